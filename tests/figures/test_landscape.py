"""Figures of the loss draw whatever was measured, without a warning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_optkit.figures.landscape import line_figure, plane_figure
from lightning_optkit.measures.landscape import LossLine, LossPlane
from tests.figures.test_stability import pixels

AXIS = torch.linspace(-1, 1, 9, dtype=torch.float64)
BOWL = AXIS[:, None] ** 2 + AXIS**2
LOSSES = {
    "bowl": BOWL + 0.01,
    "down to zero": BOWL,
    "wide": torch.exp(12 * BOWL),
    "negative": BOWL - 1,
    "constant": torch.ones(9, 9, dtype=torch.float64),
    "gaps": torch.where(BOWL > 1, math.nan, BOWL),
    "infinite": torch.where(BOWL > 1, math.inf, BOWL + 1),
    "nothing": torch.full((9, 9), math.nan, dtype=torch.float64),
}


def plane(losses, known=None):
    known = torch.ones(9, 9, dtype=torch.bool) if known is None else known
    return LossPlane(AXIS, AXIS, losses, known)


@pytest.mark.parametrize("log", [None, True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_every_plane_and_line_is_drawn(name, log):
    path = np.array([[0.8, 0.8], [0.3, 0.1], [0.0, 0.0]]) if log else None
    assert pixels(plane_figure(plane(LOSSES[name]), path=path, log=log)).std() > 0.01
    if log is None:
        line = LossLine(AXIS, LOSSES[name][4])
        assert pixels(line_figure(line, labels=("here", "there"))).std() > 0.01


def test_gaps_and_what_is_not_computed_are_said():
    gaps = plane(LOSSES["gaps"])
    assert f"({gaps.num_gaps} points without a finite loss: gaps)" in title(plane_figure(gaps))
    known = torch.zeros(9, 9, dtype=torch.bool)
    known[::2, ::2] = True
    unfinished = plane(torch.where(known, BOWL, math.nan), known)
    assert "(56 points not computed: gaps)" in title(plane_figure(unfinished))
    line = LossLine(AXIS, torch.where(AXIS > 0.5, math.nan, AXIS))
    assert "(2 points without a finite loss: gaps)" in title(line_figure(line))


def title(figure):
    return figure.axes[0].get_title()
