"""A report prints what is known and passes over what is not."""

import math

from lightning_optkit.measures.activations import Activations
from lightning_optkit.measures.gradient_noise import NoiseScale
from lightning_optkit.measures.gradient_report import GradientReport
from lightning_optkit.measures.gradients import LayerStep, StepTable

TABLE = StepTable((LayerStep("head", 3, 2.0, 4.0, 0.1),))


def below_the_table(**known):
    lines = str(GradientReport(7, TABLE, **known)).splitlines()
    assert lines[1:3] == str(TABLE).splitlines()
    return [lines[0], *lines[3:]]


def test_what_is_not_known_is_not_printed():
    assert below_the_table() == ["step 7"]
    unresolved = NoiseScale(math.nan, math.nan, 8.0, -1.0, 2)
    assert below_the_table(noise=unresolved) == ["step 7"]


def test_what_is_known_is_printed():
    activations = Activations(("body.1", "body.3"), (4, 0), (1, 0), (0, 10), (0, 7))
    one, several = NoiseScale(64, math.nan, 8, 0.1, 1), NoiseScale(64.25, 3.14, 8, 0.1, 5)
    assert below_the_table(loss=0.51234567, noise=one, activations=activations) == [
        "step 7, loss 0.5123",
        "noise scale 64 samples",
        "body.1: dead 25%",
        "body.3: saturated 70%",
    ]
    assert below_the_table(noise=several)[1] == "noise scale 64.25 ± 3.1 samples"
