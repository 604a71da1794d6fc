"""The gradient at moved shards, by FSDP2's own backward: for where whole parameters do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_optkit.bridge.held_batches import HeldBatch
from lightning_optkit.bridge.probe import Probe
from lightning_optkit.bridge.reduce import sum_over_ranks
from lightning_optkit.bridge.sharding import fsdp_groups

__all__ = ["ShardedGradient", "rank_generator", "require_shards", "sharded_gradient"]


@contextmanager
def sharded_gradient(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    probe: Probe,
    *,
    names: Sequence[str],
    held: Sequence[HeldBatch],
) -> Iterator[ShardedGradient]:
    """Yield the gradient of the held batches' loss, in shards as the parameters are.

    On leaving, gradients and what FSDP2 has accumulated are as they were, bit for bit.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module, sharded by ``fully_shard``.
        probe: open.
        names: of the parameters to differentiate by.
        held: batches of this rank, at least one.

    Raises:
        MisconfigurationException: as :func:`require_shards`.
    """
    require_shards(pl_module, names)
    with _gradients_set_aside(pl_module):
        yield ShardedGradient(trainer, pl_module, probe, names, held)


def require_shards(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse what differences of gradients over shards cannot be taken of.

    Raises:
        MisconfigurationException: for parameters that ``fully_shard`` does not manage, that are
            replicated too, or that are computed with in half precision.
    """
    parameters = dict(module.named_parameters())
    for name in names:
        p = parameters[name]
        placements = p.placements if isinstance(p, DTensor) else ()
        if len(placements) != 1 or not isinstance(placements[0], Shard):
            raise MisconfigurationException(
                f"`{name}` must be sharded over all ranks by `fully_shard` to be measured by "
                "finite differences, and is held whole by several. Leave it out with "
                "`parameters=`, or gather."
            )
    dtypes = {parameters[name].dtype for name in names}
    for group in fsdp_groups(module):
        dtypes |= {group.mp_policy.param_dtype, group.mp_policy.reduce_dtype} - {None}
    half = dtypes & {torch.float16, torch.bfloat16}
    if half:
        raise MisconfigurationException(
            f"Finite differences need float32 or float64 throughout, got {half.pop()} in the "
            "parameters or in FSDP's `MixedPrecisionPolicy`: a difference of rounded gradients is "
            "noise. Gather the parameters instead."
        )


def rank_generator(trainer: pl.Trainer, seed: int) -> torch.Generator:
    """Return a generator for this rank's part of random vectors; each rank's is another."""
    seeds = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2**62, (trainer.world_size,), generator=seeds)
    return torch.Generator().manual_seed(int(drawn[trainer.global_rank]))


class ShardedGradient:
    """What a finite-difference operator needs: gradients, weights and sums over ranks.

    A call moves this rank's shards, runs the step with FSDP2's own forward and backward, reads the
    shards of the gradient and puts everything back. A turn is one batch on each rank. A rank with
    fewer batches than another runs one of its own with weight zero, so that all take part in the
    same sums.

    Attributes:
        functions: one for each turn, from an offset, shape ``(m,)``, to loss and gradient there.
        parameters: this rank's shards, flat, shape ``(m,)``.
        weights: samples of each turn, over all ranks.
        inner_sum: sums a tensor over ranks.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        probe: Probe,
        names: Sequence[str],
        held: Sequence[HeldBatch],
    ) -> None:
        self._probe = probe
        self._held = held
        self._device = trainer.strategy.root_device
        self.inner_sum = sum_over_ranks(trainer) or (lambda tensor: tensor)
        named = dict(module.named_parameters())
        self._parameters = [cast(DTensor, named[name]) for name in names]
        self._all = list(named.values())
        self._factors = _divide_factors(module)
        self._shards = [_local(p) for p in self._parameters]
        self._saved = [shard.clone() for shard in self._shards]
        self.parameters = self._flat(self._saved)
        own = torch.zeros(self._most(len(held)), dtype=torch.float64, device=self._device)
        own[: len(held)] = own.new_tensor([batch.num_samples for batch in held])
        together = self.inner_sum(own.clone())
        self.weights: list[float] = together.tolist()
        self._share: list[float] = (own / together).tolist()
        self.functions = [partial(self._at, turn) for turn in range(len(own))]

    def _at(self, turn: int, offset: Tensor) -> tuple[Tensor, Tensor]:
        held = self._held[turn] if turn < len(self._held) else self._held[0]
        share = self._share[turn]
        pieces = offset.split([shard.numel() for shard in self._shards])
        try:
            for shard, saved, piece in zip(self._shards, self._saved, pieces, strict=True):
                shard.copy_(saved + piece.view(shard.shape).to(saved))
            loss = self._probe.backward(held.batch, turn, weight=share)
            gradient = self._flat([self._gradient(p) for p in self._parameters])
        finally:
            for shard, saved in zip(self._shards, self._saved, strict=True):
                shard.copy_(saved)
            for p in self._all:
                p.grad = None
        return self.inner_sum(share * loss.to(self._device, torch.float64)), gradient

    def _gradient(self, parameter: Tensor) -> Tensor:
        """Return the shard of the sum over ranks; FSDP2 divides it."""
        if parameter.grad is None:
            return torch.zeros_like(_local(parameter))
        return _local(parameter.grad) * self._factors[id(parameter)]

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        wide = max((p.dtype for p in self._parameters), key=lambda dtype: dtype.itemsize)
        return torch.cat([t.reshape(-1).to(self._device, wide) for t in tensors])

    def _most(self, count: int) -> int:
        """Return the largest count of any rank: the sum of what is left of each as all go down."""
        most, left = 0, count
        while float(self.inner_sum(torch.tensor([float(left > 0)], device=self._device))) > 0:
            most, left = most + 1, left - 1
        return most


def _local(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor.detach()).to_local()


def _divide_factors(module: nn.Module) -> dict[int, float]:
    """Return by what FSDP2 divides the sum of each parameter's gradient over ranks."""
    return {
        id(p.sharded_param): getattr(group, "gradient_divide_factor", None)
        or float(cast(DTensor, p.sharded_param).device_mesh.size())
        for group in fsdp_groups(module)
        for p in group.fsdp_params
    }


@contextmanager
def _gradients_set_aside(module: nn.Module) -> Iterator[None]:
    """Give the block a module without gradients that sums them at every backward."""
    with ExitStack() as stack:
        for p in module.parameters():
            _set(stack, p, "grad", None)
            _set(stack, p, "_post_accumulate_grad_hooks", None)  # an optimizer in the backward
        for group in fsdp_groups(module):
            for name in ("reduce_grads", "all_reduce_grads", "reshard_after_backward"):
                _set(stack, group, name, True)
            _set(stack, group, "_partial_reduce_output", None)
            for p in group.fsdp_params:
                _set(stack, p, "unsharded_accumulated_grad", None)
                if hasattr(p, "_unsharded_param"):
                    _set(stack, p._unsharded_param, "grad", None)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
