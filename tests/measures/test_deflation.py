"""The trace with eigenvalues taken out: unbiased, sharper, never for a repeated one."""

import math

import pytest
import torch

from lightning_optkit.measures import hessian_spectrum
from lightning_optkit.measures.deflation import RitzPairs, deflated_trace, lowest_pair, simple_pairs
from lightning_optkit.measures.lanczos import lanczos
from tests.quadratics import MatrixOperator, symmetric, within_sem


def net_like(n=400):
    generator = torch.Generator().manual_seed(3)
    bulk = 0.05 * torch.randn(n - 5, generator=generator, dtype=torch.float64) + 0.01
    return torch.cat([bulk, torch.tensor([-1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)])


def spectra_of(eigenvalues, *, num_seeds=200, num_probes=4, num_matvecs=30):
    operator = MatrixOperator(symmetric(eigenvalues))
    return [
        hessian_spectrum(
            operator,
            num_matvecs=num_matvecs,
            num_probes=num_probes,
            exact_below=0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(num_seeds)
    ]


def test_deflation_is_unbiased_honest_and_ten_times_sharper():
    eigenvalues = net_like()
    found = spectra_of(eigenvalues)
    traces = torch.tensor([f.trace for f in found], dtype=torch.float64)
    errors = torch.tensor([f.trace_standard_error for f in found], dtype=torch.float64)
    truth, n = float(eigenvalues.sum()), len(eigenvalues)
    assert within_sem(traces, truth)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(traces.std()), rel=0.2)
    plain = math.sqrt(2 * n / (4 * n + 2) * (float(eigenvalues.square().sum()) - truth**2 / n))
    assert float(traces.std()) < plain / 10


@pytest.mark.parametrize("copies", [2, 3])
def test_a_repeated_eigenvalue_is_not_counted_once(copies):
    eigenvalues = torch.cat([net_like(200), torch.full((copies,), 30.0, dtype=torch.float64)])
    found = spectra_of(eigenvalues)
    traces = torch.tensor([f.trace for f in found], dtype=torch.float64)
    assert within_sem(traces, float(eigenvalues.sum()))


def test_a_single_probe_takes_nothing_out():
    eigenvalues = net_like(200)
    (found,) = spectra_of(eigenvalues, num_seeds=1, num_probes=1)
    weighted = float((found.ritz_weights * found.ritz_values).sum()) * 200
    assert found.trace == pytest.approx(weighted, rel=1e-12)


def test_simple_pairs_are_eigenpairs_and_only_the_simple_ones():
    eigenvalues = torch.cat([net_like(200), torch.tensor([30.0, 30.0], dtype=torch.float64)])
    matrix = symmetric(eigenvalues)
    pairs = simple_pairs(lanczos(matrix, 40, num_lanes=3, keep_basis=True), torch.clone)
    assert sorted(pairs.values.tolist())[-3:] == pytest.approx([4.0, 8.0, 16.0], rel=1e-9)
    residuals = pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors
    assert float(residuals.norm(dim=1).max()) < 1e-2 * 16 / math.sqrt(200)


def test_pairs_that_another_probe_lacks_are_dropped():
    eye = torch.eye(3, dtype=torch.float64)
    one = RitzPairs(torch.tensor([3.0, 2.0], dtype=torch.float64), eye[:2])
    other = RitzPairs(torch.tensor([3.0], dtype=torch.float64), -eye[:1])
    assert one.common(other, torch.clone).values.tolist() == [3.0]
    none = RitzPairs(torch.empty(0, dtype=torch.float64), eye[:0])
    assert (
        len(one.common(none, torch.clone).values) == len(none.common(one, torch.clone).values) == 0
    )


def test_all_eigenvalues_taken_out_leave_no_error():
    nodes = torch.tensor([[1.0, 5.0], [1.0, 5.0]], dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    norms = torch.ones(2, dtype=torch.float64)
    assert deflated_trace(nodes, weights, norms, torch.tensor([5.0, 1.0]), 2) == (6.0, 0.0)
    # with one of two known, the rest has no spread: it is exact too
    trace, error = deflated_trace(nodes, weights, norms, torch.tensor([5.0]), 2)
    assert (trace, error) == (pytest.approx(6.0, rel=1e-12), pytest.approx(0.0, abs=1e-7))


def test_lowest_pair_is_the_bottom_of_the_spectrum():
    matrix = symmetric(net_like(100))
    value, vector = lowest_pair(lanczos(matrix, 40, num_lanes=2, keep_basis=True))
    assert value == pytest.approx(-1.0, rel=1e-10)
    assert float((matrix @ vector + vector).norm()) < 1e-6
    assert float(vector.norm()) == pytest.approx(1.0, rel=1e-12)
