"""LARS against its formula, torch's SGD and an independent library."""

from __future__ import annotations

import itertools

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_optkit.optim import LARS
from tests.optim import loops
from tests.optim.loops import random_gradients, run, start

MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.0, "fold_lr": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "fold_lr": True},
    {"momentum": 0.9, "dampening": 0.3, "fold_lr": True},
]


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("layerwise", [True, False])
def test_fifty_steps_are_those_of_the_formula(momentum, decay, layerwise):
    steps = random_gradients(50)
    for maximize, eps in [(False, 1e-8), (True, 0.5)]:
        options = {"lr": 0.01, "weight_decay": decay, "trust_coefficient": 0.02, "eps": eps}
        options |= momentum | {"layerwise": layerwise, "maximize": maximize}
        truth = loops.loop(loops.lars, steps, **options)
        found = run(LARS(start(), **options), steps)
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)


def test_one_step_by_hand():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))  # norm 5
    optimizer = LARS([w], lr=2.0, trust_coefficient=0.1, weight_decay=0.6, eps=1.0)
    w.grad = torch.tensor([6.0, -8.0], dtype=torch.float64)  # norm 10
    optimizer.step()
    ratio = 0.1 * 5 / (10 + 0.6 * 5 + 1)
    truth = [3 - 2 * ratio * (6 + 0.6 * 3), 4 - 2 * ratio * (-8 + 0.6 * 4)]
    assert w.tolist() == pytest.approx(truth, rel=1e-15)
    assert optimizer.last_trust_ratios().tolist() == pytest.approx([ratio], rel=1e-15)


SGD_OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    for momentum, dampening, nesterov in itertools.product([0.0, 0.9], [0.0, 0.3], [False, True])
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("foreach", [True, False])
def test_with_ratios_of_one_it_is_torchs_sgd_to_the_bit(options, dtype, foreach):
    steps = random_gradients(12, dtype)
    # On the CPU torch's foreach rounds a momentum of 0.9 to bfloat16; its default there does not.
    torchs = foreach and dtype != torch.bfloat16
    for decay, maximize in itertools.product([0.0, 0.2], [False, True]):
        same = {"lr": 0.03, "weight_decay": decay, "maximize": maximize}
        sgd = torch.optim.SGD(start(dtype), **same, **options, foreach=torchs)
        lars = LARS(start(dtype), **same, **options, foreach=foreach, layerwise=False)
        for found, truth in zip(run(lars, steps), run(sgd, steps), strict=True):
            assert torch.equal(found, truth)
        for ours, theirs in zip(lars.state.values(), sgd.state.values(), strict=False):
            assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


@pytest.mark.parametrize("zero", ["weights", "gradients"])
def test_a_layer_of_zeros_takes_a_step_of_sgd_to_the_bit(zero):
    """Its ratio is one, although its group is scaled."""
    weights = torch.zeros(7) if zero == "weights" else torch.linspace(-1, 1, 7)
    ours, theirs = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.07}
    optimizers = LARS([ours], **options), torch.optim.SGD([theirs], **options, foreach=True)
    grad = torch.zeros(7) if zero == "gradients" else torch.linspace(0.3, 2, 7)
    for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
        parameter.grad = grad.clone()
        optimizer.step()
    assert torch.equal(ours, theirs)
    assert optimizers[0].last_trust_ratios().tolist() == [1.0]


def test_folded_and_not_agree_at_a_constant_rate_and_part_when_it_changes():
    steps = random_gradients(10)
    options = {"lr": 0.05, "trust_coefficient": 0.02, "weight_decay": 0.1}
    folded, plain = (LARS(start(), fold_lr=fold, **options) for fold in (True, False))
    torch.testing.assert_close(run(folded, steps), run(plain, steps), rtol=1e-12, atol=0)
    for ours, theirs in zip(folded.state.values(), plain.state.values(), strict=True):
        a, b = ours["momentum_buffer"], 0.05 * theirs["momentum_buffer"]
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    before = [p.detach().clone() for p in plain.param_groups[0]["params"]]
    for optimizer in (folded, plain):
        optimizer.param_groups[0]["lr"] = 0.0
    zeros = [[torch.zeros_like(p) for p in before]]
    torch.testing.assert_close(run(plain, zeros), before, rtol=0, atol=0)
    moved = run(folded, zeros)  # the velocity goes on
    assert all(not torch.equal(a, b) for a, b in zip(moved, before, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("foreach", [None, False])
def test_it_is_pytorch_optimizers(nesterov, foreach):
    """Where the two mean the same: no dampening, no eps, vectors neither scaled nor decayed."""
    shapes = [(3, 4), (5,), (4, 2, 3), (1, 1)]
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ours = [nn.Parameter(value.clone()) for value in draw]
    theirs = [nn.Parameter(value.clone()) for value in draw]
    options = {"lr": 0.7, "momentum": 0.9, "nesterov": nesterov, "trust_coefficient": 0.03}
    groups = [
        {"params": [p for p in ours if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in ours if p.ndim <= 1], "layerwise": False},
    ]
    lars = LARS(groups, **options, eps=0.0, foreach=foreach)
    oracle = pytorch_optimizer.LARS(theirs, **options, weight_decay=0.05)
    for _ in range(50):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()  # it writes its velocity there
        lars.step()
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_layers_without_weight_decay_are_scaled_too(decay):
    """Other libraries switch the ratio off there."""
    w = nn.Parameter(torch.full((4,), 2.0))
    optimizer = LARS([w], lr=1.0, weight_decay=decay)
    w.grad = torch.full((4,), 50.0)
    optimizer.step()
    truth = 0.001 * 4 / (100 + decay * 4)
    assert optimizer.last_trust_ratios().tolist() == pytest.approx([truth], rel=1e-6)


def test_the_step_does_not_depend_on_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1000.0):
        steps = [[scale * g for g in grads if g is not None] for grads in random_gradients(8)[3:4]]
        ends.append(run(LARS(start(), lr=3.0, eps=0.0), steps))
    for i, (one, other) in enumerate(zip(*ends, strict=True)):
        if i < 4:  # the last is zero, and has no ratio
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lr": -1.0},
            r"`lr` must be a number of at least 0, or a tensor of one, got -1.0\.",
        ),
        ({"lr": "0.1"}, r"`lr` must be .* got '0.1'"),
        ({"lr": True}, r"`lr` must be .* got True"),
        ({"lr": float("nan")}, r"`lr` must be .* got nan"),
        ({"lr": torch.zeros(2)}, r"`lr` must be a number, or a tensor of one element, got \(2,\)"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0\. 0.9 is usual"),
        ({"momentum": False}, r"`momentum` must be in \[0, 1\), got False"),
        ({"dampening": 1}, r"`dampening` must be in \[0, 1\), got 1"),
        ({"weight_decay": -1e-4}, r"`weight_decay` must be a number of at least 0, got -0.0001"),
        ({"weight_decay": float("inf")}, r"`weight_decay` must be .* got inf"),
        ({"eps": None}, r"`eps` must be a number of at least 0, got None"),
        ({"trust_coefficient": 0.0}, r"`trust_coefficient` must be positive, got 0.0"),
        (
            {"trust_coefficient": "1"},
            r"`trust_coefficient` must be a number .* got '1'",
        ),
        ({"layerwise": "no"}, r"`layerwise` must be True or False, got 'no'"),
        ({"fold_lr": 1}, r"`fold_lr` must be True or False, got 1"),
        ({"maximize": None}, r"`maximize` must be True or False, got None"),
        ({"nesterov": 0}, r"`nesterov` must be True or False, got 0"),
        ({"foreach": "yes"}, r"`foreach` must be None, True or False, got 'yes'"),
        ({"nesterov": True, "momentum": 0.0}, r"`nesterov` must be used with a momentum"),
        ({"nesterov": True, "dampening": 0.1}, r"`nesterov` must be used with .* no dampening"),
        ({"nesterov": True, "fold_lr": True}, r"`nesterov` must be used with .*`fold_lr=False`"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LARS(start(), **{"lr": 0.1} | settings)
    good = LARS(start()[:1], lr=0.1)
    with pytest.raises(ValueError, match=message):
        good.add_param_group({"params": start(seed=5)[:1]} | settings)
    assert len(good.param_groups) == 1


def test_a_rate_must_be_given():
    with pytest.raises(TypeError, match="lr"):
        LARS(start())
