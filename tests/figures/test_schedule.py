"""The figure of a schedule draws whatever is planned, without a warning."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_optkit.figures.schedule import schedule_figure

STEPS = np.arange(100)
COSINE = 0.1 * (1 + np.cos(np.pi * STEPS / 100)) / 2
WARM = COSINE * np.minimum((STEPS + 1) / 20, 1)
PLANS = {
    "a schedule": ({"SGD": WARM}, {"SGD": COSINE}, {"end": 19}),
    "one step": ({"SGD": WARM[:1]}, {"SGD": COSINE[:1]}, {"end": 19}),
    "factors": ({"Adam": WARM / COSINE}, None, {"unit": "batch"}),
    "zeros": ({"SGD": 0 * WARM}, {"SGD": 0 * WARM}, {}),
    "tiny": ({"Adam": 1e-9 * WARM}, {"Adam": 1e-9 * COSINE}, {"end": 19}),
    "groups": (
        {f"SGD/pg{j}": WARM / j for j in range(1, 10)},
        {f"SGD/pg{j}": COSINE / j for j in range(1, 10)},
        {},
    ),
}


def drawn(name: str) -> Figure:
    used, scheduled, options = PLANS[name]
    return schedule_figure(used, scheduled, title="a warmup", **options)


def texts(figure: Figure) -> list[str]:
    (axes,) = figure.axes
    legend = axes.get_legend()
    found = [*axes.texts, *legend.get_texts(), legend.get_title()]
    return [text.get_text() for text in found if text.get_text()]


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_is_drawn(name):
    image = BytesIO()
    drawn(name).savefig(image, format="png", dpi=50)
    image.seek(0)
    assert float((imread(image)[:, :, :3] < 0.9).any(2).mean()) > 0.01  # not blank


def test_it_shows_the_rates_the_schedule_and_where_the_warmup_ends():
    figure = drawn("a schedule")
    (axes,) = figure.axes
    dashed, solid, end = axes.lines
    np.testing.assert_array_equal(solid.get_xydata(), np.stack([STEPS, WARM], 1))
    np.testing.assert_array_equal(dashed.get_xydata(), np.stack([STEPS, COSINE], 1))
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert list(end.get_xdata()) == [19, 19]
    assert texts(figure) == [
        "full rate from optimizer step 19 on",
        "SGD",
        "dashed: schedule alone",
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "learning rate")
    assert axes.get_ylim()[0] == 0
    assert figure.get_suptitle() == "a warmup"


def test_without_a_schedule_it_shows_factors():
    figure = drawn("factors")
    (axes,) = figure.axes
    assert len(axes.lines) == 1
    assert texts(figure) == ["Adam"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch", "factor")


def test_an_end_out_of_sight_is_not_marked():
    assert not drawn("one step").axes[0].texts


def test_it_says_how_many_are_left_out():
    figure = drawn("groups")
    assert len(figure.axes[0].lines) == 12
    assert texts(figure)[-1] == "dashed: schedule alone; 3 more are not drawn"
    labels = {line.get_label() for line in figure.axes[0].lines if line.get_linestyle() == "-"}
    assert labels == {f"SGD/pg{j}" for j in range(1, 7)}
