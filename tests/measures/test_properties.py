"""Promises that hold for every spectrum, tried on spectra that hypothesis makes up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_optkit.measures import (
    HessianOperator,
    critical_point,
    hessian_spectrum,
    top_eigenpairs,
)
from lightning_optkit.measures.lanczos import lanczos, rounding_noise
from lightning_optkit.measures.quadrature import gauss
from tests.quadratics import MatrixOperator, orthogonal, symmetric

tried = settings(derandomize=True, deadline=None, print_blob=True, max_examples=80, database=None)

# Zeros, repeated values, signs and fourteen decades, in one list.
EIGENVALUES = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e6, -1e6, 1e-8, -1e-8]),
        st.floats(-10, 10).map(lambda x: round(x, 9)),
    ),
    min_size=1,
    max_size=12,
)
DTYPES = st.sampled_from([torch.float32, torch.float64])
WHICH = st.sampled_from(["magnitude", "largest", "smallest", "both"])
SEEDS = st.integers(0, 20)


def ends(truth: Tensor, k: int, which: str) -> Tensor:
    """Return the wanted of the ascending true eigenvalues."""
    n = len(truth)
    if which == "magnitude":
        return truth[truth.abs().argsort(descending=True, stable=True)][:k]
    if which == "largest":
        return truth.flip(0)[:k]
    if which == "smallest":
        return truth[: min(k, n)].flip(0)
    count = min(2 * k, n)
    return torch.cat([truth.flip(0)[: count - count // 2], truth[: count // 2].flip(0)])


@tried
@given(EIGENVALUES, DTYPES, WHICH, st.integers(1, 14), SEEDS)
def test_an_eigenvalue_lies_within_each_residual(eigenvalues, dtype, which, k, seed):
    matrix = symmetric(eigenvalues, seed=seed).to(dtype)
    operator = MatrixOperator(matrix)
    found = top_eigenpairs(operator, k, which=which, generator=torch.Generator().manual_seed(seed))
    truth = torch.linalg.eigvalsh(matrix.double())
    n, vectors = len(matrix), found.vectors.double()
    count = min(2 * k if which == "both" else k, n)
    assert len(found.values) == count
    assert found.num_matvecs == operator.num_matvecs <= n
    nearest = (truth[:, None] - found.values).abs().min(0).values
    assert bool((nearest <= found.residuals).all())
    residuals = (vectors @ matrix.double() - found.values[:, None] * vectors).norm(dim=1)
    assert bool((residuals <= found.residuals).all())
    gram = vectors @ vectors.T - torch.eye(count, dtype=torch.float64)
    assert float(gram.abs().max()) <= 64 * torch.finfo(dtype).eps
    noise = rounding_noise(dtype) * float(truth.abs().max())
    assert bool((found.values <= truth[-1] + noise).all())
    assert bool((found.values >= truth[0] - noise).all())


@tried
@given(EIGENVALUES, DTYPES, WHICH, SEEDS)
def test_all_pairs_of_a_small_operator_are_its_eigenvalues(eigenvalues, dtype, which, seed):
    """As many as there are: repeated ones as often as they are repeated."""
    matrix = symmetric(eigenvalues, seed=seed).to(dtype)
    found = top_eigenpairs(MatrixOperator(matrix), len(matrix), which=which)
    truth = torch.linalg.eigvalsh(matrix.double())
    noise = rounding_noise(dtype) * float(truth.abs().max())
    assert float((found.values.sort().values - truth).abs().max()) <= noise
    assert bool(found.converged.all())
    expected = ends(truth, len(matrix), which)
    if which == "magnitude":
        assert float((found.values.abs() - expected.abs()).abs().max()) <= noise
    else:
        assert float((found.values - expected).abs().max()) <= noise


@tried
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique_by=abs), WHICH, SEEDS, DTYPES)
def test_simple_eigenvalues_are_found_within_their_errors(eigenvalues, which, seed, dtype):
    """Distinct in magnitude too, so that the wanted ones are known and none hides."""
    matrix = symmetric([float(value) for value in eigenvalues], seed=seed).to(dtype)
    for k in (1, 2, 5):
        found = top_eigenpairs(MatrixOperator(matrix), k, which=which, rtol=0)
        expected = ends(torch.linalg.eigvalsh(matrix.double()), k, which)
        assert bool(((found.values - expected).abs() <= found.errors).all())


@tried
@given(EIGENVALUES, DTYPES, st.floats(1e-5, 1.0), SEEDS)
def test_exact_shares_lie_within_their_bounds(eigenvalues, dtype, tol_rel, seed):
    matrix = symmetric(eigenvalues, seed=seed).to(dtype)
    truth = torch.linalg.eigvalsh(matrix.double())
    found = hessian_spectrum(MatrixOperator(matrix), tol_rel=tol_rel)
    shares = (found.positive, found.negative, found.zero)
    inside = (truth > found.tol, truth < -found.tol, truth.abs() <= found.tol)
    for share, mask in zip(shares, inside, strict=True):
        assert share.lower - 1e-12 <= float(mask.double().mean()) <= share.upper + 1e-12
        assert 0 <= share.lower <= share.value <= share.upper <= 1
    assert abs(sum(share.value for share in shares) - 1) <= 1e-12
    assert abs(found.trace - float(matrix.double().trace())) <= len(truth) * found.noise
    assert abs(found.trace - sum(found.ritz_values[0].tolist())) <= len(truth) * found.noise


@tried
@given(EIGENVALUES, DTYPES, SEEDS)
def test_certified_shares_hold_the_truth(eigenvalues, dtype, seed):
    """At a confidence that leaves one miss in a million."""
    matrix = symmetric(eigenvalues, seed=seed).to(dtype)
    truth = torch.linalg.eigvalsh(matrix.double())
    found = hessian_spectrum(
        MatrixOperator(matrix),
        exact_below=0,
        confidence=1 - 1e-6,
        generator=torch.Generator().manual_seed(seed),
    )
    inside = (truth > found.tol, truth < -found.tol, truth.abs() <= found.tol)
    near = ((truth.abs() - found.tol).abs() <= 2 * found.noise).any()  # rounding decides there
    for share, mask in zip((found.positive, found.negative, found.zero), inside, strict=True):
        assert share.lower <= share.value <= share.upper
        assert near or share.lower - 1e-9 <= float(mask.double().mean()) <= share.upper + 1e-9


@tried
@given(EIGENVALUES, st.sampled_from([1e-12, 1e-3, 0.5, 3.0, 1e9]), st.booleans(), SEEDS)
def test_scaling_the_loss_scales_the_eigenvalues(eigenvalues, scale, exact, seed):
    matrix = symmetric(eigenvalues, seed=seed)
    plain, scaled = (MatrixOperator(c * matrix) for c in (1.0, scale))
    options = {} if exact else {"exact_below": 0, "num_probes": 2}
    one, other = hessian_spectrum(plain, **options), hessian_spectrum(scaled, **options)
    floor = 1e-290 * max(1.0, scale)  # under zero, the same at any scale
    for name in ("lambda_max", "lambda_min", "tol"):
        assert abs(getattr(other, name) - scale * getattr(one, name)) <= 2 * other.noise + floor
    first, second = (top_eigenpairs(op, which="both") for op in (plain, scaled))
    assert bool(
        (second.values - scale * first.values).abs().max()
        <= (second.residuals + scale * first.residuals).max()
    )


@tried
@given(EIGENVALUES, SEEDS, st.randoms(use_true_random=False))
def test_permuting_parameters_changes_nothing(eigenvalues, seed, random):
    n = len(eigenvalues)
    matrix = symmetric(eigenvalues, seed=seed)
    order = list(range(n))
    random.shuffle(order)
    turned = matrix[order][:, order]
    one, other = (hessian_spectrum(MatrixOperator(m)) for m in (matrix, turned))
    difference = (one.ritz_values - other.ritz_values).abs().max()
    assert float(difference) <= one.noise
    assert abs(one.trace - other.trace) <= n * one.noise
    first, second = (top_eigenpairs(MatrixOperator(m), n) for m in (matrix, turned))
    difference = (first.values.sort().values - second.values.sort().values).abs().max()
    assert float(difference) <= 2 * one.noise


@tried
@given(EIGENVALUES, DTYPES, st.integers(1, 12), SEEDS)
def test_lanczos_stays_orthonormal_and_certified(eigenvalues, dtype, steps, seed):
    matrix = symmetric(eigenvalues, seed=seed).to(dtype)
    found = lanczos(matrix, steps, keep_basis=True, generator=torch.Generator().manual_seed(seed))
    truth = torch.linalg.eigvalsh(matrix.double())
    nodes, weights, residuals = gauss(*found.lanes()[0])
    q = found.basis[0, : len(nodes)].double()
    gram = q @ q.T - torch.eye(len(q), dtype=torch.float64)
    assert float(gram.abs().max()) <= 64 * torch.finfo(dtype).eps
    noise = rounding_noise(dtype) * float(truth.abs().max())
    nearest = (nodes[:, None] - truth).abs().min(dim=1).values
    assert bool((nearest <= residuals + noise).all())
    assert abs(float(weights.sum()) - 1) <= 1e-12


@tried
@given(EIGENVALUES, DTYPES, SEEDS)
def test_a_descent_is_claimed_just_where_an_eigenvalue_is_negative(eigenvalues, dtype, seed):
    """On a quadratic the model is the loss, up to the rounding of the loss."""
    matrix = symmetric(eigenvalues, seed=seed).to(dtype)
    params = {"w": (orthogonal(len(matrix), seed=seed)[0]).to(dtype)}
    operator = HessianOperator(lambda p: p["w"] @ matrix @ p["w"] / 2, params, self_check=False)
    spectrum = hessian_spectrum(operator)
    found = critical_point(operator, spectrum)
    assert (found.descent is not None) == (spectrum.lambda_min < -spectrum.tol)
    if found.descent is None:
        return
    assert found.descent.predicted[0] <= found.descent.predicted[1]
    assert found.descent.predicted[0] < 0
    size = float(torch.linalg.matrix_norm(matrix.double(), 2)) * (1 + found.descent.step) ** 2
    rounding = 64 * torch.finfo(dtype).eps * size
    for predicted, actual in zip(found.descent.predicted, found.descent.actual, strict=True):
        assert abs(predicted - actual) <= rounding
