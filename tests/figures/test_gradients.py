"""The figures of gradients draw whatever was measured, without a warning."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_optkit.figures.gradients import gradient_figure, trust_ratio_figure
from lightning_optkit.measures.gradients import LayerStep, StepTable

STEPS = list(range(0, 500, 10))
NAN = math.nan
HISTORIES = {
    "training": (STEPS, [2.0 * 0.97**i for i in range(50)], [3.0 - i / 20 for i in range(50)]),
    "one point": ([0], [2.0], [3.0]),
    "no loss": (STEPS, [2.0] * 50, [NAN] * 50),
    "no gradient": (STEPS, [0.0] * 50, [3.0] * 50),
    "broken": (STEPS, [1.0, 0.0, math.inf, NAN] + [1e-9] * 46, [1.0, NAN, math.inf] + [2.0] * 47),
    "nothing": ([0, 1], [NAN, 0.0], [NAN, NAN]),
    "huge": (STEPS, [10.0**i for i in range(50)], [1e30] * 50),
}


def pixels(figure: Figure) -> np.ndarray:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=50)
    image.seek(0)
    return imread(image)[:, :, :3]


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_is_drawn(name):
    steps, norms, losses = HISTORIES[name]
    image = pixels(gradient_figure(steps, gradient_norms=norms, losses=losses))
    assert float((image < 0.9).any(2).mean()) > 0.005  # not blank


def test_it_shows_loss_and_gradient():
    steps, norms, losses = HISTORIES["training"]
    left, right = gradient_figure(steps, gradient_norms=norms, losses=losses).axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), np.stack([steps, losses], 1))
    np.testing.assert_array_equal(right.lines[0].get_xydata(), np.stack([steps, norms], 1))
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss", "‖gradient‖")
    assert left.lines[0].get_linestyle() != right.lines[0].get_linestyle()  # in grey print too
    expected = "loss 3 at first, 0.55 at last; ‖gradient‖ 2 at first, 0.45 at last"
    assert left.get_title() == expected


def test_without_a_loss_there_is_one_axis():
    (axes,) = gradient_figure(STEPS, gradient_norms=[2.0] * 50, losses=[NAN] * 50).axes
    assert axes.get_ylabel() == "‖gradient‖"
    assert axes.get_title() == "‖gradient‖ 2 at first, 2 at last"


def test_what_has_no_place_on_the_axis_is_left_out():
    steps, norms, losses = HISTORIES["broken"]
    left, right = gradient_figure(steps, gradient_norms=norms, losses=losses).axes
    assert np.isnan(right.lines[0].get_ydata()[1:4]).all()
    assert np.isfinite(right.lines[0].get_ydata()[[0, *range(4, 50)]]).all()
    assert np.isnan(left.lines[0].get_ydata()[1:3]).all()


def table(ratios: dict[str, float]) -> StepTable:
    """Return a table with these trust ratios."""
    rows = [LayerStep(name, 1, 1.0 if r else 0.0, r, 0.1) for name, r in ratios.items()]
    return StepTable(tuple(rows))


def test_trust_ratios_are_a_heatmap_of_layers_and_steps():
    tables = [table({"a": 2.0, "b": 30.0}), table({"a": 4.0, "b": 0.0, "c": 7.0})]
    axes, bar = trust_ratio_figure([0, 50], tables).axes
    (image,) = axes.images
    drawn = image.get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn, [[2, 4], [30, np.nan], [np.nan, 7]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "50"]
    assert image.norm.vmin == 2.0
    assert image.norm.vmax == 30.0
    assert axes.yaxis_inverted()  # the first layer on top
    assert bar.get_ylabel() == ""


@pytest.mark.parametrize(
    "tables",
    [
        [table({"a": 2.0})],
        [table({"a": 2.0})] * 200,
        [table({"a": 0.0}), table({"a": 0.0})],
        [table({f"very.long.name.of.a.layer.{i}": i + 1.0 for i in range(60)})] * 3,
        [table({"a": 1e-30, "b": 1e30})],
    ],
)
def test_every_table_is_drawn(tables):
    image = pixels(trust_ratio_figure(list(range(len(tables))), tables))
    assert float((image < 0.9).any(2).mean()) > 0.005


def test_layers_that_cannot_be_read_are_counted():
    many = table({str(i): 1.0 + i for i in range(60)})
    figure = trust_ratio_figure([0], [many])
    assert len(figure.axes[0].get_yticklabels()) == 40
    assert figure.get_suptitle() == "Trust ratio ‖w‖ / ‖g‖ by layer, 20 more layers not shown"
