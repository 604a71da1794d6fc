"""The kind of a point on surfaces whose kind is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lightning_optkit.measures import (
    CriticalPoint,
    Descent,
    HessianOperator,
    critical_point,
    hessian_spectrum,
)
from tests.quadratics import Quadratic, symmetric


def kind_at(loss, w: Tensor, *, weights=None, **options) -> CriticalPoint:
    operator = HessianOperator(loss, {"w": w.double()}, weights=weights)
    return critical_point(operator, hessian_spectrum(operator, **options))


@dataclasses.dataclass
class Bowl:
    """The quadratic 1/2 (w - c)' A (w - c), critical at c."""

    eigenvalues: list[float]
    centre: float = 1.0

    def __call__(self, p: dict[str, Tensor]) -> Tensor:
        return Quadratic(symmetric(self.eigenvalues))({"w": p["w"] - self.centre})


@pytest.mark.parametrize("options", [{}, {"exact_below": 0}], ids=["exact", "lanczos"])
@pytest.mark.parametrize(
    ("eigenvalues", "kind"),
    [
        ([1.0, 2.0, 5.0], "minimum"),
        ([-1.0, -2.0, -5.0], "maximum"),
        ([-1.0, 2.0, 5.0], "saddle"),
        ([1.0, 0.0, 5.0], "degenerate"),
        ([-1.0, 0.0, -5.0], "degenerate"),
        ([-1.0, 0.0, 5.0], "saddle"),  # a direction down is a direction down
        ([0.0, 0.0, 0.0], "degenerate"),
        ([-1e-6, 2.0, 5.0], "degenerate"),  # within the tolerance of a thousandth
        ([3.0], "minimum"),
        ([-3.0], "maximum"),
    ],
)
def test_kinds_of_quadratics_at_their_critical_point(eigenvalues, kind, options):
    w = torch.ones(len(eigenvalues))
    found = kind_at(Bowl(eigenvalues), w, **options)
    assert found.kind == kind
    assert found.gradient_norm == found.relative_gradient == 0
    assert math.isnan(found.flatness)
    assert math.isnan(found.gradient_noise)


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0, 5.0], [-1.0, 2.0, 5.0], [-1.0, -2.0, -5.0]])
def test_away_from_the_critical_point_it_is_none(eigenvalues):
    w = torch.tensor([2.0, 1.0, 1.0])
    found = kind_at(Bowl(eigenvalues), w)
    gradient = symmetric(eigenvalues)[:, 0]
    assert found.kind == "not critical"
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    size = math.sqrt(6)
    assert found.relative_gradient == pytest.approx(float(gradient.norm()) / (5 * size), rel=1e-10)
    product = symmetric(eigenvalues) @ gradient
    flatness = float(product.norm()) / (5 * float(gradient.norm()))
    assert found.flatness == pytest.approx(flatness, rel=1e-10)


def test_textbook_points():
    monkey = lambda p: p["w"][0] ** 3 - 3 * p["w"][0] * p["w"][1] ** 2  # noqa: E731
    assert kind_at(monkey, torch.zeros(2)).kind == "degenerate"
    lecture = lambda p: (1 - p["w"][0] * p["w"][1]) ** 2  # noqa: E731
    assert kind_at(lecture, torch.zeros(2)).kind == "saddle"
    assert kind_at(lecture, torch.ones(2)).kind == "degenerate"  # a valley of minima
    assert kind_at(lambda p: p["w"].cos().sum(), torch.zeros(3)).kind == "maximum"
    assert kind_at(lambda p: -p["w"].cos().sum(), torch.zeros(3)).kind == "minimum"
    assert kind_at(lambda p: p["w"].sum(), torch.zeros(3)).kind == "not critical"  # no curvature


@pytest.mark.parametrize(("shift", "kind"), [(0.5e-5, "minimum"), (2e-5, "not critical")])
def test_a_gradient_counts_as_zero_below_a_relative_threshold(shift, kind):
    """A Newton step g / tol, with tol = 1e-3 lambda, against 1 % of the parameters."""
    w = torch.full((4,), 1 + shift, dtype=torch.float64)
    found = kind_at(Bowl([3.0] * 4), w)
    assert found.relative_gradient == pytest.approx(shift, rel=1e-3)
    assert found.kind == kind
    big = kind_at(Bowl([3e6] * 4), w)  # scaling the loss changes nothing
    assert (big.kind, big.relative_gradient) == (kind, pytest.approx(found.relative_gradient))


def test_a_gradient_flat_point_is_told_by_its_flatness():
    """Frye et al.: the gradient lies in the null space of H, and its norm is stationary."""
    loss = lambda p: p["w"][0] + 5 * p["w"][1] ** 2 - p["w"][2] ** 2  # noqa: E731
    found = kind_at(loss, torch.tensor([7.0, 0.0, 0.0]))
    assert found.gradient_norm == 1
    assert found.flatness == pytest.approx(0, abs=1e-15)
    assert found.kind == "not critical"
    steep = kind_at(loss, torch.tensor([7.0, 1.0, 0.0]))
    assert steep.flatness == pytest.approx(10 / math.sqrt(101), rel=1e-12)


def noisy_batches(mean: float, spread: float, count: int = 40):
    """Return batches with gradients mean + noise, around a bowl of curvature 2."""
    generator = torch.Generator().manual_seed(0)
    noise = spread * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    noise -= noise.mean(0)
    return [lambda p, c=c: p["w"].square().sum() + (c + mean) @ p["w"] for c in noise]


@pytest.mark.parametrize(
    ("mean", "kind"),
    [(0.0, "minimum"), (0.9, "not critical"), (1.1, "not critical")],  # in standard errors
)
def test_noise_is_evidence_and_decides_nothing(mean, kind):
    w = torch.full((3,), 1e-3, dtype=torch.float64)
    spread = 1.0
    silent = kind_at(noisy_batches(0.0, spread), w)
    expected = spread * math.sqrt(3 / 40)  # three entries, forty batches
    assert silent.gradient_noise == pytest.approx(expected, rel=0.2)  # known to 1 / sqrt(240)
    shift = mean * silent.gradient_noise / math.sqrt(3) - 2e-3  # with the bowl's own gradient
    found = kind_at(noisy_batches(shift, spread), w)
    assert found.gradient_norm == pytest.approx(mean * found.gradient_noise, abs=1e-12)
    assert found.relative_gradient > 1e-3 or mean == 0
    assert found.kind == kind


def test_a_single_batch_has_no_noise():
    w = torch.full((3,), 1e-3, dtype=torch.float64)
    found = kind_at(noisy_batches(1.0, 1.0, count=1), w)
    assert math.isnan(found.gradient_noise)
    assert found.kind == "not critical"


def test_parameters_at_the_origin():
    with_gradient = kind_at(lambda p: p["w"].square().sum() + p["w"].sum(), torch.zeros(2))
    size = 1e-2 * math.sqrt(2)  # the origin has none of its own
    assert with_gradient.kind == "not critical"
    assert with_gradient.relative_gradient == pytest.approx(math.sqrt(2) / (2 * size))
    nearly = kind_at(lambda p: (1 - p["w"][0] * p["w"][1]) ** 2, torch.tensor([1e-12, 0.0]))
    assert nearly.kind == "saddle"
    without = kind_at(lambda p: p["w"].square().sum(), torch.zeros(2))
    assert (without.kind, without.relative_gradient) == ("minimum", 0.0)


def test_it_costs_one_product_and_cannot_be_changed():
    operator = HessianOperator(Bowl([1.0, 2.0]), {"w": torch.zeros(2, dtype=torch.float64)})
    spectrum = hessian_spectrum(operator)
    before = operator.num_matvecs
    found = critical_point(operator, spectrum)
    assert operator.num_matvecs == before + 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.kind = "minimum"


# -- evidence -----------------------------------------------------------------------------------

WAYS = [{}, {"exact_below": 0}]


@pytest.mark.parametrize("options", WAYS, ids=["exact", "lanczos"])
def test_shares_are_those_of_the_spectrum(options):
    operator = HessianOperator(Bowl([-1.0, 2.0, 5.0, 0.0]), {"w": torch.ones(4).double()})
    spectrum = hessian_spectrum(operator, **options)
    found = critical_point(operator, spectrum)
    assert (found.positive, found.negative) == (spectrum.positive, spectrum.negative)
    if not options:
        assert (found.positive.value, found.negative.value) == (0.5, 0.25)


@pytest.mark.parametrize("options", WAYS, ids=["exact", "lanczos"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_model_of_a_quadratic_is_its_change(sign, options):
    """Also where there is a slope, and whichever way the eigenvector points."""
    eigenvalues = [-3.0, 2.0, 5.0]
    w = torch.ones(3, dtype=torch.float64) + sign * 0.3 * torch.tensor([1.0, -1.0, 2.0])
    operator = HessianOperator(Bowl(eigenvalues), {"w": w})
    spectrum = hessian_spectrum(operator, **options)
    for vector in (spectrum.lambda_min_vector, -spectrum.lambda_min_vector):
        found = critical_point(
            operator, dataclasses.replace(spectrum, lambda_min_vector=vector)
        ).descent
        assert found is not None
        assert found.step == pytest.approx(1e-2 * float(w.norm()), rel=1e-12)
        slope = -abs(float(symmetric(eigenvalues) @ (w - 1) @ vector))
        assert slope < -0.01
        curvature = -3.0 * found.step**2 / 2
        expected = (found.step * slope + curvature, -found.step * slope + curvature)
        assert found.predicted == pytest.approx(expected, rel=1e-6)
        assert found.actual == pytest.approx(found.predicted, rel=1e-6, abs=1e-12)
        assert found.side == 0  # down the slope
        assert found.is_real


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0], [0.0, 2.0], [0.0, 0.0], [-1e-6, 2.0]])
def test_there_is_no_descent_without_a_certified_negative_eigenvalue(eigenvalues):
    assert kind_at(Bowl(eigenvalues), torch.ones(2)).descent is None


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_step_does_not_depend_on_the_scale_of_the_loss(scale):
    operator = HessianOperator(
        Bowl([-3.0 * scale, 2.0 * scale]), {"w": torch.ones(2).double() * 1.5}
    )
    found = critical_point(operator, hessian_spectrum(operator)).descent
    assert found.step == pytest.approx(1e-2 * 1.5 * math.sqrt(2), rel=1e-12)
    assert found.actual == pytest.approx(found.predicted, rel=1e-6)


def test_at_the_origin_the_step_has_a_length_of_its_own():
    found = kind_at(lambda p: -p["w"].square().sum(), torch.zeros(2))
    assert found.kind == "maximum"
    assert found.descent.step == pytest.approx(1e-2 * 1e-2 * math.sqrt(2))
    assert found.descent.actual == pytest.approx((-2e-8, -2e-8))
    assert found.descent.predicted == pytest.approx((-2e-8, -2e-8))


@pytest.mark.parametrize("height", [0.0, 1e3, 1e6])
def test_the_step_is_long_enough_to_show_above_the_rounding_of_the_loss(height):
    """A change of 1e-6 is nothing beside a loss of 1e6 in float32."""
    w = torch.full((2,), 0.01)
    loss = lambda p: height + 0.05 * (p["w"][0] ** 2 - p["w"][1] ** 2)  # noqa: E731
    operator = HessianOperator(loss, {"w": w})
    found = critical_point(operator, hessian_spectrum(operator)).descent
    rounding = torch.finfo(torch.float32).eps * height
    curvature = abs(sum(found.predicted)) / 2
    assert curvature >= 0.99e3 * rounding
    for predicted, actual in zip(found.predicted, found.actual, strict=True):
        assert actual == pytest.approx(predicted, rel=1e-3, abs=2 * rounding + 1e-10)
    assert found.is_real


def test_a_kink_that_the_curvature_does_not_know_is_told():
    """Curved down at the point alone: a wall on both sides, and no step is a descent."""
    loss = lambda p: -(p["w"][0] ** 2) + 1e6 * p["w"][0] ** 4 + p["w"][1] ** 2  # noqa: E731
    w = torch.tensor([0.0, 3.0], dtype=torch.float64)
    found = kind_at(loss, w).descent
    assert min(found.predicted) < 0 < min(found.actual)
    assert not found.is_real


def test_a_descent_says_which_side_it_takes():
    turned = Descent(0.1, (-1.0, -0.5), (0.25, -2.0))
    assert (turned.side, turned.is_real) == (1, True)
    assert "step of 0.1" in str(turned)
    assert "by -2, predicted -0.5" in str(turned)
    level = Descent(0.1, (-1.0, -1.0), (-3.0, -3.0))
    assert level.side == 0
    assert not Descent(0.1, (-1.0, -1.0), (0.0, 0.5)).is_real


def test_it_says_what_it_found():
    saddle = str(kind_at(Bowl([-1.0, 2.0]), torch.ones(2)))
    assert saddle.startswith(
        "saddle: gradient 0, positive 0.5000, negative 0.5000; a step of 0.014"
    )
    minimum = str(kind_at(Bowl([1.0, 2.0]), torch.ones(2)))
    assert minimum == "minimum: gradient 0, positive 1.0000, negative 0.0000"
    noisy = str(kind_at(noisy_batches(1.0, 1.0), torch.ones(3)))
    assert "(noise 0." in noisy


def test_the_descent_costs_two_losses_and_no_product():
    loss = Quadratic(symmetric([-1.0, 2.0]))
    operator = HessianOperator(loss, {"w": torch.ones(2).double()})
    spectrum = hessian_spectrum(operator)
    products, calls = operator.num_matvecs, loss.calls
    critical_point(operator, spectrum)
    assert (operator.num_matvecs - products, loss.calls - calls) == (1, 2)


def test_parameters_are_left_as_they_were():
    w = torch.nn.Parameter(torch.ones(2).double())
    operator = HessianOperator(Quadratic(symmetric([-1.0, 2.0])), {"w": w})
    version = w._version
    critical_point(operator, hessian_spectrum(operator))
    assert w.tolist() == [1, 1]
    assert (w._version, w.grad) == (version, None)


@pytest.mark.parametrize(("eigenvalue", "kind"), [(3.0, "minimum"), (-3.0, "maximum")])
def test_one_parameter(eigenvalue, kind):
    found = kind_at(Bowl([eigenvalue]), torch.ones(1))
    assert found.kind == kind
    assert (found.descent is None) == (eigenvalue > 0)
