"""Lanczos by its own identities, its extremes against scipy, and its behaviour at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from lightning_optkit.measures import CurvatureError, Tridiagonal, lanczos
from lightning_optkit.measures.lanczos import rounding_noise
from lightning_optkit.measures.quadrature import gauss
from tests.quadratics import SPECTRA, MatrixOperator, symmetric

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def clustered(n: int) -> Tensor:
    """Return eigenvalues as a net has them: most near zero, a few large, some negative."""
    generator = torch.Generator().manual_seed(5)
    bulk = 1e-3 * torch.randn(n - 12, generator=generator, dtype=torch.float64)
    outliers = torch.tensor([-1.0, -0.3, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89], dtype=torch.float64)
    return torch.cat([bulk, outliers])


BIG = {
    "clustered": clustered(300),
    "even": torch.linspace(-3, 5, 300, dtype=torch.float64),
    "geometric": torch.logspace(-10, 2, 300, dtype=torch.float64),
}


def tridiagonal(found: Tridiagonal, lane: int = 0) -> Tensor:
    a, b = found.lanes()[lane]
    return torch.diag(a) + torch.diag(b[:-1], 1) + torch.diag(b[:-1], -1)


# -- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", BIG)
def test_the_basis_is_orthonormal_and_tridiagonalises(spectrum, dtype):
    matrix = symmetric(BIG[spectrum]).to(dtype)
    m, lanes = 150, 2
    found = lanczos(matrix, m, num_lanes=lanes, keep_basis=True)
    assert found.basis.shape == (lanes, m, 300)
    assert found.basis.dtype == dtype
    size = float(torch.linalg.matrix_norm(matrix.double(), 2))
    # 1e-12 in float64, 1e-5 in float32: two passes leave some tens of units in the last place.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for lane in range(lanes):
        q = found.basis[lane].double()
        a, b = found.lanes()[lane]
        assert len(a) == m
        assert float((q @ q.T - torch.eye(m).double()).abs().max()) <= tolerance
        residual = matrix.double() @ q.T - q.T @ tridiagonal(found, lane)
        assert float(residual[:, :-1].abs().max()) <= tolerance * size
        last = residual[:, -1]
        assert float(last.norm()) == pytest.approx(float(b[-1]), abs=tolerance * size)
        assert float((q @ last).abs().max()) <= tolerance * size
    assert found.dtype == dtype
    assert found.diagonal.dtype == found.off_diagonal.dtype == torch.float64


def test_a_basis_that_is_not_asked_for_is_not_kept():
    assert lanczos(torch.eye(3), 2).basis is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_eigenvalue_is_found_twice(dtype):
    """Without reorthogonalisation the largest of these appears again and again."""
    matrix = symmetric(BIG["clustered"]).to(dtype)
    nodes, _, residuals = gauss(*lanczos(matrix, 200).lanes()[0])
    found = nodes[(nodes > 0.5) & (residuals < 1e-3)]
    truth = torch.tensor([1.0, 2, 3, 5, 8, 13, 21, 34, 55, 89], dtype=torch.float64)
    assert len(found) == 10
    assert float((found - truth).abs().max()) <= 89 * rounding_noise(dtype)


@pytest.mark.parametrize("spectrum", BIG)
def test_extremes_agree_with_scipy(spectrum):
    matrix = symmetric(BIG[spectrum])
    nodes, _, residuals = gauss(*lanczos(matrix, 120).lanes()[0])
    ends = {"LA": -1, "SA": 0}
    if spectrum == "geometric":  # its smallest are so close that scipy finds none in 3000 steps
        del ends["SA"]
    for which, end in ends.items():
        truth = float(eigsh(matrix.numpy(), k=1, which=which, return_eigenvectors=False)[0])
        noise = rounding_noise(torch.float64) * float(nodes.abs().max())
        assert abs(float(nodes[end]) - truth) <= float(residuals[end]) + noise
        if spectrum == "clustered" or which == "LA":  # isolated: converged to rounding
            assert float(nodes[end]) == pytest.approx(truth, rel=1e-3, abs=1e-6)
        assert (float(nodes[end]) - truth) * (1 if which == "LA" else -1) <= noise


@pytest.mark.parametrize("spectrum", BIG)
def test_every_ritz_value_has_an_eigenvalue_within_its_residual(spectrum):
    eigenvalues = BIG[spectrum]
    nodes, weights, residuals = gauss(*lanczos(symmetric(eigenvalues), 60).lanes()[0])
    nearest = (nodes[:, None] - eigenvalues).abs().min(dim=1).values
    noise = rounding_noise(torch.float64) * float(nodes.abs().max())
    assert bool((nearest <= residuals + noise).all())
    assert float(weights.sum()) == pytest.approx(1, abs=1e-13)


HARD = BIG | {
    "five clusters": torch.cat(
        [
            centre + 1e-7 * torch.linspace(-1, 1, 60, dtype=torch.float64)
            for centre in (-1.0, 0.0, 1.0, 2.0, 5.0)
        ]
    ),
    "one huge": torch.cat(
        [torch.tensor([1e6], dtype=torch.float64), torch.linspace(-1, 1, 299).double()]
    ),
    "squeezed": torch.logspace(-14, 0, 300, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", HARD)
def test_one_orthogonalisation_keeps_250_vectors_orthonormal(spectrum, dtype):
    """Where the residual nearly vanishes too, and all of it is rounding of the product."""
    matrix = symmetric(HARD[spectrum]).to(dtype)
    found = lanczos(matrix, 250, num_lanes=2, keep_basis=True)
    size = float(torch.linalg.matrix_norm(matrix.double(), 2))
    for lane, (a, b) in enumerate(found.lanes()):
        q = found.basis[lane, : len(a)].double()
        gram = q @ q.T - torch.eye(len(a), dtype=torch.float64)
        assert float(gram.abs().max()) <= 16 * EPS[dtype]
        residual = matrix.double() @ q.T - q.T @ tridiagonal(found, lane)
        assert float(residual[:, :-1].norm(dim=0).max()) <= rounding_noise(dtype) * size
        nodes, _, residuals = gauss(a, b)
        truth = torch.linalg.eigvalsh(matrix.double())
        noise = rounding_noise(dtype) * size
        nearest = (nodes[:, None] - truth).abs().min(dim=1).values
        assert bool((nearest <= residuals + noise).all())
        # no ghosts: up to any point there are no more nodes than eigenvalues
        below = (truth[None, :] <= nodes[:, None] + noise).sum(1)
        assert bool((torch.arange(1, len(nodes) + 1) <= below).all())
        above = (truth[None, :] >= nodes[:, None] - noise).sum(1)
        assert bool((torch.arange(len(nodes), 0, -1) <= above).all())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_a_float32_operator_scales_the_result(scale):
    """Squares of these, which float32 does not hold, must not be taken in it."""
    matrix = symmetric(BIG["clustered"]).float()
    plain, scaled = lanczos(matrix, 20), lanczos(matrix * scale, 20)
    assert scaled.num_steps.tolist() == plain.num_steps.tolist() == [20]
    first = slice(0, 3)  # later steps amplify rounding
    torch.testing.assert_close(
        scaled.diagonal[:, first] / scale, plain.diagonal[:, first], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        scaled.off_diagonal[:, first] / scale, plain.off_diagonal[:, first], rtol=1e-4, atol=1e-4
    )


# -- early end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "rank 2 of 40", "all equal"])
def test_a_lane_ends_where_its_space_does(spectrum, dtype):
    special = {"rank 2 of 40": [0.0] * 38 + [-1.0, 3.0], "all equal": [7.0] * 15}
    eigenvalues = torch.tensor(special.get(spectrum) or SPECTRA[spectrum], dtype=torch.float64)
    distinct = eigenvalues.unique()
    # Diagonal, so that products are exact and repeated eigenvalues stay equal in float32.
    # Starts in which no eigenvector is nearly absent: one of weight 1e-5 amplifies rounding, and
    # then the end may be seen one step later.
    generator = torch.Generator().manual_seed(0)
    start = 1 + torch.rand(3, len(eigenvalues), generator=generator, dtype=torch.float64)
    found = lanczos(torch.diag(eigenvalues).to(dtype), len(eigenvalues), start=start)
    scale = float(eigenvalues.abs().max())
    for steps, (a, b) in zip(found.num_steps.tolist(), found.lanes(), strict=True):
        if spectrum == "huge and small" and dtype == torch.float32:
            assert steps == 2  # nine eigenvalues differ by less than the rounding of the tenth
            continue
        assert steps == len(a) == len(b) == len(distinct)
        assert float(b[-1]) == 0
        nodes, weights, residuals = gauss(a, b)
        assert float((nodes - distinct).abs().max()) <= rounding_noise(dtype) * scale
        assert float(residuals.abs().max()) == 0
        assert float(weights.sum()) == pytest.approx(1, abs=1e-13)
    assert found.num_matvecs == 3 * len(eigenvalues)
    beyond = torch.arange(found.diagonal.shape[1]) >= found.num_steps[:, None]
    assert found.diagonal[beyond].count_nonzero() == found.off_diagonal[beyond].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lane_that_ends_does_not_disturb_the_others(dtype):
    matrix = torch.diag(torch.arange(1.0, 9.0)).to(dtype)
    start = torch.ones(2, 8, dtype=torch.float64)
    start[0, 2:] = 0  # lies in the space of two eigenvectors
    found = lanczos(matrix, 8, start=start)
    assert found.num_steps.tolist() == [2, 8]
    assert gauss(*found.lanes()[0])[0].tolist() == pytest.approx([1, 2], rel=1e-6)
    alone = lanczos(matrix, 8, start=start[1:])
    torch.testing.assert_close(found.diagonal[1:], alone.diagonal, rtol=0, atol=64 * EPS[dtype] * 8)


def test_an_eigenvector_as_start_ends_at_once():
    found = lanczos(torch.diag(torch.tensor([3.0, -1.0])), 2, start=torch.tensor([[0.0, 5.0]]))
    assert found.num_steps.tolist() == [1]
    assert found.diagonal[0, 0] == -1
    assert found.start_norms.tolist() == [5.0]


def test_no_more_steps_than_dimensions_are_made():
    operator = MatrixOperator(symmetric([1.0, 2.0, 3.0]))
    found = lanczos(operator, 50)
    assert found.diagonal.shape == (1, 3)
    assert operator.num_matvecs == found.num_matvecs == 3


@pytest.mark.parametrize("value", [0.0, 4.0, -4.0])
def test_one_dimension(value):
    found = lanczos(torch.tensor([[value]]), 5)
    assert found.diagonal.tolist() == [[value]]
    assert found.off_diagonal.tolist() == [[0.0]]
    assert found.num_steps.tolist() == [1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_the_operator_scales_the_result(scale):
    """No absolute number decides when a lane ends."""
    matrix = symmetric(SPECTRA["distinct"])
    plain, scaled = lanczos(matrix, 10), lanczos(matrix * scale, 10)
    assert scaled.num_steps.tolist() == plain.num_steps.tolist() == [10]
    torch.testing.assert_close(scaled.diagonal / scale, plain.diagonal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled.off_diagonal / scale, plain.off_diagonal, rtol=1e-9, atol=0)


# -- lanes, starts and randomness -----------------------------------------------------------------


def test_lanes_are_what_single_runs_are():
    matrix = symmetric(BIG["clustered"])
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(3, 300, generator=generator, dtype=torch.float64)
    together = lanczos(matrix, 40, start=start, keep_basis=True)
    for lane in range(3):
        alone = lanczos(matrix, 40, start=start[lane : lane + 1], keep_basis=True)
        torch.testing.assert_close(together.diagonal[lane], alone.diagonal[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(together.basis[lane], alone.basis[0], rtol=0, atol=1e-8)
        assert together.start_norms[lane] == alone.start_norms[0]


def test_the_start_is_the_first_basis_vector_and_its_length_is_kept():
    start = torch.tensor([[3.0, 4.0, 0.0]])
    found = lanczos(torch.diag(torch.tensor([1.0, 2.0, 5.0])).double(), 1, start=start)
    assert found.start_norms.tolist() == [5.0]
    assert float(found.diagonal[0, 0]) == pytest.approx((9 * 1 + 16 * 2) / 25, rel=1e-15)
    with_basis = lanczos(torch.eye(3).double(), 1, start=start, keep_basis=True)
    assert with_basis.basis[0, 0].tolist() == pytest.approx([0.6, 0.8, 0.0])


def test_starts_are_gaussian():
    """Their squared norms are chi-squared with n degrees of freedom, and no entry is special."""
    n, lanes = 50, 2000
    found = lanczos(torch.eye(n), 1, num_lanes=lanes, keep_basis=True)
    squares = found.start_norms.square().numpy()
    assert abs(squares.mean() - n) <= 4 * math.sqrt(2 * n / lanes)
    spread = squares.var(ddof=1)  # of variance 2n, itself known to sqrt(2 / lanes) of it, and tails
    assert abs(spread - 2 * n) <= 4 * 2 * n * math.sqrt((2 + 12 / n) / lanes)
    gaussian = found.basis[:, 0].double() * found.start_norms[:, None]
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        sem = math.sqrt(variance / gaussian.numel())
        assert abs(float(gaussian.pow(power).mean()) - moment) <= 4 * sem


def test_the_generator_decides_and_the_global_one_is_left_alone():
    matrix = symmetric(BIG["even"])

    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return lanczos(matrix, 5, num_lanes=2, generator=generator).diagonal

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = run(None)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    torch.rand(3)
    assert torch.equal(run(None), first)
    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))
    torch.set_rng_state(torch_state)


def test_a_generator_goes_on_from_run_to_run():
    generator = torch.Generator().manual_seed(0)
    matrix = symmetric(BIG["even"])
    first, second = (lanczos(matrix, 2, generator=generator).start_norms for _ in range(2))
    assert first != second


# -- refusals -------------------------------------------------------------------------------------


class TurnsNaN(MatrixOperator):
    """Gives NaN from the third product on."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        product = super().__matmul__(vectors)
        return product if self.num_matvecs < 3 else product * math.nan


@pytest.mark.parametrize(
    "operator",
    [
        torch.full((3, 3), math.nan),
        torch.diag(torch.tensor([1.0, math.inf, 2.0])),
        TurnsNaN(symmetric(SPECTRA["distinct"])),
    ],
)
def test_products_that_are_not_finite_are_an_error(operator):
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        lanczos(operator, 3)


def test_one_bad_lane_is_an_error_too():
    matrix = torch.diag(torch.tensor([1.0, 2.0, math.nan]))
    matrix_without_nan = torch.nan_to_num(matrix, 3.0)
    start = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert lanczos(matrix_without_nan, 2, start=start).num_steps.tolist() == [2, 2]
    with pytest.raises(CurvatureError):
        lanczos(matrix, 2, start=start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_matvecs": 0}, "`num_matvecs` must be at least 1, got 0"),
        ({"num_matvecs": -3}, "`num_matvecs` must be at least 1, got -3"),
        ({"num_lanes": 0}, "`num_lanes` must be at least 1, got 0"),
        ({"start": torch.ones(3)}, r"non-zero rows of length 3, got shape \(3,\)"),
        ({"start": torch.ones(1, 4)}, r"non-zero rows of length 3, got shape \(1, 4\)"),
        ({"start": torch.tensor([[1.0, 0, 0], [0, 0, 0]])}, "must hold non-zero rows"),
        ({"start": torch.tensor([[1.0, math.nan, 0]])}, "must hold non-zero rows"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(torch.eye(3), **{"num_matvecs": 2} | options)


def test_rounding_noise_is_32_units():
    assert rounding_noise(torch.float32) == 32 * 2.0**-23
    assert rounding_noise(torch.float64) == 32 * 2.0**-52
