"""Kinds of sharpness side by side, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_optkit.measures.rescaling import Invariance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["sharpness_figure"]

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey print by lightness.
_ABSOLUTE, _ADAPTIVE, _PER_BATCH = "#0072B2", "#D55E00", "#56B4E9"
_NOT_KINDS = ("_lower", "_standard_error", "loss", "num_samples")


def sharpness_figure(
    steps: Sequence[int],
    history: Sequence[Mapping[str, float]],
    invariance: Invariance | None = None,
) -> Figure:
    """Return a row for each kind of sharpness, and how far a rescaling of layers moved it.

    A kind that was measured once is a number; one that was measured more often is a line, on an
    axis of its own: kinds have different units.

    Args:
        steps: where each point was measured.
        history: what was logged at each.
        invariance: what moved when layers were rescaled, if that was tried.
    """
    kinds = [name for name in history[-1] if not name.endswith(_NOT_KINDS)]
    figure = Figure(figsize=(8, 1.0 + 1.15 * len(kinds)), layout="constrained")
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    changes = {} if invariance is None else invariance.changes
    for axes, kind in zip(rows, kinds, strict=True):
        _draw(axes, kind, steps, history)
        verdict = f"; rescaled layers: {_verdict(changes[kind])}" if kind in changes else ""
        axes.set_title(
            f"{kind.replace('_', ' ')} {history[-1][kind]:.3g}{verdict}", loc="left", fontsize=9
        )
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("Sharpness by kind; dashed: the lower of two ways to find it", fontsize=12)
    return figure


def _verdict(change: float) -> str:
    return "stays" if abs(change) < 0.01 else f"{change:+.0%}"


def _draw(
    axes: Axes, kind: str, steps: Sequence[int], history: Sequence[Mapping[str, float]]
) -> None:
    points = [
        (s, h[kind], h.get(f"{kind}_lower"))
        for s, h in zip(steps, history, strict=True)
        if kind in h
    ]
    x, y, lower = zip(*points, strict=True)
    color = _ADAPTIVE if kind.startswith("adaptive") else _ABSOLUTE
    color = _PER_BATCH if kind.endswith("per_batch") else color
    axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.5)
    if None not in lower:
        axes.fill_between(x, lower, y, color=color, alpha=0.25, linewidth=0)
        axes.plot(x, lower, color=color, linewidth=0.8, linestyle="--")
    errors = [h[f"{kind}_standard_error"] for h in history if f"{kind}_standard_error" in h]
    if len(errors) == len(x):
        axes.errorbar(x, y, yerr=[2 * e for e in errors], color=color, linestyle="", capsize=2)
    finite = [value for value in y if math.isfinite(value)]
    axes.set_ylim(min([0.0, *finite]), 1.2 * max([*finite, 1e-12]))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.spines[["top", "right"]].set_visible(False)
