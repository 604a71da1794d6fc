r"""The trace with the largest eigenvalues taken out of its variance.

The variance of a stochastic trace is the sum of squares of the eigenvalues that are estimated. In
a net late in training a few large ones hold most of it; Lanczos converges on just these, so they
are counted exactly and the probes estimate the rest, with the same products. Where the bulk holds
it, as early in training, nothing is gained.

References:
    A. S. Gambhir, A. Stathopoulos, K. Orginos, "Deflation as a method of variance reduction for
    estimating the trace of a matrix inverse", 2017, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.lanczos import Tridiagonal
from lightning_optkit.measures.quadrature import tridiagonal_matrix

__all__ = ["RitzPairs", "deflated_trace", "lowest_pair", "simple_pairs"]

_MAX_PAIRS = 16  # at most so many are taken out: their vectors are kept until all probes are run

# A Ritz vector off by an angle phi moves 2 phi / sqrt(n) of the probe's weight, 1 / n on average:
# this share of 1 / sqrt(n) keeps the weight true to 2 %.
_ANGLE = 1e-2

# Two probes' vectors of a simple eigenvalue are parallel; those of a repeated one are two random
# directions of its eigenspace, and this near to each other once in a thousand.
_PARALLEL = 1 - 1e-6


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Converged Ritz values, shape ``(c,)``, float64, CPU, and their unit vectors ``(c, n)``."""

    values: Tensor
    vectors: Tensor

    def common(self, other: RitzPairs, total: Callable[[Tensor], Tensor]) -> RitzPairs:
        """Return the pairs that another probe has found too: eigenvalues that are not repeated.

        Args:
            other: pairs of another probe.
            total: completes dot products, see :func:`~lightning_optkit.measures.lanczos.inner_sum`.
        """
        if len(self.values) == 0 or len(other.values) == 0:
            return RitzPairs(self.values[:0], self.vectors[:0])
        cosines = total(self.vectors @ other.vectors.T).abs().max(dim=1).values
        same = (cosines >= _PARALLEL).cpu()
        return RitzPairs(self.values[same], self.vectors[same.to(self.vectors.device)])


def simple_pairs(run: Tridiagonal, total: Callable[[Tensor], Tensor]) -> RitzPairs:
    """Return the eigenpairs on which all lanes of a run with its basis have converged.

    Args:
        run: with its basis.
        total: completes dot products.
    """
    assert run.basis is not None
    found = [
        _converged(*lane, rows, run.size) for lane, rows in zip(run.lanes(), run.basis, strict=True)
    ]
    first, *others = found
    for other in others:
        first = first.common(other, total)
    return first


def lowest_pair(run: Tridiagonal) -> tuple[float, Tensor]:
    """Return the lowest Ritz value of all lanes and its unit vector, shape ``(n,)``."""
    assert run.basis is not None
    spectra = [torch.linalg.eigh(tridiagonal_matrix(*lane)) for lane in run.lanes()]
    lane = min(range(len(spectra)), key=lambda i: float(spectra[i].eigenvalues[0]))
    values, vectors = spectra[lane]
    return float(values[0]), vectors[:, 0].to(run.basis) @ run.basis[lane, : len(values)]


def _converged(diagonal: Tensor, off_diagonal: Tensor, basis: Tensor, size: int) -> RitzPairs:
    theta, vectors = torch.linalg.eigh(tridiagonal_matrix(diagonal, off_diagonal))
    residuals = off_diagonal[-1] * vectors[-1].abs()
    gaps = (theta[:, None] - theta).abs() - residuals
    gaps = gaps.fill_diagonal_(math.inf).min(1).values
    sharp = residuals <= _ANGLE / math.sqrt(size) * gaps
    largest = theta.abs().argsort(descending=True)
    chosen = largest[sharp[largest]][:_MAX_PAIRS]
    coefficients = vectors[:, chosen].T.to(basis)
    return RitzPairs(theta[chosen], coefficients @ basis[: len(theta)])


def deflated_trace(
    nodes: Tensor, weights: Tensor, start_norms: Tensor, values: Tensor, size: int
) -> tuple[float, float]:
    r"""Return an unbiased estimate of the trace, and its standard error.

    With :math:`c` eigenpairs taken out, the rest of a Gaussian probe is Gaussian in the complement
    :math:`P`, and pooled over :math:`k` probes by their squared norms

    .. math:: \mathrm{tr} A \approx \sum_{i \le c} \lambda_i + (n - c) R, \quad
        R = \frac{\sum_j v_j^\top P A P v_j}{\sum_j v_j^\top P v_j},

    whose variance is :math:`\frac{2 (n - c)}{k (n - c) + 2}` times the variance of the remaining
    eigenvalues, summed; the quadrature's second moment stands for it.

    Args:
        nodes: Ritz values, shape ``(k, m)``, NaN where padded.
        weights: theirs, same shape, 0 where padded.
        start_norms: norms of the probes, shape ``(k,)``.
        values: eigenvalues to take out, each once, shape ``(c,)``.
        size: ``n``.
    """
    theta = nodes.nan_to_num(0.0)
    rest = weights.clone()
    for value in values:
        rest[range(len(rest)), (nodes - value).abs().nan_to_num(math.inf).argmin(1)] = 0.0
    left = size - len(values)
    known = float(values.sum())
    rest = rest * start_norms.square()[:, None]
    total = float(rest.sum())
    if left == 0 or total <= 0:
        return known, 0.0
    mean = float((rest * theta).sum()) / total
    spread = max(0.0, float((rest * theta.square()).sum()) / total - mean**2)
    variance = 2 * left / (len(nodes) * left + 2) * left * spread
    return known + left * mean, math.sqrt(variance)
