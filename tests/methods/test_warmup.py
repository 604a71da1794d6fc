"""Warmup factors against closed forms, published values, and an independent library."""

import itertools
import math

import pytest
import pytorch_warmup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_optkit.methods.warmup import (
    constant_factor,
    cosine_factor,
    exponential_factor,
    linear_factor,
    noam_factor,
    radam_factor,
    untuned_factor,
    untuned_steps,
    warmup_end,
    warmup_factor,
)

EXACT = {"rel": 1e-14, "abs": 0}
RAMPS = {"linear": linear_factor, "cosine": cosine_factor}


# -- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_linear_goes_up_by_equal_parts_and_the_first_step_moves(steps, start):
    found = [linear_factor(t, warmup_steps=steps, start_factor=start) for t in range(steps + 3)]
    line = [(start * (steps - t - 1) + (t + 1)) / steps for t in range(steps)]
    assert found[:steps] == pytest.approx(line, **EXACT)
    assert found[0] > start
    assert found[steps - 1 :] == [1.0] * 4  # without rounding


@pytest.mark.parametrize("start", [0.1, 0.7])
def test_constant_holds_and_lets_go(start):
    found = [constant_factor(t, warmup_steps=3, start_factor=start) for t in range(6)]
    assert found == [start] * 3 + [1.0] * 3


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_cosine_is_half_a_wave(start):
    n = 8
    found = [cosine_factor(t, warmup_steps=n, start_factor=start) for t in range(n + 3)]
    wave = [start + (1 - start) * (1 - math.cos(math.pi * (t + 1) / n)) / 2 for t in range(n)]
    assert found[:n] == pytest.approx(wave, rel=1e-13, abs=0)
    assert found[n // 2 - 1] == pytest.approx((1 + start) / 2, **EXACT)
    assert found[n - 1 :] == [1.0] * 4


def test_exponential_makes_the_same_share_of_what_is_left_in_each_step():
    found = [exponential_factor(t, warmup_steps=5, start_factor=0.2) for t in range(100)]
    left = [0.8] + [1 - f for f in found]
    for before, after in itertools.pairwise(left[:50]):
        assert after / before == pytest.approx(math.exp(-1 / 5), rel=1e-11)
    assert found[4] == pytest.approx(0.2 + 0.8 * (1 - 1 / math.e), **EXACT)
    assert found[99] < 1  # it never arrives


def test_noam_has_the_values_of_the_paper():
    """Facts that were computed elsewhere; the paper counts steps from 1."""
    for t, rate in ((1, 1.7469e-7), (4000, 6.98771e-4), (100_000, 1.39754e-4)):
        found = noam_factor(t - 1, warmup_steps=4000, d_model=512)
        assert found == pytest.approx(rate, rel=1e-4)
    peak = noam_factor(3999, warmup_steps=4000, d_model=512)
    assert peak == pytest.approx(1 / math.sqrt(512 * 4000), **EXACT)
    assert noam_factor(3998, warmup_steps=4000, d_model=512) < peak
    assert noam_factor(4000, warmup_steps=4000, d_model=512) < peak
    assert noam_factor(1, warmup_steps=4000, d_model=512) == pytest.approx(
        2 * noam_factor(0, warmup_steps=4000, d_model=512), **EXACT
    )
    assert noam_factor(15_999, warmup_steps=4000, d_model=512) == pytest.approx(peak / 2, **EXACT)


def test_radam_has_the_values_of_the_paper():
    """Facts that were computed elsewhere; the paper counts steps from 1, and 5 is the first."""
    values = {6: 0.025821, 100: 0.215335, 1000: 0.645326}
    for i, value in values.items():
        assert radam_factor(i - 5, beta2=0.999) == pytest.approx(value, abs=5e-7)


def test_radam_is_what_torch_rectifies_by():
    """From the sixth step on, where torch's begins; the net is so simple that steps show it."""
    p, beta2 = nn.Parameter(torch.zeros(1, dtype=torch.float64)), 0.99
    optimizer = torch.optim.RAdam([p], lr=1.0, betas=(0.0, beta2), eps=0.0)
    for i in range(1, 40):
        before, p.grad = float(p.detach()), torch.ones(1, dtype=torch.float64)
        optimizer.step()
        if i > 5:
            assert before - float(p.detach()) == pytest.approx(
                radam_factor(i - 5, beta2=beta2), rel=1e-9
            )


@pytest.mark.parametrize(
    ("beta2", "passed_over"), [(0.61, 10), (0.7, 5), (0.9, 4), (0.99, 4), (0.999, 4), (0.99999, 4)]
)
def test_radam_passes_over_the_steps_that_have_no_factor(beta2, passed_over):
    def rho(i):
        return 2 / (1 - beta2) - 1 - 2 * i * beta2**i / (1 - beta2**i)

    assert rho(passed_over) <= 4 < rho(passed_over + 1)
    found = [radam_factor(t, beta2=beta2) for t in range(200)]
    assert 0 < found[0] < found[1]
    assert all(f <= 1 for f in found)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.6])
def test_radam_needs_a_long_memory(beta2):
    with pytest.raises(ValueError, match=r"`beta2` must be above 0\.6 .* got"):
        radam_factor(0, beta2=beta2)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9, 0.95, 0.999])
def test_untuned_is_linear_over_two_memories(beta2):
    length = round(2 / (1 - beta2))
    assert untuned_steps(beta2) == pytest.approx(length, **EXACT)
    found = [untuned_factor(t, beta2=beta2) for t in range(length + 3)]
    expected = [linear_factor(t, warmup_steps=length) for t in range(length + 3)]
    assert found == pytest.approx(expected, **EXACT)


# -- what all ramps have in common -------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "constant", "exponential"]),
    st.integers(1, 500),
    st.floats(0, 0.99),  # nearer to 1, a factor below it is rounded to it
)
def test_ramps_rise_from_the_start_factor_to_one(shape, steps, start):
    found = [
        warmup_factor(shape, t, warmup_steps=steps, start_factor=start) for t in range(steps + 2)
    ]
    assert all(start <= f <= 1 for f in found)
    assert found == sorted(found)
    end = warmup_end(shape, warmup_steps=steps)
    if shape == "exponential":
        assert end is None
    else:
        assert found[end:] == [1.0] * (steps + 2 - end)
        assert all(f < 1 for f in found[: max(end - 1, 0)])


@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.5, 0.9, 0.999, 1 - 1 / 3])
def test_the_end_of_untuned_is_its_first_step_at_the_full_rate(beta2):
    end = warmup_end("untuned", beta2=beta2)
    assert untuned_factor(end, beta2=beta2) == 1
    assert untuned_factor(end - 1, beta2=beta2) < 1


@pytest.mark.parametrize("shape", ["exponential", "noam", "radam"])
def test_some_have_no_end(shape):
    assert warmup_end(shape, warmup_steps=4, beta2=0.9) is None


def test_every_shape_is_found_by_its_name():
    needs = {"warmup_steps": 10, "start_factor": 0.3, "beta2": 0.9, "d_model": 16}
    ramp = {"warmup_steps": 10, "start_factor": 0.3}
    for t in (0, 4, 20):
        assert warmup_factor("linear", t, **needs) == linear_factor(t, **ramp)
        assert warmup_factor("constant", t, **needs) == constant_factor(t, **ramp)
        assert warmup_factor("cosine", t, **needs) == cosine_factor(t, **ramp)
        assert warmup_factor("exponential", t, **needs) == exponential_factor(t, **ramp)
        assert warmup_factor("noam", t, **needs) == noam_factor(t, warmup_steps=10, d_model=16)
        assert warmup_factor("untuned", t, **needs) == untuned_factor(t, beta2=0.9)
        assert warmup_factor("radam", t, **needs) == radam_factor(t, beta2=0.9)


@pytest.mark.parametrize(
    ("shape", "given", "name"),
    [
        ("linear", {}, "warmup_steps"),
        ("noam", {"warmup_steps": 4}, "d_model"),
        ("noam", {"d_model": 4}, "warmup_steps"),
        ("untuned", {"warmup_steps": 4}, "beta2"),
        ("radam", {}, "beta2"),
        ("square", {"warmup_steps": 4}, "shape"),
    ],
)
def test_what_is_missing_is_named(shape, given, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        warmup_factor(shape, 0, **given)


# -- an independent library --------------------------------------------------------------------


def library_factors(warmup, optimizer, num_steps, *args):
    """Return the rates that pytorch_warmup sets, of an optimizer whose own is 1."""
    scheduler = warmup(optimizer, *args)
    found = []
    for _ in range(num_steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        with scheduler.dampening():
            pass
    return found


def adam(*beta2s):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "betas": (0.9, beta2)} for beta2 in beta2s]
    return torch.optim.Adam(groups, lr=1.0)


@pytest.mark.parametrize("steps", [1, 5, 37])
def test_linear_and_exponential_are_those_of_pytorch_warmup(steps):
    linear = library_factors(pytorch_warmup.LinearWarmup, adam(0.9), 100, steps)
    assert linear == [[linear_factor(t, warmup_steps=steps)] for t in range(100)]
    found = library_factors(pytorch_warmup.ExponentialWarmup, adam(0.9), 100, steps)
    expected = [exponential_factor(t, warmup_steps=steps) for t in range(100)]
    assert [f for (f,) in found] == pytest.approx(expected, rel=1e-13, abs=0)


def test_untuned_is_that_of_pytorch_warmup():
    """Which rounds its length down: the same where that is exact, one step apart elsewhere."""
    found = library_factors(pytorch_warmup.UntunedLinearWarmup, adam(0.5, 0.9375), 60)
    assert found == [[untuned_factor(t, beta2=b) for b in (0.5, 0.9375)] for t in range(60)]
    found = library_factors(pytorch_warmup.UntunedLinearWarmup, adam(0.999), 3000)
    expected = [untuned_factor(t, beta2=0.999) for t in range(3000)]
    assert [f for (f,) in found] == pytest.approx(expected, rel=1 / 1999)


def test_radam_is_that_of_pytorch_warmup():
    beta2s = (0.61, 0.9, 0.999)
    found = library_factors(pytorch_warmup.RAdamWarmup, adam(*beta2s), 500)
    for t, factors in enumerate(found):
        expected = [radam_factor(t, beta2=beta2) for beta2 in beta2s]
        assert factors == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("steps", [2, 5, 30])
def test_linear_is_that_of_torchs_scheduler(steps):
    """As the page says to those who come from it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps - 1)
    for t in range(steps + 3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            linear_factor(t, warmup_steps=steps), rel=1e-12
        )
        optimizer.step()
        scheduler.step()
