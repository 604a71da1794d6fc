r"""Batch renormalization: BatchNorm whose training output approaches that of evaluation.

.. math:: y = \gamma \left( \frac{x - \mu_B}{\sigma_B}\, r + d \right) + \beta, \quad
    r = \mathrm{clip}_{[1/r_{max},\, r_{max}]} \frac{\sigma_B}{\sigma}, \quad
    d = \mathrm{clip}_{[-d_{max},\, d_{max}]} \frac{\mu_B - \mu}{\sigma}

with mean and standard deviation of the batch (with index B) and running ones. r and d are constants
for the gradient. Without the limits this is (x − μ)/σ, the output of evaluation.

References:
    S. Ioffe, *Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models*, NeurIPS 2017, section 3 and, for the schedule, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from lightning_optkit.methods.batch_norm import BatchNormVariant

__all__ = ["BatchRenorm"]


class BatchRenorm(BatchNormVariant):
    r"""Batch renormalization of inputs of shape (N, C, ...).

    The running mean and the running standard deviation are exponential means of the batches' own,
    as in the paper, where BatchNorm averages variances. So that checkpoints pass between the two,
    ``running_var`` holds σ² − eps.

    The limits are 1 and 0 at first, which is BatchNorm, and then go along straight lines to
    ``r_max`` and ``d_max``. They follow ``num_batches_tracked``, the training batches that the
    running statistics have seen, those of a BatchNorm layer before it included. What gradient
    checkpointing recomputes is not counted, and has the r and d of the first time where a forward
    pass runs the layer once.

    Args:
        num_features: C.
        eps: added to the variance, of a batch and running.
        momentum: share of a batch in the running statistics; ``None`` = the mean over batches.
        affine: whether there are γ and β.
        r_max: largest r, and inverse of the smallest, at least 1; may be infinite.
        d_max: largest \|d\|, at least 0; may be infinite.
        relax_from: training batches with limits 1 and 0; 5,000 in the paper.
        r_max_at: batch at which ``r_max`` is reached; 40,000 in the paper.
        d_max_at: batch at which ``d_max`` is reached; 25,000 in the paper. With 0 for all three the
            limits are there from the first batch.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ValueError: if a limit or a point of the schedule is out of range.

    Example:
        >>> layer = BatchRenorm(
        ...     1, r_max=torch.inf, d_max=torch.inf, relax_from=0, r_max_at=0, d_max_at=0
        ... )
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> layer.eval()(x).tolist() == layer.train()(x).tolist()  # by statistics 0 and 1
        True
        >>> layer.running_mean  # a tenth of the way to 2
        tensor([0.2000])
    """

    running_mean: Tensor  # always kept
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        relax_from: int = 5_000,
        r_max_at: int = 40_000,
        d_max_at: int = 25_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        _require_limit("r_max", r_max, least=1)
        _require_limit("d_max", d_max, least=0)
        _require_batch("relax_from", relax_from, least=0)
        _require_batch("r_max_at", r_max_at, least=relax_from)
        _require_batch("d_max_at", d_max_at, least=relax_from)
        self.r_max = float(r_max)
        self.d_max = float(d_max)
        self.relax_from = relax_from
        self.r_max_at = r_max_at
        self.d_max_at = d_max_at
        self._last: tuple[Tensor, Tensor] | None = None  # r and d, for what is recomputed

    def _normalised(self, input: Tensor, *, recomputes: bool) -> Tensor:
        if recomputes and self._last is not None:
            r, d = self._last
        else:
            r, d = self._corrections(input)
            # A compiled graph would have to hand them out, and is never run a second time.
            self._last = None if torch.compiler.is_compiling() else (r, d)
        gamma, beta = self.weight, self.bias
        # γ(x̂r + d) + β as a plain BatchNorm of scale γr and shift γd + β: torch's own kernel, which
        # takes both in single precision where inputs are in half.
        scale = r if gamma is None else gamma.to(r.dtype) * r
        shift = d if gamma is None else gamma.to(d.dtype) * d
        shift = shift if beta is None else shift + beta.to(d.dtype)
        return batch_norm(input, None, None, scale, shift, True, 0.0, self.eps)

    @torch.no_grad()
    def _corrections(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d by the statistics of before this batch, which then enters them."""
        values = input if input.dtype == torch.float64 else input.float()
        variance, mean = torch.var_mean(values, [0, *range(2, input.ndim)], correction=0)
        sigma = (variance + self.eps).sqrt()
        running_mean = self.running_mean.to(mean)
        running_sigma = (self.running_var.to(mean) + self.eps).sqrt()
        r_max = self._limit(1.0, self.r_max, self.r_max_at).to(mean)
        d_max = self._limit(0.0, self.d_max, self.d_max_at).to(mean)
        r = (sigma / running_sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / running_sigma).clamp(-d_max, d_max)
        share = self._new_share()
        new_sigma = running_sigma + share * (sigma - running_sigma)
        self.running_mean.copy_(running_mean + share * (mean - running_mean))
        self.running_var.copy_((new_sigma.square() - self.eps).clamp_min(0))  # but for rounding
        return r, d

    def _limit(self, first: float, last: float, at: int) -> Tensor:
        """Return where the line from the one to the other is; on the device, without waiting."""
        num_since = self.num_batches_tracked - self.relax_from
        share = (num_since / max(1, at - self.relax_from)).clamp(0, 1)
        return torch.where(share > 0, first + (last - first) * share, first)  # 0 · ∞ is not taken

    def extra_repr(self) -> str:
        """Return what is printed of the layer."""
        schedule = f"relax_from={self.relax_from}, r_max_at={self.r_max_at}"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"r_max={self.r_max}, d_max={self.d_max}, {schedule}, d_max_at={self.d_max_at}"
        )


def _require_limit(name: str, value: Any, *, least: int) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value >= least:
        raise ValueError(
            f"`{name}` must be a number of at least {least}, got {value!r}. {least} is BatchNorm, "
            "`float('inf')` no limit."
        )


def _require_batch(name: str, value: Any, *, least: int) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or value < least:
        since = "" if least == 0 else ", where the limits begin to move"
        raise ValueError(
            f"`{name}` must be a number of training batches of at least {least}{since}, got "
            f"{value!r}. With 0 for `relax_from`, `r_max_at` and `d_max_at` there is no schedule."
        )
