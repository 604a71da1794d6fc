"""The rate of an adaptive optimizer, against what the optimizer does to a gradient."""

import math

import pytest
import torch

from lightning_optkit.measures.adaptive_rates import effective_rate, mean_rate

STANDING = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.Adam, {"betas": (0.0, 0.9), "eps": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.0}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RAdam, {"betas": (0.5, 0.9)}),
    (torch.optim.Adamax, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
    (torch.optim.Adam, {"maximize": True}),
]


def rate_of(optimizer, parameter):
    (group,) = optimizer.param_groups
    return effective_rate(optimizer, group, optimizer.state[parameter])


@pytest.mark.parametrize(("kind", "options"), STANDING, ids=str)
def test_it_is_how_far_a_step_goes_along_a_gradient_that_stands_still(kind, options):
    gradient = torch.tensor([0.3, -2.0, 1e-3, 40.0], dtype=torch.float64)
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = kind([parameter], lr=0.05, **options)
    sign = 1 if options.get("maximize") else -1
    for _ in range(12):  # RAdam rectifies from the sixth step on
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        step = sign * (parameter.detach() - before) / gradient
        torch.testing.assert_close(
            rate_of(optimizer, parameter).expand(4).double(), step, rtol=1e-10, atol=0
        )


def test_of_adam_it_is_eta_over_sigma_whatever_the_gradients():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    square = torch.zeros(5, dtype=torch.float64)
    for t in range(1, 6):
        parameter.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        square = 0.999 * square + 0.001 * parameter.grad**2
        optimizer.step()
        expected = 0.01 / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(rate_of(optimizer, parameter), expected, rtol=1e-12, atol=0)


def test_momentum_of_rmsprop_adds_up():
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RMSprop([parameter], lr=0.1, momentum=0.9)
    for _ in range(500):  # until the running sums have settled
        before = float(parameter.detach())
        parameter.grad = torch.full((1,), 2.0, dtype=torch.float64)
        optimizer.step()
    assert float(rate_of(optimizer, parameter)) == pytest.approx(0.1 / 2 / 0.1, rel=0.01)
    assert before - float(parameter.detach()) == pytest.approx(2 * 0.5, rel=0.01)


def test_what_has_no_rate():
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    for optimizer in (
        torch.optim.SGD([parameter], lr=0.1, momentum=0.9),
        torch.optim.Adadelta([parameter], lr=0.1),
        torch.optim.Rprop([parameter], lr=0.1),
    ):
        assert rate_of(optimizer, parameter) is None  # before a step
        optimizer.step()
        assert rate_of(optimizer, parameter) is None
    assert rate_of(torch.optim.Adagrad([parameter], lr=0.1), parameter) is None  # made with a state
    diverges = torch.optim.RMSprop([parameter], lr=0.1, momentum=1.5)
    diverges.step()
    assert rate_of(diverges, parameter) is None


def test_the_rate_that_is_used_is_that_of_the_group():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.2))
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert float(rate_of(optimizer, parameter)) == pytest.approx(0.2, rel=1e-6)
    ruled = optimizer.param_groups[0] | {"lr": 0.1}
    found = effective_rate(optimizer, ruled, optimizer.state[parameter])
    assert float(found) == pytest.approx(0.1, rel=1e-6)


def test_a_mean_is_that_of_the_root_mean_square():
    rates = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    expected = 1 / math.sqrt((100 + 25 + 6.25) / 3)
    assert mean_rate(rates) == pytest.approx(expected, rel=1e-14)
    assert mean_rate(rates.tolist()) == pytest.approx(expected, rel=1e-14)
    assert mean_rate([0.1, 0.2, 0.4], [1, 1, 1]) == pytest.approx(expected, rel=1e-14)
    parts = [mean_rate(rates[:1]), mean_rate(rates[1:]), math.nan]
    assert mean_rate(parts, [1, 2, 50]) == pytest.approx(expected, rel=1e-14)
    assert mean_rate(torch.tensor(0.3)) == pytest.approx(0.3)
    assert mean_rate(torch.zeros(3)) == mean_rate([0.0, 0.1]) == 0.0  # a warmup's first step
    assert math.isnan(mean_rate([math.nan, math.nan]))
