"""Shares of the way to an averaging phase's learning rate, against their closed forms."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optkit.methods.averaging_rates import annealed_share, cyclic_share

tried = settings(derandomize=True, deadline=None, print_blob=True, database=None)


@pytest.mark.parametrize("epochs", [0.0, 0.125, 1.0, 2.5, 3.999])
def test_annealing_is_half_a_cosine(epochs):
    truth = math.sin(math.pi * epochs / 8) ** 2  # (1 - cos 2x) / 2 = sin² x
    assert annealed_share(epochs, anneal_epochs=4) == pytest.approx(truth, abs=1e-15)


@pytest.mark.parametrize("epochs", [4.0, 4.001, 1e9])
def test_annealing_has_arrived_at_its_end_and_stays(epochs):
    assert annealed_share(epochs, anneal_epochs=4) == 1.0


@pytest.mark.parametrize("epochs", [0, 0.5, 3])
def test_annealing_over_no_epochs_is_at_once(epochs):
    assert annealed_share(epochs, anneal_epochs=0) == 1.0


@tried
@given(st.floats(0, 50), st.floats(0, 50), st.floats(0.01, 20))
def test_annealing_never_turns_back(first, second, anneal_epochs):
    first, second = sorted([first, second])
    low = annealed_share(first, anneal_epochs=anneal_epochs)
    high = annealed_share(second, anneal_epochs=anneal_epochs)
    assert 0 <= low <= high <= 1


@tried
@given(st.integers(1, 12), st.integers(1, 50), st.integers(1, 40))
def test_a_cycle_falls_in_a_straight_line_and_ends_with_its_last_step(cycle, length, num_cycles):
    """Steps are fractions of epochs, whose sums are not exact: no step may count as the next."""
    steps = cycle * length
    for step in range((num_cycles - 1) * steps + 1, num_cycles * steps + 1):
        epochs = (step - 1) // length + ((step - 1) % length + 1) / length  # as SWA counts
        truth = (step - (num_cycles - 1) * steps) / steps
        assert cyclic_share(epochs, cycle=cycle) == pytest.approx(truth, abs=1e-8)


def test_a_cycle_may_be_a_part_of_an_epoch():
    found = [cyclic_share(t, cycle=0.5) for t in (0.25, 0.5, 0.625, 1.0)]
    assert found == [0.5, 1.0, 0.25, 1.0]


def test_a_cycle_begins_at_nothing():
    assert cyclic_share(0.0, cycle=3) == 0.0


@pytest.mark.parametrize("begin", [0.1, 0.3, 1 / 3, 2.7, 5 / 3])
def test_a_cycle_that_began_within_an_epoch_ends_where_it_should(begin):
    """A difference of epochs lies beside the whole number by rounding, for 5 / 3 above it."""
    for cycle in (1, 2):
        for ends in (1, 2, 3):
            epochs = (begin + cycle * ends) - begin
            assert cyclic_share(epochs, cycle=cycle) == pytest.approx(1.0, abs=1e-9)
