"""The kind of a point on surfaces whose kind is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lightning_optkit.measures import (
    CriticalPoint,
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
    assert (with_gradient.kind, with_gradient.relative_gradient) == ("not critical", math.inf)
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
