"""`HessianOperator` against matrices that are known, and the promises around its products."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import (
    CurvatureError,
    HessianOperator,
    full_precision,
    hessian_spectrum,
    lanczos,
)
from tests.quadratics import SPECTRA, Quadratic, flatten, random_params, symmetric

GRAPHS = ["cached", "lockstep"]
LAYOUTS = {
    "one vector": [(10,)],
    "matrix, scalar, vector": [(2, 3), (), (3,)],
    "four axes": [(1, 2, 2, 1), (6,)],
}


def vectors(n: int, k: int, *, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64)


def assert_product(found: Tensor, matrix: Tensor, given: Tensor) -> None:
    # The error of a product of n terms is at most n eps |A| |v|, whatever order they are summed in.
    norms = torch.linalg.matrix_norm(matrix, 2) * given.norm(dim=0)
    bound = 4 * len(matrix) * torch.finfo(torch.float64).eps * norms
    assert found.shape == given.shape
    assert found.dtype == torch.float64
    assert bool(((found - matrix @ given).norm(dim=0) <= bound).all())


# -- the product is the Hessian's -------------------------------------------------------------


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_product_with_a_quadratic_is_its_matrix(spectrum, layout, graphs):
    matrix = symmetric(SPECTRA[spectrum])
    op = HessianOperator(Quadratic(matrix), random_params(*LAYOUTS[layout]), graphs=graphs)
    v = vectors(10, 3)
    assert op.shape == (10, 10)
    assert_product(op @ v, matrix, v)
    assert_product(op @ v[:, 0], matrix, v[:, 0])
    assert_product(op @ v[:, :1], matrix, v[:, :1])
    assert_product(op.dense(), matrix, torch.eye(10, dtype=torch.float64))


@pytest.mark.parametrize("eigenvalues", [[3.0], [-2.0], [0.0], [1e8, -1e-3], [0.0, 0.0]])
def test_smallest_operators(eigenvalues):
    matrix = symmetric(eigenvalues)
    op = HessianOperator(Quadratic(matrix), random_params(*[()] * len(eigenvalues)))
    v = vectors(len(eigenvalues), 2)
    assert_product(op @ v, matrix, v)
    assert_product(op @ v[:, 0], matrix, v[:, 0])


def test_one_float32_product_is_off_by_rounding_only():
    matrix = symmetric(SPECTRA["distinct"]).float()
    params = {"w": torch.ones(10)}
    op = HessianOperator(lambda p: p["w"] @ matrix @ p["w"] / 2, params)
    v = vectors(10, 4).float()
    # 20 terms: each entry sums A v and its transpose.
    bound = 20 * torch.finfo(torch.float32).eps * 7 * v.norm(dim=0)
    assert (op @ v).dtype == torch.float32
    assert bool(((op @ v - matrix @ v).norm(dim=0) <= bound).all())


def net_and_data(samples: int = 14) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        return net, torch.randn(samples, 4).double(), torch.randint(3, (samples,))


def net_loss(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda params: cross_entropy(functional_call(net, params, (x,)), y)


def dense_reference(loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> Any:
    """Return the Hessian by torch's own function for it, row by row."""
    shapes = {name: p.shape for name, p in params.items()}

    def of_vector(vector: Tensor) -> Tensor:
        pieces = vector.split([s.numel() for s in shapes.values()])
        named = {n: v.view(s) for (n, s), v in zip(shapes.items(), pieces, strict=True)}
        return loss(named)

    return hessian(of_vector, flatten(params).detach())


def test_net_agrees_with_a_dense_hessian():
    net, x, y = net_and_data()
    params = dict(net.named_parameters())
    truth = dense_reference(net_loss(net, x, y), params)
    op = HessianOperator(net_loss(net, x, y), params)
    torch.testing.assert_close(op.dense(), truth, rtol=1e-8, atol=1e-13)


def test_dense_crosses_its_block_size():
    n = 150  # three blocks of columns, the last one short
    matrix = symmetric(torch.linspace(-1, 2, n).double())
    op = HessianOperator(Quadratic(matrix), random_params((n,)))
    assert_product(op.dense(), matrix, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("graphs", GRAPHS)
def test_weighted_batches_make_the_mean_over_all_samples(graphs):
    net, x, y = net_and_data(17)
    params, cuts = dict(net.named_parameters()), [0, 10, 14, 17]
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    whole = HessianOperator(net_loss(net, x, y), params)
    split = HessianOperator(
        [net_loss(net, x[part], y[part]) for part in parts],
        params,
        weights=[10, 4, 3],
        graphs=graphs,
    )
    unweighted = HessianOperator([net_loss(net, x[part], y[part]) for part in parts], params)
    v = vectors(whole.shape[0], 3)
    torch.testing.assert_close(split @ v, whole @ v, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(split.gradient(), whole.gradient(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(split.loss(), whole.loss(), rtol=1e-12, atol=0)
    assert split.total_weight == 17
    assert unweighted.total_weight == 3
    assert float((unweighted @ v - whole @ v).norm() / (whole @ v).norm()) > 0.05


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("batched_below", [0, 20_000], ids=["loop", "batched"])
def test_all_routes_give_the_same_product(monkeypatch, batched_below, graphs):
    module = "lightning_optkit.measures.gradient_graph"
    monkeypatch.setattr(f"{module}._BATCHED_BELOW", batched_below)
    calls = count_calls(monkeypatch, f"{module}.GradientGraph._products_batched")
    net, x, y = net_and_data()
    params = dict(net.named_parameters())
    op = HessianOperator(net_loss(net, x, y), params, graphs=graphs)
    truth = dense_reference(net_loss(net, x, y), params)
    v = vectors(op.shape[0], 5)
    assert_product(op @ v, truth, v)
    assert len(calls) == (batched_below > 0)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    calls: list[Any] = []
    holder, attribute = name.rsplit(".", 1)
    module, cls = holder.rsplit(".", 1)
    owner = getattr(__import__(module, fromlist=[cls]), cls)
    original = getattr(owner, attribute)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, counting)
    return calls


# -- parameters that do not take part ---------------------------------------------------------


def partly_used(p: dict[str, Tensor]) -> Tensor:
    """Use `cubic` in full, `linear` without curvature, `unused` not at all."""
    return p["cubic"].pow(3).sum() / 6 + 5 * p["linear"].sum()


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])  # 4 and 8 divide the sizes of the parameters
def test_parameters_without_curvature_give_zero_rows(k, graphs):
    params = {
        "unused": torch.ones(4, dtype=torch.float64),
        "cubic": torch.arange(1.0, 4.0, dtype=torch.float64),
        "linear": torch.ones(2, 4, dtype=torch.float64),
    }
    op = HessianOperator(partly_used, params, graphs=graphs)
    truth = torch.zeros(15, 15, dtype=torch.float64)
    truth[4:7, 4:7] = torch.diag(params["cubic"])
    v = vectors(15, k)
    assert torch.equal((op @ v)[:4], torch.zeros(4, k, dtype=torch.float64))
    assert torch.equal((op @ v)[7:], torch.zeros(8, k, dtype=torch.float64))
    assert_product(op @ v, truth, v)
    assert op.gradient()[:4].count_nonzero() == 0
    assert op.gradient()[7:].tolist() == [5.0] * 8


@pytest.mark.parametrize("k", [1, 3])
def test_a_linear_loss_has_a_zero_hessian(k):
    op = HessianOperator(lambda p: 3 * p["w"].sum(), {"w": torch.ones(3, 2, dtype=torch.float64)})
    assert torch.equal(op @ vectors(6, k), torch.zeros(6, k, dtype=torch.float64))
    assert op.gradient().tolist() == [3.0] * 6


class NoBatching(torch.autograd.Function):
    """Doubles, with a backward that vmap cannot see through."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        assert math.isfinite(g.sum().item())
        return NoBatching.apply(g)


def test_an_operator_without_a_batching_rule_is_looped_over(monkeypatch):
    name = "lightning_optkit.measures.gradient_graph.GradientGraph._product"
    calls = count_calls(monkeypatch, name)
    loss = lambda p: NoBatching.apply(p["w"]).sin().sum()  # noqa: E731
    w = torch.arange(1.0, 4.0, dtype=torch.float64)
    op = HessianOperator(loss, {"w": w}, self_check=False)
    v = vectors(3, 2)
    assert_product(op @ v, torch.diag(-4 * (2 * w).sin()), v)
    assert len(calls) == 1 + 2  # in one go, in vain; then one after the other


# -- graphs are reused, and rebuilt when a parameter moves --------------------------------------


@pytest.mark.parametrize("graphs", GRAPHS)
def test_an_optimizer_step_between_products_gives_the_new_hessian(graphs):
    w = nn.Parameter(torch.arange(1.0, 4.0, dtype=torch.float64))
    b = nn.Parameter(torch.ones(2, dtype=torch.float64))
    op = HessianOperator(
        lambda p: p["w"].pow(3).sum() / 6 + p["b"].pow(4).sum() / 12,
        {"w": w, "b": b},
        graphs=graphs,
    )
    ones = torch.ones(5, dtype=torch.float64)
    assert (op @ ones).tolist() == [1, 2, 3, 1, 1]
    optimizer = torch.optim.SGD([b], lr=1.0)  # moves the last parameter only
    b.grad = torch.full((2,), -1.0, dtype=torch.float64)
    optimizer.step()
    assert (op @ ones).tolist() == [1, 2, 3, 4, 4]
    with torch.no_grad():
        w.mul_(2)
    assert (op @ ones).tolist() == [2, 4, 6, 4, 4]
    assert op.gradient().tolist() == pytest.approx([2, 8, 18, 8 / 3, 8 / 3], rel=1e-15)
    w.data = torch.ones(3, dtype=torch.float64)  # as `Module.to` does: another storage
    assert (op @ ones).tolist() == [1, 1, 1, 4, 4]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_of_a_fused_optimizer_is_seen(optimizer):
    """Its kernels write without counting up the version of a tensor."""
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    op = HessianOperator(lambda p: (2 * p["w"]).pow(3).sum() / 48, {"w": w})
    ones = torch.ones(3, dtype=torch.float64)
    assert (op @ ones).tolist() == [1, 1, 1]
    w.grad = torch.full((3,), -0.5, dtype=torch.float64)
    optimizer([w], lr=1.0, fused=True).step()
    assert torch.equal(op @ ones, w.detach())
    assert w[0] != 1


def test_cached_graphs_are_built_once_and_lockstep_ones_each_time():
    calls = {}
    for graphs in GRAPHS:
        loss = Quadratic(symmetric([1.0, 2.0, 3.0]))
        op = HessianOperator([loss, loss], random_params((3,)), graphs=graphs, self_check=False)
        for _ in range(4):
            op @ vectors(3, 2)
        op.gradient()
        calls[graphs] = loss.calls
    assert calls == {"cached": 2, "lockstep": 10}


def test_lockstep_says_that_it_works_in_blocks():
    loss, params = Quadratic(symmetric([1.0])), random_params((1,))
    assert HessianOperator(loss, params, graphs="lockstep").works_in_blocks
    assert not HessianOperator(loss, params).works_in_blocks


def test_products_are_counted_with_those_of_the_self_check():
    op = HessianOperator(Quadratic(symmetric([1.0, 2.0, 3.0])), random_params((3,)))
    assert op.num_matvecs == 0
    op @ vectors(3, 5)
    assert op.num_matvecs == 5 + 2
    op @ vectors(3, 1)[:, 0]
    assert op.num_matvecs == 5 + 2 + 1
    op.dense()
    assert op.num_matvecs == 5 + 2 + 1 + 3


# -- other quantities --------------------------------------------------------------------------


def test_gradient_loss_and_norm_of_a_quadratic():
    matrix = symmetric(SPECTRA["distinct"])
    params = random_params((2, 3), (4,))
    w, offset = flatten(params), vectors(10, 1)[:, 0]
    op = HessianOperator([Quadratic(matrix), Quadratic(2 * matrix)], params, weights=[3, 1])
    scale = (3 + 2) / 4
    torch.testing.assert_close(op.gradient(), scale * matrix @ w, rtol=1e-12, atol=1e-12)
    shifted = scale * matrix @ (w + offset)
    torch.testing.assert_close(op.gradient(offset), shifted, rtol=1e-12, atol=1e-12)
    assert float(op.loss()) == pytest.approx(scale * float(w @ matrix @ w) / 2, rel=1e-12)
    assert op.loss().shape == ()
    assert op.parameter_norm() == pytest.approx(float(w.norm()), rel=1e-12)
    column = HessianOperator(lambda p: p["p0"].sum().reshape(1), params)
    assert column.loss().shape == ()
    assert torch.equal(op.gradient(), op.gradient(torch.zeros(10, dtype=torch.float64)))


@pytest.mark.parametrize("graphs", GRAPHS)
def test_the_loss_at_an_offset_is_the_loss_there(graphs):
    matrix = symmetric(SPECTRA["distinct"])
    params = random_params((2, 3), (4,))
    w, offset = flatten(params), vectors(10, 1)[:, 0]
    losses = [Quadratic(matrix), Quadratic(2 * matrix)]
    op = HessianOperator(losses, params, weights=[3, 1], graphs=graphs)
    here = float(op.loss())
    there = 5 / 4 * float((w + offset) @ matrix @ (w + offset)) / 2
    assert float(op.loss(offset)) == pytest.approx(there, rel=1e-12)
    assert op.loss(offset).shape == ()
    assert not op.loss(offset).requires_grad
    assert torch.equal(op.loss(torch.zeros(10, dtype=torch.float64)), op.loss())
    assert float(op.loss()) == here
    assert torch.equal(flatten(params), w)
    assert op.num_matvecs == 0
    calls = losses[0].calls
    op.loss(offset)
    assert losses[0].calls == calls + 1  # a forward pass


def test_the_loss_at_an_offset_sums_over_processes():
    matrix, params = symmetric(SPECTRA["distinct"]), random_params((10,))
    offset = vectors(10, 1)[:, 0]

    def process(scale: float) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        loss = Quadratic(scale * matrix)
        return lambda reduce: HessianOperator(loss, params, reduce=reduce).loss(offset)

    w = flatten(params) + offset
    for found in in_step(process(0.5), process(1.5)):
        assert float(found) == pytest.approx(float(w @ matrix @ w) / 2, rel=1e-12)


def test_names_are_in_the_order_of_the_vectors():
    params = {"b": torch.ones(2), "a.weight": torch.ones(3), "a.bias": torch.ones(())}
    op = HessianOperator(lambda p: p["a.weight"].sum() + 2 * p["b"].sum(), params)
    assert op.names == ["b", "a.weight", "a.bias"]
    assert op.gradient().tolist() == [2, 2, 1, 1, 1, 0]
    op.names.clear()
    assert len(op.names) == 3


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("size", [1, 10])
def test_asking_twice_gives_the_same_answer(size, graphs):
    """Weights are multiplied in place: never into what the graphs keep."""
    matrix = symmetric(SPECTRA["distinct"][-size:])
    losses = [Quadratic(matrix), Quadratic(3 * matrix)]
    op = HessianOperator(losses, random_params((size,)), weights=[1, 4], graphs=graphs)
    v = vectors(size, 2)
    quantities = [
        lambda: op @ v,
        lambda: op @ v[:, 0],
        op.gradient,
        lambda: op.gradient(v[:, 0]),
        lambda: op.forward_mode_product(v[:, 0]),
        op.loss,
        op.gradient_noise,
    ]
    first = [quantity().clone() for quantity in quantities]
    for quantity, answer in zip(quantities, first, strict=True):
        assert torch.equal(quantity(), answer)


def test_forward_mode_product_is_the_same_product():
    net, x, y = net_and_data()
    params = dict(net.named_parameters())
    losses = [net_loss(net, x[:9], y[:9]), net_loss(net, x[9:], y[9:])]
    op = HessianOperator(losses, params, weights=[9, 5])
    truth = dense_reference(net_loss(net, x, y), params)
    v = vectors(op.shape[0], 1)[:, 0]
    assert_product(op.forward_mode_product(v), truth, v)


def test_forward_mode_is_right_where_backwards_take_shortcuts():
    """The product of two zeros: the lecture's saddle, as `prod` computes it."""
    w = torch.zeros(2, dtype=torch.float64)
    op = HessianOperator(lambda p: (1 - p["w"].prod()) ** 2, {"w": w})
    assert op.forward_mode_product(torch.tensor([1.0, 0.0]).double()).tolist() == [0, -2]
    assert (op @ torch.tensor([1.0, 0.0])).tolist() == [0, -2]


def test_gradient_noise_against_a_hand_computation():
    # Gradients (1, 0), (0, 2), (4, 4) with weights 1/8, 2/8, 5/8: mean (2.625, 3).
    slopes = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
    losses = [lambda p, c=c: c @ p["w"] for c in slopes]
    op = HessianOperator(losses, {"w": torch.zeros(2, dtype=torch.float64)}, weights=[1, 2, 5])
    w = np.array([1, 2, 5]) / 8
    squares = ((slopes.numpy() - np.array([2.625, 3.0])) ** 2).sum(1)
    expected = math.sqrt((w**2 @ squares) / (1 - (w**2).sum()))
    assert op.gradient().tolist() == [2.625, 3.0]
    assert float(op.gradient_noise()) == pytest.approx(expected, rel=1e-12)


def test_gradient_noise_is_unbiased_for_batches_of_any_size():
    """Its square has the variance of the mean over samples as its expectation."""
    sizes, dimension, scale = [1, 3, 8, 20], 3, 0.7
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        samples = torch.from_numpy(rng.normal(scale=scale, size=(sum(sizes), dimension)))
        batches = samples.split(sizes)
        means = [batch.mean(0) for batch in batches]
        losses = [lambda p, c=mean: c @ p["w"] for mean in means]
        params = {"w": torch.zeros(dimension, dtype=torch.float64)}
        draws.append(float(HessianOperator(losses, params, weights=sizes).gradient_noise()) ** 2)
    truth = dimension * scale**2 / sum(sizes)
    assert abs(np.mean(draws) - truth) <= 4 * np.std(draws) / math.sqrt(len(draws))


def test_gradient_noise_of_a_single_batch_is_unknown():
    op = HessianOperator(Quadratic(symmetric([1.0, 2.0])), random_params((2,)))
    assert math.isnan(op.gradient_noise())


# -- several processes -------------------------------------------------------------------------


def in_step(*processes: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run functions of an all-reduce as processes that wait for each other's contribution.

    Their results, exceptions included, are returned. A process that waits in vain fails the test
    after five seconds instead of hanging.
    """
    barrier = threading.Barrier(len(processes), timeout=5)
    given: list[Tensor] = [torch.empty(0)] * len(processes)

    def run(rank: int) -> Any:
        def reduce(tensor: Tensor) -> Tensor:
            given[rank] = tensor.clone()
            barrier.wait()
            assert len({t.shape for t in given}) == 1, "processes must reduce alike"
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        try:
            return processes[rank](reduce)
        except Exception as error:
            return error

    # Precision settings are global, not of a thread: here they are equal before and after.
    with full_precision(), ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(run, range(len(processes))))


@pytest.mark.parametrize("graphs", GRAPHS)
def test_two_processes_with_unequal_shares_make_the_full_batch(graphs):
    net, x, y = net_and_data(14)
    params = dict(net.named_parameters())
    v = vectors(sum(p.numel() for p in params.values()), 3)

    def measured(op: HessianOperator) -> dict[str, Any]:
        found = hessian_spectrum(op, exact_below=0, num_matvecs=10, num_probes=2)
        return {
            "product": op @ v,
            "gradient": op.gradient(),
            "loss": op.loss(),
            "lambda_max": found.lambda_max,
            "trace": found.trace,
            "bounds": found.minimum_ratio_bounds,
            "weight": op.total_weight,
        }

    def process(part: slice, weight: int) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        loss = net_loss(copy.deepcopy(net), x[part], y[part])  # `functional_call` moves into it
        return lambda reduce: measured(
            HessianOperator(
                loss,
                params,
                weights=[weight],
                graphs=graphs,
                reduce=reduce,
                self_check=False,  # forward mode has one level for all threads
            )
        )

    first, second = in_step(process(slice(0, 10), 10), process(slice(10, 14), 4))
    full = measured(HessianOperator(net_loss(net, x, y), params, weights=[14], graphs=graphs))
    for key, truth in full.items():
        torch.testing.assert_close(first[key], truth, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_gradient_noise_of_two_processes_is_that_of_all_batches():
    slopes = vectors(4, 3)
    losses = [lambda p, c=c: c @ p["w"] for c in slopes]
    params = {"w": torch.zeros(3, dtype=torch.float64)}
    weights = [1, 2, 5, 3]
    truth = HessianOperator(losses, params, weights=weights).gradient_noise()

    def process(part: slice) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        return lambda reduce: HessianOperator(
            losses[part], params, weights=weights[part], reduce=reduce
        ).gradient_noise()

    for noise in in_step(process(slice(0, 1)), process(slice(1, 4))):
        assert float(noise) == pytest.approx(float(truth), rel=1e-12)


def broken(p: dict[str, Tensor]) -> Tensor:
    raise OSError("the data is gone")


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize(
    "measure",
    [
        hessian_spectrum,
        lambda op: hessian_spectrum(op, exact_below=0, num_matvecs=3),
        lambda op: lanczos(op, 3),
        lambda op: lanczos(op, 3, num_lanes=2),
    ],
    ids=["exact", "lanczos", "one lane", "two lanes"],
)
def test_a_process_that_fails_stops_the_others_too(measure, self_check):
    params = random_params((5,))

    def process(loss: Any) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        return lambda reduce: measure(
            HessianOperator(loss, params, reduce=reduce, self_check=self_check)
        )

    good, bad = in_step(process(Quadratic(symmetric([1.0, 2, 3, 4, 5]))), process(broken))
    assert isinstance(bad, OSError)
    assert isinstance(good, CurvatureError)
    assert "NaN or infinite" in str(good)


@pytest.mark.parametrize("quantity", ["gradient", "gradient_noise", "loss"])
def test_a_process_that_fails_stops_every_quantity(quantity):
    params = random_params((5,))

    def process(loss: Any) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        return lambda reduce: getattr(HessianOperator(loss, params, reduce=reduce), quantity)()

    good, bad = in_step(process(Quadratic(symmetric([1.0, 2, 3, 4, 5]))), process(broken))
    assert isinstance(bad, OSError)
    assert isinstance(good, CurvatureError)


def test_a_nan_loss_on_one_process_is_an_error_on_all():
    params = random_params((5,))
    matrix = symmetric([1.0, 2, 3, 4, 5])

    def process(loss: Any) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        return lambda reduce: hessian_spectrum(HessianOperator(loss, params, reduce=reduce))

    found = in_step(process(Quadratic(matrix)), process(Quadratic(matrix * math.nan)))
    assert all(isinstance(error, CurvatureError) for error in found)


def test_the_self_check_runs_in_step(monkeypatch):
    """Its finite differences, that is: threads share torch's forward-mode level."""

    def no_forward_mode(self: HessianOperator, vector: Tensor) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(HessianOperator, "forward_mode_product", no_forward_mode)
    matrix, params = symmetric(SPECTRA["distinct"]), random_params((10,))
    v = vectors(10, 2)

    def process(share: float) -> Callable[[Callable[[Tensor], Tensor]], Any]:
        loss = Quadratic(share * matrix)
        return lambda reduce: HessianOperator(loss, params, reduce=reduce) @ v

    for found in in_step(process(0.5), process(1.5)):
        assert_product(found, matrix, v)


# -- the user's things stay as they were ---------------------------------------------------------


@pytest.mark.parametrize("graphs", GRAPHS)
def test_parameters_are_left_as_they_were(graphs):
    net, x, y = net_and_data()
    net[0].weight.requires_grad_(False)
    net[2].weight.grad = torch.full_like(net[2].weight, 7.0)
    params = dict(net.named_parameters())
    before = {n: (p.clone(), p._version, p.data_ptr(), p.requires_grad) for n, p in params.items()}
    random_state = torch.get_rng_state()

    op = HessianOperator(net_loss(net, x, y), params, graphs=graphs)
    with torch.no_grad():
        op.gradient(torch.ones(op.shape[0], dtype=torch.float64))
        op.forward_mode_product(torch.ones(op.shape[0], dtype=torch.float64))
        op.gradient_noise()
        hessian_spectrum(op)
        hessian_spectrum(op, exact_below=0, num_matvecs=5)

    for name, p in params.items():
        value, version, address, requires_grad = before[name]
        assert torch.equal(p, value)
        assert (p._version, p.data_ptr(), p.requires_grad) == (version, address, requires_grad)
        assert p.grad is None or name == "2.weight"
    assert bool((net[2].weight.grad == 7).all())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_products_work_in_inference_mode():
    matrix = symmetric(SPECTRA["distinct"])
    op = HessianOperator(Quadratic(matrix), random_params((10,)))
    with torch.inference_mode():
        v = vectors(10, 2)
        found = op @ v
    assert_product(found.clone(), matrix, v.clone())


def test_mixed_precision_parameters_are_each_rounded_to_their_own():
    matrix = symmetric(SPECTRA["distinct"])
    params = random_params((3,), dtype=torch.float32) | {"wide": torch.ones(7, dtype=torch.float64)}
    op = HessianOperator(Quadratic(matrix), params)
    v = vectors(10, 3).float().double()  # exact in float32, so only the result is rounded
    truth = matrix @ v
    found = op @ v
    assert op.dtype == torch.float64
    assert found.dtype == op.gradient().dtype == op.loss().dtype == torch.float64
    # `w @ A @ w` reaches the float32 leaf as two terms, each rounded: twice half a unit each
    bound = 2 * torch.finfo(torch.float32).eps * 7 * v.norm(dim=0)
    assert bool(((found[:3] - truth[:3]).norm(dim=0) <= bound).all())
    torch.testing.assert_close(found[3:], truth[3:], rtol=1e-12, atol=1e-12)


# -- refusals ----------------------------------------------------------------------------------

SQUARE: Callable[[dict[str, Tensor]], Tensor] = lambda p: p["w"].square().sum()  # noqa: E731


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "at least one parameter"),
        ({"w": [1.0]}, TypeError, r"`params\['w'\]` must be a tensor, got list"),
        ({"w": torch.ones(2).half()}, TypeError, r"must be float32 or float64, got torch.float16"),
        ({"w": torch.ones(2).bfloat16()}, TypeError, r"got torch.bfloat16.*\.float\(\)"),
        ({"w": torch.ones(2, dtype=torch.cfloat)}, TypeError, "got torch.complex64"),
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"w": torch.eye(2).to_sparse()}, TypeError, "must be dense, got torch.sparse_coo"),
    ],
)
def test_parameters_that_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        HessianOperator(SQUARE, params)


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ([SQUARE, SQUARE], [1.0], "one entry for each of the 2 batches, at least one, got 1"),
        ([SQUARE], [1.0, 2.0], "each of the 1 batches, at least one, got 2"),
        ([], None, "at least one, got 0"),
        ([SQUARE, SQUARE], [1.0, 0.0], r"must be positive.*, got 0\.0"),
        ([SQUARE, SQUARE], [1.0, -2.0], r"must be positive.*, got -2\.0"),
        ([SQUARE, SQUARE], [1.0, math.nan], "must be positive.*, got nan"),
        ([SQUARE, SQUARE], [math.inf, 1.0], "must be positive.*, got inf"),
    ],
)
def test_weights_that_are_refused(losses, weights, message):
    with pytest.raises(ValueError, match=message):
        HessianOperator(losses, {"w": torch.ones(2)}, weights=weights)


def test_unknown_graphs_are_refused():
    with pytest.raises(ValueError, match="`graphs` must be 'cached' or 'lockstep', got 'fresh'"):
        HessianOperator(SQUARE, {"w": torch.ones(2)}, graphs="fresh")


@pytest.mark.parametrize("shape", [(), (3,), (1, 2), (3, 2), (2, 2, 2), (0,)])
def test_vectors_of_the_wrong_shape_are_refused(shape):
    op = HessianOperator(SQUARE, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"must have the shape \(2,\) or \(2, k\), got \("):
        op @ torch.ones(shape)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p: p["w"].square(), r"must return a scalar tensor, got \(2,\)"),
        (lambda p: p["w"].sum().item(), "must return a scalar tensor, got float"),
        (lambda p: p["w"].detach().sum(), "does not depend on the parameters"),
        (lambda p: torch.ones(()), "does not depend on the parameters"),
    ],
)
def test_losses_that_are_refused(loss, message):
    op = HessianOperator(loss, {"w": torch.ones(2)})
    with pytest.raises(CurvatureError, match=message):
        op @ torch.ones(2)


def test_other_errors_of_the_loss_come_through_as_they_are():
    op = HessianOperator(broken, {"w": torch.ones(2)})
    with pytest.raises(OSError, match="the data is gone"):
        op @ torch.ones(2)
