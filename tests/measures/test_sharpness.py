import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.measures.sharpness import (
    average_sharpness,
    ball_sharpness,
    epsilon_sharpness,
)


def quadratic(matrix, at, *, constant=0.0, dtype=torch.float64):
    """Return the surface ½ wᵀ A w + constant at a point; a vector A is a diagonal."""
    matrix = torch.as_tensor(matrix, dtype=dtype)
    matrix = torch.diag(matrix) if matrix.ndim == 1 else matrix
    at = torch.as_tensor(at, dtype=dtype)
    return LossSurface(lambda p: p["w"] @ matrix @ p["w"] / 2 + constant, {"w": at})


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


CURVED = [3.0, 1e-4, 0.0, 700.0, 0.2]
AT = [1.0, -2.0, 0.5, 0.01, 0.0]

# -- epsilon -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
def test_epsilon_of_a_minimum_of_a_quadratic_is_its_closed_form(epsilon):
    found = epsilon_sharpness(quadratic(CURVED, [0.0] * 5), epsilon=epsilon)
    truth = 50 * epsilon**2 * sum(CURVED)
    assert found.value == pytest.approx(truth, rel=1e-6)
    assert found.corners == pytest.approx(truth, rel=1e-6)
    assert 0 < found.lower <= found.value


@pytest.mark.parametrize("seed", range(5))
def test_epsilon_away_from_a_minimum(seed):
    h, x = torch.tensor(CURVED, dtype=torch.float64), torch.tensor(AT, dtype=torch.float64)
    found = epsilon_sharpness(
        quadratic(CURVED, AT, constant=0.3), generator=torch.Generator().manual_seed(seed)
    )
    b = 1e-3 * (x.abs() + 1)
    loss = (h * x**2).sum() / 2 + 0.3
    truth = 100 * (h * ((x.abs() + b) ** 2 - x**2)).sum() / 2 / (1 + loss)
    assert found.loss == pytest.approx(float(loss), rel=1e-12)
    assert found.value == pytest.approx(float(truth), rel=1e-6)


def test_epsilon_where_the_loss_curves_down_stays_in_the_middle():
    curved = [3.0, -5.0, 0.5, -0.1]  # up along two axes, down along two
    found = epsilon_sharpness(quadratic(curved, [0.0] * 4))
    assert found.corners < 50e-6 * 3.5  # corners go down two axes
    assert found.value == pytest.approx(50e-6 * 3.5, rel=1e-6)


def test_epsilon_of_coupled_parameters_is_the_best_of_all_corners():
    matrix = symmetric([4.0, 2.0, 1.0, 0.5, 0.1, 0.05, 0.01])
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=7)), dtype=torch.float64)
    best = 50e-6 * float(torch.einsum("ci,ij,cj->c", corners, matrix, corners).max())
    found = [
        epsilon_sharpness(
            quadratic(matrix, torch.zeros(7)), generator=torch.Generator().manual_seed(seed)
        ).value
        for seed in range(10)
    ]
    assert max(found) == pytest.approx(best, rel=1e-9)  # a hard problem: one start may miss it
    assert min(found) > best / 3


def test_epsilon_in_a_subspace_of_a_line():
    generator = torch.Generator().manual_seed(3)
    x = torch.tensor(AT, dtype=torch.float64)
    found = epsilon_sharpness(quadratic(CURVED, AT), subspace_dim=1, generator=generator)
    a = torch.randn(5, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[:, 0]
    reach = 1e-3 * (abs(a @ x / (a @ a)) + 1)  # A⁺x in one dimension
    h = torch.tensor(CURVED, dtype=torch.float64)
    loss = (h * x**2).sum() / 2
    ends = [float((h * (x + sign * reach * a) ** 2).sum() / 2) for sign in (-1, 1)]
    assert found.value == pytest.approx(100 * (max(ends) - float(loss)) / (1 + float(loss)), 1e-9)
    assert found.subspace_dim == 1


def test_epsilon_in_a_subspace_of_all_is_the_best_corner_of_its_box():
    surface = quadratic(CURVED, [0.0] * 5)
    found = epsilon_sharpness(surface, subspace_dim=5, num_iterations=30)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    corners = 1e-3 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))).double() @ a.T
    best = float((torch.tensor(CURVED) * corners**2).sum(1).max()) * 50
    assert found.value == pytest.approx(best, rel=1e-9)


def test_unscaled_quasi_newton_of_scipy_understates_a_flat_minimum():
    from scipy.optimize import minimize

    h = np.linspace(0.1, 1, 50)
    at = np.full(50, 1e-6)  # nearly stationary
    b = 1e-3 * (at + 1)
    naive = minimize(
        lambda z: (-(h * (at + z) ** 2).sum() / 2, -h * (at + z)), np.zeros(50), jac=True,
        method="L-BFGS-B", bounds=list(zip(-b, b, strict=True)), options={"maxiter": 10},
    )  # fmt: skip
    rise = -naive.fun - (h * at**2).sum() / 2
    found = epsilon_sharpness(quadratic(h, at))
    truth = (h * ((at + b) ** 2 - at**2)).sum() / 2
    assert found.quasi_newton == pytest.approx(100 * truth / (1 + found.loss), rel=1e-6)
    assert 100 * rise / (1 + found.loss) < found.value / 20


def test_where_the_loss_is_not_finite_the_maximum_is_infinite_and_its_parts_are_finite():
    def loss(p):
        w = p["w"]
        return w.square().sum() / 2 + torch.where(w[0] > 5e-4, torch.inf, 0.0)

    surface = LossSurface(loss, {"w": torch.zeros(3, dtype=torch.float64)})
    found = [
        epsilon_sharpness(surface, generator=torch.Generator().manual_seed(seed))
        for seed in range(6)
    ]
    values = [each.value for each in found]
    assert np.isinf(values).any()  # a draw of signs may keep away from there
    parts = [(each.corners, each.quasi_newton) for each in found]
    assert np.isfinite(parts).all()
    assert np.max(parts) == pytest.approx(50e-6 * 3, rel=1e-6)

    def barrier(p):  # NaN beyond a distance of 0.01
        return -torch.log(1 - 1e4 * p["w"].square().sum())

    surface = LossSurface(barrier, {"w": torch.zeros(3, dtype=torch.float64)})
    assert ball_sharpness(surface, rho=0.05).value == np.inf
    assert np.isfinite(ball_sharpness(surface, rho=0.005).value)


# -- ball --------------------------------------------------------------------------------------


def largest_in_ball(matrix, x, rho):
    """Return the exact rise: (μ I − A) δ = A x with ‖δ‖ = ρ and μ ≥ λmax."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    slope = vectors.T @ (matrix.numpy() @ x.numpy())

    def excess(mu):
        return np.linalg.norm(slope / (mu - values)) - rho

    mu = brentq(excess, values[-1] + 1e-12, values[-1] + 1e6, xtol=1e-14)
    delta = slope / (mu - values)
    return float(slope @ delta + (values * delta**2).sum() / 2)


def test_ball_of_a_quadratic_is_the_solution_of_its_trust_region_problem():
    matrix, x = (
        symmetric([5.0, 2.0, 1.0, 0.1]),
        torch.tensor([0.3, -0.1, 0.2, 0.5], dtype=torch.float64),
    )
    found = ball_sharpness(quadratic(matrix, x), rho=0.2, num_steps=200)
    assert found.value == pytest.approx(largest_in_ball(matrix, x, 0.2), rel=1e-9)
    g = matrix @ x
    delta = 0.2 * g / g.norm()
    first = float(g @ delta + delta @ matrix @ delta / 2)
    assert found.one_step == pytest.approx(first, rel=1e-12)  # SAM's
    assert found.num_gradients == 201


def test_ball_at_a_stationary_point_is_half_rho_squared_lambda_max():
    matrix = symmetric([5.0, 2.0, -1.0, 0.1])
    found = ball_sharpness(quadratic(matrix, torch.zeros(4)), rho=0.3, num_steps=100)
    assert found.value == pytest.approx(0.3**2 * 5 / 2, rel=1e-9)


def test_ball_of_a_loss_that_only_falls_is_zero():
    assert ball_sharpness(quadratic([-1.0, -2.0], [0.0, 0.0])).value == 0


def test_adaptive_ball_measures_lengths_relative_to_each_parameter():
    matrix, x = (
        symmetric([5.0, 2.0, 1.0, 0.1]),
        torch.tensor([0.3, -0.1, 0.0, 0.5], dtype=torch.float64),
    )
    found = ball_sharpness(quadratic(matrix, x), rho=0.2, adaptive=True, num_steps=300)
    scaled = torch.diag(x.abs()) @ matrix @ torch.diag(x.abs())  # in units of |w|
    truth = largest_in_ball(scaled[[0, 1, 3]][:, [0, 1, 3]], x[[0, 1, 3]].sign(), 0.2)
    assert found.value == pytest.approx(truth, rel=1e-8)


# -- average -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_of_a_quadratic_is_half_rho_squared_trace(adaptive):
    matrix, x = (
        symmetric([5.0, 2.0, -1.0, 0.1]),
        torch.tensor([0.3, -0.1, 0.2, 0.5], dtype=torch.float64),
    )
    scale = x**2 if adaptive else torch.ones(4).double()
    truth = 0.2**2 * float((matrix.diagonal() * scale).sum()) / 2
    found = [
        average_sharpness(
            quadratic(matrix, x),
            rho=0.2,
            adaptive=adaptive,
            num_samples=40,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(100)
    ]
    values = np.array([each.value for each in found])
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / 10
    errors = np.array([each.standard_error for each in found])
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.25)


def test_average_takes_each_perturbation_with_its_opposite():
    slope = torch.tensor([1e6, -1e6], dtype=torch.float64)
    surface = LossSurface(lambda p: (slope * p["w"]).sum(), {"w": torch.ones(2).double()})
    found = average_sharpness(surface)
    assert abs(found.value) < 1e-9
    assert found.standard_error < 1e-9


# -- all ---------------------------------------------------------------------------------------


def relu_net(alpha=1.0, dtype=torch.float64):
    """Return the surface of a net whose first layer is multiplied by alpha, its second divided."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    shapes = {"a.weight": (6, 3), "a.bias": (6,), "b.weight": (1, 6)}
    params = {
        k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()
    }

    def loss(p):
        hidden = torch.relu(x.to(dtype) @ p["a.weight"].T + p["a.bias"])
        return (hidden @ p["b.weight"].T - y.to(dtype)).square().mean()

    scales = {"a.weight": alpha, "a.bias": alpha, "b.weight": 1 / alpha}
    return LossSurface(loss, {k: (p * scales[k]).to(dtype) for k, p in params.items()})


def test_rescaling_layers_moves_what_is_absolute_and_leaves_what_is_adaptive():
    here, there = relu_net(), relu_net(alpha=4.0)
    assert float(here.loss()) == pytest.approx(float(there.loss()), rel=1e-12)
    for adaptive in (False, True):
        for measure in (ball_sharpness, average_sharpness):
            one, other = (measure(s, rho=0.1, adaptive=adaptive).value for s in (here, there))
            if adaptive:
                assert other == pytest.approx(one, rel=1e-9)
            else:
                assert abs(other / one - 1) > 0.2
    assert epsilon_sharpness(there).value > 1.3 * epsilon_sharpness(here).value


MEASURES = {
    "epsilon": epsilon_sharpness,
    "subspace": lambda s: epsilon_sharpness(s, subspace_dim=5),
    "ball": ball_sharpness,
    "adaptive": lambda s: ball_sharpness(s, adaptive=True),
    "average": average_sharpness,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measure_is_the_same_twice_changes_nothing_and_holds_in_float32(measure):
    surface = relu_net()
    before = {name: p.clone() for name, p in surface.params.items()}
    state = torch.get_rng_state()
    assert measure(surface) == measure(surface)
    assert all(torch.equal(p, before[name]) for name, p in surface.params.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert measure(relu_net(dtype=torch.float32)).value == pytest.approx(
        measure(surface).value, rel=2e-3
    )


def test_m_sharpness_is_the_mean_of_that_of_each_batch():
    h = [
        torch.tensor([1.0, 4.0], dtype=torch.float64),
        torch.tensor([3.0, 0.0], dtype=torch.float64),
    ]
    surface = LossSurface(
        [lambda p, h=h: (h * p["w"] ** 2).sum() / 2 for h in h],
        {"w": torch.zeros(2).double()},
        weights=[1, 3],
    )
    steps = {"rho": 0.1, "num_steps": 60}
    mean = surface.mean_over_batches(lambda each: ball_sharpness(each, **steps).value)
    assert mean == pytest.approx((1 * 4 + 3 * 3) / 4 * 0.1**2 / 2, rel=1e-9)
    together = ball_sharpness(surface, **steps).value
    assert together == pytest.approx((1 * 1 + 3 * 3) / 4 * 0.1**2 / 2, rel=1e-9)
    assert together < mean


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (epsilon_sharpness, {"epsilon": 0.0}, "`epsilon` must be positive and finite, got 0.0"),
        (epsilon_sharpness, {"num_iterations": 0}, "`num_iterations` must be an integer of at le"),
        (epsilon_sharpness, {"subspace_dim": 6}, "`subspace_dim` must be between 1 and the numb"),
        (ball_sharpness, {"rho": -1.0}, "`rho` must be positive and finite, got -1.0"),
        (ball_sharpness, {"num_steps": True}, "`num_steps` must be an integer of at least 1"),
        (average_sharpness, {"num_samples": 5}, "`num_samples` must be an even integer of at lea"),
        (average_sharpness, {"rho": float("nan")}, "`rho` must be positive and finite, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(measure, options, message):
    with pytest.raises(ValueError, match=message):
        measure(quadratic(CURVED, AT), **options)


def test_a_loss_without_a_value_is_refused():
    for measure in MEASURES.values():
        with pytest.raises(CurvatureError):
            measure(quadratic(CURVED, [float("nan")] * 5))
    with pytest.raises(CurvatureError, match=r"a loss above -1, got -2\.0"):
        epsilon_sharpness(quadratic(CURVED, [0.0] * 5, constant=-2.0))
