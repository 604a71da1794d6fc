"""A batch in parts of some samples each."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = ["batch_parts", "num_rows"]


def num_rows(batch: Any) -> int | None:
    """Return the length of the first dimension that all tensors of a batch share, if they do.

    Tensors of a single number do not count.

    Example:
        >>> import torch
        >>> num_rows({"image": torch.zeros(8, 3), "scale": torch.tensor(2.0)})
        8
        >>> num_rows([torch.zeros(8, 3), torch.zeros(5)]) is None
        True
    """
    lengths: set[int] = set()

    def see(tensor: Tensor) -> Tensor:
        lengths.update(tensor.shape[:1])
        return tensor

    apply_to_collection(batch, Tensor, see)
    return lengths.pop() if len(lengths) == 1 else None


def batch_parts(batch: Any, size: int) -> list[Any]:
    """Return parts of ``size`` rows each, the last with what is left; what is no tensor is in all.

    Raises:
        MisconfigurationException: if its tensors do not share a first dimension.

    Example:
        >>> import torch
        >>> [part.tolist() for part in batch_parts(torch.arange(5), 2)]
        [[0, 1], [2, 3], [4]]
    """
    rows = num_rows(batch)
    if rows is None:
        raise MisconfigurationException(
            "The tensors of a batch must share their first dimension for it to be split, got "
            "different ones. Return batches whose tensors begin with the samples."
        )

    def part(start: int) -> Any:
        rows = slice(start, start + size)
        return apply_to_collection(batch, Tensor, lambda t: t[rows] if t.ndim else t)

    return [part(start) for start in range(0, rows, size)]
