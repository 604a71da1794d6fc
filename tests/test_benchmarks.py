from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks.equal_error import frobenius_squared, probes_for, top_of, worst_error
from tests.benchmarks.timing import Outcome, OutOfPatience, in_turn

EIGENVALUES = torch.tensor([-10.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # squares sum to 112


@pytest.mark.parametrize(
    ("method", "products"),
    [
        ("hutchinson", 10),  # 2 * 112 / 9 is still above 24
        ("hutch++", 3),  # one probe takes -10 out: 2 * 12 / 1, just met
        ("xtrace", 4),  # one probe takes nothing out: 2 * 112; two take -10 out: 2 * 12 / 2
    ],
)
def test_probes_for_is_the_least_count_that_meets_the_variance(method: str, products: int) -> None:
    variance = 24.0
    assert probes_for(method, variance**0.5 * (1 + 1e-12), 112.0, EIGENVALUES) == products


def test_frobenius_norm_and_top_of_an_exact_spectrum() -> None:
    spectrum = SimpleNamespace(
        ritz_values=torch.stack([EIGENVALUES, EIGENVALUES * 0.9]),
        ritz_weights=torch.full((2, 5), 0.2, dtype=torch.float64),
        num_params=5,
    )
    assert top_of(spectrum, 2) == [-10.0, 3.0]
    exact = SimpleNamespace(
        ritz_values=EIGENVALUES[None], ritz_weights=spectrum.ritz_weights[:1], num_params=5
    )
    assert frobenius_squared(exact, torch.tensor([-10.0])) == pytest.approx(112.0)


def test_worst_error_compares_by_magnitude() -> None:
    assert worst_error([3.0, -11.0], torch.tensor([-10.0, 3.0]).double()) == pytest.approx(0.1)


def test_a_peer_past_its_deadline_is_cut_off_and_not_run_again() -> None:
    deadlines = []

    def slow(deadline: float) -> tuple[None, int]:
        deadlines.append(deadline)
        raise OutOfPatience(7)

    outcomes = in_turn(
        "ours", lambda _: (1.0, 3), {"slow": slow, "fast": lambda _: (2.0, 4)}, rounds=2, patience=8
    )
    assert len(deadlines) == 1
    assert [len(outcomes[name].seconds) for name in ("ours", "slow", "fast")] == [3, 1, 2]
    assert outcomes["slow"].is_cut
    assert outcomes["slow"].num_products == 7
    assert Outcome(seconds=[6.0], is_cut=True).times(2.0) == "> 3.00"
