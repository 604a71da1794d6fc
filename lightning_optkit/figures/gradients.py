"""Loss, gradient norm and trust ratios through training, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from lightning_optkit.measures.gradients import StepTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["gradient_figure", "trust_ratio_figure"]

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey print by lightness.
_LOSS, _GRADIENT = "#0072B2", "#D55E00"

_FEW = 40  # points that are still worth a marker each
_SHOWN = 40  # rows that can still be read; the rest is named in the title


def gradient_figure(
    steps: Sequence[int], *, gradient_norms: Sequence[float], losses: Sequence[float]
) -> Figure:
    """Return the loss and the gradient's norm over steps, on two axes.

    Training that is stuck at a point has a small gradient; where the loss is flat and the gradient
    is not small, it bounces.

    Args:
        steps: where each point was measured.
        gradient_norms: on a log axis; what is zero or not finite is left out.
        losses: NaN where there is none. Without any the axis is left out.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    x, norms, loss = (np.asarray(each, dtype=float) for each in (steps, gradient_norms, losses))
    gradient_axes = axes
    if np.isfinite(loss).any():
        _draw(axes, x, loss, _LOSS, "-", "loss")
        gradient_axes = axes.twinx()
    _draw(gradient_axes, x, np.where(norms > 0, norms, np.nan), _GRADIENT, "--", "‖gradient‖")
    _scale(gradient_axes, norms)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_title(_summary(norms, loss), fontsize=9)
    figure.suptitle("Loss and gradient", fontsize=12)
    return figure


def trust_ratio_figure(steps: Sequence[int], tables: Sequence[StepTable]) -> Figure:
    """Return each layer's ‖w‖ / ‖g‖ over steps as a heatmap, first layer on top.

    Args:
        steps: where each point was measured.
        tables: the step at each; a layer that is missing in one has an empty cell there.
    """
    layers = list(dict.fromkeys(row.layer for table in tables for row in table.rows))
    shown = layers[:_SHOWN]
    ratios = np.full((len(shown), len(tables)), np.nan)
    for column, table in enumerate(tables):
        known = {row.layer: row.trust_ratio for row in table.rows}
        ratios[:, column] = [known.get(layer, np.nan) for layer in shown]
    ratios[ratios <= 0] = np.nan  # weights of zero have no place on a log scale
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(shown)), layout="constrained")
    _draw_heatmap(figure, steps, shown, ratios)
    left_out = len(layers) - len(shown)
    more = f", {left_out} more layers not shown" if left_out else ""
    figure.suptitle(f"Trust ratio ‖w‖ / ‖g‖ by layer{more}", fontsize=12)
    return figure


def _draw(
    axes: Axes, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], colour: str, line: str, name: str
) -> None:
    y = np.where(np.isfinite(y), y, np.nan)
    marker = "o" if len(x) <= _FEW else ""
    axes.plot(x, y, color=colour, linestyle=line, linewidth=1.5, marker=marker, markersize=4)
    axes.set_ylabel(name, color=colour)
    axes.tick_params(axis="y", labelcolor=colour)
    axes.spines[["top"]].set_visible(False)


def _scale(axes: Axes, norms: np.ndarray[Any, Any]) -> None:
    drawn = norms[np.isfinite(norms) & (norms > 0)]
    if not len(drawn):
        return
    axes.set_yscale("log")
    # labels of a decade alone would leave a short axis without any
    subs = [1.0] if drawn.max() > 1e3 * drawn.min() else [1.0, 2.0, 5.0]
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _summary(norms: np.ndarray[Any, Any], loss: np.ndarray[Any, Any]) -> str:
    change = f"‖gradient‖ {norms[0]:.3g} at first, {norms[-1]:.3g} at last"
    if np.isfinite(loss[[0, -1]]).all():
        change = f"loss {loss[0]:.3g} at first, {loss[-1]:.3g} at last; {change}"
    return change


def _draw_heatmap(
    figure: Figure, steps: Sequence[int], layers: Sequence[str], ratios: np.ndarray[Any, Any]
) -> None:
    axes = figure.subplots()
    axes.set_facecolor("#DDDDDD")  # where there is no ratio
    axes.set_yticks(np.arange(len(layers)), layers, fontsize=8)
    columns = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
    axes.set_xticks(columns, [f"{steps[column]:,}" for column in columns], fontsize=8)
    axes.set_xlabel("step, a column for each that was measured; grey: no gradient", fontsize=9)
    if not np.isfinite(ratios).any():
        axes.text(0.5, 0.5, "no layer has a gradient", ha="center", transform=axes.transAxes)
        return
    low, high = float(np.nanmin(ratios)), float(np.nanmax(ratios))
    norm = LogNorm(low, high if high > low else low * 1.01)
    image = axes.imshow(ratios, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
