import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import CurvatureError, HessianOperator
from lightning_optkit.measures.finite_difference import FiniteDifferenceOperator
from lightning_optkit.measures.lanczos import lanczos
from lightning_optkit.measures.quadrature import gauss
from tests.quadratics import symmetric


def quadratic(matrix, at):
    def gradient_fn(offset):
        w = at + offset
        return w @ matrix @ w / 2, matrix @ w

    return gradient_fn


def net(dtype, activation=nn.Tanh):
    """Return the exact Hessian in float64, flat parameters, and a gradient function in dtype."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 10), activation(), nn.Linear(10, 4)).double()
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randint(0, 4, (64,))
    parameters = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss_fn(params):
        values = next(iter(params.values()))
        return cross_entropy(functional_call(module, params, (x.to(values),)), y)

    cast = {name: p.to(dtype) for name, p in parameters.items()}
    gradients = HessianOperator(loss_fn, cast, self_check=False)
    flat = torch.cat([p.reshape(-1) for p in cast.values()])
    matrix = HessianOperator(loss_fn, parameters, self_check=False).dense()
    return matrix, flat, lambda offset: (gradients.loss(offset), gradients.gradient(offset))


def test_products_of_a_quadratic_are_exact():
    matrix = symmetric([-2.0, 0.0, 1.0, 1e3])
    operator = FiniteDifferenceOperator(
        quadratic(matrix, torch.ones(4).double()), torch.ones(4).double()
    )
    vectors = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(operator @ vectors, matrix @ vectors, rtol=1e-8, atol=1e-6)
    assert (operator @ vectors[:, 0]).shape == (4,)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_step_scales_with_the_vector(scale):
    matrix, flat, gradient_fn = net(torch.float64)
    operator = FiniteDifferenceOperator(gradient_fn, flat)
    v = torch.randn(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    error = (operator @ (scale * v) / scale - matrix @ v).norm() / (matrix @ v).norm()
    assert error < 1e-8


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_lanczos_finds_the_extremes(dtype, rtol):
    matrix, flat, gradient_fn = net(dtype)
    operator = FiniteDifferenceOperator(gradient_fn, flat)
    truth = torch.linalg.eigvalsh(matrix)
    theta, _, _ = gauss(*lanczos(operator, 60).lanes()[0])
    assert float(theta[-1]) == pytest.approx(float(truth[-1]), rel=rtol)
    assert abs(float(theta[0] - truth[0])) <= rtol * float(truth[-1])
    assert operator.noise >= 2.5e-4
    assert abs(float(theta[-1] - truth[-1])) <= operator.noise * float(truth[-1])


def test_kinks_are_refused_in_float32_and_passed_by_in_float64():
    matrix, flat, gradient_fn = net(torch.float64, nn.ReLU)
    v = torch.ones_like(flat)
    product = FiniteDifferenceOperator(gradient_fn, flat) @ v
    torch.testing.assert_close(product, matrix @ v, rtol=1e-6, atol=1e-8)

    def kinked(offset):
        w = 1 + offset
        return (w - 1).abs().sum() + w.square().sum(), offset.sign() + 2 * w

    with pytest.raises(CurvatureError, match="do not settle"):
        FiniteDifferenceOperator(kinked, torch.ones(50)) @ torch.ones(50)


def test_loss_gradient_and_noise_are_weighted_over_batches():
    at = torch.tensor([1.0, 2.0], dtype=torch.float64)
    first, second = torch.diag(at), 3 * torch.diag(at)
    functions = [quadratic(first, at), quadratic(second, at)]
    operator = FiniteDifferenceOperator(functions, at, weights=[3, 1])
    mean = (3 * first + second) / 4
    assert float(operator.loss()) == pytest.approx(float(at @ mean @ at / 2))
    torch.testing.assert_close(operator.gradient(), mean @ at)
    torch.testing.assert_close(operator.gradient(at), mean @ (2 * at))
    torch.testing.assert_close(operator @ at, mean @ at, rtol=1e-7, atol=0)
    errors = [(0.75 * (first - mean) @ at).norm(), (0.25 * (second - mean) @ at).norm()]
    truth = math.sqrt(sum(float(e) ** 2 for e in errors) / (1 - 0.75**2 - 0.25**2))
    assert float(operator.gradient_noise()) == pytest.approx(truth)
    assert math.isnan(FiniteDifferenceOperator(functions[0], at).gradient_noise())
    assert operator.total_weight == 4
    assert operator.parameter_norm() == pytest.approx(math.sqrt(5))


def test_zero_vectors_and_zero_curvature():
    at = torch.zeros(3, dtype=torch.float64)
    operator = FiniteDifferenceOperator(quadratic(torch.zeros(3, 3).double(), at), at)
    assert bool((operator @ torch.ones(3) == 0).all())
    operator = FiniteDifferenceOperator(quadratic(torch.eye(3).double(), at), at)
    assert bool((operator @ torch.zeros(3) == 0).all())


def test_a_gradient_that_is_not_finite_is_named():
    at = torch.ones(2)
    operator = FiniteDifferenceOperator(lambda offset: (at.sum(), at * math.nan), at)
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        operator @ at


@pytest.mark.parametrize(
    ("options", "parameters", "error", "message"),
    [
        ({"weights": [1, 2]}, torch.ones(2), ValueError, "`weights` must have one entry"),
        ({"weights": [0.0]}, torch.ones(2), ValueError, "`weights` must be positive"),
        ({"step": 0.0}, torch.ones(2), ValueError, "`step` must be positive"),
        ({}, torch.ones(2).bfloat16(), TypeError, "`parameters` must be float32 or float64"),
        ({}, torch.ones(0), ValueError, "at least one parameter"),
    ],
)
def test_bad_arguments_are_refused(options, parameters, error, message):
    with pytest.raises(error, match=message):
        FiniteDifferenceOperator(quadratic(torch.eye(2), 0), parameters, **options)


def test_vectors_of_the_wrong_length_are_refused():
    operator = FiniteDifferenceOperator(quadratic(torch.eye(2), torch.ones(2)), torch.ones(2))
    with pytest.raises(ValueError, match=r"the shape \(2,\) or \(2, k\), got \(3,\)"):
        operator @ torch.ones(3)
