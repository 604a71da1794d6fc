"""`Spectrum`: closed forms, the exact way against Lanczos, invariances and honest errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_optkit.measures import HessianOperator, Share, Spectrum, hessian_spectrum
from lightning_optkit.measures.lanczos import rounding_noise
from tests.quadratics import (
    SPECTRA,
    MatrixOperator,
    Quadratic,
    random_params,
    symmetric,
    within_sem,
)

LANCZOS = {"exact_below": 0}
WAYS = [{}, LANCZOS]
EPS = torch.finfo(torch.float64).eps


def quadratic_operator(eigenvalues, **options) -> HessianOperator:
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return HessianOperator(Quadratic(symmetric(values)), random_params((len(values),)), **options)


def bulk_and_outliers(n: int = 400) -> Tensor:
    """Return eigenvalues as a net's: a bulk around zero, some negative, five far out."""
    generator = torch.Generator().manual_seed(3)
    bulk = 0.05 * torch.randn(n - 5, generator=generator, dtype=torch.float64) + 0.01
    return torch.cat([bulk, torch.tensor([-1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)])


# -- closed forms -------------------------------------------------------------------------------


def lecture(**options) -> HessianOperator:
    """Return the Hessian of (1 - w1 w2)^2 at the origin: a saddle with eigenvalues -2 and 2."""
    w = torch.zeros(2, dtype=torch.float64)
    return HessianOperator(lambda p: (1 - p["w"][0] * p["w"][1]) ** 2, {"w": w}, **options)


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
@pytest.mark.parametrize("options", WAYS)
def test_the_lectures_saddle(options, graphs):
    found = hessian_spectrum(lecture(graphs=graphs), **options)
    assert found.minimum_ratio == 0.5
    assert found.minimum_ratio_bounds == (0.5, 0.5)
    assert found.minimum_ratio_resolved
    assert (found.negative_ratio, found.zero_ratio) == (0.5, 0.0)
    assert found.lambda_max == pytest.approx(2, rel=1e-14)
    assert found.lambda_min == pytest.approx(-2, rel=1e-14)
    assert found.spectral_radius == pytest.approx(2, rel=1e-14)
    assert found.condition_number == pytest.approx(1, rel=1e-12)
    if not options:
        assert found.trace == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_exact_way_finds_prescribed_eigenvalues(spectrum):
    truth = torch.tensor(SPECTRA[spectrum], dtype=torch.float64).sort().values
    found = hessian_spectrum(quadratic_operator(truth), tol_rel=1e-9)
    scale = float(truth.abs().max())
    assert found.method == "exact"
    assert found.ritz_values.shape == (1, 10)
    torch.testing.assert_close(found.ritz_values[0], truth, rtol=0, atol=20 * EPS * scale)
    assert found.ritz_weights.tolist() == [[0.1] * 10]
    assert found.ritz_residuals.count_nonzero() == 0
    assert found.minimum_ratio == float((truth > found.tol).double().mean())
    assert found.negative_ratio == float((truth < -found.tol).double().mean())
    assert found.zero_ratio == float((truth.abs() <= found.tol).double().mean())
    assert found.trace == pytest.approx(float(truth.sum()), abs=100 * EPS * scale)
    assert found.trace_standard_error == 0
    assert found.top_eigenvalues(3) == found.ritz_values[0].flip(0)[:3].tolist()
    assert found.lambda_max == float(found.ritz_values.max())
    assert found.lambda_min == float(found.ritz_values.min())


@pytest.mark.parametrize(
    ("eigenvalues", "tol_rel", "shares"),
    [
        ([10.0, 1.0, 0.1, -0.1], 0.05, (0.5, 0.0, 0.5)),
        ([10.0, 1.0, 0.1, -0.1], 0.001, (0.75, 0.25, 0.0)),
        ([-10.0, 1.0, 0.4, -0.6], 0.05, (0.25, 0.5, 0.25)),  # the radius is the negative one's
        ([10.0, 1.0, 0.1, -0.1], 2.0, (0.0, 0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("options", WAYS)
def test_the_tolerance_is_relative_to_the_largest_magnitude(eigenvalues, tol_rel, shares, options):
    operator = MatrixOperator(symmetric(eigenvalues))
    found = hessian_spectrum(operator, tol_rel=tol_rel, num_probes=400, **options)
    assert found.tol == pytest.approx(10 * tol_rel, rel=1e-12)
    assert found.tol_rel == tol_rel
    # 400 probes settle shares of four eigenvalues: the interval is a point, the share itself.
    assert (found.minimum_ratio, found.negative_ratio, found.zero_ratio) == shares
    for share, truth in zip((found.positive, found.negative, found.zero), shares, strict=True):
        assert share.bounds == (truth, truth)


def test_the_tolerance_stays_above_the_rounding_noise():
    for dtype in (torch.float32, torch.float64):
        matrix = symmetric([1e-9, -1e-9, 1e-3, 5.0]).to(dtype)
        found = hessian_spectrum(MatrixOperator(matrix), tol_rel=0)
        assert found.noise == pytest.approx(rounding_noise(dtype) * 5, rel=1e-6)
        assert found.tol == pytest.approx(4 * found.noise, rel=1e-12)
        # 1e-9 is a sign in float64 and rounding in float32
        expected = (0.75, 0.25) if dtype == torch.float64 else (0.5, 0.0)
        assert (found.minimum_ratio, found.negative_ratio) == expected


def test_an_eigenvalue_at_the_tolerance_leaves_the_exact_share_open():
    found = hessian_spectrum(
        MatrixOperator(torch.diag(torch.tensor([10.0, 1.0, 0.3]))), tol_rel=0.1
    )
    assert found.positive.bounds == (1 / 3, pytest.approx(2 / 3))
    assert found.zero.bounds == (1 / 3, pytest.approx(2 / 3))
    assert found.negative.bounds == (0, 0)
    negative = MatrixOperator(torch.diag(torch.tensor([-10.0, -1.0, -0.3])))
    found = hessian_spectrum(negative, tol_rel=0.1)
    assert found.negative.bounds == (1 / 3, pytest.approx(2 / 3))
    assert found.positive.bounds == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_eigenvalue_at_the_tolerance_leaves_the_certified_share_open(sign, dtype):
    """Rounding decides on which side of it the Ritz value falls: neither may be certain."""
    eigenvalues = sign * torch.tensor([10.0] * 20 + [1.0] * 20 + [0.3] * 20, dtype=torch.float64)
    for seed in range(4):
        matrix = symmetric(eigenvalues, seed=seed).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        found = hessian_spectrum(
            MatrixOperator(matrix), tol_rel=0.1, num_probes=50, generator=generator, **LANCZOS
        )
        for share in ((found.positive, found.negative)[::sign][0], found.zero):
            assert share.lower <= 1 / 3 < 2 / 3 <= share.upper
            assert share.quadrature_width > 0.3


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_one_parameter(value, options):
    found = hessian_spectrum(quadratic_operator([value]), **options)
    assert found.lambda_max == found.lambda_min == pytest.approx(value, rel=1e-14)
    assert found.minimum_ratio == (value > 0)
    assert found.negative_ratio == (value < 0)
    assert found.minimum_ratio_resolved
    assert found.trace == pytest.approx(value, rel=1e-14)
    assert found.trace_standard_error == pytest.approx(0, abs=1e-7)
    assert found.top_eigenvalues(5) == [found.lambda_max]
    assert found.condition_number == pytest.approx(1, rel=1e-12)
    assert math.isfinite(float(found.density([value])))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("num_probes", [1, 3, 4, 7])
def test_no_share_is_claimed_where_there_is_none(num_probes, sign):
    """One of 3000 eigenvalues would be 0.0003: rounding must not vote for it."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = sign * (1 + torch.rand(3000, generator=generator, dtype=torch.float64))
    operator = MatrixOperator(torch.diag(eigenvalues).to_sparse())
    for seed in range(5):
        found = hessian_spectrum(
            operator,
            num_matvecs=12,
            num_probes=num_probes,
            generator=torch.Generator().manual_seed(seed),
            **LANCZOS,
        )
        all_of_it, none = (found.positive, found.negative)[::sign]
        assert none.bounds == found.zero.bounds == (0, 0)
        assert all_of_it.bounds == (1, 1)
        assert (none.value, found.zero.value, all_of_it.value) == (0, 0, 1)


@pytest.mark.parametrize("n", [1, 2, 5, 50])
@pytest.mark.parametrize("options", WAYS)
def test_a_hessian_of_zeros(options, n):
    found = hessian_spectrum(quadratic_operator([0.0] * n), **options)
    assert (found.minimum_ratio, found.negative_ratio, found.zero_ratio) == (0, 0, 1)
    assert found.zero.bounds == (1, 1)
    assert found.positive.bounds == found.negative.bounds == (0, 0)
    assert found.lambda_max == found.lambda_min == found.spectral_radius == found.trace == 0
    assert found.trace_standard_error == 0
    assert found.condition_number == math.inf
    assert bool(torch.isfinite(found.density(torch.linspace(-1, 1, 11))).all())
    assert "nan" not in str(found)


# -- Lanczos against the exact way ---------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
def test_lanczos_agrees_with_the_exact_way_within_its_errors(graphs):
    eigenvalues = bulk_and_outliers()
    operator = quadratic_operator(eigenvalues, graphs=graphs)
    exact = hessian_spectrum(operator)
    found = hessian_spectrum(operator, num_matvecs=50, **LANCZOS)
    assert found.method == "lanczos"
    assert found.lambda_max == pytest.approx(exact.lambda_max, rel=1e-10)
    assert found.lambda_min == pytest.approx(exact.lambda_min, rel=1e-8)
    assert abs(found.lambda_max - exact.lambda_max) <= found.lambda_max_error
    assert abs(found.lambda_min - exact.lambda_min) <= found.lambda_min_error
    assert abs(found.trace - exact.trace) <= 4 * found.trace_standard_error
    assert 0 < found.trace_standard_error < 30
    for name in ("positive", "negative", "zero"):
        share = getattr(found, name)
        assert share.lower <= getattr(exact, name).value <= share.upper
        assert share.lower <= share.value <= share.upper
        assert share.upper - share.lower < 0.25
    assert found.tol == pytest.approx(exact.tol, rel=1e-10)
    assert found.top_eigenvalues(4) == pytest.approx(exact.top_eigenvalues(4), rel=1e-8)


def test_probes_are_pooled_by_their_squared_lengths():
    """As the Beta law needs it: the mass of one long vector made of all probes."""
    eigenvalues = torch.tensor([-3.0, -1.0, 0.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    found = hessian_spectrum(MatrixOperator(torch.diag(eigenvalues)), num_probes=3, **LANCZOS)
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(3, 6, generator=generator, dtype=torch.float64).square()
    for share, inside in (
        (found.positive, eigenvalues > 0),
        (found.negative, eigenvalues < 0),
        (found.zero, eigenvalues == 0),
    ):
        mass = float(squares[:, inside].sum() / squares.sum())
        assert share.lower < mass < share.upper
        assert share.value == pytest.approx(mass, abs=1e-9)


def test_residuals_bound_unconverged_extremes():
    eigenvalues = torch.linspace(-1, 1, 300, dtype=torch.float64) ** 3
    operator = MatrixOperator(symmetric(eigenvalues))
    for num_matvecs in (2, 3, 5, 10, 20):
        found = hessian_spectrum(operator, num_matvecs=num_matvecs, **LANCZOS)
        for value, error in (
            (found.lambda_max, found.lambda_max_error),
            (found.lambda_min, found.lambda_min_error),
        ):
            assert float((eigenvalues - value).abs().min()) <= error
        assert found.lambda_max_error > found.noise  # none has converged
        noise = found.noise
        assert -1 - noise <= found.lambda_min <= found.lambda_max <= 1 + noise


def test_extremes_are_algebraic_whatever_their_magnitude():
    found = hessian_spectrum(quadratic_operator([-7.0, -1.0, 0.5, 2.0]))
    assert (found.lambda_max, found.lambda_min) == pytest.approx((2, -7))
    assert found.spectral_radius == pytest.approx(7)


def test_nodes_and_weights_have_the_shape_that_is_promised():
    operator = quadratic_operator(bulk_and_outliers())
    found = hessian_spectrum(operator, num_matvecs=20, num_probes=3, **LANCZOS)
    assert found.ritz_values.shape == found.ritz_weights.shape == (3, 20)
    assert found.ritz_residuals.shape == (3, 20)
    assert found.ritz_values.dtype == found.ritz_weights.dtype == torch.float64
    assert torch.equal(found.ritz_values, found.ritz_values.sort(dim=1).values)
    assert found.ritz_weights.sum(1).tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert found.num_matvecs == 60 + 2  # with the self-check's
    assert (found.num_params, found.confidence) == (400, 0.99)
    assert 0 < found.seconds < 60


def test_lanes_that_end_early_are_padded():
    found = hessian_spectrum(quadratic_operator([1.0] * 7 + [5.0] * 3), num_probes=2, **LANCZOS)
    assert found.ritz_values.shape == (2, 10)
    assert found.ritz_values.isnan().sum(1).tolist() == [8, 8]
    assert found.ritz_values[:, :2].flatten().tolist() == pytest.approx([1, 5, 1, 5])
    assert found.ritz_weights[:, 2:].count_nonzero() == 0
    assert found.ritz_residuals[:, 2:].count_nonzero() == 0
    assert (found.lambda_min, found.lambda_max) == pytest.approx((1, 5))
    assert found.top_eigenvalues(9) == pytest.approx([5, 1])
    assert found.condition_number == pytest.approx(5)
    assert found.lambda_max_error == pytest.approx(found.noise)
    assert found.minimum_ratio == 1


def test_top_eigenvalues_take_the_best_of_all_probes():
    probes = torch.tensor([[1.0, 3.0, 4.9], [1.0, 2.9, 5.0]], dtype=torch.float64)
    found = dataclasses.replace(
        hessian_spectrum(lecture()),
        ritz_values=probes,
        ritz_weights=torch.full_like(probes, 1 / 3),
        ritz_residuals=torch.tensor([[0.3, 0.2, 0.1], [0.3, 0.2, 0.05]], dtype=torch.float64),
        noise=0.001,
    )
    assert found.top_eigenvalues(2) == [5.0, 3.0]
    assert found.top_eigenvalues(7) == [5.0, 3.0, 1.0]
    assert found.top_eigenvalues(0) == []
    assert found.lambda_max_error == pytest.approx(0.051, rel=1e-12)
    assert found.lambda_min_error == pytest.approx(0.301, rel=1e-12)
    assert found.condition_number == pytest.approx(5 / 1.3)


def test_condition_number_is_a_lower_bound_and_infinite_where_an_eigenvalue_is_zero():
    eigenvalues = torch.logspace(-3, 1, 200, dtype=torch.float64)
    operator = MatrixOperator(symmetric(eigenvalues))
    assert hessian_spectrum(operator).condition_number == pytest.approx(1e4, rel=1e-9)
    bounds = [
        hessian_spectrum(operator, num_matvecs=m, **LANCZOS).condition_number for m in (5, 20, 60)
    ]
    assert 1 < bounds[0] < bounds[1] < bounds[2] <= 1e4 * (1 + 1e-9)
    eigenvalues[0] = 0
    assert hessian_spectrum(MatrixOperator(symmetric(eigenvalues))).condition_number == math.inf


# -- invariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_scaling_the_loss_scales_eigenvalues_and_leaves_shares(scale, options):
    eigenvalues = bulk_and_outliers(60)
    plain = hessian_spectrum(quadratic_operator(eigenvalues), **options)
    scaled = hessian_spectrum(quadratic_operator(scale * eigenvalues), **options)
    for name in ("lambda_max", "lambda_min", "trace", "trace_standard_error", "tol", "noise"):
        assert getattr(scaled, name) == pytest.approx(scale * getattr(plain, name), rel=1e-9)
    for name in ("positive", "negative", "zero"):
        assert getattr(scaled, name).value == pytest.approx(getattr(plain, name).value, abs=1e-9)
        assert getattr(scaled, name).bounds == getattr(plain, name).bounds
    assert scaled.condition_number == pytest.approx(plain.condition_number, rel=1e-9)


@pytest.mark.parametrize("options", WAYS)
def test_a_negative_scale_turns_the_spectrum_around(options):
    eigenvalues = bulk_and_outliers(60)
    plain = hessian_spectrum(quadratic_operator(eigenvalues), **options)
    turned = hessian_spectrum(quadratic_operator(-eigenvalues), **options)
    assert turned.negative.bounds == plain.positive.bounds
    assert turned.negative.value == pytest.approx(plain.positive.value, abs=1e-9)
    assert turned.zero.bounds == plain.zero.bounds
    assert turned.lambda_min == pytest.approx(-plain.lambda_max, rel=1e-10)
    assert turned.trace == pytest.approx(-plain.trace, rel=1e-9)


def test_weight_decay_shifts_the_spectrum():
    eigenvalues = torch.tensor(SPECTRA["distinct"], dtype=torch.float64)
    matrix = symmetric(eigenvalues)
    decayed = HessianOperator(
        lambda p: Quadratic(matrix)(p) + 0.25 * p["p0"].square().sum(), random_params((10,))
    )
    found = hessian_spectrum(decayed).ritz_values[0]
    torch.testing.assert_close(found, eigenvalues + 0.5, rtol=1e-12, atol=1e-12)


def test_permuting_parameters_leaves_everything():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x = torch.randn(9, 4, dtype=torch.float64)
    loss = lambda p: functional_call(net, p, (x,)).square().mean()  # noqa: E731
    params = dict(net.named_parameters())
    turned = dict(reversed(params.items()))
    order = torch.arange(37).split([p.numel() for p in params.values()])
    permutation = torch.cat(order[::-1])
    one, other = HessianOperator(loss, params), HessianOperator(loss, turned)
    torch.testing.assert_close(
        other.dense(), one.dense()[permutation][:, permutation], rtol=1e-12, atol=1e-14
    )
    first, second = hessian_spectrum(one), hessian_spectrum(other)
    torch.testing.assert_close(second.ritz_values, first.ritz_values, rtol=1e-10, atol=1e-13)
    assert [second.positive, second.negative, second.zero] == [
        first.positive,
        first.negative,
        first.zero,
    ]


# -- trace ---------------------------------------------------------------------------------------


def traces_and_errors(eigenvalues: Tensor, *, num_draws: int, **options) -> tuple[Tensor, Tensor]:
    """Return traces and their standard errors by so many sets of probes."""
    operator = MatrixOperator(symmetric(eigenvalues))
    found = [
        hessian_spectrum(
            operator,
            num_matvecs=10,
            generator=torch.Generator().manual_seed(seed),
            **LANCZOS,
            **options,
        )
        for seed in range(num_draws)
    ]
    return (
        torch.tensor([f.trace for f in found], dtype=torch.float64),
        torch.tensor([f.trace_standard_error for f in found], dtype=torch.float64),
    )


def assert_unbiased_and_honest(traces: Tensor, errors: Tensor, truth: float) -> None:
    assert within_sem(traces, truth)
    # The spread of 200 draws is known to 5 %, and the reported one is itself an estimate.
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(traces.std()), rel=0.2)


def test_the_trace_is_unbiased_and_its_error_honest():
    eigenvalues = bulk_and_outliers(100)
    traces, errors = traces_and_errors(eigenvalues, num_draws=200)
    assert_unbiased_and_honest(traces, errors, float(eigenvalues.sum()))


def test_the_trace_of_a_multiple_of_the_identity_has_no_variance():
    eigenvalues = torch.full((100,), 3.0, dtype=torch.float64)
    traces, errors = traces_and_errors(eigenvalues, num_draws=5)
    assert float((traces - 300).abs().max()) <= 1e-10
    assert float(errors.max()) <= 1e-5  # the root of rounding


@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_error_of_the_trace_is_that_of_the_closed_form(num_probes):
    # a smooth spectrum: no eigenvalue converges, none is taken out
    eigenvalues = torch.logspace(-2, 1, 100, dtype=torch.float64)
    truth = float(eigenvalues.sum())
    traces, errors = traces_and_errors(eigenvalues, num_draws=200, num_probes=num_probes)
    assert_unbiased_and_honest(traces, errors, truth)
    spread = float(eigenvalues.square().sum()) - truth**2 / 100
    exact_error = math.sqrt(2 * 100 / (num_probes * 100 + 2) * spread)
    rms = float(errors.square().mean().sqrt())
    assert rms == pytest.approx(exact_error, rel=0.05)


def test_more_probes_shrink_the_error_of_the_trace_as_the_root():
    operator = MatrixOperator(symmetric(bulk_and_outliers()))
    few, many = (
        hessian_spectrum(operator, num_matvecs=40, num_probes=k, **LANCZOS) for k in (16, 256)
    )
    ratio = few.trace_standard_error / many.trace_standard_error
    assert ratio == pytest.approx(4, rel=0.25)  # each is known to some 10 %


# -- density -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [None, 0.5])
@pytest.mark.parametrize("options", WAYS)
def test_the_density_integrates_to_one(options, bandwidth):
    found = hessian_spectrum(quadratic_operator(bulk_and_outliers()), **options)
    # Fine enough for the narrowest line, of deviation 1/2000 of the largest eigenvalue: with two
    # points a deviation the sum over a Gaussian is its integral to more digits than there are
    grid = torch.arange(-5, 24, 0.004, dtype=torch.float64)
    density = found.density(grid, bandwidth)
    assert density.shape == grid.shape
    assert density.dtype == torch.float64
    assert bool((density >= 0).all())
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)


def test_the_density_with_a_bandwidth_is_a_sum_of_gaussians():
    found = hessian_spectrum(quadratic_operator([-1.0, 2.0]))
    x = torch.tensor([[-1.3, 0.0], [0.7, 2.0]], dtype=torch.float64)
    expected = sum(
        0.5 * torch.exp(-((x - value) ** 2) / (2 * 0.3**2)) / (0.3 * math.sqrt(2 * math.pi))
        for value in (-1.0, 2.0)
    )
    torch.testing.assert_close(found.density(x, bandwidth=0.3), expected, rtol=1e-12, atol=1e-15)
    from_numpy = found.density(x.numpy(), bandwidth=0.3)
    assert torch.equal(from_numpy, found.density(x, bandwidth=0.3))
    assert found.density([0.0]).shape == (1,)


def test_the_density_averages_over_probes():
    operator = quadratic_operator(bulk_and_outliers())
    found = hessian_spectrum(operator, num_matvecs=10, num_probes=2, **LANCZOS)
    x = torch.linspace(-1, 16, 50, dtype=torch.float64)
    singles = [
        dataclasses.replace(
            found,
            ritz_values=found.ritz_values[i : i + 1],
            ritz_weights=found.ritz_weights[i : i + 1],
            ritz_residuals=found.ritz_residuals[i : i + 1],
        ).density(x, bandwidth=0.5)
        for i in range(2)
    ]
    torch.testing.assert_close(found.density(x, 0.5), sum(singles) / 2, rtol=1e-12, atol=1e-15)


def test_a_converged_eigenvalue_is_a_line_and_the_bulk_is_smooth():
    eigenvalues = bulk_and_outliers()
    operator = quadratic_operator(eigenvalues)
    found = hessian_spectrum(operator, num_matvecs=40, **LANCZOS)
    sigma = 0.04 * 16  # of its size, so that it can be seen
    expected = float(found.ritz_weights[:, -1].mean()) / (sigma * math.sqrt(2 * math.pi))
    assert float(found.density([found.lambda_max])) == pytest.approx(expected, rel=1e-6)
    grid = torch.linspace(-0.04, 0.06, 200, dtype=torch.float64)  # a deviation around the mean
    bulk = found.density(grid)
    share = float(((eigenvalues >= -0.04) & (eigenvalues <= 0.06)).double().mean())
    # four probes of 400 dimensions know this share to 0.05 at two standard errors
    assert float(torch.trapezoid(bulk, grid)) == pytest.approx(share, abs=0.1)
    single = hessian_spectrum(operator, num_matvecs=14, num_probes=1, **LANCZOS)
    nodes = single.ritz_values[0]
    assert int(((nodes >= -0.04) & (nodes <= 0.06)).sum()) <= 4  # lines would leave gaps
    bulk = single.density(grid)
    assert float(bulk.max() / bulk.min()) < 5


# -- the object ----------------------------------------------------------------------------------


def test_it_cannot_be_changed():
    found = hessian_spectrum(lecture())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.trace = 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.positive.value = 3.0


@pytest.mark.parametrize(
    ("share", "text", "resolved"),
    [
        (Share(0.5, 0.5, 0.5, 0.0), "0.5000", True),
        (Share(0.5, 0.46, 0.55, 0.01), "0.500 [0.460, 0.550]", True),
        (Share(0.25, 0.0, 0.5, 0.4), "unresolved [0.000, 0.500]", False),
        (Share(0.0, 0.0, 1.0, 1.0), "unresolved [0.000, 1.000]", False),
    ],
)
def test_a_share_that_is_not_resolved_is_not_quoted(share, text, resolved):
    assert str(share) == text
    assert share.resolved is resolved
    assert share.bounds == (share.lower, share.upper)


def test_it_says_what_it_found():
    text = str(hessian_spectrum(lecture()))
    assert text == (
        "minimum ratio 0.5000 (tol 0.002), lambda in [-2, 2], exact, 4 products"
    )  # two of them the self-check's
    wide = hessian_spectrum(
        MatrixOperator(symmetric(bulk_and_outliers())), num_matvecs=5, num_probes=2, **LANCZOS
    )
    assert not wide.minimum_ratio_resolved
    assert str(wide).startswith("minimum ratio unresolved [0.")
    assert str(wide).endswith("lanczos, 10 products")


def test_quadrature_width_is_what_more_products_remove():
    operator = MatrixOperator(symmetric(bulk_and_outliers()))
    wide, narrow = (hessian_spectrum(operator, num_matvecs=m, **LANCZOS) for m in (6, 200))
    assert wide.positive.quadrature_width > 0.3
    assert narrow.positive.quadrature_width < 0.005
    sampling = narrow.positive.upper - narrow.positive.lower
    assert 0.04 < sampling < 0.097  # four probes of 400 dimensions: 2.58 * 2 sqrt(2 p q / 1600)


def test_the_exact_way_is_taken_up_to_its_limit():
    operator = MatrixOperator(symmetric(SPECTRA["distinct"]))
    assert hessian_spectrum(operator, exact_below=10).method == "exact"
    assert operator.num_matvecs == 10
    assert hessian_spectrum(operator, exact_below=9).method == "lanczos"


def test_seeds_decide_and_the_default_is_one():
    operator = MatrixOperator(symmetric(bulk_and_outliers()))

    def trace(generator: torch.Generator | None) -> float:
        return hessian_spectrum(operator, num_matvecs=5, generator=generator, **LANCZOS).trace

    state = torch.get_rng_state()
    assert trace(None) == trace(None) == trace(torch.Generator().manual_seed(0))
    assert trace(torch.Generator().manual_seed(1)) != trace(None)
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_are_different_vectors_also_one_after_another():
    for blocks in (True, False):
        operator = MatrixOperator(symmetric(bulk_and_outliers()), works_in_blocks=blocks)
        found = hessian_spectrum(operator, num_matvecs=5, num_probes=3, **LANCZOS)
        assert len(set(found.ritz_values[:, 0].tolist())) == 3
        assert operator.num_matvecs == found.num_matvecs == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_matvecs": 1}, "`num_matvecs` must be at least 2, got 1"),
        ({"num_probes": 0}, "`num_probes` must be at least 1, got 0"),
        ({"tol_rel": -1e-3}, "`tol_rel` must be at least 0 or 'auto', got -0.001"),
        ({"tol_rel": math.nan}, "`tol_rel` must be at least 0 or 'auto', got nan"),
        ({"confidence": 0.0}, "`confidence` must be between 0 and 1, such as 0.99, got 0.0"),
        ({"confidence": 1.0}, "`confidence` must be between 0 and 1"),
        ({"confidence": 99}, "`confidence` must be between 0 and 1, such as 0.99, got 99"),
        ({"confidence": math.nan}, "`confidence` must be between 0 and 1"),
    ],
)
def test_arguments_that_are_refused(options, message):
    operator = lecture()
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(operator, **options)
    assert operator.num_matvecs == 0  # before anything was spent


# -- an independent implementation -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of a package whose last release is from 2021
def test_top_eigenvalues_agree_with_pyhessian():
    pyhessian = pytest.importorskip("pyhessian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(40, 6), torch.randint(3, (40,))
        criterion = nn.CrossEntropyLoss()
        theirs = pyhessian.hessian(net, criterion, data=(x, y), cuda=False).eigenvalues(
            maxIter=1000, tol=1e-7, top_n=2
        )[0]
    params = {name: p.detach() for name, p in net.named_parameters()}
    loss = lambda p: criterion(functional_call(net, p, (x,)), y)  # noqa: E731
    for options in WAYS:
        ours = hessian_spectrum(HessianOperator(loss, params), **options).top_eigenvalues(2)
        # Power iteration in float32 with deflation: what it stops at, not what is true.
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_extremes_agree_with_numpy():
    matrix = symmetric(bulk_and_outliers())
    truth = np.linalg.eigvalsh(matrix.numpy())
    found = hessian_spectrum(MatrixOperator(matrix), **LANCZOS)
    assert isinstance(found, Spectrum)
    assert found.top_eigenvalues(4) == pytest.approx(truth[::-1][:4].tolist(), rel=1e-10)


# -- the lowest eigenvector ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [True, False], ids=["together", "in turn"])
@pytest.mark.parametrize("options", WAYS, ids=["exact", "lanczos"])
def test_the_vector_is_that_of_the_lowest_eigenvalue(options, blocks, dtype):
    matrix = symmetric(bulk_and_outliers()).to(dtype)
    operator = MatrixOperator(matrix, works_in_blocks=blocks)
    found = hessian_spectrum(operator, **options)
    u = found.lambda_min_vector
    assert (u.shape, u.dtype) == ((400,), dtype)
    assert float(u.norm()) == pytest.approx(1, rel=1e-5)
    assert float(u.double() @ matrix.double() @ u.double()) == pytest.approx(
        found.lambda_min, abs=found.noise
    )
    residual = (matrix.double() @ u.double() - found.lambda_min * u.double()).norm()
    assert float(residual) <= found.lambda_min_error + found.noise


def test_the_vector_is_that_of_the_best_probe():
    """Before convergence the probes differ: the value and the vector must be of one probe."""
    matrix = symmetric(torch.linspace(-1, 1, 300, dtype=torch.float64))
    for seed in range(8):
        for blocks in (True, False):
            found = hessian_spectrum(
                MatrixOperator(matrix, works_in_blocks=blocks),
                num_matvecs=4,
                generator=torch.Generator().manual_seed(seed),
                **LANCZOS,
            )
            u = found.lambda_min_vector
            assert float(u @ matrix @ u) == pytest.approx(found.lambda_min, rel=1e-10)


@pytest.mark.parametrize("eigenvalues", [[0.0], [-2.0], [0.0, 0.0], [3.0, 3.0]])
@pytest.mark.parametrize("options", WAYS)
def test_the_vector_of_small_operators(eigenvalues, options):
    found = hessian_spectrum(quadratic_operator(eigenvalues), **options)
    u = found.lambda_min_vector
    assert float(u.norm()) == pytest.approx(1, rel=1e-12)
    error = symmetric(eigenvalues) @ u - min(eigenvalues) * u
    assert float(error.norm()) <= 1e-12


# -- a tolerance that is found ---------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS, ids=["exact", "lanczos"])
def test_auto_takes_the_smallest_tolerance_that_resolves(options):
    operator = MatrixOperator(symmetric(bulk_and_outliers()))
    options = options | {"num_matvecs": 40, "num_probes": 10}
    found = hessian_spectrum(operator, tol_rel="auto", **options)
    assert found.tol == pytest.approx(found.tol_rel * found.spectral_radius, rel=1e-12)
    assert found.positive.upper - found.positive.lower < 0.05
    by_hand = hessian_spectrum(operator, tol_rel=found.tol_rel, **options)
    assert (by_hand.positive, by_hand.negative, by_hand.zero) == (
        found.positive,
        found.negative,
        found.zero,
    )
    steps = round(10 * math.log10(found.tol_rel))
    assert found.tol_rel == pytest.approx(10 ** (steps / 10), rel=1e-12)  # ten a decade
    if not options.get("exact_below", 1):
        for k in range(-60, steps, 5):
            finer = hessian_spectrum(operator, tol_rel=10 ** (k / 10), **options)
            assert finer.positive.upper - finer.positive.lower >= 0.05
    else:
        assert steps == -60


def test_auto_is_content_with_the_narrowest_where_none_resolves():
    operator = MatrixOperator(symmetric(torch.linspace(-1, 1, 200, dtype=torch.float64)))
    options = {"num_matvecs": 3, "num_probes": 1, **LANCZOS}
    found = hessian_spectrum(operator, tol_rel="auto", **options)
    width = found.positive.upper - found.positive.lower
    assert width > 0.05
    widths = []
    for k in range(-60, -4):
        share = hessian_spectrum(operator, tol_rel=10 ** (k / 10), **options).positive
        widths.append(share.upper - share.lower)
    assert width == pytest.approx(min(widths), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_stays_above_the_rounding_noise(dtype):
    matrix = symmetric([1e-9, -1e-9, 1e-3, 5.0]).to(dtype)
    found = hessian_spectrum(MatrixOperator(matrix), tol_rel="auto")
    assert found.tol >= 4 * found.noise
    assert found.tol_rel == pytest.approx({torch.float32: 10**-4.8, torch.float64: 1e-6}[dtype])


@pytest.mark.parametrize("options", WAYS)
def test_auto_with_a_hessian_of_zeros(options):
    found = hessian_spectrum(quadratic_operator([0.0] * 5), tol_rel="auto", **options)
    assert (found.minimum_ratio, found.negative_ratio, found.zero_ratio) == (0, 0, 1)


def test_the_interval_at_a_found_tolerance_still_holds_the_share():
    """Choosing among tolerances by width, not by share, must not spoil the confidence."""
    eigenvalues = bulk_and_outliers(200)
    operator, missed = MatrixOperator(torch.diag(eigenvalues)), 0
    for seed in range(40):
        found = hessian_spectrum(
            operator,
            num_matvecs=16,
            num_probes=2,
            tol_rel="auto",
            confidence=0.95,
            generator=torch.Generator().manual_seed(seed),
            **LANCZOS,
        )
        share = float((eigenvalues > found.tol).double().mean())
        missed += not found.positive.lower <= share <= found.positive.upper
    assert missed <= 2 + 4 * math.sqrt(40 * 0.05 * 0.95)


@pytest.mark.parametrize("tol_rel", ["automatic", "", None])
def test_other_words_for_a_tolerance_are_refused(tol_rel):
    with pytest.raises(ValueError, match="must be at least 0 or 'auto', got"):
        hessian_spectrum(lecture(), tol_rel=tol_rel)


# -- why a condition number is what it is ----------------------------------------------------------


def test_the_condition_number_says_what_it_rests_on():
    assert hessian_spectrum(quadratic_operator([0.5, -10.0])).condition_reason == "10 / 0.5"
    zero = hessian_spectrum(quadratic_operator([0.0, 0.0]))
    assert zero.condition_reason == "infinite: every eigenvalue is zero"
    dead = hessian_spectrum(MatrixOperator(torch.diag(torch.tensor([4.0, 0.0]).double())))
    assert dead.condition_number == math.inf
    assert dead.condition_reason.startswith("infinite: an eigenvalue of size 0.0e+00 is zero up to")
    assert "dead unit" in dead.condition_reason


def test_the_condition_number_of_lanczos_is_said_to_be_a_bound():
    operator = MatrixOperator(symmetric(torch.logspace(-3, 1, 200, dtype=torch.float64)))
    found = hessian_spectrum(operator, num_matvecs=20, **LANCZOS)
    bound, large, small = found.condition_reason.rpartition("at least ")[1:][0:1] + tuple(
        float(number) for number in found.condition_reason.removeprefix("at least ").split(" / ")
    )
    assert bound == "at least "
    assert large / small == pytest.approx(found.condition_number, rel=1e-2)
    assert large == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("options", [{"num_matvecs": 2.5}, {"num_probes": 1.0}])
def test_counts_are_whole_numbers(options):
    with pytest.raises(TypeError, match="must be an integer, got"):
        hessian_spectrum(lecture(), **options)
