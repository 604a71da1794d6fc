"""A training batch in two halves, and the gradients of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_optkit.bridge.batch_parts import num_rows
from lightning_optkit.bridge.probe import Probe
from lightning_optkit.bridge.reduce import sum_over_ranks
from lightning_optkit.bridge.together import gathered, together

__all__ = ["BatchGradients", "half_batches", "half_gradient", "half_gradients"]


def half_batches(batch: Any) -> list[Any]:
    """Return the first half of a batch's rows and the rest; what is no tensor is in both.

    Raises:
        MisconfigurationException: if its tensors do not share a first dimension of at least 2.

    Example:
        >>> [half.tolist() for half in half_batches(torch.arange(5))]
        [[0, 1], [2, 3, 4]]
    """
    rows = num_rows(batch)
    if rows is None or rows < 2:
        raise MisconfigurationException(
            "The tensors of a batch must share a first dimension of at least 2 for it to be split "
            f"in halves, got {'different ones' if rows is None else rows}. Accumulate gradients "
            "over batches, or pass `noise_scale=False`."
        )
    middle = rows // 2

    def part(rows: slice) -> Any:
        return apply_to_collection(batch, Tensor, lambda t: t[rows] if t.ndim else t)

    return [part(slice(None, middle)), part(slice(middle, None))]


class BatchGradients(NamedTuple):
    """Norms of the gradients of independent batches at the same weights, those of all ranks.

    Attributes:
        square_norms: of each batch's mean gradient.
        square_norm_of_mean: of the plain mean of these gradients.
        batch_sizes: samples in each.
    """

    square_norms: Sequence[float]
    square_norm_of_mean: float
    batch_sizes: Sequence[float]


def half_gradients(
    trainer: pl.Trainer,
    batch: Any,
    gradient: Callable[[Any, int], list[Tensor]],
) -> BatchGradients:
    """Return the gradients of a batch's halves; all ranks take part.

    Args:
        trainer: the Trainer, fitting.
        batch: of this rank.
        gradient: ``(half, 0 or 1) -> its gradient by each parameter``.

    Raises:
        MisconfigurationException: if the batch of a rank cannot be split.
        RuntimeError: if it fails on another rank.
    """
    halves = together(trainer, lambda: half_batches(batch))
    found = together(trainer, lambda: [gradient(half, i) for i, half in enumerate(halves)])
    first, second = (torch.cat([_flat(part) for part in parts]) for parts in found)
    norms = torch.stack([torch.linalg.vector_norm(each) for each in (first, second)]).cpu().double()
    sizes = torch.tensor([num_rows(half) for half in halves], dtype=torch.float64)
    every = gathered(trainer, torch.stack([norms.square(), sizes]))
    total = (sum_over_ranks(trainer) or (lambda tensor: tensor))(first.add_(second))
    mean = float(torch.linalg.vector_norm(total)) / (2 * trainer.world_size)
    return BatchGradients(
        tuple(every[:, 0].flatten().tolist()), mean**2, tuple(every[:, 1].flatten().tolist())
    )


def _flat(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.reshape(-1)


def half_gradient(probe: Probe, names: Sequence[str], half: Any, batch_idx: int) -> list[Tensor]:
    """Return the gradient of the loss on a part of a batch by the named parameters, in their order.

    Shards are gathered: all ranks must call it.

    Args:
        probe: open.
        names: of parameters; one that the loss does not depend on has a gradient of zero.
        half: the part.
        batch_idx: of the whole batch, for ``training_step``.
    """
    copies = {name: p.detach().requires_grad_() for name, p in probe.parameters(names).items()}
    loss = probe.loss_fn(half, batch_idx)(copies)
    found = torch.autograd.grad(
        loss, list(copies.values()), allow_unused=True, materialize_grads=True
    )
    return list(found)
