"""The Hessian's spectrum: minimum ratio with certified bounds, extremes, trace, density."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import scipy.linalg
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from lightning_optkit.measures.deflation import (
    RitzPairs,
    deflated_trace,
    lowest_pair,
    simple_pairs,
)
from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.lanczos import Tridiagonal, inner_sum, lanczos
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.quadrature import gauss
from lightning_optkit.measures.shares import Share, Shares, certified_shares, exact_shares

__all__ = ["Spectrum", "check_settings", "hessian_spectrum"]

# What `tol_rel="auto"` tries, and when it is content.
_AUTO_TOLERANCES = [10 ** (k / 10) for k in range(-60, -4)]
_AUTO_WIDTH = 0.05


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Spectrum:
    r"""Eigenvalues of a symmetric operator, exact or as Lanczos quadrature, with error bars.

    Attributes:
        positive: share of eigenvalues above ``tol``: the minimum ratio.
        negative: share below ``-tol``.
        zero: share within ``tol`` of zero.
        tol: the tolerance, ``tol_rel`` times :math:`\max|\lambda|`, never under the rounding noise.
        tol_rel: the relative tolerance, asked for or found by ``"auto"``.
        ritz_values: nodes, shape ``(probes, nodes)``, float64, CPU, ascending; NaN pads a probe
            that ended early. With ``method="exact"`` one probe holds all eigenvalues.
        ritz_weights: weights of the nodes, same shape; each probe's sum to 1, padding is 0.
        ritz_residuals: each ``ritz_value`` +- residual holds an eigenvalue; same shape.
        trace: estimate of the sum of eigenvalues; exact with ``method="exact"``.
        trace_standard_error: its standard error, 0 if exact.
        lambda_min_vector: unit eigenvector of :math:`\lambda_{min}`, shape ``(n,)``, of the
            operator's dtype and device: where the loss curves down, if it does.
        confidence: probability with which each share lies within its bounds.
        num_matvecs: products spent.
        num_params: ``n``.
        method: ``"exact"``, ``"lanczos"``, ``"fd"`` for Lanczos on finite differences of gradients,
            or ``"pyhessian"`` for PyHessian's own estimates.
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
    lambda_min_vector: Tensor
    confidence: float
    num_matvecs: int
    num_params: int
    method: Literal["exact", "lanczos", "fd", "pyhessian"]
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

    @property
    def condition_reason(self) -> str:
        """What the condition number rests on, or why it is infinite."""
        if self.spectral_radius == 0:
            return "infinite: every eigenvalue is zero"
        radii = self.ritz_values.abs()
        smallest = float(radii[~radii.isnan()].min())
        if math.isinf(self.condition_number):
            return (
                f"infinite: an eigenvalue of size {smallest:.1e} is zero up to the rounding noise, "
                f"{self.noise:.1e}. A dead unit, a parameter without effect or more parameters "
                "than the data pin down does that"
            )
        nearest = self.spectral_radius / self.condition_number
        bound = "" if self.method == "exact" else "at least "
        return f"{bound}{self.spectral_radius:.3g} / {nearest:.3g}"

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
    tol_rel: float | Literal["auto"] = 1e-3,
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
            ``"auto"`` takes the smallest of ten a decade, from 1e-6 on, whose interval for the
            minimum ratio is narrower than 0.05.
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
        trace, trace_error = float(nodes.sum()), 0.0
        lowest = _lowest_eigenvector(matrix).to(operator.device, operator.dtype)
    else:
        runs, pairs, lowest = _probe(operator, num_matvecs, num_probes, generator)
        nodes, weights, residuals = _quadrature(runs)
        norms = torch.cat([run.start_norms for run in runs])
        trace, trace_error = deflated_trace(nodes, weights, norms, pairs.values, operator.shape[0])

    valid = nodes[~nodes.isnan()]
    radius = float(valid.abs().max())
    smallest = torch.finfo(operator.dtype)
    noise = max(operator.noise * radius, smallest.tiny / smallest.eps)  # below, digits are lost

    def shares_at(tol: float) -> Shares:
        if exact:
            return exact_shares(valid, tol, noise)
        return certified_shares(runs, tol, noise, confidence)

    tol_rel, tol, shares = _resolved(shares_at, tol_rel, radius, 4 * noise)
    return Spectrum(
        *shares,
        tol=tol,
        tol_rel=tol_rel,
        ritz_values=nodes,
        ritz_weights=weights,
        ritz_residuals=residuals,
        trace=trace,
        trace_standard_error=trace_error,
        lambda_min_vector=lowest,
        confidence=confidence,
        num_matvecs=operator.num_matvecs - spent,
        num_params=operator.shape[0],
        method="exact" if exact else "lanczos",
        seconds=time.perf_counter() - started,
        noise=noise,
    )


def check_settings(
    *,
    num_matvecs: int,
    num_probes: int,
    tol_rel: float | Literal["auto"],
    confidence: float,
) -> None:
    """Refuse arguments of :func:`hessian_spectrum` that are out of range.

    Raises:
        ValueError: naming the argument and its rule.
        TypeError: if a count is not an integer.
    """
    for name, count, least in (("num_matvecs", num_matvecs, 2), ("num_probes", num_probes, 1)):
        if not isinstance(count, int):
            raise TypeError(f"`{name}` must be an integer, got {count!r}.")
        if count < least:
            raise ValueError(f"`{name}` must be at least {least}, got {count}.")
    if tol_rel != "auto" and not (isinstance(tol_rel, (int, float)) and tol_rel >= 0):  # nor NaN
        raise ValueError(f"`tol_rel` must be at least 0 or 'auto', got {tol_rel!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, such as 0.99, got {confidence}.")


def _resolved(
    shares_at: Callable[[float], Shares],
    tol_rel: float | Literal["auto"],
    radius: float,
    least: float,
) -> tuple[float, float, Shares]:
    """Return the relative and the absolute tolerance, and the shares there."""
    if tol_rel != "auto":
        tol = max(tol_rel * radius, least)
        return tol_rel, tol, shares_at(tol)
    grid = [t for t in _AUTO_TOLERANCES if t * radius >= least] or [_AUTO_TOLERANCES[-1]]
    narrowest: tuple[float, float, Shares] | None = None
    for relative in grid:
        tol = max(relative * radius, least)
        shares = shares_at(tol)
        if narrowest is None or _width(shares) < _width(narrowest[2]):
            narrowest = relative, tol, shares
        if _width(shares) < _AUTO_WIDTH:
            break
    assert narrowest is not None  # the grid is not empty
    return narrowest


def _width(shares: Shares) -> float:
    return shares[0].upper - shares[0].lower


def _lowest_eigenvector(matrix: Tensor) -> Tensor:
    _, vectors = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[0, 0])
    return torch.from_numpy(vectors[:, 0])


def _probe(
    operator: HessianOperator,
    num_matvecs: int,
    num_probes: int,
    generator: torch.Generator | None,
) -> tuple[list[Tridiagonal], RitzPairs, Tensor]:
    """Run the probes: together where a block of vectors is cheaper, else with one basis alive.

    Returns:
        The tridiagonal matrices without their bases, the pairs that all probes have converged on,
        none for a single probe, and the eigenvector of the lowest Ritz value.
    """
    generator = generator or torch.Generator().manual_seed(0)
    together = num_probes if operator.works_in_blocks else 1
    steps = min(num_matvecs, operator.shape[0])
    total, size = inner_sum(operator), getattr(operator, "local_size", operator.shape[0])
    workspace = torch.empty(together, steps, size, dtype=operator.dtype, device=operator.device)
    runs: list[Tridiagonal] = []
    pairs: RitzPairs | None = None
    lowest, vector = math.inf, torch.empty(0)
    for _ in range(num_probes // together):
        run = lanczos(
            operator,
            num_matvecs,
            num_lanes=together,
            keep_basis=True,
            workspace=workspace,
            generator=generator,
        )
        found = simple_pairs(run, total)
        pairs = found if pairs is None else pairs.common(found, total)
        value, candidate = lowest_pair(run)
        if value < lowest:
            lowest, vector = value, candidate
        runs.append(replace(run, basis=None))
    assert pairs is not None  # there is at least one probe
    if num_probes == 1:  # one probe cannot tell a repeated eigenvalue from a simple one
        pairs = RitzPairs(pairs.values[:0], pairs.vectors[:0])
    return runs, pairs, vector


def _quadrature(runs: list[Tridiagonal]) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes (padded with NaN), weights and residuals (padded with 0) of all lanes."""
    steps = runs[0].diagonal.shape[1]
    rules = [gauss(*lane) for run in runs for lane in run.lanes()]

    def padded(part: int, filler: float) -> Tensor:
        return torch.stack([pad(r[part], (0, steps - len(r[part])), value=filler) for r in rules])

    return padded(0, math.nan), padded(1, 0.0), padded(2, 0.0)
