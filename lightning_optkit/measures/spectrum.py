"""The Hessian's spectrum: minimum ratio with certified bounds, extremes, trace, density."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.lanczos import Tridiagonal, lanczos
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.quadrature import gauss
from lightning_optkit.measures.shares import Share, certified_shares, exact_shares

__all__ = ["Spectrum", "check_settings", "hessian_spectrum"]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Spectrum:
    r"""Eigenvalues of a symmetric operator, exact or as Lanczos quadrature, with error bars.

    Attributes:
        positive: share of eigenvalues above ``tol``: the minimum ratio.
        negative: share below ``-tol``.
        zero: share within ``tol`` of zero.
        tol: the tolerance, ``tol_rel`` times :math:`\max|\lambda|`, never under the rounding noise.
        tol_rel: the relative tolerance that was asked for.
        ritz_values: nodes, shape ``(probes, nodes)``, float64, CPU, ascending; NaN pads a probe
            that ended early. With ``method="exact"`` one probe holds all eigenvalues.
        ritz_weights: weights of the nodes, same shape; each probe's sum to 1, padding is 0.
        ritz_residuals: each ``ritz_value`` +- residual holds an eigenvalue; same shape.
        trace: estimate of the sum of eigenvalues; exact with ``method="exact"``.
        trace_standard_error: its standard error, 0 if exact.
        confidence: probability with which each share lies within its bounds.
        num_matvecs: products spent.
        num_params: ``n``.
        method: ``"exact"`` or ``"lanczos"``.
        seconds: wall time spent.
        noise: absolute rounding error of one eigenvalue.
    """

    positive: Share
    negative: Share
    zero: Share
    tol: float
    tol_rel: float
    ritz_values: Tensor
    ritz_weights: Tensor
    ritz_residuals: Tensor
    trace: float
    trace_standard_error: float
    confidence: float
    num_matvecs: int
    num_params: int
    method: Literal["exact", "lanczos"]
    seconds: float
    noise: float

    @property
    def minimum_ratio(self) -> float:
        """Share of positive eigenvalues: 1 at a minimum, between 0 and 1 at a saddle."""
        return self.positive.value

    @property
    def minimum_ratio_bounds(self) -> tuple[float, float]:
        """Interval that holds the minimum ratio, at ``confidence``."""
        return self.positive.bounds

    @property
    def minimum_ratio_resolved(self) -> bool:
        """Whether that interval is no wider than 0.1."""
        return self.positive.resolved

    @property
    def negative_ratio(self) -> float:
        """Share of negative eigenvalues."""
        return self.negative.value

    @property
    def zero_ratio(self) -> float:
        """Share of eigenvalues within ``tol`` of zero."""
        return self.zero.value

    @property
    def lambda_max(self) -> float:
        """Largest eigenvalue, algebraically; Lanczos approaches it from below."""
        return float(self.ritz_values[~self.ritz_values.isnan()].max())

    @property
    def lambda_min(self) -> float:
        """Smallest eigenvalue, algebraically; Lanczos approaches it from above."""
        return float(self.ritz_values[~self.ritz_values.isnan()].min())

    @property
    def lambda_max_error(self) -> float:
        """An eigenvalue lies within this of ``lambda_max``."""
        return self._residual_at(self.lambda_max)

    @property
    def lambda_min_error(self) -> float:
        """An eigenvalue lies within this of ``lambda_min``."""
        return self._residual_at(self.lambda_min)

    @property
    def spectral_radius(self) -> float:
        """Largest absolute eigenvalue."""
        return max(abs(self.lambda_max), abs(self.lambda_min))

    @property
    def condition_number(self) -> float:
        r"""A lower bound on :math:`\max|\lambda| / \min|\lambda|`; exact if ``method`` is.

        Infinite where an eigenvalue is zero up to rounding, as it is in any net with a dead unit.
        """
        nearest = self.ritz_values.abs() + self.ritz_residuals
        smallest = float(nearest[~nearest.isnan()].min())
        return self.spectral_radius / smallest if smallest > self.noise else math.inf

    def top_eigenvalues(self, k: int) -> list[float]:
        """Return the ``k`` largest eigenvalues found, descending, fewer if there are fewer.

        Lanczos probes see the same eigenvalues; each rank takes the best of them. A single probe
        sees a repeated eigenvalue once.
        """
        filled = self.ritz_values.nan_to_num(-math.inf)
        best = filled.sort(dim=1, descending=True).values.max(dim=0).values[:k]
        return [float(value) for value in best if value > -math.inf]

    def density(self, grid: ArrayLike, bandwidth: float | None = None) -> Tensor:
        r"""Return the density of eigenvalues on a grid, shape of ``grid``, float64.

        .. math:: \hat\rho(x) = \frac1k \sum_{j,i} w_{ji} \, \mathcal N(x; \theta_{ji}, \sigma_{ji})

        Args:
            grid: points, in units of eigenvalues, any array or tensor.
            bandwidth: :math:`\sigma`, in the same units. By default each node's own: half the
                distance to its neighbours, so that gaps between Ritz values do not show as
                ringing, but no more than its residual, so that a converged eigenvalue stays a
                line; at least 4 % of its size, or 1/2000 of the largest.
        """
        points = torch.as_tensor(grid, dtype=torch.float64)
        x = points.reshape(-1, 1)
        total = torch.zeros(len(x), dtype=torch.float64)
        for nodes, weights, residuals in zip(
            self.ritz_values, self.ritz_weights, self.ritz_residuals, strict=True
        ):
            valid = ~nodes.isnan()
            theta, w = nodes[valid], weights[valid]
            sigma = (
                self._bandwidths(theta, residuals[valid])
                if bandwidth is None
                else theta.new_tensor(bandwidth)
            )
            z = (x - theta) / sigma
            total += (w * torch.exp(-z.square() / 2) / (sigma * math.sqrt(2 * math.pi))).sum(1)
        return (total / len(self.ritz_values)).reshape(points.shape)

    def _bandwidths(self, theta: Tensor, residuals: Tensor) -> Tensor:
        gaps = theta.diff()
        edge = gaps.new_zeros(1)
        spacing = torch.maximum(torch.cat([edge, gaps]), torch.cat([gaps, edge])) / 2
        visible = (0.04 * theta.abs()).clamp_min(max(self.spectral_radius, 1e-300) / 2000)
        return torch.maximum(torch.minimum(spacing, residuals), visible)

    def _residual_at(self, value: float) -> float:
        return float(self.ritz_residuals[self.ritz_values == value].min()) + self.noise

    def __str__(self) -> str:
        """Return the findings in one line."""
        return (
            f"minimum ratio {self.positive} (tol {self.tol:.2g}), "
            f"lambda in [{self.lambda_min:.4g}, {self.lambda_max:.4g}], "
            f"{self.method}, {self.num_matvecs} products"
        )


def hessian_spectrum(
    operator: HessianOperator,
    *,
    num_matvecs: int = 80,
    num_probes: int = 4,
    tol_rel: float = 1e-3,
    confidence: float = 0.99,
    exact_below: int = 4000,
    generator: torch.Generator | None = None,
) -> Spectrum:
    r"""Return the spectrum of a Hessian.

    Up to ``exact_below`` parameters the matrix is built from ``n`` products and diagonalised in
    float64: exact up to rounding. Above, ``num_probes`` Lanczos runs of ``num_matvecs`` steps give
    shares with certified bounds (:mod:`~lightning_optkit.measures.quadrature`), extremes with
    residuals and the trace with a standard error. Only the probes are random.

    Args:
        operator: the Hessian.
        num_matvecs: Lanczos steps of one probe, at least 2. More narrow the quadrature's part of
            the bounds.
        num_probes: probes, at least 1. More narrow the sampling part.
        tol_rel: eigenvalues within ``tol_rel * max|lambda|`` of zero count as zero; at least 0.
            The tolerance never falls below four times the rounding noise, where signs are random.
        confidence: probability with which each share lies within its bounds, in (0, 1).
        exact_below: largest number of parameters for the exact way; memory grows as its square.
        generator: source of the probes, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range.
        CurvatureError: if products are NaN, missing or wrong.

    Example:
        >>> import torch
        >>> op = HessianOperator(lambda p: (1 - p["w"][0] * p["w"][1]) ** 2, {"w": torch.zeros(2)})
        >>> hessian_spectrum(op).minimum_ratio
        0.5
    """
    check_settings(
        num_matvecs=num_matvecs, num_probes=num_probes, tol_rel=tol_rel, confidence=confidence
    )
    started = time.perf_counter()
    spent = operator.num_matvecs
    exact = operator.shape[0] <= exact_below
    if exact:
        matrix = operator.dense()
        if not bool(torch.isfinite(matrix).all()):
            raise CurvatureError.not_finite(operator)
        nodes = torch.linalg.eigvalsh(matrix)[None]
        weights = torch.full_like(nodes, 1 / nodes.shape[1])
        residuals = torch.zeros_like(nodes)
    else:
        runs = _probe(operator, num_matvecs, num_probes, generator)
        nodes, weights, residuals = _quadrature(runs)

    valid = nodes[~nodes.isnan()]
    radius = float(valid.abs().max())
    noise = max(operator.noise * radius, 1e-300)
    tol = max(tol_rel * radius, 4 * noise)
    if exact:
        shares = exact_shares(valid, tol, noise)
        trace, trace_error = float(valid.sum()), 0.0
    else:
        shares = certified_shares(runs, tol, noise, confidence)
        trace, trace_error = _trace(nodes, weights, operator.shape[0])
    return Spectrum(
        *shares,
        tol=tol,
        tol_rel=tol_rel,
        ritz_values=nodes,
        ritz_weights=weights,
        ritz_residuals=residuals,
        trace=trace,
        trace_standard_error=trace_error,
        confidence=confidence,
        num_matvecs=operator.num_matvecs - spent,
        num_params=operator.shape[0],
        method="exact" if exact else "lanczos",
        seconds=time.perf_counter() - started,
        noise=noise,
    )


def check_settings(*, num_matvecs: int, num_probes: int, tol_rel: float, confidence: float) -> None:
    """Refuse arguments of :func:`hessian_spectrum` that are out of range.

    Raises:
        ValueError: naming the argument and its rule.
    """
    for name, count, least in (("num_matvecs", num_matvecs, 2), ("num_probes", num_probes, 1)):
        if count < least:
            raise ValueError(f"`{name}` must be at least {least}, got {count}.")
    if not tol_rel >= 0:  # NaN neither
        raise ValueError(f"`tol_rel` must be at least 0, got {tol_rel}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, such as 0.99, got {confidence}.")


def _probe(
    operator: HessianOperator,
    num_matvecs: int,
    num_probes: int,
    generator: torch.Generator | None,
) -> list[Tridiagonal]:
    """Run the probes: together where a block of vectors is cheaper, else with one basis alive."""
    generator = generator or torch.Generator().manual_seed(0)
    together = num_probes if operator.works_in_blocks else 1
    return [
        lanczos(operator, num_matvecs, num_lanes=together, generator=generator)
        for _ in range(num_probes // together)
    ]


def _quadrature(runs: list[Tridiagonal]) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes (padded with NaN), weights and residuals (padded with 0) of all lanes."""
    steps = runs[0].diagonal.shape[1]
    rules = [gauss(*lane) for run in runs for lane in run.lanes()]

    def padded(part: int, filler: float) -> Tensor:
        return torch.stack([pad(r[part], (0, steps - len(r[part])), value=filler) for r in rules])

    return padded(0, math.nan), padded(1, 0.0), padded(2, 0.0)


def _trace(nodes: Tensor, weights: Tensor, n: int) -> tuple[float, float]:
    r"""Return Hutchinson's estimate of the trace and its standard error.

    For a direction :math:`v` uniform on the sphere,
    :math:`\mathrm{Var}(n v^\top A v) = \frac{2n}{n + 2} (\|A\|_F^2 - \mathrm{tr}(A)^2 / n)`, in
    which the second moment of the quadrature stands for the Frobenius norm.
    """
    theta = nodes.nan_to_num(0.0)
    means = n * (weights * theta).sum(1)
    frobenius = n * float((weights * theta.square()).sum(1).mean())
    trace = float(means.mean())
    variance = 2 * n / (n + 2) * max(0.0, frobenius - trace**2 / n)
    return trace, math.sqrt(variance / len(means))
