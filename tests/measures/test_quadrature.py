"""The certified bounds hold for every measure, and the Beta law for every share."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lightning_optkit.measures import lanczos
from lightning_optkit.measures.lanczos import rounding_noise
from lightning_optkit.measures.quadrature import gauss, mass_below, share_interval
from tests.quadratics import symmetric, within_sem

# The same examples every time: a failure is a fault of the code, not of the day.
reproducible = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

FEW = [-1.0, -1e-3, 0.0, 1e-3, 1.0, 3.0]
VALUES = st.one_of(
    st.floats(-10, 10).map(lambda x: x if abs(x) > 1e-30 else 0.0),  # squares must not underflow
    st.sampled_from(FEW),  # repeated
    st.just(0.0),
    st.builds(lambda c, e: c + e * 1e-9, st.sampled_from(FEW), st.integers(-9, 9)),  # clustered
    st.builds(lambda s, e: s * 10.0**e, st.sampled_from([-1, 1]), st.integers(-12, 4)),
)
SPECTRA = st.one_of(
    st.lists(VALUES, min_size=1, max_size=24),
    st.lists(st.sampled_from(FEW), min_size=1, max_size=24),
    st.builds(lambda zeros, rest: [0.0] * zeros + rest, st.integers(1, 20), st.lists(VALUES)),
)


def start_for(n: int, seed: int, spread: float) -> Tensor:
    """Return a start vector; with a large spread it all but misses some eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=torch.float64)
    return start * torch.exp(spread * torch.randn(n, generator=generator, dtype=torch.float64))


def mass(eigenvalues: Tensor, start: Tensor, threshold: float) -> float:
    """Return the exact share of the start vector's square on eigenvalues up to the threshold."""
    squares = start.square()
    return min(1.0, float(squares[eigenvalues <= threshold].sum() / squares.sum()))


def leak(eigenvalues: Tensor, threshold: float, perturbation: float) -> float:
    """Return how much mass a perturbation of that norm may carry over the threshold.

    Products are those of a matrix nearby. Its eigenvectors on either side of a gap are turned by
    perturbation / gap (Davis and Kahan), so the mass of a fixed vector changes by twice that. The
    count of eigenvalues does not, and a Gaussian vector knows no eigenvectors: for the shares this
    does not matter.
    """
    below, above = eigenvalues[eigenvalues <= threshold], eigenvalues[eigenvalues > threshold]
    if not len(below) or not len(above):
        return 0.0
    gap = float(above.min() - below.max())
    return 2 * perturbation / (gap - perturbation) if gap > 3 * perturbation else 1.0


def thresholds(
    eigenvalues: Tensor, ritz_values: Tensor, radius: float, slack: float
) -> list[float]:
    """Return thresholds that coincide with eigenvalues and Ritz values, and lie around them."""
    at = [*eigenvalues.tolist(), *ritz_values.tolist()]
    beside = [t + s * radius * r for t in at[:6] for s in (-1, 1) for r in (1e-16, 1e-9, 1e-3)]
    poles = [t + s * slack for t in ritz_values.tolist() for s in (-1, 1)]
    return [*at, *beside, *poles, 0.0, 1e-3 * radius, -1e-3 * radius, 2 * radius, -2 * radius]


@reproducible
@given(
    spectrum=SPECTRA,
    steps=st.integers(1, 24),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@example(spectrum=[1.0], steps=1, seed=0, spread=0.0, dtype=torch.float64)
@example(spectrum=[0.0] * 10, steps=3, seed=0, spread=0.0, dtype=torch.float64)
@example(spectrum=[-2.0, 2.0], steps=1, seed=0, spread=0.0, dtype=torch.float64)
@example(spectrum=[1.0, 1.0 + 1e-15, 2.0, 3.0], steps=3, seed=0, spread=0.0, dtype=torch.float64)
@example(  # neighbours closer than rounding: the two bounds would cross by 2e-8
    spectrum=[
        *(2.999999999999998, 3e-14, 1.0000000002, 0.001, -1.0000000000000009, -1.0000000000007),
        *(-1.00000000000004, 2.999999995, 0.0010000000000300001, -0.001, -0.999999999999993),
    ],
    steps=9,
    seed=976,
    spread=0.0,
    dtype=torch.float64,
)
@example(spectrum=[0.0] * 20 + FEW, steps=4, seed=1, spread=0.0, dtype=torch.float32)
def test_bounds_hold_the_true_mass(spectrum, steps, seed, spread, dtype):
    eigenvalues = torch.tensor(spectrum, dtype=dtype)  # rounded first: then diagonal is exact
    start = start_for(len(eigenvalues), seed, spread)
    a, b = lanczos(torch.diag(eigenvalues), steps, start=start[None]).lanes()[0]
    eigenvalues = eigenvalues.double()
    radius = float(eigenvalues.abs().max())
    slack = max(rounding_noise(dtype) * radius, 1e-300)
    # In float32 the start vector itself is rounded, and its square with it.
    start_error = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    for t in thresholds(eigenvalues, gauss(a, b)[0], radius, slack):
        lower, upper = mass_below(a, b, t, slack=slack)
        assert 0 <= lower <= upper <= 1
        error = start_error + leak(eigenvalues, t, slack / 4)
        assert lower - error <= mass(eigenvalues, start, t) <= upper + error


@reproducible
@given(
    distinct=st.lists(st.integers(-50, 50), min_size=1, max_size=8, unique=True),
    copies=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_bounds_meet_once_the_measure_is_known(distinct, copies, seed):
    eigenvalues = torch.tensor(distinct * copies, dtype=torch.float64)
    start = 1 + start_for(len(eigenvalues), seed, 0.0).abs()
    a, b = lanczos(torch.diag(eigenvalues), len(eigenvalues), start=start[None]).lanes()[0]
    for t in sorted(distinct):
        for between in (t - 0.5, t + 0.5):
            lower, upper = mass_below(a, b, between, slack=1e-9)
            truth = mass(eigenvalues, start, between)
            assert upper - lower <= 3e-10  # what is given to the rounding of the weights
            assert lower == pytest.approx(truth, abs=1e-9)
        lower, upper = mass_below(a, b, float(t), slack=1e-9)
        atom = mass(eigenvalues, start, t) - mass(eigenvalues, start, t - 0.5)
        assert upper - lower == pytest.approx(atom, abs=1e-9)  # at an eigenvalue, its whole weight


def spread_out(n: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bulk = 0.2 * torch.randn(n - 3, generator=generator, dtype=torch.float64)
    eigenvalues = torch.cat([bulk, torch.tensor([-1.0, 4.0, 9.0], dtype=torch.float64)])
    return eigenvalues, torch.randn(n, generator=generator, dtype=torch.float64)


def test_more_steps_only_narrow_the_bounds():
    eigenvalues, start = spread_out()
    found = lanczos(torch.diag(eigenvalues), 60, start=start[None])
    for t in (-0.5, -0.1, 0.0, 0.03, 0.3, 2.0):
        bounds = []
        for m in range(1, 61):
            a, b = found.diagonal[0, :m], found.off_diagonal[0, :m]
            bounds.append(mass_below(a, b, t, slack=1e-13))
        lowers, uppers = zip(*bounds, strict=True)
        # Twice what each bound gives to the rounding of the weights
        assert all(later >= sooner - 2e-10 for sooner, later in pairwise(lowers))
        assert all(later <= sooner + 2e-10 for sooner, later in pairwise(uppers))
        assert uppers[-1] - lowers[-1] < 0.5 * (uppers[0] - lowers[0])


def test_the_bounds_are_attained():
    """They are the best: each is the mass of a measure with the same tridiagonal matrix.

    Continuing with the Radau entry and nothing behind it is such a measure. It has an eigenvalue
    at the threshold, which the bounds must leave on either side, and nothing else to spare.
    """
    eigenvalues, start = spread_out()
    a, b = lanczos(torch.diag(eigenvalues), 7, start=start[None]).lanes()[0]
    for t in (-0.5, 0.03, 0.25, 2.0):
        slack = 1e-12
        lower, upper = mass_below(a, b, t, slack=slack)
        shifted = torch.diag(a) + torch.diag(b[:-1], 1) + torch.diag(b[:-1], -1)
        shifted -= t * torch.eye(7, dtype=torch.float64)
        corner = torch.linalg.inv(shifted)[-1, -1]
        extended = torch.cat([a, (t + b[-1] ** 2 * corner)[None]])
        nodes, weights, residuals = gauss(extended, torch.cat([b, b.new_zeros(1)]))
        at = int((nodes - t).abs().argmin())
        assert float(nodes[at]) == pytest.approx(t, abs=1e-12)
        assert lower == pytest.approx(float(weights[:at].sum()), abs=1e-9)
        assert upper == pytest.approx(float(weights[: at + 1].sum()), abs=1e-9)
        assert residuals.count_nonzero() == 0


def test_mass_below_and_above_mirror_each_other():
    """Turning the sign of everything turns the bounds around."""
    eigenvalues, start = spread_out()
    a, b = lanczos(torch.diag(eigenvalues), 12, start=start[None]).lanes()[0]
    for t in (-0.5, 0.01, 0.3, 2.0):
        lower, upper = mass_below(a, b, t, slack=1e-12)
        mirrored = mass_below(-a, b, -t, slack=1e-12)
        assert mirrored == pytest.approx((1 - upper, 1 - lower), abs=1e-9)


# -- the Gauss rule -------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_the_gauss_rule_has_the_moments_of_the_measure(m):
    eigenvalues, start = spread_out()
    scaled = eigenvalues / 9  # moments of order 17 stay near 1
    squares = start.square() / start.square().sum()
    a, b = lanczos(torch.diag(scaled), m, start=start[None]).lanes()[0]
    nodes, weights, _ = gauss(a, b)
    assert torch.equal(nodes, nodes.sort().values)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
    for power in range(2 * m):
        truth = float(squares @ scaled.pow(power))
        assert float(weights @ nodes.pow(power)) == pytest.approx(truth, rel=1e-10, abs=1e-13)
    beyond = float(squares @ scaled.pow(2 * m) - weights @ nodes.pow(2 * m))
    assert beyond == pytest.approx(float(b.square().prod()), rel=1e-8)  # the rule's known error


def test_weights_are_squares_of_eigenvector_components():
    matrix = symmetric([-2.0, 0.5, 1.0, 4.0])
    eigenvectors = torch.linalg.eigh(matrix).eigenvectors
    start = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    _, weights, residuals = gauss(*lanczos(matrix, 4, start=start[None]).lanes()[0])
    truth = (eigenvectors.T @ start).square() / start.square().sum()
    torch.testing.assert_close(weights, truth, rtol=1e-9, atol=1e-13)
    assert residuals.count_nonzero() == 0


# -- from mass to share ---------------------------------------------------------------------------

LAWS = [
    (n, k, p)
    for n, k, p in [
        (10, 1, 0.5),
        (10, 4, 0.1),
        (100, 4, 0.03),
        (100, 4, 0.5),
        (1000, 2, 0.999),
        (1000, 4, 0.25),
        (50_000, 4, 0.00002),  # one eigenvalue
        (50_000, 8, 0.7),
    ]
]


@pytest.mark.parametrize(("n", "k", "p"), [law for law in LAWS if law[0] <= 1000])
def test_pooled_mass_of_gaussian_probes_follows_the_beta_law(n, k, p):
    generator = torch.Generator().manual_seed(0)
    draws, positive = 4000, round(p * n)
    probes = torch.randn(draws, k, n, generator=generator, dtype=torch.float64)
    squares = probes.square()
    pooled = squares[:, :, :positive].sum((1, 2)) / squares.sum((1, 2))
    law = stats.beta(k * p * n / 2, k * (1 - p) * n / 2)
    assert within_sem(pooled, p)
    assert within_sem((pooled - p).square(), float(law.var()))
    # and the whole distribution: Kolmogorov's distance at a level of 1e-4
    assert stats.kstest(pooled.numpy(), law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("confidence", [0.8, 0.99])
@pytest.mark.parametrize(("n", "k", "p"), LAWS)
def test_intervals_cover_as_often_as_they_say(n, k, p, confidence):
    rng = np.random.default_rng(0)
    draws = rng.beta(k * p * n / 2, k * (1 - p) * n / 2, size=2000)
    intervals = [
        share_interval(x, x, dimension=n, num_probes=k, confidence=confidence) for x in draws
    ]
    hits = np.mean([low - 1e-12 <= p <= high + 1e-12 for low, high in intervals])
    sem = math.sqrt(confidence * (1 - confidence) / len(draws))
    assert hits >= confidence - 4 * sem
    if min(p, 1 - p) * n >= 25:  # elsewhere the share is so discrete that intervals are generous
        assert hits <= confidence + 4 * sem + 0.03


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize(("n", "k"), [(7, 1), (40, 4), (300, 4)])
def test_the_interval_is_the_set_of_shares_that_no_tail_rejects(n, k, confidence):
    """Against the definition, one share after another."""
    tail = (1 - confidence) / 2
    counts = np.arange(1, n)
    laws = stats.beta(k * counts / 2, k * (n - counts) / 2)
    for lower, upper in [(0.0, 0.0), (0.0, 0.3), (0.1, 0.1), (0.48, 0.55), (0.97, 1.0), (1.0, 1.0)]:
        possible = (laws.sf(lower) >= tail) & (laws.cdf(upper) >= tail)
        kept = [i / n for i in counts[possible].tolist()]
        kept += [0.0] if lower <= 0 else []  # all mass on one side, for certain
        kept += [1.0] if upper >= 1 else []
        found = share_interval(lower, upper, dimension=n, num_probes=k, confidence=confidence)
        assert found == (min(kept), max(kept))


def test_nothing_known_is_the_whole_interval():
    found = share_interval(0.0, 1.0, dimension=123, num_probes=4, confidence=0.99)
    assert found == (0.0, 1.0)


def test_no_mass_is_no_share_or_one_too_small_to_be_seen():
    low, high = share_interval(0.0, 0.0, dimension=5000, num_probes=4, confidence=0.99)
    assert low == high == 0  # any eigenvalue has some mass
    low, high = share_interval(0.0, 1e-6, dimension=5000, num_probes=4, confidence=0.99)
    assert (low, high) == (0.0, 0.0)  # one of 5000 would have 2e-4, within a factor of ten or so
    low, high = share_interval(1.0, 1.0, dimension=5000, num_probes=4, confidence=0.99)
    assert low == high == 1


@reproducible
@given(
    masses=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    n=st.integers(1, 3000),
    k=st.integers(1, 200),
    confidences=st.tuples(st.floats(0.01, 0.999), st.floats(0.01, 0.999)).map(sorted),
)
@example(masses=[0.25, 0.25], n=10, k=1000, confidences=[0.5, 0.6])  # no share fits
@example(masses=[0.0, 1.0], n=1, k=1, confidences=[0.9, 0.99])
def test_intervals_are_ordered_and_grow_with_confidence(masses, n, k, confidences):
    options = {"dimension": n, "num_probes": k}
    loose, strict = (share_interval(*masses, **options, confidence=c) for c in confidences)
    for low, high in (loose, strict):
        assert 0 <= low <= high <= 1
        assert abs(low * n - round(low * n)) < 1e-6
        assert abs(high * n - round(high * n)) < 1e-6
    # Where no share fits, the two nearest stand for an empty set, and the rule ends.
    if masses[1] - masses[0] > 2 / n:
        assert strict[0] <= loose[0]
        assert strict[1] >= loose[1]


def test_more_probes_narrow_the_interval():
    widths = [
        high - low
        for low, high in (
            share_interval(0.3, 0.3, dimension=4000, num_probes=k, confidence=0.99)
            for k in (1, 4, 16, 64)
        )
    ]
    # as one over the root of their number; the interval has multiples of 1/4000 as its ends
    assert widths == pytest.approx([widths[0] / 2**i for i in range(4)], abs=2e-3)
    normal = 2 * stats.norm.ppf(0.995) * math.sqrt(2 * 0.3 * 0.7 / (4 * 4000))
    assert widths[1] == pytest.approx(normal, rel=0.02)


def test_a_threshold_on_a_ritz_value_is_no_pole():
    """The entry of the Radau rule is infinite there: the bound is taken a step further out."""
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.randn(12, generator=generator, dtype=torch.float64)
    off_diagonal = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
    nodes, weights, _ = gauss(diagonal, off_diagonal)
    slack = 2.0**-40
    exact = [k for k in range(12) if float(nodes[k] + slack - slack) == float(nodes[k])]
    assert exact
    for k in exact:
        lower, upper = mass_below(diagonal, off_diagonal, float(nodes[k]) + slack, slack=slack)
        # at a Ritz value the Radau rule is the Gauss rule itself; a step out loses little
        below, through = float(weights[:k].sum()), float(weights[: k + 1].sum())
        assert -1e-12 <= below - lower < 2e-3
        assert -1e-12 <= upper - through < 2e-3
