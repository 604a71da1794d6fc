"""Modules whose parameters FSDP2 keeps in shards, one on each rank, seen as if they were whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "at_rest",
    "foreign_shard",
    "fsdp_groups",
    "mute_setters",
    "resharded_after",
    "shard_of",
    "sharding_hidden",
    "whole",
    "whole_fits",
    "whole_of_shards",
]


_HOME = "torch.distributed.fsdp"
if not hasattr(fsdp, "FSDPModule"):  # torch 2.5
    _HOME = "torch.distributed._composable.fsdp"
_FSDPModule = import_module(_HOME).FSDPModule

# What is gathered may take this share of the free memory. The rest is for the graphs of the held
# batches, whose size nobody knows before they are built.
_SHARE = 0.5
# Whole copies that a measurement makes beside its vectors: the original and the one that a step may
# write into, the gradient and a product.
_COPIES = 4


def whole(parameter: Tensor) -> Tensor:
    """Return a tensor with all shards in it; any other as it is. All ranks must call it."""
    parameter = parameter.detach()
    if not isinstance(parameter, DTensor):
        return parameter
    # shards that are offloaded to the CPU travel on the device that the ranks talk through
    shards = cast(DTensor, parameter.to(parameter.device_mesh.device_type))
    return shards.full_tensor()


def whole_of_shards(shard: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which each rank holds a shard, in the layout of another tensor.

    Args:
        shard: of this rank.
        like: a ``DTensor``; any other means that the shard is whole.
    """
    if not isinstance(like, DTensor):
        return shard
    mesh = like.device_mesh
    shards = DTensor.from_local(
        shard.to(mesh.device_type),
        mesh,
        like.placements,
        shape=like.shape,  # said, because it cannot be inferred from uneven shards
        stride=like.stride(),
    )
    return shards.full_tensor()


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that all ranks hold, in the layout of another one."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()


def whole_fits(trainer: pl.Trainer, module: nn.Module, *, num_vectors: int) -> bool:
    """Return whether each rank has room for whole parameters; all ranks get the same answer.

    An estimate: four copies of all parameters and ``num_vectors`` vectors of their size must fit
    into half of the memory that is free. Where that is unknown, they do.

    Args:
        trainer: the Trainer, fitting.
        module: its module, sharded or not.
        num_vectors: vectors of all parameters that the measurement keeps.
    """
    size = sum(p.numel() * max(p.element_size(), 4) for p in module.parameters())
    free = _free_bytes(trainer.strategy.root_device, ranks=trainer.num_devices)
    fits = free is None or (_COPIES + num_vectors) * size <= _SHARE * free
    return trainer.strategy.reduce_boolean_decision(fits)


def foreign_shard(module: nn.Module) -> str | None:
    """Return the name of a parameter that is a DTensor for another reason than FSDP2, if any."""
    own = {
        id(parameter.sharded_param)
        for group in fsdp_groups(module)
        for parameter in group.fsdp_params
        if not parameter.is_dtensor
    }
    named = module.named_parameters()
    return next((n for n, p in named if isinstance(p, DTensor) and id(p) not in own), None)


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Have all parameters in shards, as the optimizer sees them; all ranks must enter and leave.

    After a validation FSDP2 leaves the outermost module gathered; it is gathered again on leaving.
    """
    gathered = [group for group in fsdp_groups(module) if group.is_unsharded]
    _reshard(module)
    try:
        yield
    finally:
        _reshard(module)  # what a hook of the module gathered meanwhile
        for group in gathered:
            group.unshard()
            group.wait_for_unshard()


@contextmanager
def sharding_hidden(module: nn.Module) -> Iterator[None]:
    """Keep FSDP2 out of a call: a module is then what it was before ``fully_shard``.

    What is shadowed on modules lives in their ``__dict__`` and vanishes when the snapshot is
    restored; what is shadowed on FSDP's own states goes here.
    """
    states = _states(module)
    for child in _managed(module):
        own = set(_hook_ids(child._get_fsdp_state()))
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = child.__dict__[kind].items()
            child.__dict__[kind] = OrderedDict((i, hook) for i, hook in hooks if i not in own)
        for name in _STATEFUL:
            child.__dict__[name] = _nothing
    for state in states:  # methods that the user registered as a forward call these two
        state._pre_forward = lambda module, args, kwargs: (args, kwargs)
        state._post_forward = lambda module, args, output: output
    try:
        yield
    finally:
        for state in states:
            del state._pre_forward, state._post_forward


def mute_setters(module: nn.Module) -> None:
    """Shadow what switches FSDP2's sums off and on; the shadows vanish with the snapshot."""
    for child in _managed(module):
        for name in _STATEFUL:
            if name.startswith("set_"):
                child.__dict__[name] = _nothing


@contextmanager
def resharded_after(module: nn.Module) -> Iterator[None]:
    """Have all parameters in shards again after a call, also where it had no backward or failed."""
    try:
        yield
    except BaseException:
        for child in _managed(module):
            if child._get_fsdp_state()._is_root and hasattr(child, "reset_iter_state"):
                child.reset_iter_state()  # newer than torch 2.10
        raise
    finally:
        _reshard(module)


def fsdp_groups(module: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters that are gathered together; none without FSDP2."""
    groups: list[Any] = []
    for state in _states(module):
        if hasattr(state, "_fsdp_param_groups"):  # newer than torch 2.10
            groups += state._fsdp_param_groups
        elif state._fsdp_param_group is not None:
            groups.append(state._fsdp_param_group)
    return groups


def _managed(module: nn.Module) -> list[Any]:
    return [child for child in module.modules() if isinstance(child, _FSDPModule)]


def _states(module: nn.Module) -> list[Any]:
    states = [child._get_fsdp_state() for child in _managed(module)]
    return list(dict.fromkeys(states))  # modules that were sharded together share one


def _reshard(module: nn.Module) -> None:
    for child in _managed(module):
        child.reshard()


def _hook_ids(state: Any) -> Iterator[int]:
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        for each in getattr(handle, "handles", (handle,)):
            yield each.id


# What a step may call on a sharded module: to gather, to free, to set when gradients are summed.
_STATEFUL = [
    name
    for name in vars(_FSDPModule)
    if name.startswith("set_") or name in ("unshard", "reshard", "reset_iter_state")
]


def _free_bytes(device: torch.device, *, ranks: int) -> int | None:
    """Return what this rank may allocate on its device; ``ranks`` share a host's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with suppress(OSError, ValueError, StopIteration):  # Linux only
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024 // ranks
    return None


class _Done:
    """Stands for the handle of an asynchronous gather."""

    def wait(self) -> None:
        """Wait for nothing."""


def _nothing(*args: Any, **kwargs: Any) -> _Done:
    return _Done()
