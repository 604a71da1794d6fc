"""The spectrum of a Hessian as a figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import NullLocator

from lightning_optkit.measures.shares import Share
from lightning_optkit.measures.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NEGATIVE", "POSITIVE", "ZERO", "spectrum_figure"]

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey print by lightness.
NEGATIVE, ZERO, POSITIVE = "#D55E00", "#BBBBBB", "#0072B2"


def spectrum_figure(
    spectrum: Spectrum, *, num_eigenvalues: int = 5, matrix: str = "Hessian"
) -> Figure:
    """Return the density of eigenvalues, the largest ones, and the shares by sign with bounds.

    Args:
        spectrum: what to draw.
        num_eigenvalues: how many of the largest eigenvalues to mark.
        matrix: whose spectrum it is, for the title.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    grid = GridSpec(2, 1, figure=figure, height_ratios=[4, 1])
    _draw_density(figure.add_subplot(grid[0]), spectrum, num_eigenvalues)
    _draw_shares(figure.add_subplot(grid[1]), spectrum)
    n = spectrum.num_params
    figure.suptitle(f"{matrix} spectrum, {n:,} parameter{'s' * (n != 1)}", fontsize=12)
    return figure


def _draw_density(axes: Axes, spectrum: Spectrum, num_eigenvalues: int) -> None:
    if spectrum.spectral_radius == 0:
        axes.text(0.5, 0.5, "every eigenvalue is zero", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    linear = max(spectrum.tol, spectrum.spectral_radius * 1e-4)
    x = _symlog_grid(spectrum, linear)
    density = np.maximum(spectrum.density(x).numpy(), 1e-300)
    for sign, colour in ((x < -spectrum.tol, NEGATIVE), (x > spectrum.tol, POSITIVE)):
        axes.fill_between(x, density, where=sign, color=colour, alpha=0.35, linewidth=0)
    near_zero = np.abs(x) <= spectrum.tol
    axes.fill_between(x, density, where=near_zero, color=ZERO, alpha=0.6, linewidth=0)
    axes.plot(x, density, color="black", linewidth=1)
    peak = float(density.max())
    for value in spectrum.top_eigenvalues(num_eigenvalues):
        axes.plot([value], [peak * 2], marker="v", color=POSITIVE, markersize=5, clip_on=False)
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_xticks(_decades(spectrum, linear))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.set_ylim(max(peak * 1e-8, 0.1 / spectrum.num_params / spectrum.spectral_radius), peak * 3)
    axes.set_xlabel(f"eigenvalue (linear within ±{linear:.2g})")
    axes.set_ylabel("density")
    axes.set_title(
        f"λ from {spectrum.lambda_min:.4g} to {spectrum.lambda_max:.4g}, "
        f"trace {spectrum.trace:.4g} ± {spectrum.trace_standard_error:.2g}, "
        f"{_method(spectrum)}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _symlog_grid(spectrum: Spectrum, linear: float) -> np.ndarray[Any, Any]:
    """Return points equally spaced on a symmetric-log axis, a little beyond the spectrum."""
    ends = np.arcsinh(np.array([spectrum.lambda_min, spectrum.lambda_max]) / linear)
    margin = 0.04 * (ends[1] - ends[0]) + 1
    return np.sinh(np.linspace(ends[0] - margin, ends[1] + margin, 1500)) * linear


def _decades(spectrum: Spectrum, linear: float) -> list[float]:
    """Return zero and the powers of ten outside the linear part: inside, they would overlap."""
    first = math.ceil(math.log10(2 * linear))
    last = math.floor(math.log10(spectrum.spectral_radius))
    powers = [10.0**k for k in range(first, last + 1)]
    negative = [-p for p in powers if p <= abs(spectrum.lambda_min)]
    return [*reversed(negative), 0.0, *(p for p in powers if p <= abs(spectrum.lambda_max))]


def _draw_shares(axes: Axes, spectrum: Spectrum) -> None:
    rows = (
        ("positive\n(minimum ratio)", spectrum.positive, POSITIVE),
        (f"zero (±{spectrum.tol:.2g})", spectrum.zero, ZERO),
        ("negative", spectrum.negative, NEGATIVE),
    )
    for row, (label, share, colour) in enumerate(rows):
        _draw_share(axes, row, share, colour)
        axes.text(-0.01, row, label, ha="right", va="center", fontsize=8)
        axes.text(1.01, row, str(share), va="center", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(2.6, -0.6)
    axes.set_yticks([])
    axes.set_xlabel(f"share of eigenvalues ({_certainty(spectrum)})", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_share(axes: Axes, row: int, share: Share, colour: str) -> None:
    if share.resolved:
        axes.barh(row, share.value, height=0.6, color=colour)
    axes.plot(share.bounds, [row, row], color="black", linewidth=1.5, marker="|", markersize=8)


def _method(spectrum: Spectrum) -> str:
    products = f"{spectrum.num_matvecs} products"
    return {
        "exact": "all eigenvalues",
        "lanczos": f"Lanczos, {products}",
        "fd": f"Lanczos on finite differences, {products}",
        "pyhessian": f"PyHessian, {products}",
    }[spectrum.method]


def _certainty(spectrum: Spectrum) -> str:
    bounds = f"{spectrum.confidence:.0%} bounds"
    return {"exact": "exact", "pyhessian": "estimates without bounds"}.get(spectrum.method, bounds)
