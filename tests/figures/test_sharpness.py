"""The figure of sharpness draws whatever was measured, without a warning."""

from __future__ import annotations

from lightning_optkit.figures.sharpness import sharpness_figure
from lightning_optkit.measures.rescaling import Invariance
from tests.figures.test_stability import pixels

POINT = {
    "epsilon": 0.5, "epsilon_lower": 0.4, "ball": 0.0, "ball_lower": 0.0, "average": -0.1,
    "average_standard_error": 0.2, "ball_per_batch": 0.3, "loss": 1.0, "num_samples": 8.0,
}  # fmt: skip


def test_kinds_are_rows_with_what_a_rescaling_does():
    invariance = Invariance((("a", "b"),), {"epsilon": 0.5, "ball": 1.0},
                            {"epsilon": 1.0, "ball": 1.0}, 4.0)  # fmt: skip
    figure = sharpness_figure([3, 7], [POINT, POINT | {"epsilon": 0.7}], invariance)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "epsilon 0.7; rescaled layers: +100%",
        "ball 0; rescaled layers: stays",
        "average -0.1",
        "ball per batch 0.3",
    ]
    assert pixels(figure).std() > 0.01


def test_one_point_and_a_kind_that_comes_later_are_drawn():
    assert pixels(sharpness_figure([3], [POINT])).std() > 0.01
    later = [{"ball": 1.0}, {"ball": 1.0, "lambda_max": 2.0, "lambda_max_lower": 1.9}]
    assert len(sharpness_figure([1, 2], later).axes) == 2
