import math

import pytest
import torch

from lightning_optkit.measures.directions import random_directions
from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.landscape import loss_line, loss_plane, plane_passes
from lightning_optkit.measures.loss_surface import LossSurface

A = torch.tensor([[3.0, 1.0, 0.0], [1.0, -2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
AT = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
DIRECTIONS = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)


def quadratic(w):
    return w @ A @ w / 2


def counted(calls, function=quadratic):
    def loss(p):
        calls.append(p["w"].clone())
        return function(p["w"])

    return LossSurface(loss, {"w": AT})


def test_a_plane_of_a_quadratic_is_its_formula():
    calls = []
    plane = loss_plane(counted(calls), DIRECTIONS, resolution=7, span=(-1.0, 2.0, 0.0, 3.0))
    assert plane.x.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert plane.y.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    for i, y in enumerate(plane.y):
        for j, x in enumerate(plane.x):
            truth = quadratic(AT + x * DIRECTIONS[0] + y * DIRECTIONS[1])
            torch.testing.assert_close(plane.losses[i, j], truth, rtol=1e-13, atol=1e-13)
    assert len(calls) == 49  # none twice
    assert bool(plane.known.all())
    assert plane.num_gaps == 0


@pytest.mark.parametrize("resolution", [2, 3, 8, 9, 25, 26])
def test_passes_begin_coarse_and_end_with_all_points(resolution):
    calls = []
    planes = list(plane_passes(counted(calls), DIRECTIONS, resolution=resolution))
    assert len(calls) == resolution**2
    assert not planes[0].known.any()
    numbers = [int(plane.known.sum()) for plane in planes]
    assert numbers == sorted(set(numbers))
    for plane in planes:
        assert torch.equal(plane.losses[plane.known], planes[-1].losses[plane.known])
        assert bool(plane.losses[~plane.known].isnan().all())
    stride = {2: 1, 3: 1, 8: 1, 9: 2, 25: 4, 26: 4}[resolution]  # of the first pass
    coarse = torch.zeros(resolution, resolution, dtype=torch.bool)
    coarse[::stride, ::stride] = True
    assert any(torch.equal(plane.known, coarse) for plane in planes)


def test_a_plane_goes_on_where_it_was_left():
    whole = loss_plane(counted([]), DIRECTIONS, resolution=9)
    passes = plane_passes(counted(first := []), DIRECTIONS, resolution=9)
    left = [next(passes) for _ in range(5)][-1]
    rest = []
    *_, resumed = plane_passes(counted(rest), DIRECTIONS, resolution=9, known=left)
    assert torch.equal(resumed.losses, whole.losses)
    assert len(first) + len(rest) == 81


@pytest.mark.parametrize("resolution", [2, 9, 25, 26])
def test_what_is_known_makes_a_coarse_picture(resolution):
    planes = list(plane_passes(counted([]), DIRECTIONS, resolution=resolution))
    seen = {}
    for plane in planes:
        found = plane.coarse()
        if found is None:
            continue
        apart, coarse = found
        assert torch.equal(coarse.known, plane.known)
        seen[apart] = coarse.losses
        at = range(resolution)  # the nearest of 0, apart, 2 apart, ...: up where in the middle
        nearest = [min((k for k in at[::apart]), key=lambda k: (abs(k - i), -k)) for i in at]
        assert torch.equal(coarse.losses, planes[-1].losses[nearest][:, nearest])
    first = {2: 1, 9: 2, 25: 4, 26: 4}[resolution]
    assert list(seen) == [apart for apart in (4, 2, 1) if apart <= first]
    assert torch.equal(seen[1], planes[-1].losses)


def test_the_middle_of_a_plane_is_the_loss_and_nothing_moves():
    before = AT.clone()
    plane = loss_plane(counted([]), DIRECTIONS, resolution=5)
    assert plane.losses[2, 2] == quadratic(AT)
    assert torch.equal(AT, before)


def test_a_line_between_two_points_ends_at_their_losses():
    other = torch.tensor([0.3, -0.7, 5.0], dtype=torch.float64)
    line = loss_line(counted([]), other - AT, torch.tensor([0.0, 0.25, 1.0]))
    truths = torch.stack([quadratic(AT + t * (other - AT)) for t in (0, 0.25, 1)])
    torch.testing.assert_close(line.losses, truths, rtol=1e-13, atol=0)


def test_losses_without_a_value_are_gaps():
    surface = counted([], lambda w: quadratic(w) + torch.log(w[0]))  # NaN beyond 0, -inf at it
    plane = loss_plane(surface, torch.eye(3, dtype=torch.float64)[:2], resolution=5, span=2.0)
    truth = [bool(1 + x > 0) for x in plane.x]
    assert torch.isfinite(plane.losses).all(0).tolist() == truth
    assert plane.num_gaps == 5 * truth.count(False) == 10
    line = loss_line(surface, torch.tensor([1.0, 0, 0]).double(), torch.tensor([0.0, -3.0]))
    assert line.num_gaps == 1
    assert math.isnan(line.losses[1])


def test_batches_and_processes_are_weighted_and_a_failure_elsewhere_is_told():
    functions = [lambda p: quadratic(p["w"]), lambda p: 3 * quadratic(p["w"])]
    surface = LossSurface(functions, {"w": AT}, weights=[1, 3], reduce=lambda t: 2 * t)
    line = loss_line(surface, DIRECTIONS[0], torch.tensor([1.0]))
    truth = 10 / 4 * quadratic(AT + DIRECTIONS[0])
    torch.testing.assert_close(line.losses[0], truth, rtol=1e-14, atol=0)

    def with_a_failure_elsewhere(tensor):
        return tensor + torch.tensor([math.nan, 1.0]) if tensor.shape == (2,) else 2 * tensor

    surface = LossSurface(functions, {"w": AT}, reduce=with_a_failure_elsewhere)
    with pytest.raises(CurvatureError, match="another process"):
        surface.value()
    reduced = []
    surface = LossSurface(
        lambda p: p["missing"], {"w": AT}, reduce=lambda t: (reduced.append(t), t)[1]
    )
    with pytest.raises(KeyError):  # after it has told the others
        surface.value()
    assert reduced[-1].tolist() == [0.0, 1.0]


def test_a_value_needs_no_graph():
    seen = []
    surface = LossSurface(
        lambda p: (seen.append(torch.is_grad_enabled()), p["w"].sum())[1],
        {"w": torch.ones(2, requires_grad=True)},
    )
    assert float(surface.value(torch.ones(2))) == 4.0
    assert seen == [False]
    with pytest.raises(CurvatureError, match="must return a scalar tensor, got"):
        LossSurface(lambda p: p["w"], {"w": torch.ones(2)}).value()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 1}, "`resolution` must be an integer of at least 2, got 1"),
        ({"resolution": True}, "`resolution` must be an integer of at least 2, got True"),
        ({"span": 0.0}, "`span` must be a positive number, or"),
        ({"span": (1.0, 0.0, 0.0, 1.0)}, "in growing order"),
        ({"span": math.nan}, "`span` must be a positive number"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loss_plane(counted([]), DIRECTIONS, **options)


def test_a_filter_normalized_plane_does_not_see_a_rescaling():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    shapes = {"a": (5, 4), "b": (3, 5)}
    params = {
        n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
    }

    def loss(p):
        return (torch.relu(x @ p["a"].T) @ p["b"].T).square().mean()

    planes = []
    for alpha in (1.0, 4.0):
        scaled = {"a": params["a"] * alpha, "b": params["b"] / alpha}
        planes.append(
            loss_plane(LossSurface(loss, scaled), random_directions(scaled), resolution=5)
        )
    torch.testing.assert_close(planes[0].losses, planes[1].losses, rtol=1e-12, atol=1e-12)
