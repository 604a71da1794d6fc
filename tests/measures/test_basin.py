import math

import pytest
import torch

from lightning_optkit.measures import CurvatureError
from lightning_optkit.measures.basin import basin_radius
from lightning_optkit.measures.directions import random_directions
from lightning_optkit.measures.loss_surface import LossSurface

H = torch.tensor([4.0, 1.0, 0.25, 9.0], dtype=torch.float64)
ORIGIN = {"w": torch.zeros(4, dtype=torch.float64)}


def quadratic(scale=1.0):
    return LossSurface(lambda p: scale * (H * p["w"] ** 2).sum() / 2, ORIGIN)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_radii_of_a_quadratic_are_its_closed_form(scale):
    found = basin_radius(quadratic(scale), rise=0.3, num_directions=6)
    generator = torch.Generator().manual_seed(0)
    for radius in found.radii:
        (d,) = random_directions(ORIGIN, 1, normalization="none", generator=generator)
        d = d / d.norm()
        truth = math.sqrt(2 * 0.3 / (scale * float((H * d**2).sum())))
        assert float(radius) == pytest.approx(truth, rel=3e-4)
    logs = found.radii.log()
    assert found.log_volume == pytest.approx(4 * float(logs.mean()))
    assert found.standard_error == pytest.approx(float(logs.std()) / math.sqrt(6))
    assert (found.loss, found.cutoff, found.num_parameters) == (0.0, 0.3, 4)


def test_the_error_over_directions_is_that_of_other_seeds():
    found = [
        basin_radius(quadratic(), generator=torch.Generator().manual_seed(seed))
        for seed in range(60)
    ]
    means = torch.tensor([each.mean_log_radius for each in found])
    errors = torch.tensor([each.standard_error for each in found])
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(means.std()), rel=0.25)


def test_a_loss_that_is_not_finite_lies_beyond_the_rim_and_a_flat_one_has_none():
    wall = LossSurface(
        lambda p: torch.where(p["w"].norm() > 0.37, torch.nan, 0.0) * p["w"].sum().sign(), ORIGIN
    )
    found = basin_radius(wall, num_directions=3)
    assert found.radii.tolist() == pytest.approx([0.37] * 3, rel=3e-4)
    flat = basin_radius(LossSurface(lambda p: 0 * p["w"].sum(), ORIGIN), num_directions=2)
    assert flat.radii.tolist() == [math.inf, math.inf]


def test_a_basin_around_no_number_is_refused():
    surface = LossSurface(lambda p: p["w"].sum() + math.nan, {"w": torch.zeros(2)})
    with pytest.raises(CurvatureError, match="must be finite, got nan"):
        basin_radius(surface)


def test_all_losses_are_counted():
    calls = []
    surface = LossSurface(lambda p: (calls.append(1), (H * p["w"] ** 2).sum())[1], ORIGIN)
    assert basin_radius(surface, num_directions=4).num_losses == len(calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rise": 0.0}, "`rise` must be positive and finite, got 0.0"),
        ({"num_directions": 1}, "`num_directions` must be an integer of at least 2, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        basin_radius(quadratic(), **options)
