"""The learning rates of a run, before it has begun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["schedule_figure"]

# Okabe and Ito's colours: told apart by colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

Curves = Mapping[str, "np.ndarray[Any, Any]"]


def schedule_figure(
    used: Curves,
    scheduled: Curves | None = None,
    *,
    title: str,
    end: int | None = None,
    unit: str = "optimizer step",
) -> Figure:
    """Return what steps will be made at, and dashed what the scheduler alone would ask for.

    Args:
        used: rates by name, each of shape ``(num_steps,)``; up to six are drawn. Without
            ``scheduled``, factors of a rate that is not known.
        scheduled: the rates without warmup, by the same names.
        title: what warms up, and how.
        end: the first step at the full rate, marked if it is in sight.
        unit: of the horizontal axis.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(used, _COLORS, strict=False):
        x = np.arange(len(used[name]))
        if scheduled is not None:
            axes.plot(x, scheduled[name], color=color, linewidth=1.2, linestyle="--")
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, used[name], color=color, linewidth=1.8, marker=marker, label=name)
    longest = max(len(values) for values in used.values())
    if end is not None and 0 < end < longest:
        axes.axvline(end, color="black", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            f"full rate from {unit} {end:,} on",
            (end, 1), xytext=(4, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel(unit)
    axes.set_ylabel("learning rate" if scheduled is not None else "factor")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    left_out = max(len(used) - len(_COLORS), 0)
    legend_title = "dashed: schedule alone" if scheduled is not None else None
    if left_out:
        legend_title = "; ".join(filter(None, [legend_title, f"{left_out:,} more are not drawn"]))
    axes.legend(frameon=False, fontsize=8, title=legend_title, title_fontsize=8)
    figure.suptitle(title, fontsize=12)
    return figure
