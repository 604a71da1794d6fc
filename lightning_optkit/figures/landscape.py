"""The loss along a line or on a plane, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lightning_optkit.measures.landscape import LossLine, LossPlane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["line_figure", "plane_figure"]

_LINE, _MARK = "#0072B2", "#D55E00"
_COLOURS = "viridis"  # even in lightness: readable in print and by colour-blind readers
_WIDE = 30  # highest over lowest loss, above which a log scale shows more
_NUM_LEVELS = 9


def line_figure(
    line: LossLine, *, labels: tuple[str, str] = ("here", ""), title: str = "Loss along a line"
) -> Figure:
    """Return the loss over the position on a line, with its ends marked.

    Args:
        line: the losses; those that are not finite are gaps, and said.
        labels: what lies at position 0, and at position 1 (empty: nothing).
        title: above the picture.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    positions, losses = line.positions.numpy(), line.losses.numpy()
    losses = np.where(np.isfinite(losses), losses, np.nan)
    axes.plot(positions, losses, color=_LINE, linewidth=1.5)
    for position, label in zip((0.0, 1.0), labels, strict=True):
        if label and positions[0] <= position <= positions[-1]:
            axes.axvline(position, color=_MARK, linestyle="--", linewidth=1)
            side = "right" if position == positions[-1] else "left"
            axes.annotate(
                f" {label} ", (position, 1), xycoords=("data", "axes fraction"), va="top", ha=side,
                color=_MARK,
            )  # fmt: skip
    if _is_wide(losses):
        axes.set_yscale("log")
    axes.set_xlabel("position")
    axes.set_ylabel("loss")
    axes.set_title(_with_gaps(title, line.num_gaps))
    return figure


def plane_figure(
    plane: LossPlane,
    *,
    path: np.ndarray[Any, Any] | None = None,
    names: tuple[str, str] = ("first direction", "second direction"),
    title: str = "Loss on a plane",
    log: bool | None = None,
) -> Figure:
    """Return labelled contours of the loss, with the path of training if there is one.

    Args:
        plane: the losses; those that are not finite, or not known yet, are gaps, and said.
        path: coordinates of each point of the path, shape ``(points, 2)``; the last is where
            training is.
        names: of the axes.
        title: above the picture.
        log: whether levels grow by factors; ``None`` = where the loss spans more than a factor 30.
    """
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    axes = figure.subplots()
    losses = np.ma.masked_invalid(plane.losses.numpy())
    if losses.count() and losses.min() < losses.max():
        _contours(figure, axes, plane, losses, _is_wide(losses) if log is None else log)
    if losses.mask.any():
        axes.set_facecolor("0.85")
    if path is not None and len(path):
        axes.plot(path[:, 0], path[:, 1], color="white", linewidth=3)
        axes.plot(
            path[:, 0], path[:, 1], color=_MARK, linewidth=1.5, marker="o", markersize=2.5,
            label="training",
        )  # fmt: skip
    axes.plot(
        0, 0, marker="*", markersize=13, color=_MARK, markeredgecolor="white", linestyle="",
        label="here",
    )  # fmt: skip
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.set_xlim(float(plane.x[0]), float(plane.x[-1]))
    axes.set_ylim(float(plane.y[0]), float(plane.y[-1]))
    axes.legend(loc="upper right", fontsize=8)
    missing = int((~plane.known).sum())
    axes.set_title(_with_gaps(title, plane.num_gaps, missing), fontsize=11)
    return figure


def _contours(
    figure: Figure, axes: Axes, plane: LossPlane, losses: np.ma.MaskedArray[Any, Any], log: bool
) -> None:
    low, high = float(losses.min()), float(losses.max())
    x, y = plane.x.numpy(), plane.y.numpy()
    if log and low > 0:
        levels = list(np.geomspace(low, high, 2 * _NUM_LEVELS))
        norm: Normalize = LogNorm(low, high)
    else:
        levels = list(MaxNLocator(2 * _NUM_LEVELS).tick_values(low, high))
        norm = Normalize(low, high)
    axes.contourf(x, y, losses, levels=levels, norm=norm, cmap=_COLOURS, extend="both")
    lines = axes.contour(
        x, y, losses, levels=levels[::2], colors="black", linewidths=0.6, alpha=0.7
    )
    axes.clabel(lines, fontsize=7, fmt="%.3g")
    bar = figure.colorbar(ScalarMappable(norm, _COLOURS), ax=axes, label="loss")
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _is_wide(losses: np.ndarray[Any, Any]) -> bool:
    finite = losses[np.isfinite(losses)]
    return bool(len(finite)) and float(finite.min()) > 0 and finite.max() / finite.min() > _WIDE


def _with_gaps(title: str, num_gaps: int, missing: int = 0) -> str:
    said = [f"{num_gaps} points without a finite loss"] if num_gaps else []
    said += [f"{missing} points not computed"] if missing else []
    return f"{title}\n({'; '.join(said)}: gaps)" if said else title
