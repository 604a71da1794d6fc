"""LAMB against its formula, torch's AdamW and an independent library."""

from __future__ import annotations

import itertools

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_optkit.optim import LAMB
from tests.optim import loops
from tests.optim.loops import random_gradients, run, start

OPTIONS = [
    {"bias_correction": bias, "max_weight_norm": most, "capturable": capturable}
    for bias, most, capturable in itertools.product([True, False], [None, 1.5], [False, True])
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("layerwise", [True, False])
def test_fifty_steps_are_those_of_the_formula(options, decay, layerwise):
    steps = random_gradients(50)
    for maximize, betas in [(False, (0.9, 0.999)), (True, (0.0, 0.5))]:
        options |= {"lr": 0.02, "weight_decay": decay, "layerwise": layerwise}
        options |= {"maximize": maximize, "betas": betas, "eps": 1e-3}
        formula = {key: value for key, value in options.items() if key != "capturable"}
        truth = loops.loop(loops.lamb, steps, **formula)
        found = run(LAMB(start(), **options), steps)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-13)


def test_one_step_by_hand():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = LAMB([w], lr=0.1, weight_decay=0.5, eps=0.25)
    w.grad = torch.tensor([0.75, -0.25], dtype=torch.float64)
    optimizer.step()  # corrected, the means are g and g² themselves
    update = [0.75 / 1.0 + 1.5, -0.25 / 0.5 + 2.0]
    ratio = 5 / (update[0] ** 2 + update[1] ** 2) ** 0.5
    truth = [3 - 0.1 * ratio * update[0], 4 - 0.1 * ratio * update[1]]
    assert w.tolist() == pytest.approx(truth, rel=1e-12)
    assert optimizer.last_trust_ratios().tolist() == pytest.approx([ratio], rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("foreach", [None, False])
def test_a_step_has_the_size_of_the_weights(decay, dtype, rtol, foreach):
    """Of the rate times their norm, exactly, whatever the gradient and the step."""
    params = start(dtype)[:4]
    optimizer = LAMB(params, lr=0.5, weight_decay=decay, foreach=foreach)
    for grads in random_gradients(8, dtype)[3:]:
        before = [p.detach().clone().double() for p in params]
        run(optimizer, [grads[:4]])
        for parameter, old, grad in zip(params, before, grads, strict=False):
            if grad is not None:
                size = (parameter.detach().double() - old).norm()
                torch.testing.assert_close(size, 0.5 * old.norm(), rtol=rtol, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("foreach", [True, False])
def test_with_ratios_of_one_it_is_torchs_adamw(decay, foreach):
    """Up to rounding: the two bias corrections are one here, and eps takes part in it."""
    steps = random_gradients(50)
    for maximize, capturable in [(False, False), (True, True)]:
        same = {"lr": 0.03, "weight_decay": decay, "eps": 1e-3, "maximize": maximize}
        adamw = torch.optim.AdamW(start(), **same)
        lamb = LAMB(start(), **same, layerwise=False, foreach=foreach, capturable=capturable)
        torch.testing.assert_close(run(lamb, steps), run(adamw, steps), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_it_is_pytorch_optimizers(decay):
    """Where the two mean the same: no bias correction, norms of at most ten, no eps to speak of."""
    steps = [[g for g in grads if g is not None] for grads in random_gradients(30)[3:]]
    steps = [grads for grads in steps if len(grads) == 5]
    ours, theirs = start(), start()
    with torch.no_grad():
        for params in (ours, theirs):
            params[0].mul_(20)  # its norm is above ten
    options = {"lr": 0.05, "weight_decay": decay, "eps": 1e-15}
    lamb = LAMB(ours, **options, bias_correction=False, max_weight_norm=10.0)
    # without `adam_debias` it divides the length of a step by 1 - 0.9^t: ten times γ‖w‖ at first
    oracle = pytorch_optimizer.Lamb(theirs, **options, weight_decouple=False, adam_debias=True)
    torch.testing.assert_close(run(lamb, steps), run(oracle, steps), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_bias_correction_of_a_float32_parameter_is_exact(capturable):
    """1 - 0.999 in float32 would be wrong in the fifth digit."""
    w = nn.Parameter(torch.ones(3))
    optimizer = LAMB([w], lr=1.0, layerwise=False, eps=0.0, capturable=capturable)
    w.grad = torch.full((3,), 0.37)
    optimizer.step()
    assert w.tolist() == pytest.approx([0.0] * 3, abs=3e-7)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_layers_without_weight_decay_are_scaled_too(decay):
    """Other libraries switch the ratio off there."""
    w = nn.Parameter(torch.full((4,), 2.0))
    optimizer = LAMB([w], lr=1.0, weight_decay=decay)
    w.grad = torch.full((4,), 50.0)
    optimizer.step()
    assert optimizer.last_trust_ratios().tolist() == pytest.approx([2 / (1 + 2 * decay)], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"`lr` must be a number of at least 0, or a tensor of one, got -1.0"),
        ({"betas": 0.9}, r"`betas` must be two numbers in \[0, 1\), got 0.9\. Write"),
        ({"betas": (0.9,)}, r"`betas` must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` must be in \[0, 1\), got 1.0"),
        ({"betas": (True, 0.5)}, r"`betas\[0\]` must be in \[0, 1\), got True"),
        ({"eps": -1.0}, r"`eps` must be a number of at least 0, got -1.0"),
        ({"weight_decay": "0"}, r"`weight_decay` must be a number of at least 0, got '0'"),
        ({"max_weight_norm": 0.0}, r"`max_weight_norm` must be positive, got 0.0\. None is no"),
        ({"max_weight_norm": -1}, r"`max_weight_norm` must be a number of at least 0, got -1"),
        ({"bias_correction": None}, r"`bias_correction` must be True or False, got None"),
        ({"layerwise": 1}, r"`layerwise` must be True or False, got 1"),
        ({"maximize": "no"}, r"`maximize` must be True or False, got 'no'"),
        ({"capturable": 0}, r"`capturable` must be True or False, got 0"),
        ({"foreach": 1}, r"`foreach` must be None, True or False, got 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LAMB(start(), **settings)


def test_betas_may_be_a_list():
    """As a config file has them."""
    steps = random_gradients(3)
    found = run(LAMB(start(), betas=[0.5, 0.9]), steps)
    assert [f.tolist() for f in found] == [
        f.tolist() for f in run(LAMB(start(), betas=(0.5, 0.9)), steps)
    ]
