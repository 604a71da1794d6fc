"""Curvature by layer as a figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_optkit.figures.spectrum import NEGATIVE, POSITIVE
from lightning_optkit.measures.spectrum import Spectrum

__all__ = ["layers_figure"]

_SHOWN = 40  # rows that can still be read; the rest is named in a line below


def layers_figure(layers: Mapping[str, Spectrum]) -> Figure:
    """Return extremes, trace and minimum ratio of each layer's block, first layer on top.

    Args:
        layers: the spectrum of each layer, by its name.
    """
    shown = dict(list(layers.items())[:_SHOWN])
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(shown)), layout="constrained")
    extremes, trace, ratio = figure.subplots(1, 3, sharey=True)
    rows = np.arange(len(shown))
    spectra = list(shown.values())

    extremes.barh(rows, [max(s.lambda_max, 0.0) for s in spectra], 0.6, color=POSITIVE)
    extremes.barh(rows, [min(s.lambda_min, 0.0) for s in spectra], 0.6, color=NEGATIVE)
    extremes.set_title("λ max (blue) and λ min (orange)", fontsize=10)
    extremes.set_yticks(rows, list(shown), fontsize=8)
    extremes.invert_yaxis()

    colours = [POSITIVE if s.trace >= 0 else NEGATIVE for s in spectra]
    errors = [2 * s.trace_standard_error for s in spectra]
    trace.barh(rows, [s.trace for s in spectra], 0.6, color=colours)
    trace.errorbar([s.trace for s in spectra], rows, xerr=errors, fmt="none", ecolor="black")
    trace.set_title("trace ± 2 standard errors", fontsize=10)

    for row, spectrum in enumerate(spectra):
        if spectrum.minimum_ratio_resolved:
            ratio.barh(row, spectrum.minimum_ratio, 0.6, color=POSITIVE)
        ratio.plot(spectrum.minimum_ratio_bounds, [row, row], color="black", marker="|")
    ratio.set_xlim(0, 1)
    ratio.set_title("minimum ratio with its interval", fontsize=10)

    for row, spectrum in enumerate(spectra):
        if spectrum.spectral_radius == 0:
            extremes.text(0, row, " no curvature", va="center", fontsize=8)

    for axes in (extremes, trace, ratio):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    left_out = len(layers) - len(shown)
    more = f", {left_out} more not shown" if left_out else ""
    figure.suptitle(f"Curvature by layer{more}", fontsize=12)
    return figure
