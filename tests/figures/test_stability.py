"""The figure of stability draws whatever was measured, without a warning."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_optkit.figures.stability import stability_figure

STEPS = list(range(50))
HISTORIES = {
    "edge": (STEPS, [19 + (-1) ** k for k in STEPS], [20.0] * 50),
    "one point": ([7], [3.0], [2.0]),
    "adam's first steps": (STEPS, [5e4 / (k + 1) ** 2 for k in STEPS], [400.0 + k for k in STEPS]),
    "negative": (STEPS, [k - 25.0 for k in STEPS], [20.0] * 50),
    "zero": (STEPS, [0.0] * 50, [20.0] * 50),
    "warm-up from zero": (STEPS, [3.0] * 50, [math.inf] + [200.0 / k for k in STEPS[1:]]),
    "no threshold": (STEPS, [3.0] * 50, [math.nan] * 50),
    "huge": (STEPS, [1e30] * 50, [1e-3] * 50),
}


def pixels(figure: Figure) -> np.ndarray:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=50)
    image.seek(0)
    return imread(image)[:, :, :3]


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_is_drawn(name):
    image = pixels(stability_figure(*HISTORIES[name]))
    assert float((image < 0.9).any(2).mean()) > 0.01  # not blank


def test_it_shows_what_was_measured():
    steps, curvature, limit = HISTORIES["edge"]
    top, bottom = stability_figure(steps, curvature, limit).axes
    assert [line.get_label() for line in top.lines] == ["λmax", "threshold"]
    np.testing.assert_array_equal(top.lines[0].get_xydata(), np.stack([steps, curvature], 1))
    np.testing.assert_array_equal(top.lines[1].get_xydata(), np.stack([steps, limit], 1))
    assert top.get_title() == "last λmax 18, threshold 20"
    np.testing.assert_allclose(bottom.lines[1].get_ydata(), np.array(curvature) / 20)
    assert bottom.get_title() == "above 1 for 0% of the points"
    assert bottom.get_ylim()[1] > 1  # the line at 1 is in sight


def test_it_says_how_often_the_limit_was_passed():
    _, bottom = stability_figure([0, 1, 2, 3], [1.0, 3.0, 3.0, 5.0], [2.0] * 4).axes
    assert bottom.get_title() == "above 1 for 75% of the points"


def test_a_wide_range_is_drawn_on_a_log_axis_unless_it_crosses_zero():
    for name, scales in {
        "edge": ["linear", "linear"],
        "adam's first steps": ["log", "log"],
        "negative": ["linear", "linear"],
        "huge": ["log", "log"],
    }.items():
        figure = stability_figure(*HISTORIES[name])
        assert [axes.get_yscale() for axes in figure.axes] == scales


def test_without_a_threshold_there_is_no_ratio():
    (axes,) = stability_figure(*HISTORIES["no threshold"]).axes
    assert [line.get_label() for line in axes.lines] == ["λmax"]
    assert axes.get_title() == "last λmax 3"
