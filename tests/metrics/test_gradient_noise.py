"""The metric says what the functions say of its last points."""

import math
import pickle
import random

import pytest
import torch

from lightning_optkit import GradientNoiseScale
from lightning_optkit.measures.gradient_noise import noise_point, noise_scale


def updates(count: int, seed: int = 0) -> list[tuple[list[float], float, list[int]]]:
    draw = random.Random(seed)
    return [([draw.uniform(3, 5), draw.uniform(3, 5)], 2.5, [4, 5]) for _ in range(count)]


@pytest.mark.parametrize("window", [None, 1, 3, 10])
def test_it_averages_the_last_points(window):
    metric = GradientNoiseScale(window=window)
    for count in range(1, 8):
        metric.update(*updates(7)[count - 1])
        kept = updates(7)[:count][-window:] if window else updates(7)[:count]
        expected = noise_scale([noise_point(*each) for each in kept])
        found = metric.compute()
        assert float(found["noise_scale"]) == pytest.approx(expected.value, rel=1e-6)
        error = float(found["standard_error"])
        assert error == pytest.approx(expected.standard_error, rel=1e-6, nan_ok=True)
        assert math.isnan(error) == (len(kept) == 1)
        assert metric.estimate.num_points == len(kept)
        assert metric.estimate.value == expected.value


def test_a_point_may_be_given_in_tensors():
    listed, tensors = GradientNoiseScale(), GradientNoiseScale()
    listed.update([1.0, 2.0], 1.2, [3, 4])
    tensors.update(torch.tensor([1.0, 2.0]), torch.tensor(1.2).double(), torch.tensor([3, 4]))
    assert tensors.estimate.value == pytest.approx(listed.estimate.value, rel=1e-6)
    with pytest.raises(ValueError, match="at least two batches"):
        listed.update([1.0], 1.0, [8])
    assert listed.estimate.num_points == 1


def test_points_of_several_processes_are_pooled():
    ranks = [GradientNoiseScale(), GradientNoiseScale()]
    for metric, points in zip(ranks, (updates(3), updates(4, seed=1)), strict=True):
        for point in points:
            metric.update(*point)
    expected = noise_scale([noise_point(*each) for each in (*updates(3), *updates(4, seed=1))])
    synced = pickle.loads(pickle.dumps(ranks[0]))
    for state in ("variances", "square_norms"):  # as torchmetrics does it
        setattr(synced, state, torch.cat([*getattr(ranks[0], state), *getattr(ranks[1], state)]))
    assert synced.estimate == expected


def test_it_starts_anew_and_takes_up_a_stored_state():
    metric = GradientNoiseScale(window=3)
    for point in updates(5):
        metric.update(*point)
    stored, before = metric.state_dict(), metric.estimate
    again = GradientNoiseScale(window=3)
    again.load_state_dict(stored)
    assert again.estimate == before
    metric.reset()
    with pytest.raises(ValueError, match="Measure one first"):
        _ = metric.estimate
    metric.update(*updates(1)[0])
    assert metric.estimate.num_points == 1


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "3"])
def test_what_is_no_window_is_refused(window):
    with pytest.raises(ValueError, match="`window` must be an integer of at least 1, got"):
        GradientNoiseScale(window=window)
