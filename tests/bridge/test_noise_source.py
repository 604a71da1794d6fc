"""Where gradients of independent batches come from, with stand-ins for a Trainer."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optkit.bridge.noise_source import (
    NoiseSource,
    gradients_of_halves,
    gradients_of_step,
)
from lightning_optkit.bridge.step_batches import BatchesOfStep


class Module(nn.Module):
    automatic_optimization = True


@pytest.mark.parametrize(
    ("accumulated", "ranks", "source"),
    [(1, 1, 3), (4, 1, 0), (1, 2, 1), (4, 2, 2)],
)
def test_what_training_computes_anyway_comes_first(accumulated, ranks, source):
    trainer = SimpleNamespace(accumulate_grad_batches=accumulated, world_size=ranks)
    module = Module()
    assert NoiseSource.of(trainer, module) == source
    module.automatic_optimization = False  # whose backward passes may be of any loss
    assert NoiseSource.of(trainer, module) == NoiseSource.HALVES == 3


def test_the_mean_of_a_step_that_is_cut_short_is_that_of_its_batches():
    batches = BatchesOfStep((4.0, 2.0), (1.0, 3.0), (5.0, 6.0), share=2 / 3)
    found = gradients_of_step(batches, gradient_norm=2.0)  # of the sum over three
    assert found.square_norms == (5.0, 6.0)
    assert found.batch_sizes == (4.0, 2.0)
    assert found.square_norm_of_mean == pytest.approx((2.0 * 3 / 2) ** 2)


def test_batches_of_unknown_size_are_refused():
    batches = BatchesOfStep((4.0, math.nan), (1.0, 1.0), (1.0, 1.0), share=1.0)
    with pytest.raises(MisconfigurationException, match="must share their first dimension"):
        gradients_of_step(batches, gradient_norm=1.0)


@pytest.mark.parametrize("count", [0, 2])
def test_parameters_must_be_those_of_one_optimizer(count):
    owned = [{"weight": torch.ones(1)}] * count + [{}]
    with pytest.raises(MisconfigurationException, match=f"got those of {count}"):
        gradients_of_halves(None, None, None, owned, None, 0)
