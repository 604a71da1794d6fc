"""Learning rates for a batch, against the numbers of the paper and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optkit.methods.batch_scaling import (
    corrected_momentum,
    gradual_factor,
    scaling_factor,
)

tried = settings(derandomize=True, deadline=None, print_blob=True, database=None)


@pytest.mark.parametrize(
    ("workers", "per_worker", "rate"),
    [(8, 32, 0.1), (256, 32, 3.2), (1, 64, 0.025), (44, 256, 4.4), (352, 32, 4.4)],
)
def test_rates_of_goyal_et_al(workers, per_worker, rate):
    """Section 5.1: 0.1 · kn / 256; 8k images in a batch are trained at 3.2."""
    assert 0.1 * scaling_factor(workers * per_worker, 256, rule="linear") == pytest.approx(
        rate, rel=1e-15
    )


@tried
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_rules_are_powers_of_the_ratio(batch_size, reference):
    linear = scaling_factor(batch_size, reference, rule="linear")
    root = scaling_factor(batch_size, reference, rule="sqrt")
    assert linear * reference == pytest.approx(batch_size, rel=1e-14)
    assert root**2 == pytest.approx(linear, rel=1e-14)
    assert scaling_factor(batch_size, reference, rule="none") == 1.0
    for rule in ("linear", "sqrt"):
        assert scaling_factor(reference, reference, rule=rule) == 1.0


def test_k_small_steps_are_one_large_step_where_the_gradient_stands_still():
    """What the linear rule rests on: on a linear loss it is exact."""
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = large = torch.zeros(3, dtype=torch.float64)
    for gradient in gradients:
        small = small - 0.1 * gradient
    large = large - 0.1 * scaling_factor(6, 1, rule="linear") * gradients.mean(0)
    torch.testing.assert_close(large, small, rtol=1e-14, atol=1e-15)


def test_the_root_keeps_the_variance_of_a_step():
    """The mean of k gradients has a k-th of the variance of one."""
    for k in (2, 9, 32):
        step = scaling_factor(k, 1, rule="sqrt")
        assert step**2 * (1 / k) == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("rule", ["Linear", "square", None, 2])
def test_another_rule_is_refused(rule):
    with pytest.raises(ValueError, match="`rule` must be 'linear', 'sqrt' or 'none', got"):
        scaling_factor(1, 1, rule=rule)


# -- warmup ------------------------------------------------------------------------------------


@tried
@given(st.integers(1, 200), st.floats(1.001, 100))
def test_the_warmup_grows_by_a_constant_amount_from_one_to_the_factor(num_steps, factor):
    found = [gradual_factor(t, factor, num_steps=num_steps) for t in range(num_steps + 3)]
    part = (factor - 1) / num_steps
    growth = [b - a for a, b in zip([1.0, *found], found[:num_steps], strict=False)]
    assert growth == pytest.approx([part] * num_steps, abs=1e-12 * factor)
    assert found[num_steps - 1 :] == [factor] * 4  # without rounding


def test_the_warmup_of_goyal_et_al():
    """From 0.1 to 3.2 over the 5 epochs of 157 steps that ImageNet has at 8,192 images a batch."""
    steps = 5 * math.ceil(1_281_167 / 8192)
    found = [0.1 * gradual_factor(t, 32.0, num_steps=steps) for t in range(steps)]
    assert found[0] == pytest.approx(0.1 + 3.1 / 785, rel=1e-14)
    assert found[392] == pytest.approx(0.1 + 3.1 * 393 / 785, rel=1e-14)
    assert found[-1] == 0.1 * 32.0


@pytest.mark.parametrize("factor", [1.0, 0.5, 1e-3])
@pytest.mark.parametrize("step", [0, 5, 50])
def test_a_factor_that_is_not_above_one_holds_at_once(factor, step):
    assert gradual_factor(step, factor, num_steps=10) == factor


def test_no_steps_are_no_warmup():
    assert [gradual_factor(t, 7.0, num_steps=0) for t in (0, 1)] == [7.0, 7.0]


# -- momentum ----------------------------------------------------------------------------------


def test_the_corrected_velocity_is_the_rate_times_that_without_one():
    """Equations (9) and (10) of Goyal et al., for rates that go up, down, to zero and stay."""
    generator = torch.Generator().manual_seed(1)
    rates = [0.1, 0.2, 0.2, 1.7, 0.03, 0.5, 0.5, 0.01]
    w = plain = torch.randn(4, generator=generator, dtype=torch.float64)
    u = v = torch.zeros(4, dtype=torch.float64)
    before = None
    for rate in rates:
        gradient = torch.randn(4, generator=generator, dtype=torch.float64)
        u = 0.9 * u + gradient
        plain = plain - rate * u
        v = corrected_momentum(0.9, rate, before) * v + rate * gradient
        w, before = w - v, rate
        torch.testing.assert_close(v, rate * u, rtol=1e-13, atol=0)
        torch.testing.assert_close(w, plain, rtol=1e-13, atol=1e-15)


def test_nothing_is_corrected_at_first_at_the_same_rate_and_after_a_rate_of_zero():
    assert corrected_momentum(0.9, 0.3, None) == 0.9
    assert corrected_momentum(0.9, 0.3, 0.3) == 0.9
    assert corrected_momentum(0.9, 0.3, 0.0) == 0.9
    assert corrected_momentum(0.9, 0.0, 0.3) == 0.0
    assert corrected_momentum(0.0, 0.6, 0.3) == 0.0
