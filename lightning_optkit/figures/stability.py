"""The largest curvature against the optimizer's limit, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["stability_figure"]

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey print by lightness.
_CURVATURE, _LIMIT = "#0072B2", "#D55E00"

_WIDE = 8  # largest over smallest: Adam's first steps are far from all others
_FEW = 40  # points that are still worth a marker each


def stability_figure(
    steps: Sequence[int], lambda_max: Sequence[float], threshold: Sequence[float]
) -> Figure:
    """Return the largest eigenvalue over steps with the threshold, and below it their ratio.

    Args:
        steps: where each point was measured.
        lambda_max: largest eigenvalue of the preconditioned Hessian.
        threshold: the optimizer's limit; NaN or infinite where there is none. Without any the
            ratio is left out.
    """
    x, curvature, limit = (np.asarray(each, dtype=float) for each in (steps, lambda_max, threshold))
    has_limit = bool(np.isfinite(limit).any())
    figure = Figure(figsize=(8, 4.8 if has_limit else 3.2), layout="constrained")
    rows = figure.subplots(2 if has_limit else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_curvature(rows[0], x, curvature, limit)
    if has_limit:
        _draw_ratio(rows[1], x, curvature / limit)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.suptitle("Stability of the optimizer", fontsize=12)
    return figure


def _draw_curvature(
    axes: Axes,
    x: np.ndarray[Any, Any],
    curvature: np.ndarray[Any, Any],
    limit: np.ndarray[Any, Any],
) -> None:
    axes.plot(
        x, curvature, color=_CURVATURE, linewidth=1.5, marker=_marker(x), markersize=4, label="λmax"
    )
    finite = np.isfinite(limit)
    if finite.any():
        axes.plot(
            x[finite], limit[finite], color=_LIMIT, linewidth=1.5, linestyle="--", label="threshold"
        )
    _scale(axes, np.concatenate([curvature, limit[finite]]))
    axes.set_ylabel("eigenvalue")
    title = f"last λmax {curvature[-1]:.4g}"
    if np.isfinite(limit[-1]):
        title += f", threshold {limit[-1]:.4g}"
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ratio(axes: Axes, x: np.ndarray[Any, Any], ratio: np.ndarray[Any, Any]) -> None:
    axes.axhline(1.0, color=_LIMIT, linewidth=1.5, linestyle="--")
    axes.plot(x, ratio, color=_CURVATURE, linewidth=1.5, marker=_marker(x), markersize=4)
    axes.fill_between(x, ratio, 1.0, where=ratio > 1, interpolate=True, color=_LIMIT, alpha=0.25)
    _scale(axes, np.append(ratio[np.isfinite(ratio)], 1.0))
    axes.set_ylabel("λmax / threshold")
    axes.set_title(f"above 1 for {np.mean(ratio > 1):.0%} of the points", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, drawn: np.ndarray[Any, Any]) -> None:
    """Take a log axis where a linear one would press most points into a line."""
    if (drawn > 0).all() and drawn.max() > _WIDE * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _marker(x: np.ndarray[Any, Any]) -> str:
    return "o" if len(x) <= _FEW else ""
