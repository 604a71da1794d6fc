"""BatchNorm of inputs with any number of dimensions, and what its variants share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchNorm", "BatchNormVariant"]


class BatchNorm(_BatchNorm):
    """BatchNorm of inputs of shape (N, C, ...), where torch's classes fix the number of dimensions.

    For a place of which only the number of channels is known, as in that of a GroupNorm layer.
    Arguments and state are those of :class:`torch.nn.BatchNorm2d`.

    Example:
        >>> layer = BatchNorm(3)
        >>> [layer(torch.randn(2, 3, *shape)).shape[2:] for shape in ((), (4,), (4, 5))]
        [torch.Size([]), torch.Size([4]), torch.Size([4, 5])]
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(
                f"`input` must have the shape (N, C, ...), got {tuple(input.shape)}. Add a "
                "dimension for the batch."
            )


class BatchNormVariant(BatchNorm):
    """A BatchNorm that normalises another way in training, and in the same way in evaluation.

    Parameters, buffers and their names are BatchNorm's, so that checkpoints pass between the two.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plain = False
        """While true it trains as BatchNorm does; for a pass that takes statistics of the data."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, of the same shape."""
        if self.plain or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        recomputes = _recomputes()
        if self.num_batches_tracked is not None and not recomputes:
            self.num_batches_tracked.add_(1)
        return self._normalised(input, recomputes=recomputes)

    def _normalised(self, input: Tensor, *, recomputes: bool) -> Tensor:
        """Return it as in training, and update the running statistics unless it is recomputed.

        A first run comes before each that recomputes it.
        """
        raise NotImplementedError

    def _new_share(self) -> float:
        """Return how much of a batch enters the running statistics, as torch's momentum has it."""
        if self.momentum is None and self.num_batches_tracked is not None:
            return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


def _recomputes() -> bool:
    """Return whether this is gradient checkpointing's second run: it comes within a backward."""
    if torch.compiler.is_compiling():  # which plans recomputation by itself
        return False
    return torch._C._current_graph_task_id() != -1
