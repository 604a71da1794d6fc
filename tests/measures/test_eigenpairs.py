"""`top_eigenpairs` against prescribed spectra and scipy, its certificates, and its warm starts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import (
    CurvatureError,
    Eigenpairs,
    HessianOperator,
    WrongDerivativesError,
    top_eigenpairs,
)
from lightning_optkit.measures.lanczos import rounding_noise
from tests.quadratics import (
    SPECTRA,
    MatrixOperator,
    Quadratic,
    orthogonal,
    random_params,
    symmetric,
)

WHICH = ["magnitude", "largest", "smallest", "both"]
DTYPES = [torch.float32, torch.float64]


def wanted(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    """Return the true values in the order that is promised."""
    descending = eigenvalues.double().sort(descending=True).values
    n = len(descending)
    if which == "magnitude":
        return descending[descending.abs().argsort(descending=True, stable=True)][:k]
    if which == "largest":
        return descending[:k]
    if which == "smallest":
        return descending[-min(k, n) :]
    count = min(2 * k, n)
    return torch.cat([descending[: count - count // 2], descending[n - count // 2 :]])


def residuals_of(found: Eigenpairs, matrix: Tensor) -> Tensor:
    vectors = found.vectors.double()
    return (vectors @ matrix.double() - found.values[:, None] * vectors).norm(dim=1)


def assert_certified(found: Eigenpairs, matrix: Tensor) -> None:
    """Residuals are no less than the true ones, and an eigenvalue lies within each."""
    assert bool((residuals_of(found, matrix) <= found.residuals).all())
    truth = torch.linalg.eigvalsh(matrix.double())
    assert bool(((truth[:, None] - found.values).abs().min(0).values <= found.residuals).all())
    assert bool((found.errors <= found.residuals).all())
    vectors = found.vectors.double()
    gram = vectors @ vectors.T - torch.eye(len(vectors)).double()
    assert float(gram.abs().max()) <= 64 * torch.finfo(matrix.dtype).eps


def net_like(n: int = 300) -> Tensor:
    """Return eigenvalues as a net's: a bulk around zero, one negative, four far out."""
    generator = torch.Generator().manual_seed(3)
    bulk = 0.05 * torch.randn(n - 5, generator=generator, dtype=torch.float64) + 0.01
    return torch.cat([bulk, torch.tensor([-1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)])


# -- prescribed spectra -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("spectrum", sorted(set(SPECTRA) - {"huge and small", "repeated"}))
def test_all_wanted_eigenvalues_of_a_small_operator_are_found(spectrum, which, dtype):
    assert_all_found(symmetric(SPECTRA[spectrum]).to(dtype), which, (1, 2, 3, 5, 9, 10, 14))


def test_one_huge_eigenvalue_does_not_make_the_others_converge_at_once():
    for which in WHICH:
        assert_all_found(symmetric(SPECTRA["huge and small"]), which, (1, 2, 3, 5, 9, 10))


def test_repeated_eigenvalues_are_found_as_often_as_they_are_repeated():
    for which in WHICH:
        for dtype in DTYPES:
            assert_all_found(symmetric(SPECTRA["repeated"]).to(dtype), which, (1, 2, 3, 5, 9, 10))


def assert_all_found(matrix: Tensor, which: str, counts: tuple[int, ...]) -> None:
    dtype = matrix.dtype
    truth = torch.linalg.eigvalsh(matrix.double())
    noise = rounding_noise(dtype) * float(truth.abs().max())
    for k in counts:
        found = top_eigenpairs(MatrixOperator(matrix), k, which=which, rtol=0)
        expected = wanted(truth, k, which)
        assert_certified(found, matrix)
        assert bool(found.converged.all())
        if which == "magnitude":  # of two with one magnitude either may come first
            assert bool((found.values.abs() - expected.abs()).abs().max() <= noise)
            assert bool((found.values.abs().diff() <= noise).all())
        else:
            assert bool((found.values - expected).abs().max() <= noise)
            assert bool((found.values.diff() <= noise).all())
        assert found.num_matvecs <= 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_shapes_and_types_that_are_promised(dtype):
    matrix = symmetric(net_like(60)).to(dtype)
    found = top_eigenpairs(MatrixOperator(matrix), 3)
    assert found.vectors.shape == (3, 60)
    assert found.vectors.dtype == dtype
    for part in (found.values, found.residuals, found.errors):
        assert part.shape == (3,)
        assert part.dtype == torch.float64
    assert found.converged.dtype == torch.bool
    assert top_eigenpairs(MatrixOperator(matrix), 3, which="both").values.shape == (6,)


@pytest.mark.parametrize(
    ("which", "scipys"), [("largest", "LA"), ("smallest", "SA"), ("both", "BE")]
)
@pytest.mark.parametrize("basis_size", [None, 9])
def test_scipy_agrees(which, scipys, basis_size):
    matrix = symmetric(net_like(100))
    k = 2 if which == "both" else 4
    theirs = eigsh(matrix.numpy(), k=4, which=scipys, return_eigenvectors=False, tol=1e-12)
    ours = top_eigenpairs(
        MatrixOperator(matrix), k, which=which, rtol=1e-10, basis_size=basis_size, max_matvecs=3000
    )
    assert bool(ours.converged.all())
    assert ours.values.tolist() == pytest.approx(sorted(theirs, reverse=True), rel=1e-9)
    if basis_size is None:  # in thousands of products rounding adds up beyond that of one
        assert_certified(ours, matrix)


def test_ends_are_algebraic_and_magnitude_is_not():
    matrix = torch.diag(torch.tensor([-9.0, -1.0, 0.5, 4.0, 7.0], dtype=torch.float64))
    values = {w: top_eigenpairs(matrix, 2, which=w, rtol=1e-12).values.tolist() for w in WHICH}
    assert values["magnitude"] == pytest.approx([-9, 7])
    assert values["largest"] == pytest.approx([7, 4])
    assert values["smallest"] == pytest.approx([-1, -9])
    assert values["both"] == pytest.approx([7, 4, -1, -9])


def test_both_ends_of_a_small_operator_do_not_overlap():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert top_eigenpairs(matrix, 2, which="both").values.tolist() == pytest.approx([3, 2, 1])
    assert top_eigenpairs(matrix[:1, :1], 2, which="both").values.tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_eigenvalue_is_returned_twice(dtype):
    """Without reorthogonalisation copies of the largest appear."""
    matrix = symmetric(net_like()).to(dtype)
    found = top_eigenpairs(
        MatrixOperator(matrix), 5, rtol=0, max_matvecs=200, basis_size=200
    )  # far beyond convergence
    noise = rounding_noise(dtype) * 16
    assert found.values.tolist() == pytest.approx([16, 8, 4, 2, -1], abs=noise)
    assert_certified(found, matrix)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(s, torch.float32) for s in (1e-12, 1e12)]  # float32 holds the squares of no more
    + [(s, torch.float64) for s in (1e-30, 1e-12, 1e12, 1e30)],
)
def test_scaling_the_operator_scales_the_result(scale, dtype):
    matrix = symmetric(net_like(80)).to(dtype)
    plain = top_eigenpairs(MatrixOperator(matrix), 3)
    scaled = top_eigenpairs(MatrixOperator(matrix * scale), 3)
    rounding = 64 * torch.finfo(dtype).eps
    assert scaled.num_matvecs == plain.num_matvecs
    torch.testing.assert_close(scaled.values / scale, plain.values, rtol=rounding, atol=0)
    torch.testing.assert_close(
        scaled.errors / scale, plain.errors, rtol=0.1, atol=rounding * float(plain.values[0])
    )


def test_turning_the_sign_turns_the_ends_around():
    matrix = symmetric(net_like(80))
    plain = top_eigenpairs(matrix, 3, which="largest")
    turned = top_eigenpairs(-matrix, 3, which="smallest")
    torch.testing.assert_close(turned.values.flip(0), -plain.values, rtol=1e-12, atol=0)
    assert turned.num_matvecs == plain.num_matvecs


# -- stopping -----------------------------------------------------------------------------------


def test_it_stops_as_soon_as_the_tolerance_is_met():
    operator = MatrixOperator(symmetric(net_like()))
    truth = torch.tensor([16.0, 8.0, 4.0], dtype=torch.float64)
    spent = []
    for rtol in (1e-1, 1e-3, 1e-6, 1e-12):
        operator.num_matvecs = 0
        found = top_eigenpairs(operator, 3, rtol=rtol)
        assert found.num_matvecs == operator.num_matvecs
        assert bool((found.errors - operator.noise * 16 <= rtol * found.values).all())
        assert float(((found.values - truth) / truth).abs().max()) <= rtol
        spent.append(found.num_matvecs)
    assert spent == sorted(set(spent))
    assert spent[1] <= 10  # a handful: the outliers are far out


def test_errors_are_the_square_of_the_residual_over_the_gap():
    r"""For a matrix of two the Ritz vector's angle tells both exactly."""
    angle = 0.01
    start = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64)
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    first = top_eigenpairs(matrix, 1, start=start, max_matvecs=1, rtol=1e-14)
    sine = 2 * math.sin(angle) * math.cos(angle)
    assert float(first.residuals[0]) >= sine / 2  # nobody knows of a gap yet
    generic = symmetric(net_like())
    noise = rounding_noise(torch.float64) * 16
    truth = torch.linalg.eigvalsh(generic)
    past = [top_eigenpairs(generic, max_matvecs=m, rtol=0) for m in range(1, 10)]
    for before, last, found in zip(past, past[1:], past[2:], strict=False):
        residual = float(found.residuals[0]) - noise
        assert residual == pytest.approx(float(residuals_of(found, generic)[0]), rel=1e-3)
        moved = max(
            abs(float(found.values[0] - last.values[0])),
            abs(float(last.values[0] - before.values[0])),
        )
        expected = min(residual, max(moved, residual**2 / 8))
        assert float(found.errors[0]) - noise == pytest.approx(expected, rel=0.1)
        assert abs(float(found.values[0] - truth[-1])) <= float(found.errors[0])
    assert bool(past[-1].errors[0] < past[-1].residuals[0] / 2)


def test_what_has_not_converged_says_so():
    matrix = symmetric(torch.linspace(-1, 1, 300, dtype=torch.float64))
    for max_matvecs in (1, 2, 7, 30, 60):  # the last beyond a restart
        operator = MatrixOperator(matrix)
        found = top_eigenpairs(operator, 3, rtol=1e-10, max_matvecs=max_matvecs)
        assert found.num_matvecs == operator.num_matvecs == max_matvecs
        assert len(found.values) == min(3, max_matvecs)
        assert not bool(found.converged.any())
        assert_certified(found, matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 3])
def test_restarts_converge_and_stay_certified(k, which, dtype):
    """The smallest basis that is allowed is cut back every few products."""
    eigenvalues = torch.linspace(-1, 1, 100, dtype=torch.float64) ** 3
    matrix = symmetric(eigenvalues).to(dtype)
    count = 2 * k if which == "both" else k
    operator = MatrixOperator(matrix)
    for max_matvecs in (2 * count + 2, 4 * count, 3000):
        found = top_eigenpairs(
            operator,
            k,
            which=which,
            rtol=1e-8,
            basis_size=2 * count + 1,
            max_matvecs=max_matvecs,
        )
        assert_certified(found, matrix)
    assert bool(found.converged.all())
    assert found.num_matvecs > 2 * count + 1  # there were restarts
    expected = wanted(eigenvalues, k, which)
    tolerance = 1e-7 + 8 * rounding_noise(dtype)
    assert found.values.abs().tolist() == pytest.approx(expected.abs().tolist(), abs=tolerance)


def test_a_basis_that_is_cut_back_is_no_larger_than_asked():
    held: list[int] = []

    class Watched(MatrixOperator):
        def __matmul__(self, vectors: Tensor) -> Tensor:
            base = vectors._base if vectors._base is not None else vectors
            held.append(base.numel() // len(self.matrix))
            return super().__matmul__(vectors)

    top_eigenpairs(
        Watched(symmetric(torch.linspace(-1, 1, 200).double())), 2, basis_size=9, rtol=1e-8
    )
    assert max(held) <= 9


# -- blocks that close --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [2, 3])
def test_repeated_eigenvalues_of_a_low_rank_operator_are_all_found(copies, dtype):
    eigenvalues = torch.zeros(120, dtype=torch.float64)
    eigenvalues[:copies] = 5.0
    eigenvalues[copies] = -2.0
    matrix = torch.diag(eigenvalues).to(dtype)
    found = top_eigenpairs(MatrixOperator(matrix), copies + 1)
    assert found.values.tolist() == pytest.approx([5.0] * copies + [-2.0], rel=1e-5)
    assert bool(found.converged.all())
    assert_certified(found, matrix)


def test_zeros_fill_what_a_low_rank_operator_leaves():
    eigenvalues = torch.zeros(60, dtype=torch.float64)
    eigenvalues[7] = 3.0
    found = top_eigenpairs(torch.diag(eigenvalues), 4)
    assert found.values.tolist() == pytest.approx([3.0, 0, 0, 0], abs=1e-12)
    assert bool(found.converged.all())


@pytest.mark.parametrize("which", WHICH)
def test_a_block_after_one_that_closed_may_be_longer_than_the_basis(which):
    """Its vectors stay coupled where the basis grows: else false pairs have residual zero."""
    eigenvalues = torch.linspace(-1, 1, 150, dtype=torch.float64)
    matrix = torch.diag(eigenvalues)
    start = torch.zeros(1, 150, dtype=torch.float64)
    start[0, 17] = 1.0  # an eigenvector: a block of one
    for max_matvecs in (60, 149):
        found = top_eigenpairs(
            matrix, 2, which=which, start=start, rtol=1e-6, max_matvecs=max_matvecs
        )
        assert_certified(found, matrix)
    expected = wanted(eigenvalues, 2, which)
    assert found.values.abs().tolist() == pytest.approx(expected.abs().tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "eigenvalues", [[3.0], [0.0], [-2.0], [0.0, 0.0], [4.0, 4.0], [1e8, -1e-3]]
)
@pytest.mark.parametrize("which", WHICH)
def test_smallest_operators(eigenvalues, which):
    operator = HessianOperator(
        Quadratic(symmetric(eigenvalues)), random_params(*[()] * len(eigenvalues))
    )
    found = top_eigenpairs(operator, 3, which=which)
    truth = wanted(torch.tensor(eigenvalues), 3, which)
    noise = operator.noise * float(truth.abs().max())
    assert len(found.values) == len(eigenvalues)
    assert float((found.values - truth).abs().max()) <= noise
    assert bool(found.converged.all())


def test_an_operator_of_zeros_has_zero_eigenvalues():
    found = top_eigenpairs(torch.zeros(50, 50), 3)
    assert found.values.tolist() == [0, 0, 0]
    assert bool(found.converged.all())
    assert found.residuals.tolist() == [0, 0, 0]


# -- warm starts --------------------------------------------------------------------------------


def skew(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return (matrix - matrix.T) / math.sqrt(2 * n)


@pytest.mark.parametrize("k", [1, 3])
def test_following_a_slowly_turning_matrix_takes_a_handful_of_products(k):
    eigenvalues = net_like()
    turn = torch.matrix_exp(0.02 * skew(300))
    vectors, start, spent = orthogonal(300), None, []
    for _ in range(30):
        matrix = vectors @ torch.diag(eigenvalues) @ vectors.T
        found = top_eigenpairs(MatrixOperator((matrix + matrix.T) / 2), k, start=start)
        truth = torch.tensor([16.0, 8.0, 4.0], dtype=torch.float64)[:k]
        assert float(((found.values - truth) / truth).abs().max()) <= 1e-3
        assert bool(found.converged.all())
        spent.append(found.num_matvecs)
        start, vectors = found.vectors, turn @ vectors
    assert max(spent[1:]) <= k + 4
    assert sum(spent[1:]) < 29 * spent[0]


def test_a_pair_that_is_tracked_too_may_overtake():
    """With two vectors tracked the order of values follows; one alone knows no other."""
    bulk = net_like()[:-5]
    start = None
    for t in range(31):
        eigenvalues = torch.cat([torch.tensor([4 - 0.1 * t, 2.05 + 0.1 * t]).double(), bulk])
        found = top_eigenpairs(torch.diag(eigenvalues), 2, start=start)
        expected = eigenvalues[:2].sort(descending=True).values
        assert found.values.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
        start = found.vectors


def test_a_single_pair_that_is_followed_is_certified_as_an_eigenvalue_also_where_it_is_overtaken():
    bulk = net_like()[:-5]
    start = None
    for t in range(31):
        eigenvalues = torch.cat([torch.tensor([4 - 0.1 * t, 2.05 + 0.1 * t]).double(), bulk])
        matrix = torch.diag(eigenvalues)
        found = top_eigenpairs(matrix, 1, start=start)
        assert_certified(found, matrix)
        start = found.vectors


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_eigenvector_of_a_lower_eigenvalue_is_not_returned_as_the_top_one(dtype):
    assert_not_misled(3.0, dtype)


def test_nor_where_the_top_one_is_huge():
    assert_not_misled(1e6, torch.float64)


def assert_not_misled(top: float, dtype: torch.dtype) -> None:
    eigenvalues = torch.linspace(0.1, 1, 60, dtype=torch.float64)
    eigenvalues[-1] = top
    vectors = orthogonal(60)
    matrix = vectors @ torch.diag(eigenvalues) @ vectors.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    for which in ("magnitude", "largest"):
        found = top_eigenpairs(MatrixOperator(matrix), 1, which=which, start=vectors[:, 10][None])
        assert float(found.values[0]) == pytest.approx(top, rel=1e-3)
        assert_certified(found, matrix)


def test_a_start_may_be_one_vector_or_rows_of_any_length_and_type():
    matrix = symmetric(net_like())
    top = torch.linalg.eigh(matrix).eigenvectors[:, -1] + 1e-4  # an exact one closes a block
    for start in (top, 1e-6 * top[None], 1e6 * top[None], top.float(), nn.Parameter(top[None])):
        found = top_eigenpairs(matrix, 1, start=start)
        assert float(found.values[0]) == pytest.approx(16, rel=1e-6)
        assert not found.vectors.requires_grad
    nearly = top + 1e-3 * torch.linalg.eigh(matrix).eigenvectors[:, :50].sum(1)
    warm = top_eigenpairs(matrix, 1, start=nearly[None])
    assert warm.num_matvecs < top_eigenpairs(matrix, 1).num_matvecs


def test_seeds_decide_and_the_default_is_one():
    matrix = symmetric(torch.linspace(-1, 1, 100).double())

    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return top_eigenpairs(matrix, max_matvecs=3, generator=generator).values

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(run(None), run(None))
    assert torch.equal(run(None), run(0))
    assert not torch.equal(run(1), run(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


# -- operators of losses ------------------------------------------------------------------------


def small_net(layer: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)] if layer is None else [layer]
        return nn.Sequential(*layers).double(), torch.randn(9, 3, dtype=torch.float64)


def test_a_net_and_its_dense_hessian_have_the_same_ends():
    net, x = small_net()
    operator = HessianOperator(
        lambda p: functional_call(net, p, (x,)).square().mean(), dict(net.named_parameters())
    )
    truth = torch.linalg.eigvalsh(operator.dense())
    for which in WHICH:
        found = top_eigenpairs(operator, 2, which=which, rtol=1e-8)
        expected = wanted(truth, 2, which)
        assert found.values.tolist() == pytest.approx(expected.tolist(), rel=1e-7, abs=1e-12)


def test_weight_norm_takes_part_with_its_true_second_derivative():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
        x = torch.randn(9, 3, dtype=torch.float64)
    params = dict(layer.named_parameters())

    def by_formula(p: dict[str, Tensor]) -> Tensor:
        g, v = p["parametrizations.weight.original0"], p["parametrizations.weight.original1"]
        return (x @ (g * v / v.norm(dim=1, keepdim=True)).T + p["bias"]).square().mean()

    truth = torch.linalg.eigvalsh(HessianOperator(by_formula, params).dense())
    found = top_eigenpairs(
        HessianOperator(lambda p: functional_call(layer, p, (x,)).square().mean(), params),
        which="both",
        rtol=1e-9,
    )
    assert found.values.tolist() == pytest.approx([float(truth[-1]), float(truth[0])], rel=1e-8)


def test_parameters_that_moved_are_measured_where_they_are():
    w = nn.Parameter(torch.arange(1.0, 5.0, dtype=torch.float64))
    operator = HessianOperator(lambda p: p["w"].pow(3).sum() / 6, {"w": w})
    before = top_eigenpairs(operator, rtol=1e-9)
    with torch.no_grad():
        w.mul_(3)
    after = top_eigenpairs(operator, rtol=1e-9, start=before.vectors)
    assert (float(before.values[0]), float(after.values[0])) == pytest.approx((4, 12), rel=1e-8)


def test_parameters_without_a_part_have_eigenvalue_zero():
    params = {"used": torch.ones(2).double(), "unused": torch.ones(3).double()}
    operator = HessianOperator(lambda p: p["used"].pow(2).sum(), params)
    found = top_eigenpairs(operator, 5)
    assert found.values.tolist() == pytest.approx([2, 2, 0, 0, 0], abs=1e-12)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


def test_a_function_that_can_be_differentiated_once_is_refused():
    operator = HessianOperator(
        lambda p: OnceDifferentiable.apply(p["w"]).sum(), {"w": torch.ones(3)}
    )
    with pytest.raises((CurvatureError, WrongDerivativesError), match="second derivative"):
        top_eigenpairs(operator)


def test_no_gradient_is_asked_for_and_none_is_left():
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    operator = HessianOperator(lambda p: p["w"].pow(4).sum(), {"w": w})
    with torch.no_grad():
        found = top_eigenpairs(operator, 2)
    assert w.grad is None
    assert not found.vectors.requires_grad
    with torch.inference_mode():
        assert top_eigenpairs(operator, 2).values.tolist() == found.values.tolist()


# -- refusals -----------------------------------------------------------------------------------


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
        top_eigenpairs(operator, 2, rtol=1e-9)


def test_the_cause_of_products_that_are_not_finite_is_raised_where_it_is_known():
    operator = TurnsNaN(symmetric(SPECTRA["distinct"]))
    operator.failure = OSError("the data is gone")
    with pytest.raises(OSError, match="the data is gone"):
        top_eigenpairs(operator, 2, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"k": -2}, "`k` must be at least 1, got -2"),
        ({"max_matvecs": 0}, "`max_matvecs` must be at least 1, got 0"),
        ({"which": "LM"}, "`which` must be one of 'magnitude', .*'both', got 'LM'"),
        ({"rtol": -1e-3}, "`rtol` must be at least 0, got -0.001"),
        ({"rtol": math.nan}, "`rtol` must be at least 0, got nan"),
        ({"basis_size": 2}, "`basis_size` must be more than 2, got 2"),
        ({"k": 2, "which": "both", "basis_size": 8}, "`basis_size` must be more than 8, got 8"),
        ({"start": torch.ones(1, 11)}, r"non-zero rows of length 10.*\(1, 11\)"),
        ({"start": torch.zeros(2, 10)}, "non-zero rows of length 10"),
        ({"start": torch.full((10,), math.nan)}, "non-zero rows of length 10"),
        ({"start": torch.ones(2, 2, 10)}, r"got shape \(2, 2, 10\)"),
        ({"start": torch.ones(0, 10)}, "non-zero rows of length 10"),
    ],
)
def test_arguments_that_are_refused(options, message):
    operator = MatrixOperator(symmetric(SPECTRA["distinct"]))
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(operator, **options)
    assert operator.num_matvecs == 0


@pytest.mark.parametrize("rank", [0, 1, 5, 1000])
def test_a_spectrum_of_few_values_costs_few_products(rank):
    """Zero, low rank, and identity: spaces close, and that nothing is hidden is soon known."""
    n = 1000
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix.diagonal()[:rank] = 1.0 if rank == n else torch.arange(1.0, rank + 1).double()
    for k, most in ((1, 2 * (rank % n + 2)), (3, 4 * (rank % n + 2))):
        found = top_eigenpairs(MatrixOperator(matrix), k)
        truth = matrix.diagonal().sort(descending=True).values[:k]
        assert bool((found.values - truth).abs().max() <= 1e-10)
        assert found.num_matvecs <= most


def test_a_runner_up_that_overtakes_is_seen_at_once():
    """Two eigenvectors that never turn: the lower one rises and crosses."""
    bulk = torch.linspace(-0.2, 0.5, 298, dtype=torch.float64)
    vectors, start = orthogonal(300), None
    for step in range(30):
        top = torch.tensor([3.0 - 0.05 * step, 2.0 + 0.05 * step], dtype=torch.float64)
        eigenvalues = torch.cat([bulk, top])
        matrix = vectors @ torch.diag(eigenvalues) @ vectors.T
        found = top_eigenpairs(MatrixOperator(matrix), 1, which="largest", start=start)
        assert float(found.values[0]) == pytest.approx(float(top.max()), rel=1e-3)
        assert start is None or found.num_matvecs <= 3
        start = found.subspace


def test_a_tracked_space_is_cut_back_and_goes_on():
    matrix = symmetric(net_like(200))
    truth = torch.linalg.eigvalsh(matrix)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    found = top_eigenpairs(
        MatrixOperator(matrix), 2, which="largest", rtol=1e-10, start=start, basis_size=8
    )
    assert found.num_matvecs > 8
    assert bool(found.converged.all())
    torch.testing.assert_close(found.values, truth[-2:].flip(0), rtol=1e-9, atol=0)
    assert_certified(found, matrix)


def test_rows_that_are_the_same_count_once():
    matrix = symmetric(net_like(200))
    top = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    found = top_eigenpairs(MatrixOperator(matrix), 1, start=torch.stack([top, top, -top]))
    assert float(found.values[0]) == pytest.approx(16.0, rel=1e-9)


@pytest.mark.parametrize("learning_rate", [0.3, 1.5])
def test_two_pairs_are_followed_through_the_edge_of_stability(learning_rate):
    """Eigenvectors turn from step to step; every value is within its tolerance all the same."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 6, generator=generator)
    labels = torch.randint(3, (128,), generator=generator)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    for p in net.parameters():
        nn.init.uniform_(p, -0.3, 0.3, generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    sizes = [p.numel() for p in net.parameters()]

    def loss(p):
        return cross_entropy(functional_call(net, p, (inputs,)), labels)

    def loss_of(vector):
        pieces = zip(net.named_parameters(), vector.split(sizes), strict=True)
        return loss({name: piece.view(p.shape) for (name, p), piece in pieces})

    start, products = None, 0
    for step in range(60):
        optimizer.zero_grad()
        loss(dict(net.named_parameters())).backward()
        optimizer.step()
        operator = HessianOperator(loss, dict(net.named_parameters()), self_check=False)
        found = top_eigenpairs(operator, 2, which="largest", start=start)
        dense = hessian(loss_of)(nn.utils.parameters_to_vector(net.parameters()).detach())
        truth = torch.linalg.eigvalsh(dense.double())[-2:].flip(0)
        error = float((found.values - truth).abs()[0] / truth[0])
        assert error <= 1e-3, f"step {step}: {found.values} against {truth}"
        start, products = found.vectors, products + found.num_matvecs
    assert products / 60 < (5 if learning_rate < 1 else 15)


@pytest.mark.parametrize("options", [{"k": 1.5}, {"max_matvecs": 10.0}])
def test_counts_are_whole_numbers(options):
    with pytest.raises(TypeError, match="must be an integer, got"):
        top_eigenpairs(torch.eye(3), **options)


@pytest.mark.parametrize("matrix", [torch.zeros(9, 9), torch.diag(torch.arange(9.0))])
def test_more_pairs_than_a_start_that_is_exact(matrix):
    """The residuals of an exact start are zero: what to add to it is drawn."""
    start = torch.eye(9)[-2:]
    found = top_eigenpairs(matrix, 4, start=start)
    truth = matrix.diagonal().flip(0)[:4].double()
    torch.testing.assert_close(found.values, truth, rtol=1e-3, atol=1e-6)


def test_more_rows_than_products_or_dimensions_to_spend_them_on():
    matrix = torch.diag(torch.arange(9.0))
    start = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    assert top_eigenpairs(matrix, 1, start=start, max_matvecs=3).num_matvecs == 3
    assert float(top_eigenpairs(matrix, 1, start=start).values[0]) == pytest.approx(8.0, rel=1e-5)
