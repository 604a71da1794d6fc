"""The noise scale, against its definition, an identity, and Gaussian gradients."""

import math

import numpy as np
import pytest
import torch

from lightning_optkit.measures.gradient_noise import NoisePoint, noise_point, noise_scale


def test_equal_batches_give_the_published_formula():
    generator = np.random.default_rng(0)
    for k, b in ((2, 16), (5, 3), (7, 1)):
        gradients = generator.normal(size=(k, 11))
        squares, of_mean = (gradients**2).sum(1), float((gradients.mean(0) ** 2).sum())
        small, big, size = squares.mean(), of_mean, k * b
        found = noise_point(squares, of_mean, [b] * k)
        assert found.variance == pytest.approx((small - big) / (1 / b - 1 / size), rel=1e-10)
        assert found.square_norm == pytest.approx((size * big - b * small) / (size - b), rel=1e-10)


@pytest.mark.parametrize("sizes", [[8, 8], [5, 6], [1, 100, 7], [32, 32, 32, 4]])
def test_both_estimates_are_unbiased_for_any_sizes(sizes):
    """They are linear, so that their mean is what they make of the means."""
    variance, square, k = 12.5, 0.75, len(sizes)
    squares = [square + variance / size for size in sizes]  # E |g_i|²
    of_mean = square + variance * sum(1 / size for size in sizes) / k**2  # E |mean|²
    found = noise_point(squares, of_mean, sizes)
    assert found.variance == pytest.approx(variance, rel=1e-12)
    assert found.square_norm == pytest.approx(square, rel=1e-12)


def test_the_signal_of_two_halves_is_their_inner_product():
    first, second = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).double()
    mean = (first + second) / 2
    found = noise_point(torch.stack([first @ first, second @ second]), mean @ mean, [4, 4])
    assert found.square_norm == pytest.approx(float(first @ second), rel=1e-12)
    assert found.variance == pytest.approx(
        2 * float((first - second) @ (first - second)), rel=1e-12
    )


def test_the_scale_of_the_loss_does_not_matter():
    points = [noise_point([3.0, 2.0], 1.5, [4, 5]), noise_point([2.0, 2.5], 1.6, [4, 5])]
    scaled = [noise_point([300.0, 200.0], 150.0, [4, 5]), noise_point([200, 250], 160.0, [4, 5])]
    for name in ("value", "standard_error"):
        found = [getattr(noise_scale(each), name) for each in (points, scaled)]
        assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_means_come_before_the_ratio():
    points = [NoisePoint(8.0, 0.1), NoisePoint(4.0, 0.5)]
    found = noise_scale(points)
    assert found.value == pytest.approx(6.0 / 0.3)
    assert (found.variance, found.square_norm, found.num_points) == (6.0, pytest.approx(0.3), 2)
    residuals = [8.0 - 20 * 0.1, 4.0 - 20 * 0.5]
    expected = math.sqrt(sum(r * r for r in residuals) / 2) / 0.3
    assert found.standard_error == pytest.approx(expected, rel=1e-12)


def test_the_error_agrees_with_the_jackknife():
    generator = np.random.default_rng(2)
    variances, squares = generator.normal(9, 1, 400), generator.normal(0.5, 0.2, 400)
    found = noise_scale([NoisePoint(v, s) for v, s in zip(variances, squares, strict=True)])
    left_out = (variances.sum() - variances) / (squares.sum() - squares)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(jackknife, rel=0.01)


def test_what_is_not_resolved_is_not_a_number():
    one = noise_scale([NoisePoint(8.0, 0.5)])
    assert one.value == 16.0
    assert math.isnan(one.standard_error)
    for square in (0.0, -1.0):
        found = noise_scale([NoisePoint(8.0, square), NoisePoint(7.0, square)])
        assert math.isnan(found.value)
        assert math.isnan(found.standard_error)
        assert found.square_norm == square


def points_of_gaussians(generator, *, num_points, sizes, mean, deviations):
    """Return points of batches whose samples have gradients with these means and deviations."""
    points = []
    for _ in range(num_points):
        noise = generator.normal(size=(len(sizes), len(mean))) * deviations
        gradients = mean + noise / np.sqrt(sizes)[:, None]
        of_mean = float((gradients.mean(0) ** 2).sum())
        points.append(noise_point((gradients**2).sum(1), of_mean, sizes))
    return points


@pytest.mark.parametrize("sizes", [[32, 32], [32, 7, 20]], ids=str)
def test_gaussian_gradients_have_their_known_scale_within_the_error(sizes):
    generator = np.random.default_rng(3)
    deviations = generator.uniform(0.5, 1.5, 60)
    mean = generator.normal(size=60)
    mean *= math.sqrt((deviations**2).sum() / 64) / np.linalg.norm(mean)  # a noise scale of 64
    settings = {"num_points": 20, "sizes": np.array(sizes), "mean": mean, "deviations": deviations}
    found = [noise_scale(points_of_gaussians(generator, **settings)) for _ in range(300)]
    errors = np.array([each.standard_error for each in found])
    values = np.array([each.value for each in found])
    covered = np.abs(values - 64) <= 2 * errors
    # 0.95 of 300: three standard errors are 0.04; the first order falls a little short
    assert 0.89 <= covered.mean() <= 0.99
    assert np.abs(np.median(values) - 64) < 4 * errors.mean() / math.sqrt(300)
    for name, truth in (
        ("variance", (deviations**2).sum()),
        ("square_norm", (mean**2).sum()),
    ):
        each = np.array([getattr(scale, name) for scale in found])
        assert abs(each.mean() - truth) <= 4 * each.std() / math.sqrt(300)


@pytest.mark.parametrize(
    ("squares", "sizes"),
    [([1.0], [4]), ([], []), ([1.0, 2.0], [4]), ([1.0, 2.0], [4, 0])],
)
def test_what_is_no_point_is_refused(squares, sizes):
    with pytest.raises(ValueError, match="must hold a number for each of at least two batches"):
        noise_point(squares, 1.0, sizes)
    with pytest.raises(ValueError, match="must hold at least one point, got none"):
        noise_scale([])
