"""Samples of a mixed batch, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

__all__ = ["mixed_batch_figure"]

_COLUMNS = 4


def mixed_batch_figure(
    images: np.ndarray[Any, Any],
    mixing: np.ndarray[Any, Any],
    labels: tuple[Sequence[int], Sequence[int]] | None = None,
    *,
    title: str,
) -> Figure:
    """Return images in rows of four, each with what it is made of.

    Args:
        images: shape ``(n, channels, height, width)``, of 1 or 3 channels and any scale: the least
            and the largest value of all are black and white.
        mixing: λ of each, what it weighs itself, shape ``(n,)``.
        labels: of each, and of its partner.
        title: of all.
    """
    rows = -(-len(images) // _COLUMNS)
    figure = Figure(figsize=(1.9 * _COLUMNS, 2.2 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    low, high = float(np.min(images)), float(np.max(images))
    shown = (images - low) / ((high - low) or 1.0)
    for i, axis in enumerate(axes):
        axis.axis("off")
        if i < len(images):
            pixels = np.moveaxis(shown[i], 0, -1)
            axis.imshow(
                pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1
            )
            axis.set_title(_made_of(i, mixing, labels), fontsize=9)
    figure.suptitle(title if labels is None else f"{title}: share · label", fontsize=11)
    return figure


def _made_of(
    i: int, mixing: np.ndarray[Any, Any], labels: tuple[Sequence[int], Sequence[int]] | None
) -> str:
    """Return the share of each label, or λ alone."""
    if labels is None:
        return f"λ = {mixing[i]:.2f}"
    first, second = labels[0][i], labels[1][i]
    if first == second:
        return f"1.00 · {first}"
    return f"{mixing[i]:.2f} · {first} + {1 - mixing[i]:.2f} · {second}"
