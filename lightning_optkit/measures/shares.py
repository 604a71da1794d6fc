"""Shares of positive, negative and zero eigenvalues, with the interval that holds each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.lanczos import Tridiagonal
from lightning_optkit.measures.quadrature import mass_below, share_interval

__all__ = ["Share", "Shares", "certified_shares", "exact_shares"]

_POOLING_ERROR = 1e-12  # of a mean of masses: a mean of ones must leave no room for a share above


@dataclass(frozen=True)
class Share:
    """A share of the eigenvalues, with the interval that holds it.

    Attributes:
        value: the share if it is known, else the middle of the certified masses; in [0, 1].
        lower: lower end of the interval, at the spectrum's confidence.
        upper: upper end.
        quadrature_width: the part of the width that more ``num_matvecs`` would remove; the rest
            is sampling, which more ``num_probes`` would remove.
    """

    value: float
    lower: float
    upper: float
    quadrature_width: float

    @property
    def bounds(self) -> tuple[float, float]:
        """``(lower, upper)``."""
        return self.lower, self.upper

    @property
    def resolved(self) -> bool:
        """Whether the interval is narrow enough, 0.1, to quote the value alone."""
        return self.upper - self.lower <= 0.1

    def __str__(self) -> str:
        """Return the value with its interval; an unresolved one has no value to quote."""
        if self.lower == self.upper:
            return f"{self.value:.4f}"
        interval = f"[{self.lower:.3f}, {self.upper:.3f}]"
        return f"{self.value:.3f} {interval}" if self.resolved else f"unresolved {interval}"


Shares = tuple[Share, Share, Share]
"""Positive, negative, zero."""


def exact_shares(eigenvalues: Tensor, tol: float, noise: float) -> Shares:
    """Return positive, negative and zero share; an eigenvalue within noise of ``tol`` is open."""

    def share(counts: list[Tensor]) -> Share:
        lower, value, upper = (float(c.double().mean()) for c in counts)
        return Share(value, lower, upper, 0.0)

    steps = (noise, 0.0, -noise)
    return (
        share([eigenvalues > tol + e for e in steps]),
        share([eigenvalues < -tol - e for e in steps]),
        share([eigenvalues.abs() <= tol - e for e in steps]),
    )


def certified_shares(
    runs: list[Tridiagonal], tol: float, noise: float, confidence: float
) -> Shares:
    """Return positive, negative and zero share, pooled over the probes by their squared norms."""
    lanes = [lane for run in runs for lane in run.lanes()]
    norms = torch.cat([run.start_norms for run in runs]).square()

    def pooled(threshold: float) -> tuple[float, float]:
        masses = [mass_below(*lane, threshold, slack=noise) for lane in lanes]
        lower, upper = norms @ torch.tensor(masses, dtype=torch.float64) / norms.sum()
        return float(lower) - _POOLING_ERROR, float(upper) + _POOLING_ERROR

    def share(lower: float, upper: float) -> Share:
        lower, upper = max(0.0, lower), min(1.0, upper)
        interval = share_interval(
            lower,
            upper,
            dimension=runs[0].size,
            num_probes=len(lanes),
            confidence=confidence,
        )
        value = min(max((lower + upper) / 2, interval[0]), interval[1])
        return Share(value, *interval, quadrature_width=upper - lower)

    (low_tol, up_tol), (low_minus, up_minus) = pooled(tol), pooled(-tol)
    return (
        share(1 - up_tol, 1 - low_tol),
        share(low_minus, up_minus),
        share(low_tol - up_minus, up_tol - low_minus),
    )
