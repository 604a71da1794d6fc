r"""Ghost batch normalization: BatchNorm over parts of a batch, as if it were a smaller one.

References:
    E. Hoffer, I. Hubara, D. Soudry, *Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks*, NeurIPS 2017, section 4 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from lightning_optkit.methods.batch_norm import BatchNormVariant

__all__ = ["GhostBatchNorm", "chunk_sizes"]


class GhostBatchNorm(BatchNormVariant):
    """BatchNorm that in training takes its statistics over chunks of the batch.

    The running statistics take in, once a batch, the means over chunks of their mean and unbiased
    variance, weighted by the samples in each. Hoffer et al. take the chunks in one after another
    instead: a batch of K chunks then forgets as K batches would, and its last chunks weigh most.
    Here ``momentum`` means what it does in BatchNorm, and the order of samples nothing.

    A batch that is one chunk is BatchNorm, to the bit. Gradient checkpointing's second run of the
    layer updates nothing.

    Args:
        num_features: C, of inputs of shape (N, C, ...).
        eps: added to the variance.
        momentum: share of a batch in the running statistics; ``None`` = the mean over batches.
        affine: whether there are γ and β.
        track_running_stats: whether there are running statistics, as in torch's BatchNorm.
        chunk_size: samples in a chunk, at least 2; the last one may have fewer, see
            :func:`chunk_sizes`.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ValueError: if ``chunk_size`` is out of range.

    Example:
        >>> layer = GhostBatchNorm(1, affine=False, chunk_size=2)
        >>> layer(torch.tensor([[1.0], [3.0], [10.0], [90.0]])).flatten().round().tolist()
        [-1.0, 1.0, -1.0, 1.0]
        >>> layer.running_mean  # a tenth of the way to (2 + 50) / 2
        tensor([2.6000])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        chunk_size: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        _require_chunk_size(chunk_size)
        self.chunk_size = chunk_size

    def _normalised(self, input: Tensor, *, recomputes: bool) -> Tensor:
        share = 0.0 if recomputes else self._new_share()
        mean, variance = self.running_mean, self.running_var
        sizes = chunk_sizes(len(input), self.chunk_size)
        if len(sizes) == 1:
            return self._batch_norm(input, mean, variance, share)
        if mean is None or variance is None:
            return torch.cat(
                [self._batch_norm(chunk, None, None, 0.0) for chunk in input.split(sizes)]
            )
        outputs = []
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        moments = torch.zeros(2, self.num_features, dtype=dtype, device=mean.device)
        for chunk in input.split(sizes):
            own = torch.zeros(2, self.num_features, dtype=mean.dtype, device=mean.device)
            outputs.append(self._batch_norm(chunk, own[0], own[1], 1.0))
            moments += own.to(dtype) * (len(chunk) / len(input))
        mean.lerp_(moments[0].to(mean), share)
        variance.lerp_(moments[1].to(variance), share)
        return torch.cat(outputs)

    def _batch_norm(
        self, chunk: Tensor, mean: Tensor | None, variance: Tensor | None, share: float
    ) -> Tensor:
        return batch_norm(chunk, mean, variance, self.weight, self.bias, True, share, self.eps)

    def extra_repr(self) -> str:
        """Return what is printed of the layer."""
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}"


def chunk_sizes(num_samples: int, chunk_size: int) -> list[int]:
    """Return how many samples are in each chunk; a last chunk of one joins the one before it.

    Args:
        num_samples: in the batch.
        chunk_size: in each chunk but the last.

    Example:
        >>> chunk_sizes(8, 4), chunk_sizes(10, 4), chunk_sizes(9, 4), chunk_sizes(1, 4)
        ([4, 4], [4, 4, 2], [4, 5], [1])
    """
    num_full, rest = num_samples // chunk_size, num_samples % chunk_size  # compilable
    sizes = [chunk_size] * num_full
    if rest == 1 and sizes:  # a single value has no variance
        sizes[-1] += 1
    elif rest or not sizes:
        sizes.append(rest)
    return sizes


def _require_chunk_size(chunk_size: Any) -> None:
    is_count = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if not is_count or chunk_size < 2:
        raise ValueError(
            f"`chunk_size` must be an integer of at least 2, got {chunk_size!r}. 32 to 128 are "
            "usual."
        )
