"""The cost model against real measurements, operation counts and its own page."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_optkit.measures.spectrum as spectrum_module
from lightning_optkit.callbacks.hessian_spectrum import _report
from lightning_optkit.measures import HessianOperator, critical_point, hessian_spectrum
from lightning_optkit.measures.cost_model import (
    Hardware,
    measurement_cost,
    transformer_activations,
)
from lightning_optkit.measures.finite_difference import FiniteDifferenceOperator
from tests.benchmarks import bench_scaling
from tests.benchmarks.bench_products import gradient
from tests.benchmarks.nets import GPT, Workload
from tests.benchmarks.timing import peak_memory


def gpt(width=32, layers=2, vocab=16, length=16, batch=2):
    torch.manual_seed(0)
    net = GPT(vocab=vocab, length=length, width=width, heads=width // 16, layers=layers)
    tokens = torch.randint(vocab, (batch, length + 1))
    return Workload("GPT", net.eval(), tokens[:, :-1], tokens[:, 1:])


# -- what is exact ----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["cached", "lockstep"])
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize(("num_matvecs", "num_probes"), [(4, 1), (5, 3)])
def test_products_and_vectors_are_those_of_a_measurement(
    monkeypatch, route, self_check, num_matvecs, num_probes
):
    work = gpt()
    bases = []
    run_lanczos = spectrum_module.lanczos

    def noting(*args, **kwargs):
        run = run_lanczos(*args, **kwargs)
        bases.append(run.basis.numel() * run.basis.element_size())
        return run

    monkeypatch.setattr(spectrum_module, "lanczos", noting)
    operator = HessianOperator([work.loss] * 2, work.params, graphs=route, self_check=self_check)
    spectrum = hessian_spectrum(
        operator, num_matvecs=num_matvecs, num_probes=num_probes, exact_below=0
    )
    critical_point(operator, spectrum)
    cost = measurement_cost(
        work.num_params,
        route=route,
        num_matvecs=num_matvecs,
        num_probes=num_probes,
        num_batches=2,
        self_check=self_check,
        exact_below=0,
    )
    assert cost.num_products == operator.num_matvecs
    assert set(bases) == {cost.krylov_bytes}
    assert cost.parameter_bytes == sum(p.numel() * p.element_size() for p in work.params.values())


@pytest.mark.parametrize("route", ["cached", "lockstep"])
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("num_batches", [1, 3])
def test_every_batch_is_gone_through_as_often_as_in_a_measurement(
    route, self_check, exact, num_batches
):
    calls, sent = 0, []
    angles = torch.linspace(0.0, 3.0, 40)

    def loss(p):
        nonlocal calls
        calls += 1
        return (p["w"] + angles).sin().sum()

    def reduce(part):
        sent.append(part.numel())
        return part

    operator = HessianOperator(
        [loss] * num_batches,
        {"w": torch.zeros(40)},
        graphs=route,
        self_check=self_check,
        reduce=reduce,
    )
    settings = {"num_matvecs": 6, "num_probes": 3, "exact_below": 40 if exact else 39}
    report = _report(operator, hessian_spectrum(operator, **settings), {})
    assert report.point.descent is not None  # the two losses along it are counted
    cost = measurement_cost(
        40,
        route=route,
        num_batches=num_batches,
        self_check=self_check,
        world_size=2,
        hardware=Hardware(bandwidth=1.0),
        **settings,
    )
    assert cost.num_products == operator.num_matvecs
    assert cost.num_passes * num_batches == calls
    # a ring of two sends each number once; sums of one number are left out
    assert cost.network_seconds == 4 * sum(size for size in sent if size > 1)


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize(("num_matvecs", "num_probes"), [(20, 1), (7, 3), (80, 2)])
def test_differences_take_the_gradients_of_a_measurement(num_batches, num_matvecs, num_probes):
    calls = 0
    angles = torch.linspace(0.0, 3.0, 40, dtype=torch.float64)

    def loss_and_gradient(offset):
        nonlocal calls
        calls += 1
        return (offset + angles).sin().sum(), (offset + angles).cos()

    operator = FiniteDifferenceOperator(
        [loss_and_gradient] * num_batches, torch.zeros(40, dtype=torch.float64)
    )
    settings = {"num_matvecs": num_matvecs, "num_probes": num_probes}
    report = _report(operator, hessian_spectrum(operator, exact_below=0, **settings), {})
    assert report.point.descent is not None
    # a sharded model is never small enough for all columns, and has no self-check
    cost = measurement_cost(40, route="sharded", num_batches=num_batches, **settings)
    assert cost.num_products == operator.num_matvecs
    assert cost.num_passes == cost.gradients
    assert cost.num_passes * num_batches == calls
    assert cost == measurement_cost(
        40, route="sharded", num_batches=num_batches, self_check=False, exact_below=0, **settings
    )


def test_a_small_net_takes_a_product_a_parameter():
    params = {"w": torch.ones(7)}
    operator = HessianOperator(lambda p: p["w"].pow(3).sum(), params)
    critical_point(operator, hessian_spectrum(operator))
    cost = measurement_cost(7)
    assert cost.num_products == operator.num_matvecs == 7 + 3
    assert cost.krylov_bytes == 0


def test_lanczos_takes_no_more_steps_than_parameters():
    operator = HessianOperator(lambda p: p["w"].pow(3).sum(), {"w": torch.arange(1.0, 8.0)})
    critical_point(
        operator, hessian_spectrum(operator, num_matvecs=80, num_probes=2, exact_below=0)
    )
    cost = measurement_cost(7, num_matvecs=80, num_probes=2, exact_below=0)
    assert cost.num_products == operator.num_matvecs == 2 * 7 + 3


# -- operations -------------------------------------------------------------------------------


def test_operations_are_those_that_torch_counts():
    work = gpt(width=64, layers=3, vocab=64, length=16)
    tokens = work.inputs.numel()
    with FlopCounterMode(display=False) as counter:
        gradient(work)
    counted = counter.get_total_flops()
    model = 6 * work.num_params * tokens
    # more: embeddings, positions and norms multiply no matrix; less: attention's own products
    assert counted == pytest.approx(model, rel=0.1)

    operator = HessianOperator(work.loss, work.params, self_check=False)
    vector = torch.ones(work.num_params)
    operator @ vector
    with FlopCounterMode(display=False) as counter:
        operator @ vector
    # two gradients but for the first layer, which passes nothing on; time says 2.13
    assert counter.get_total_flops() == pytest.approx(2 * counted, rel=0.05)


def test_work_adds_up():
    cost = measurement_cost(
        10**6, num_matvecs=10, num_probes=2, num_batches=3, batch_size=4, sequence_length=8
    )
    assert cost.num_products == 23
    assert cost.gradients == pytest.approx(1.03 + 23 * 2.13 + 3.5 + 2 / 3)
    assert cost.flops == pytest.approx(cost.gradients * 6 * 10**6 * 4 * 8 * 3)
    hardware = Hardware(flops=1e12, efficiency=0.5)
    slow = measurement_cost(10**6, num_matvecs=10, num_probes=2, hardware=hardware)
    assert slow.compute_seconds == pytest.approx(slow.flops / 0.5e12)


def test_lockstep_builds_the_graph_for_every_multiplication():
    cached, lockstep = (
        measurement_cost(10**6, route=route, num_matvecs=10, num_probes=4, self_check=False)
        for route in ("cached", "lockstep")
    )
    # 10 multiplications of four vectors, and the six times that the kind of point asks
    assert lockstep.gradients - cached.gradients == pytest.approx((10 + 6 - 1) * 1.03)
    assert lockstep.krylov_bytes == 4 * cached.krylov_bytes


# -- several devices --------------------------------------------------------------------------


def test_one_device_sends_nothing():
    for route in ("cached", "lockstep", "sharded"):
        assert measurement_cost(10**6, route=route).network_seconds == 0


def test_a_ring_sends_what_an_all_reduce_sends():
    n, p = 12, 4
    # by hand: a ring of p passes n / p numbers in each of p - 1 steps, twice
    sent = 2 * (p - 1) * (n // p) * 4
    cost = measurement_cost(
        n, world_size=p, exact_below=0, num_matvecs=2, num_probes=1, hardware=Hardware(bandwidth=1)
    )
    # the gradient is summed too: for the self-check, the point and its noise, and by forward mode
    assert cost.network_seconds == pytest.approx(sent * (cost.num_products + 4))


def test_a_sharded_model_sends_thrice_a_gradient():
    n, p = 12, 4
    # by hand: two gathers and a scatter of n / p numbers in each of p - 1 steps, for every batch
    sent = 3 * (p - 1) * (n // p) * 4 * 5
    cost = measurement_cost(
        n, route="sharded", world_size=p, num_batches=5, hardware=Hardware(bandwidth=1)
    )
    assert cost.network_seconds == pytest.approx(sent * cost.gradients)


def test_shards_divide_parameters_and_vectors():
    one, many = (
        measurement_cost(10**9, route="sharded", world_size=p, num_batches=1) for p in (1, 64)
    )
    assert many.parameter_bytes == one.parameter_bytes / 64 == 2 * 4e9 / 64
    assert many.krylov_bytes == one.krylov_bytes / 64 == 80 * 4e9 / 64
    assert many.graph_bytes == one.graph_bytes  # activations are of this device's own batch
    whole = measurement_cost(10**9, world_size=64, num_batches=1)
    assert whole.krylov_bytes == 80 * 4e9


# -- memory -----------------------------------------------------------------------------------


def test_activations_are_those_that_a_forward_pass_keeps():
    work = gpt(width=64, layers=4, vocab=128, length=64, batch=4)
    kept = []
    measured = peak_memory(lambda: kept.append(work.loss()))
    predicted = transformer_activations(
        work.num_params, sequence_length=64, layers=4, width=64, head_width=16, vocab=128
    )
    assert 4 * predicted * work.inputs.numel() == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("self_check", [True, False])
def test_peak_is_within_a_quarter(self_check):
    work = gpt(width=64, layers=2, vocab=64, length=64, batch=2)
    settings = {"num_matvecs": 12, "num_probes": 1, "exact_below": 0}

    def measure():
        params = {name: p.detach().clone() for name, p in work.params.items()}
        operator = HessianOperator(work.loss, params, self_check=self_check)
        critical_point(operator, hessian_spectrum(operator, **settings))

    activations = transformer_activations(
        work.num_params, sequence_length=64, layers=2, width=64, head_width=16, vocab=64
    )
    cost = measurement_cost(
        work.num_params,
        num_batches=1,
        batch_size=2,
        sequence_length=64,
        activations=activations,
        self_check=self_check,
        **settings,
    )
    assert cost.total_bytes == pytest.approx(peak_memory(measure), rel=0.25)


@pytest.mark.parametrize(("num_matvecs", "num_probes"), [(12, 1), (20, 2)])
@pytest.mark.parametrize("batch", [1, 4])
def test_peak_of_differences_is_within_a_tenth(num_matvecs, num_probes, batch):
    work = gpt(width=64, layers=2, vocab=64, length=64, batch=batch)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in work.params.items()}
    settings = {"num_matvecs": num_matvecs, "num_probes": num_probes}

    def measure():
        saved = [p.detach().clone() for p in leaves.values()]

        def loss_and_gradient(offset):  # as `ShardedGradient` has it, on one device
            pieces = offset.split([p.numel() for p in saved])
            with torch.no_grad():
                for p, at, piece in zip(leaves.values(), saved, pieces, strict=True):
                    p.copy_(at + piece.view(at.shape))
            loss = work.loss(leaves)
            loss.backward()
            scaled = [p.grad * 1.0 for p in leaves.values()]
            found = torch.cat([part.reshape(-1) for part in scaled])
            for p in leaves.values():
                p.grad = None
            return loss.detach(), found

        parameters = torch.cat([p.reshape(-1) for p in saved])
        operator = FiniteDifferenceOperator(loss_and_gradient, parameters)
        _report(operator, hessian_spectrum(operator, exact_below=0, **settings), {})

    activations = transformer_activations(
        work.num_params, sequence_length=64, layers=2, width=64, head_width=16, vocab=64
    )
    cost = measurement_cost(
        work.num_params,
        route="sharded",
        num_batches=1,
        batch_size=batch,
        sequence_length=64,
        activations=activations,
        **settings,
    )
    assert cost.total_bytes == pytest.approx(peak_memory(measure), rel=0.1)


def test_shape_is_guessed_from_the_number_of_parameters():
    # 7 billion: 32 layers of width 4,096 are 6.4 billion in the layers
    layers, width = 32, 4096
    n = 12 * layers * width**2
    guessed = transformer_activations(n, sequence_length=1024)
    known = transformer_activations(n, sequence_length=1024, layers=layers, width=width)
    assert guessed == pytest.approx(known, rel=0.02)
    by_width = transformer_activations(n, sequence_length=1024, width=width)
    by_layers = transformer_activations(n, sequence_length=1024, layers=layers)
    assert by_width == pytest.approx(known)
    assert by_layers == pytest.approx(known)


# -- the edge ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_params": 0}, "`num_params` must be at least 1, got 0"),
        ({"num_params": 9, "world_size": 0}, "`world_size` must be at least 1, got 0"),
        ({"num_params": 9, "num_batches": -1}, "`num_batches` must be at least 1, got -1"),
        ({"num_params": 9, "route": "whole"}, "`route` must be 'cached', 'lockstep' or 'sharded'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measurement_cost(**arguments)


@pytest.mark.parametrize("speeds", [{"flops": 0}, {"bandwidth": -1.0}, {"efficiency": 1.1}])
def test_speeds_out_of_range_are_refused(speeds):
    with pytest.raises(ValueError, match=f"`{next(iter(speeds))}` must be"):
        Hardware(**speeds)


def test_str_is_one_line_with_everything():
    text = str(measurement_cost(7 * 10**9, route="sharded", world_size=64))
    assert text.startswith("sharded: 332 products, 672 gradients")
    assert text.endswith("on each of 64 devices")
    assert "\n" not in text
    assert str(measurement_cost(7)).endswith("on one device")


# -- the page ---------------------------------------------------------------------------------


def test_page_shows_the_table_that_the_code_makes():
    page = bench_scaling.SCALING_PAGE.read_text(encoding="utf-8")
    section = page.split("<!-- cost_model:start -->\n")[1].split("\n<!-- cost_model:end -->")[0]
    assert section == bench_scaling.table_section().strip()


def test_page_was_measured_with_the_model_as_it_is():
    page = bench_scaling.SCALING_PAGE.read_text(encoding="utf-8")
    flops = float(re.search(r"([\d.]+) GFLOP/s", page)[1]) * 1e9
    for label in bench_scaling.SHAPES:
        work = bench_scaling.workload(label)
        for route in ("cached", "lockstep"):
            cost = bench_scaling.predicted(work, label, route, flops)
            row = next(x for x in page.splitlines() if f"{work.num_params:,}, {route}" in x)
            assert f"| {cost.num_products} |" in row
            assert f"| {cost.total_bytes / 1e6:,.0f} MB |" in row
