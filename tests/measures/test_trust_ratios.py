"""Trust ratios against their formulas, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_optkit.measures import lamb_ratios, lars_ratios


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_lars_is_the_formula():
    weights, gradients = vector(3.0, 0.5, 40.0), vector(2.0, 7.0, 1e-3)
    found = lars_ratios(weights, gradients, trust_coefficient=0.02, weight_decay=0.1, eps=0.25)
    truth = [0.02 * w / (g + 0.1 * w + 0.25) for w, g in [(3.0, 2.0), (0.5, 7.0), (40.0, 1e-3)]]
    assert found.tolist() == pytest.approx(truth, rel=1e-15)


def test_lars_has_the_papers_defaults():
    assert lars_ratios(vector(5.0), vector(2.0)).tolist() == pytest.approx([0.001 * 5 / 2])


def test_lars_takes_a_weight_decay_of_each_layer():
    weights, gradients, decays = vector(3.0, 5.0), vector(2.0, 7.0), vector(0.0, 0.2)
    found = lars_ratios(weights, gradients, weight_decay=decays)
    apart = [
        float(lars_ratios(weights[i], gradients[i], weight_decay=float(decays[i]))) for i in (0, 1)
    ]
    assert found.tolist() == apart


def test_lamb_is_the_formula():
    weights, updates = vector(3.0, 0.5, 40.0), vector(2.0, 8.0, 10.0)
    assert lamb_ratios(weights, updates).tolist() == [1.5, 0.0625, 4.0]
    assert lamb_ratios(weights, updates, max_weight_norm=10.0).tolist() == [1.5, 0.0625, 1.0]


@pytest.mark.parametrize("ratios", [lars_ratios, lamb_ratios])
@pytest.mark.parametrize("norms", [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
def test_a_zero_has_no_ratio(ratios, norms):
    first, second = vector(norms[0], 1.0), vector(norms[1], 1.0)
    assert ratios(first, second)[0] == 1
    assert ratios(first, second)[1] != 0


def test_zero_stays_one_with_decay_eps_and_a_limit():
    zero, one = vector(0.0), vector(1.0)
    options = {"weight_decay": 0.1, "eps": 1.0}
    assert lars_ratios(one, zero, **options) == lars_ratios(zero, one, **options) == 1
    assert lamb_ratios(zero, one, max_weight_norm=0.5) == 1


def test_scale_of_weights_and_gradients():
    """A step of LARS without eps follows the weights' scale; so does LAMB's, below its limit."""
    weights, others = vector(3.0, 0.5), vector(2.0, 7.0)
    c = 17.0
    for decay in (0.0, 0.3):
        ratio = lars_ratios(weights, others, weight_decay=decay)
        scaled = lars_ratios(c * weights, c * others, weight_decay=decay)
        torch.testing.assert_close(scaled, ratio, rtol=1e-14, atol=0)
    ratio = lamb_ratios(weights, others)
    torch.testing.assert_close(lamb_ratios(c * weights, others), c * ratio, rtol=1e-14, atol=0)
    torch.testing.assert_close(lamb_ratios(weights, c * others), ratio / c, rtol=1e-14, atol=0)


@pytest.mark.parametrize("ratios", [lars_ratios, lamb_ratios])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_shape_and_arguments_stay(ratios, dtype):
    weights, others = torch.tensor([2.0, 0.0]).to(dtype), torch.tensor([4.0, 1.0]).to(dtype)
    found = ratios(weights, others)
    assert (found.dtype, found.shape) == (dtype, (2,))
    assert weights.tolist() == [2.0, 0.0]
    assert others.tolist() == [4.0, 1.0]
    assert ratios(weights[:0], others[:0]).shape == (0,)


def test_an_infinite_gradient_makes_no_step():
    assert lars_ratios(vector(1.0), vector(math.inf)) == 0


def test_what_is_no_number_is_seen():
    norms = torch.tensor([torch.nan, 2.0, torch.inf])
    others = torch.tensor([1.0, torch.nan, 1.0])
    assert lars_ratios(norms, others).isfinite().tolist() == [False, False, False]
    assert lamb_ratios(norms, others).isfinite().tolist() == [False, False, False]
