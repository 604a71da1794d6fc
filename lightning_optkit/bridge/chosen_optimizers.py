"""Some of a module's optimizers, chosen by index."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_optkit.bridge.arguments import is_count
from lightning_optkit.bridge.attended_step import torch_optimizers

__all__ = ["chosen_optimizers", "optimizer_indices"]


def optimizer_indices(optimizers: int | Sequence[int] | None) -> list[int] | None:
    """Return what a user gave as a list, in the order given; ``None`` = all.

    Raises:
        ValueError: unless it is an index or a list of different ones.

    Example:
        >>> optimizer_indices(1), optimizer_indices([2, 0])
        ([1], [2, 0])
    """
    if optimizers is None:
        return None
    found = optimizers if isinstance(optimizers, Sequence) else [optimizers]
    is_right = bool(found) and all(is_count(i, least=0) for i in found)
    if not is_right or len(set(found)) < len(found):
        raise ValueError(
            f"`optimizers` must be an index or a list of indices such as [0, 1], got "
            f"{optimizers!r}. `None` takes all."
        )
    return list(found)


def chosen_optimizers(
    trainer: pl.Trainer, indices: Sequence[int] | None
) -> list[tuple[int, Optimizer]]:
    """Return those optimizers of the Trainer, with their indices; ``None`` = all.

    Raises:
        MisconfigurationException: if there is none of that index, or one that is none of torch's.
    """
    found = torch_optimizers(trainer)
    chosen = range(len(found)) if indices is None else indices
    if any(i >= len(found) for i in chosen):
        raise MisconfigurationException(
            f"`optimizers` must be indices below {len(found)}, the number of the module's "
            f"optimizers, got {list(chosen)}. `None` takes all."
        )
    return [(i, found[i]) for i in chosen]
