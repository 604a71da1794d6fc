"""The gradient of one batch as a graph that is built once and multiplied many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.twice_differentiable import twice_differentiable

__all__ = [
    "Forward",
    "GradientGraph",
    "LossFn",
    "evaluated",
    "explained",
    "flat",
    "scalar",
    "split",
]

LossFn = Callable[[dict[str, Tensor]], Tensor]

# Number of parameters up to which one batched product beats a loop over its vectors: launch and
# interpreter time dominate there; beyond it arithmetic does, and batching only costs memory.
_BATCHED_BELOW = 20_000


class Forward:
    """One batch's loss alone, by the same kernels as its graph."""

    def __init__(self, loss_fn: LossFn, leaves: dict[str, Tensor]) -> None:
        self.loss = evaluated(loss_fn, leaves)[0].detach().reshape(())


class GradientGraph:
    """One batch's loss and gradient, with the graph of the gradient kept for products."""

    def __init__(
        self, loss_fn: LossFn, leaves: dict[str, Tensor], *, create_graph: bool = True
    ) -> None:
        self._leaves = leaves
        loss, _ = evaluated(loss_fn, leaves)
        try:
            self._gradients = torch.autograd.grad(
                loss,
                tuple(leaves.values()),
                create_graph=create_graph,
                allow_unused=True,  # a parameter may have no part in this loss
                materialize_grads=True,
            )
        except RuntimeError as error:
            raise explained(error) from error
        self.loss = loss.detach().reshape(())

    @property
    def gradient(self) -> Tensor:
        """The gradient, shape ``(n,)``, without its graph."""
        return flat(self._gradients, self._leaves).detach()

    @property
    def gradient_tangent(self) -> Tensor:
        """The gradient's directional derivative, where the leaves are dual tensors."""
        duals = [forward_ad.unpack_dual(g) for g in self._gradients]
        tangents = [torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals]
        return flat(tangents, self._leaves).detach()

    def products(self, rows: Tensor, *, last: bool = False) -> Tensor:
        """Return ``H v`` for each row ``v`` of ``rows``, shape ``(k, n)``.

        Args:
            rows: the vectors.
            last: free the graph while the last of them is multiplied: none can follow.
        """
        if len(rows) > 1 and rows.shape[1] <= _BATCHED_BELOW:
            try:
                return self._products_batched(rows)  # kept: it may yet have to go one by one
            except (torch.OutOfMemoryError, CurvatureError):
                raise
            except RuntimeError:  # an operator without a batching rule: one by one
                pass
        if len(rows) == 1:  # without a copy
            product = self._product(split(rows[0], self._leaves), keep=not last)
            return flat(product, self._leaves)[None]
        products = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for i, v in enumerate(rows):
            keep = not last or i < len(rows) - 1
            pieces = split(v.contiguous(), self._leaves)
            products[i] = flat(self._product(pieces, keep=keep), self._leaves)
        return products

    def _products_batched(self, rows: Tensor) -> Tensor:
        pieces = [
            piece.reshape(len(rows), *leaf.shape).to(leaf)
            for piece, leaf in zip(
                rows.split([leaf.numel() for leaf in self._leaves.values()], dim=1),
                self._leaves.values(),
                strict=True,
            )
        ]
        products = self._product(pieces, batched=True)
        # zeros of a parameter that takes no part come back without the batch axis
        full = [
            p.expand(len(rows), *leaf.shape)
            for p, leaf in zip(products, self._leaves.values(), strict=True)
        ]
        return torch.cat([p.reshape(len(rows), -1).to(rows) for p in full], dim=1)

    def _product(
        self, pieces: Sequence[Tensor], *, batched: bool = False, keep: bool = True
    ) -> tuple[Tensor, ...]:
        curved = [i for i, g in enumerate(self._gradients) if g.requires_grad]
        leaves = tuple(self._leaves.values())
        if not curved:  # the gradient does not depend on the parameters: a linear loss
            lead = pieces[0].shape[:1] if batched else ()
            return tuple(leaf.new_zeros(lead + leaf.shape) for leaf in leaves)
        try:
            return torch.autograd.grad(
                [self._gradients[i] for i in curved],
                leaves,
                [pieces[i] for i in curved],
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            raise explained(error) from error


def evaluated(loss_fn: LossFn, leaves: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return the loss, and the outputs where the function returns them beside it.

    Raises:
        CurvatureError: if the loss is not a scalar that depends on the leaves.
    """
    with twice_differentiable():
        loss: Any = loss_fn(dict(leaves))
    loss, outputs = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, None)
    loss = scalar(loss)
    if not loss.requires_grad:
        raise CurvatureError(
            "The loss does not depend on the parameters it was given. It must be computed from "
            "the dictionary passed to `loss_fn`, without `.detach()` or `torch.no_grad()`."
        )
    return loss, outputs


def scalar(loss: Any) -> Tensor:
    """Return what a loss function returned, refused unless it is a scalar.

    Raises:
        CurvatureError: for anything else.
    """
    loss = loss[0] if isinstance(loss, tuple) and len(loss) == 2 else loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise CurvatureError(
            f"`loss_fn` must return a scalar tensor, got {got}. Average over the batch first."
        )
    return loss.reshape(())


def explained(error: RuntimeError) -> Exception:
    """Return the error of a missing second derivative with the way out; any other as it is."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return error
    if "is not implemented" in text or "once_differentiable" in text or "double backward" in text:
        return CurvatureError(
            f"A layer has no second derivative ({text.splitlines()[0]}). For attention use "
            "`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, for embeddings `sparse=False`, for "
            "checkpointing `use_reentrant=False`, and the plain module for a compiled one."
        )
    return error


def split(vector: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the pieces of a flat vector, in shape, dtype and device of the parameters."""
    pieces = vector.split([p.numel() for p in params.values()])
    return [piece.view(p.shape).to(p) for piece, p in zip(pieces, params.values(), strict=True)]


def flat(tensors: Sequence[Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """Return tensors of the parameters' shapes as one vector, in their widest dtype."""
    first = next(iter(params.values()))
    wide = torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else first.dtype
    return torch.cat([t.reshape(-1).to(first.device, wide) for t in tensors])
