import numpy as np
import pytest
import torch

from lightning_optkit.measures.directions import (
    normalized_direction,
    random_directions,
    trajectory_plane,
)

PARAMS = {
    "conv": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double(),
    "bias": torch.ones(4).double(),
    "matrix": torch.randn(2, 5, generator=torch.Generator().manual_seed(2)).double(),
    "scale": torch.tensor(3.0).double(),
}


def pieces(direction):
    parts = direction.split([p.numel() for p in PARAMS.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(PARAMS.items(), parts, strict=True)}


def test_filters_are_as_long_as_the_weights_and_keep_their_direction():
    drawn = torch.randn(48 + 4 + 10 + 1, generator=torch.Generator().manual_seed(3)).double()
    found, before = pieces(normalized_direction(drawn, PARAMS)), pieces(drawn)
    for name in ("conv", "matrix"):
        for d, w, old in zip(found[name], PARAMS[name], before[name], strict=True):
            assert d.norm() == pytest.approx(float(w.norm()), rel=1e-14)
            torch.testing.assert_close(d / d.norm(), old / old.norm())
    assert found["bias"].abs().sum() == found["scale"] == 0


def test_layers_and_none():
    drawn = torch.randn(63, generator=torch.Generator().manual_seed(3)).double()
    found = pieces(normalized_direction(drawn, PARAMS, normalization="layer"))
    assert found["conv"].norm() == pytest.approx(float(PARAMS["conv"].norm()), rel=1e-14)
    assert found["bias"].abs().sum() == 0
    assert torch.equal(normalized_direction(drawn, PARAMS, normalization="none"), drawn)
    with pytest.raises(ValueError, match="`normalization` must be 'filter', 'layer' or 'none'"):
        normalized_direction(drawn, PARAMS, normalization="filters")


def test_a_filter_of_zeros_and_a_direction_of_zeros_stay_zero():
    zeros = {"w": torch.zeros(2, 3)}
    assert normalized_direction(torch.ones(6), zeros).abs().sum() == 0
    assert normalized_direction(torch.zeros(6), {"w": torch.ones(2, 3)}).abs().sum() == 0


def test_random_directions_are_reproducible_nearly_orthogonal_and_draw_from_no_global_stream():
    state = torch.get_rng_state()
    big = {"w": torch.ones(100, 100)}
    one, two = random_directions(big)
    assert torch.equal(torch.stack([one, two]), random_directions(big))
    assert abs(float(one @ two / one.norm() / two.norm())) < 0.05
    assert one.dtype == torch.float32
    other = random_directions(big, generator=torch.Generator().manual_seed(9))[0]
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_plane_of_a_path_is_that_of_its_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(12, 40, generator=generator, dtype=torch.float64).cumsum(0)
    plane = trajectory_plane(list(points))
    steps = (points[:-1] - points[-1]).numpy()
    u, s, vt = np.linalg.svd(steps, full_matrices=False)
    overlaps = (plane.directions.numpy() @ vt[:2].T).round(10)
    assert np.abs(overlaps).tolist() == [[1, 0], [0, 1]]
    np.testing.assert_allclose(plane.explained, s[:2] ** 2 / (s**2).sum(), rtol=1e-10)
    signs = np.sign(np.diag(overlaps))
    np.testing.assert_allclose(plane.path[:-1], u[:, :2] * s[:2] * signs, rtol=1e-8, atol=1e-10)
    assert plane.path[-1].tolist() == [0.0, 0.0]


def test_a_path_in_a_plane_is_explained_by_it():
    corners = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 0]])
    plane = trajectory_plane(list(corners))
    assert plane.explained.tolist() == pytest.approx([0.8, 0.2])
    assert plane.path.abs().flatten().tolist() == pytest.approx([0, 1, 2, 0, 0, 0])
    assert plane.directions.dtype == torch.float32


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([torch.ones(3)] * 2, "`points` must hold at least three weights of the path, got 2"),
        ([torch.ones(3)] * 4, "`points` must span a plane, got a path along a line, or one that"),
        ([t * torch.ones(3) for t in range(4)], "`points` must span a plane"),
    ],
)
def test_paths_without_a_plane_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        trajectory_plane(points)
