"""The way off a saddle, on surfaces where it is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import CurvatureError, HessianOperator, escape_attempt
from tests.quadratics import SPECTRA, Quadratic, flatten, orthogonal, random_params, symmetric


def attempt_at(loss, w, *, dtype=torch.float64, **options):
    w = torch.as_tensor(w, dtype=dtype)
    return escape_attempt(HessianOperator(loss, {"w": w}), **options)


def lecture(p):
    return (1 - p["w"][0] * p["w"][1]) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_radius", [0.5, 10.0, 100.0])
def test_the_lectures_saddle(max_radius, dtype):
    """Along (1, 1)/sqrt 2 the loss is (1 - t^2/2)^2: a fall of t^2 - t^4/4."""
    found = attempt_at(lecture, [0.0, 0.0], dtype=dtype, max_radius=max_radius)
    close = 10 * torch.finfo(dtype).eps
    longest = max_radius * 0.01 * math.sqrt(2)  # at most sqrt 2, where the valley is
    assert found.accepted
    assert found.certified
    assert found.gradient_norm == found.relative_gradient == 0
    assert found.lambda_min == pytest.approx(-2, rel=close)
    assert found.spectral_radius == pytest.approx(2, rel=close)
    assert found.direction.abs().tolist() == pytest.approx([math.sqrt(0.5)] * 2, rel=close)
    assert found.direction[0] == pytest.approx(found.direction[1].item(), rel=close)
    assert found.step == longest
    assert found.predicted == pytest.approx(-(longest**2), rel=close)
    assert found.actual == pytest.approx(longest**4 / 4 - longest**2, abs=close)
    assert found.loss_before == 1


@pytest.mark.parametrize("name", SPECTRA)
def test_quadratics(name):
    """The model is exact there: the longest step falls as far as predicted."""
    eigenvalues = torch.tensor(SPECTRA[name], dtype=torch.float64)
    found = attempt_at(Quadratic(symmetric(SPECTRA[name])), torch.zeros(10))
    radius, smallest = float(eigenvalues.abs().max()), float(eigenvalues.min())
    negative = smallest < -1e-13 * radius
    assert found.certified == found.accepted == negative
    assert smallest - 1e-13 * radius <= found.lambda_min
    near = (eigenvalues - found.lambda_min).abs().min()
    assert near <= found.lambda_min_error <= 0.02 * radius
    if negative:
        assert found.lambda_min == pytest.approx(smallest, rel=1e-2)
        assert found.step == 0.5 * 0.01 * math.sqrt(10)
        assert found.predicted == pytest.approx(found.lambda_min * found.step**2 / 2, rel=1e-12)
        assert found.actual == pytest.approx(found.predicted, rel=1e-6)
    else:
        assert (found.step, found.predicted, found.actual) == (0, 0, 0)
        assert math.isnan(found.relative_gradient)


def test_a_negative_eigenvalue_within_rounding_is_not_certified():
    matrix = symmetric([-1e-7, *range(1, 10)])
    single = attempt_at(Quadratic(matrix), torch.zeros(10), dtype=torch.float32)
    assert not single.certified
    assert single.lambda_min_error > 1e-7
    assert attempt_at(Quadratic(matrix), torch.zeros(10), dtype=torch.float64).certified


@pytest.mark.parametrize("max_matvecs", [2, 4, 8, 300])
def test_what_is_certified_holds_before_convergence(max_matvecs):
    generator = torch.Generator().manual_seed(3)
    eigenvalues = torch.randn(300, generator=generator, dtype=torch.float64)
    matrix = symmetric(eigenvalues)
    found = attempt_at(Quadratic(matrix), torch.zeros(300), max_matvecs=max_matvecs)
    u = found.direction
    assert found.certified
    assert found.lambda_min == pytest.approx(float(u @ matrix @ u), rel=1e-10)
    assert found.lambda_min >= float(eigenvalues.min())
    assert (eigenvalues - found.lambda_min).abs().min() <= found.lambda_min_error
    residual = (matrix @ u - found.lambda_min * u).norm()
    assert found.lambda_min_error == pytest.approx(float(residual), rel=1e-6)
    assert found.num_matvecs <= max_matvecs + 3


@pytest.mark.parametrize("seed", range(6))
def test_the_step_never_climbs(seed):
    """The lowest of all sufficient steps of the ladder, by evaluating every one of them."""
    params = random_params((6, 4), (4, 1), seed=seed)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)).double()

    def loss(p):
        return (torch.tanh(x @ p["p0"]) @ p["p1"] - 1).square().mean()

    operator = HessianOperator(loss, params)
    found = escape_attempt(operator)
    matrix = operator.dense()
    gradient, theta = operator.gradient(), flatten(params)
    slope = float(gradient @ found.direction)
    assert slope <= 0
    assert found.certified
    assert found.lambda_min == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]), rel=1e-2)
    best = (float(loss(params)), 0.0)
    for k in range(16):
        t = 0.5 * float(theta.norm()) * 0.5**k
        moved = (theta + t * found.direction).split([24, 4])
        there = float(loss({"p0": moved[0].view(6, 4), "p1": moved[1].view(4, 1)}))
        model = slope * t + found.lambda_min * t**2 / 2
        if there - found.loss_before <= model / 4:
            best = min(best, (there, t))
    assert found.loss_after == pytest.approx(best[0], rel=1e-12)
    assert found.step == pytest.approx(best[1], rel=1e-12)
    gain = float(gradient.norm()) ** 2 / 2 / float(torch.linalg.eigvalsh(matrix).abs().max())
    assert found.relative_gradient == pytest.approx(gain / -found.actual, rel=2e-2)
    assert found.accepted == (found.relative_gradient <= 0.1)
    assert escape_attempt(operator, gradient_tol=math.inf).accepted


def test_the_sign_follows_the_gradient():
    for tilt in (1e-9, -1e-9):
        found = attempt_at(lambda p, t=tilt: -p["w"].square().sum() + t * p["w"].sum(), [0.0])
        assert math.copysign(1, float(found.direction)) == -math.copysign(1, tilt)
        assert found.accepted


def test_a_step_stops_where_the_model_fails():
    """Of 1/(1 + x^2) a quarter of the predicted fall comes true up to x = sqrt 3, not beyond."""
    found = attempt_at(lambda p: 1 / (1 + (p["w"] / 1e-3).square().sum()), [0.0], max_radius=100.0)
    assert math.sqrt(3) / 2 < found.step / 1e-3 <= math.sqrt(3)


def test_of_sufficient_steps_the_lowest_is_taken():
    """Of -y^2/2 - y^4 + 1.37 y^6 at 1 a bit over a quarter comes true, and at 1/2 more in all."""

    def loss(p):
        y = p["w"] / 1e-2
        return (-y.square() / 2 - y.pow(4) + 1.37 * y.pow(6)).sum()

    found = attempt_at(loss, [0.0], max_radius=1.0)
    assert found.step == 0.5e-2
    assert found.actual == pytest.approx(-(0.125 + 0.0625 - 1.37 / 64), rel=1e-6)
    assert -found.actual > 0.13 > 0.5 / 4  # what the step of 1 would bring, which is sufficient


def test_no_step_lowers_the_loss():
    walls = lambda p: -p["w"].square().sum() / 2 + 1e16 * p["w"].pow(4).sum()  # noqa: E731
    found = attempt_at(walls, [0.0])
    assert found.certified
    assert (found.step, found.actual, found.predicted) == (0, 0, 0)
    assert not found.accepted


def test_a_fall_within_rounding_is_none():
    flat = lambda p: 100 + lecture(p)  # noqa: E731 - falls by 5e-5, seven units in the last place
    assert not attempt_at(flat, [0.0, 0.0], dtype=torch.float32).accepted
    assert attempt_at(flat, [0.0, 0.0], dtype=torch.float64).accepted


def fails_far_away(p):
    if p["w"].detach().norm() > 2e-3:
        raise RuntimeError("too far")
    return lecture(p)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: lecture(p) + (2e-3 - p["w"].norm().detach()).sqrt() * 0,
        lambda p: lecture(p) + torch.where(p["w"].norm().detach() > 2e-3, -torch.inf, 0.0),
        fails_far_away,
    ],
    ids=["nan", "minus infinity", "error"],
)
def test_steps_without_a_loss_are_passed_over(loss):
    found = attempt_at(loss, [0.0, 0.0])
    assert 1e-3 < found.step <= 2e-3
    assert math.isfinite(found.loss_after)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_do_not_matter(scale):
    params = random_params((5,), seed=2)
    plain = HessianOperator(lambda p: (1 - p["p0"].prod()).square(), params)
    scaled = HessianOperator(lambda p: scale * (1 - p["p0"].prod()).square(), params)
    stretched = HessianOperator(
        lambda p: (1 - (p["p0"] / scale).prod()).square(), {"p0": params["p0"] * scale}
    )
    one = escape_attempt(plain)
    for other, length in ((escape_attempt(scaled), 1.0), (escape_attempt(stretched), scale)):
        if length < 1:  # the least size of a net is absolute
            continue
        assert other.relative_gradient == pytest.approx(one.relative_gradient, rel=1e-8)
        assert other.step == pytest.approx(one.step * length, rel=1e-8)
        assert other.accepted == one.accepted


def test_a_wide_flat_space_does_not_hide_the_direction():
    """One negative eigenvalue, little against the largest, among ten thousand zeros."""
    u = torch.zeros(10_000)
    u[17] = 1.0
    found = attempt_at(
        lambda p: -0.05 * p["w"][17] ** 2 + 5 * p["w"][3] ** 2, torch.zeros(10_000)
    )  # fmt: skip
    assert found.accepted
    assert found.lambda_min == pytest.approx(-0.1, rel=1e-2)
    assert abs(float(found.direction @ u.double())) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("outlier", [0.0, 10.0, 1e3, 1e5])
def test_large_eigenvalues_do_not_pass_the_bulk_off_as_the_end(outlier):
    """A bulk around 0.01, as of weight decay: its mean is a Ritz value long before its ends are."""
    generator = torch.Generator().manual_seed(0)
    bulk = 0.01 + 0.1 * (2 * torch.rand(395, generator=generator).double() - 1)
    eigenvalues = torch.cat([bulk, outlier * torch.arange(1, 6) / 5])
    found = attempt_at(Quadratic(symmetric(eigenvalues)), torch.zeros(400))
    assert found.accepted
    assert found.lambda_min == pytest.approx(float(bulk.min()), rel=2e-2)
    assert found.num_matvecs <= 60


def test_the_same_every_time_and_for_every_generator_the_same_direction():
    rotated = orthogonal(50, seed=5)
    loss = Quadratic(rotated @ torch.diag(torch.linspace(-3, 10, 50).double()) @ rotated.T)
    first, again = attempt_at(loss, torch.zeros(50)), attempt_at(loss, torch.zeros(50))
    assert torch.equal(first.displacement, again.displacement)
    other = attempt_at(loss, torch.zeros(50), generator=torch.Generator().manual_seed(9))
    assert abs(float(first.direction @ other.direction)) == pytest.approx(1, abs=0.05)
    assert torch.equal(first.displacement, first.direction * first.step)


# -- what the default of `gradient_tol` rests on ----------------------------------------------


def digits_net(start: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    if start == "zeros":
        for p in net.parameters():
            nn.init.zeros_(p)
    return net, torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


@pytest.mark.parametrize("start", ["random", "zeros"])
def test_a_saddle_is_told_from_training(start):
    net, x, y = digits_net(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9 if start == "random" else 0)
    shares = []
    for step in range(401):
        if step in (0, 10, 40, 100, 400):
            params = {name: p.detach().clone() for name, p in net.named_parameters()}
            operator = HessianOperator(
                lambda p: cross_entropy(functional_call(net, p, (x[:256],)), y[:256]), params
            )
            found = escape_attempt(operator)
            assert found.certified  # negative curvature is everywhere, and proves nothing
            shares.append(found.relative_gradient)
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    if start == "random":
        assert min(shares) > 0.5
    else:
        assert max(shares) < 0.05


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        attempt_at(lambda p: lecture(p) + value, [0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_tol": -0.1}, "`gradient_tol` must be at least 0, got -0.1"),
        ({"gradient_tol": math.nan}, "`gradient_tol` must be at least 0, got nan"),
        ({"max_matvecs": 0}, "`max_matvecs` must be at least 1, got 0"),
        ({"max_radius": 0.0}, "`max_radius` must be positive and finite, got 0.0"),
        ({"max_radius": math.inf}, "`max_radius` must be positive and finite, got inf"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attempt_at(lecture, [0.0, 0.0], **options)


def test_nothing_is_changed_and_products_are_counted():
    w = torch.zeros(2)
    operator = HessianOperator(lecture, {"w": w})
    found = escape_attempt(operator)
    assert torch.equal(w, torch.zeros(2))
    assert found.num_matvecs == operator.num_matvecs
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.step = 1.0
