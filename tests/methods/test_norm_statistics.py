"""Statistics gathered batch by batch against torch's own for one big batch, and by hand."""

import contextlib
import copy
import itertools
import re
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from lightning_optkit.methods import moments
from lightning_optkit.methods.norm_statistics import (
    StatisticsNotFiniteError,
    refresh_norm_statistics,
    tracking_layers,
)
from tests.distributed import run_in_two_processes

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}
SIZES = [5, 4, 1, 6]  # uneven, with a batch of one sample


def drawn(*shape, seed=0, dtype=torch.float64):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * values.exp() + 2).to(dtype)  # far from what any layer begins with


def made(*layers, dtype=torch.float64, seed=0):
    """Return layers in eval mode, as a net, with statistics that are wrong in every channel."""
    net = nn.Sequential(*layers).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in itertools.chain(net.parameters(), net.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
            else:
                tensor.fill_(7)  # `num_batches_tracked`
    return net.eval()


def passes_over(net, parts):
    return lambda: [partial(net, part) for part in parts]


def statistics(net):
    """Return the running statistics by name of the buffer."""
    return {n: b.clone() for n, b in net.named_buffers() if n.endswith(("mean", "var"))}


def of_one_big_batch(net, x, eval_layers=()):
    """Return what torch stores for one batch of all the data with momentum 1."""
    net = copy.deepcopy(net)
    for name, layer in net.named_modules():
        if isinstance(layer, NORMS) and name not in eval_layers:
            layer.momentum = 1.0
            layer.training = True
    with torch.no_grad():
        net(x)
    return statistics(net)


def assert_equal(found, truth, tolerance):
    assert found.keys() == truth.keys()
    assert found
    for name, value in truth.items():
        error = float((found[name].double() - value.double()).abs().max())
        assert error <= tolerance * float(value.abs().max()), f"{name}: {error:.1e}"


def assert_differ(found, truth, names, by=1e-5):
    for name in names:
        assert float((found[name] - truth[name]).abs().max()) > by * float(truth[name].abs().max())


# -- values ----------------------------------------------------------------------------------------


def test_values_by_hand():
    net = made(nn.BatchNorm1d(2), dtype=torch.float64)
    parts = [torch.tensor([[1.0, 0.0], [2.0, 4.0]]).double(), torch.tensor([[6.0, 2.0]]).double()]
    assert refresh_norm_statistics(net, passes_over(net, parts)) == ["0"]
    assert net[0].running_mean.tolist() == [3.0, 2.0]
    assert net[0].running_var.tolist() == pytest.approx([7.0, 4.0], rel=1e-15)


LAYERS = {
    "batch 1d": (nn.BatchNorm1d(3), (3,)),
    "batch 1d of sequences": (nn.BatchNorm1d(3), (3, 5)),
    "batch 2d": (nn.BatchNorm2d(3), (3, 4, 5)),
    "batch 3d": (nn.BatchNorm3d(3), (3, 2, 4, 3)),
    "synchronised": (nn.SyncBatchNorm(3), (3, 4)),
    "no affine": (nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
    "no momentum": (nn.BatchNorm1d(3, momentum=None), (3,)),
    "instance 1d": (nn.InstanceNorm1d(3, track_running_stats=True), (3, 5)),
    "instance 2d": (nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (3, 4, 5)),
    "instance 3d": (nn.InstanceNorm3d(3, track_running_stats=True), (3, 2, 4, 3)),
}


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_against_one_big_batch(kind, dtype, layerwise):
    layer, shape = LAYERS[kind]
    net = made(copy.deepcopy(layer), dtype=dtype)
    x = drawn(sum(SIZES), *shape, dtype=dtype)
    names = refresh_norm_statistics(net, passes_over(net, x.split(SIZES)), layerwise=layerwise)
    assert names == ["0"]
    assert_equal(statistics(net), of_one_big_batch(net, x), DTYPES[dtype])
    assert net[0].num_batches_tracked == 7


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_instance_without_a_batch(dims):
    layer = getattr(nn, f"InstanceNorm{dims}d")(3, track_running_stats=True)
    net = made(layer)
    x = drawn(4, 3, *[3] * dims)
    refresh_norm_statistics(net, passes_over(net, list(x)))
    assert_equal(statistics(net), of_one_big_batch(net, x), 1e-12)


def test_instances_of_different_length_weigh_the_same():
    net = made(nn.InstanceNorm1d(3, track_running_stats=True))
    short, long = drawn(2, 3, 4), drawn(1, 3, 50, seed=1)
    refresh_norm_statistics(net, passes_over(net, [short, long]))
    means = torch.cat([short.mean(2), long.mean(2)])
    variances = torch.cat([short.var(2), long.var(2)])
    truth = {"0.running_mean": means.mean(0), "0.running_var": variances.mean(0)}
    assert_equal(statistics(net), truth, 1e-12)


def test_an_instance_of_one_value_has_a_mean_but_no_variance():
    net = made(nn.InstanceNorm1d(3, track_running_stats=True))
    point, line = drawn(2, 3, 1), drawn(2, 3, 6, seed=1)
    refresh_norm_statistics(net, passes_over(net, [point, line]))
    mean = torch.cat([point.mean(2), line.mean(2)]).mean(0)
    truth = {"0.running_mean": mean, "0.running_var": line.var(2).mean(0)}
    assert_equal(statistics(net), truth, 1e-12)


@pytest.mark.parametrize("kind", ["batch 2d", "instance 2d"])
def test_a_large_input_is_taken_in_parts(kind, monkeypatch):
    monkeypatch.setattr(moments, "_PART", 80)  # two samples
    net, x = made(copy.deepcopy(LAYERS[kind][0])), drawn(7, 3, 3, 4)
    refresh_norm_statistics(net, passes_over(net, [x]))
    assert_equal(statistics(net), of_one_big_batch(net, x), 1e-12)


def test_a_mean_far_from_zero_does_not_cancel():
    net = made(nn.BatchNorm1d(3), dtype=torch.float32)
    x = drawn(64, 3, dtype=torch.float32) + 1e4
    refresh_norm_statistics(net, passes_over(net, x.split(7)))
    truth = {"0.running_mean": x.double().mean(0), "0.running_var": x.double().var(0)}
    assert_equal(statistics(net), truth, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_double(dtype):
    net = made(nn.BatchNorm1d(3), dtype=torch.float32)
    net[0].running_mean, net[0].running_var = torch.zeros(3).double(), torch.ones(3).double()
    x = drawn(300, 3, dtype=dtype)
    layer = net[0]
    layer.forward = lambda values: values  # what follows is not the point
    refresh_norm_statistics(net, passes_over(net, x.split(7)))
    truth = {"0.running_mean": x.double().mean(0), "0.running_var": x.double().var(0)}
    assert_equal(statistics(net), truth, 1e-12)


def test_autocast_has_no_part_in_the_sums():
    net = made(nn.Linear(4, 3), nn.BatchNorm1d(3), dtype=torch.float32)
    x, seen = drawn(20, 4, dtype=torch.float32), []
    net[0].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refresh_norm_statistics(net, passes_over(net, x.split(6)))
    assert seen[0].dtype == torch.bfloat16
    inputs = torch.cat(seen).double()
    truth = {"1.running_mean": inputs.mean(0), "1.running_var": inputs.var(0)}
    assert_equal(statistics(net), truth, 1e-7)  # what float32 buffers hold


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 1),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    length=st.integers(1, 3),
)
def test_no_split_of_the_data_matters(sizes, seed, offset, length):
    net = made(nn.BatchNorm1d(2))
    x = drawn(sum(sizes), 2, length, seed=seed) + offset
    refresh_norm_statistics(net, passes_over(net, [p for p in x.split(sizes) if len(p)]))
    values = x.movedim(1, 0).flatten(1)
    truth = {"0.running_mean": values.mean(1), "0.running_var": values.var(1)}
    found = statistics(net)
    assert_equal(
        {"0.running_mean": found["0.running_mean"]},
        {"0.running_mean": truth["0.running_mean"]},
        1e-12,
    )
    # Deviations of both from a rounded mean: eps · offset · deviation, for torch's result too.
    deviation = truth["0.running_var"].sqrt() + 1
    error = (found["0.running_var"] - truth["0.running_var"]).abs()
    bound = 1e-12 * truth["0.running_var"] + 1e-15 * abs(offset) * deviation + 1e-14
    assert bool((error <= bound).all())


def test_an_empty_batch_counts_for_nothing():
    net, x = made(nn.BatchNorm1d(3)), drawn(6, 3)
    refresh_norm_statistics(net, passes_over(net, [x[:4], x[:0], x[4:]]), layerwise=True)
    assert_equal(statistics(net), of_one_big_batch(net, x), 1e-12)


# -- against torch ---------------------------------------------------------------------------------


def test_update_bn_agrees_on_means_and_lacks_the_variance_of_means():
    net, x = made(nn.BatchNorm2d(3)), drawn(12, 3, 2, 2)
    x[4:8] += 9  # the batches differ
    theirs, parts = copy.deepcopy(net), x.split(4)
    refresh_norm_statistics(net, passes_over(net, parts))
    update_bn(parts, theirs)
    assert_equal({"mean": net[0].running_mean}, {"mean": theirs[0].running_mean}, 1e-12)
    means = torch.stack([part.mean((0, 2, 3)) for part in parts])
    within = torch.stack([part.var((0, 2, 3), correction=0) for part in parts]).mean(0)
    assert_equal({"var": theirs[0].running_var}, {"var": within * 16 / 15}, 1e-12)
    total = within + means.var(0, correction=0)
    assert_equal({"var": net[0].running_var}, {"var": total * 48 / 47}, 1e-12)
    assert bool((theirs[0].running_var < net[0].running_var).all())


# -- nets ------------------------------------------------------------------------------------------


def mlp(dtype):
    return made(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Sigmoid(),
        nn.Linear(5, 3),
        nn.BatchNorm1d(3, momentum=None),
        dtype=dtype,
    )


def conv_net(dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    instance = getattr(nn, f"InstanceNorm{dims}d")(4, track_running_stats=True)
    return lambda dtype: made(
        conv(2, 3, 3, padding=1),
        norm(3),
        nn.Tanh(),
        conv(3, 4, 2),
        instance,
        nn.Tanh(),
        conv(4, 2, 1),
        norm(2),
        dtype=dtype,
    )


NETS = {"mlp": (mlp, (4,)), **{f"conv {d}d": (conv_net(d), (2, *[4] * d)) for d in (1, 2, 3)}}
NORMS_IN = {"mlp": ["1", "5", "8"]} | {f"conv {d}d": ["1", "4", "7"] for d in (1, 2, 3)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETS)
def test_a_deep_net_is_exact_layer_by_layer_and_else_in_its_first(name, dtype):
    build, shape = NETS[name]
    net, x = build(dtype), drawn(24, *shape, dtype=dtype) / 9
    truth = of_one_big_batch(net, x)
    at_once, in_order = copy.deepcopy(net), copy.deepcopy(net)
    parts = [9, 2, 8, 5]
    assert refresh_norm_statistics(at_once, passes_over(at_once, x.split(parts))) == NORMS_IN[name]
    refresh_norm_statistics(in_order, passes_over(in_order, x.split(parts)), layerwise=True)
    assert_equal(statistics(in_order), truth, DTYPES[dtype])
    first = [n for n in truth if n.startswith("1.")]
    found = statistics(at_once)
    assert_equal({n: found[n] for n in first}, {n: truth[n] for n in first}, DTYPES[dtype])
    assert_differ(found, truth, [f"{NORMS_IN[name][-1]}.running_var"])


def test_a_single_pass_normalises_by_the_batch():
    net, x = mlp(torch.float64), drawn(24, 4) / 9
    theirs = copy.deepcopy(net)
    seen = []
    for layer, mode in ((theirs[1], True), (theirs[5], True), (theirs[8], True)):
        layer.training = mode
    theirs[5].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for part in x.split(6):
            theirs(part)
    refresh_norm_statistics(net, passes_over(net, x.split(6)))
    assert_equal({"mean": net[5].running_mean}, {"mean": torch.cat(seen).mean(0)}, 1e-12)
    assert_equal({"var": net[5].running_var}, {"var": torch.cat(seen).var(0)}, 1e-12)


def test_one_pass_for_each_layer():
    net, started = mlp(torch.float64), []

    def passes():
        started.append(0)
        return passes_over(net, drawn(9, 4).split(3))()

    refresh_norm_statistics(net, passes)
    assert len(started) == 1
    started.clear()
    refresh_norm_statistics(net, passes, layerwise=True)
    assert len(started) == 3


class Shared(nn.Module):
    """A layer used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.again(self.linear(self.norm(x)))


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_shared_layer_adds_up_all_its_uses(layerwise):
    net, x = made(Shared()), drawn(9, 3) / 9
    seen = []
    handle = net[0].norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    names = refresh_norm_statistics(net, passes_over(net, x.split(4)), layerwise=layerwise)
    handle.remove()
    assert names == ["0.norm"]
    assert len(seen) == 6
    inputs = torch.cat(seen)
    assert_equal({"mean": net[0].norm.running_mean}, {"mean": inputs.mean(0)}, 1e-12)
    assert_equal({"var": net[0].norm.running_var}, {"var": inputs.var(0)}, 1e-12)


@pytest.mark.parametrize("layerwise", [False, True])
def test_frozen_layers_stay_and_are_used_as_they_are(layerwise):
    net, x = mlp(torch.float64), drawn(24, 4) / 9
    before = statistics(net)
    names = refresh_norm_statistics(
        net, passes_over(net, x.split(7)), frozen=["1", "8"], layerwise=layerwise
    )
    assert names == ["5"]
    truth = of_one_big_batch(net, x, eval_layers=["1", "8"])
    assert_equal(statistics(net), truth, 1e-12)  # the data reaches "5" through no other norm layer
    for name in ("1.running_mean", "1.running_var", "8.running_mean", "8.running_var"):
        assert torch.equal(statistics(net)[name], before[name])


def test_layers_that_are_not_reached_are_left_out():
    net = made(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = statistics(net)
    x = drawn(6, 3)
    for layerwise in (False, True):
        passes = passes_over(net[1], x.split(3))
        assert refresh_norm_statistics(net, passes, layerwise=layerwise) == ["1"]
        assert torch.equal(net[0].running_var, before["0.running_var"])
        assert_equal({"var": net[1].running_var}, {"var": x.var(0)}, 1e-12)


class AnyOrder(nn.Module):
    """Layers run in an order that the input says; registered as they are not run."""

    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm1d(3)
        self.middle = nn.BatchNorm1d(3, affine=False)
        self.first = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x, names=("first", "middle", "last")):
        for name in names:
            x = self.linear(getattr(self, name)(x).tanh())
        return x


def test_the_order_is_that_of_execution():
    net, x = made(AnyOrder()), drawn(12, 3) / 9
    truth = of_one_big_batch(net, x)
    names = refresh_norm_statistics(net, passes_over(net, x.split(5)), layerwise=True)
    assert names == ["0.first", "0.middle", "0.last"]
    assert_equal(statistics(net), truth, 1e-12)


def test_a_layer_that_is_first_met_late_still_comes_before_those_that_follow_it():
    net, x = made(AnyOrder())[0], drawn(12, 3)
    calls = [partial(net, x[:6], ("first", "last")), partial(net, x[6:])]
    names = refresh_norm_statistics(net, lambda: calls, layerwise=True)
    assert names == ["first", "middle", "last"]


def test_what_most_batches_do_decides_an_order_that_changes():
    net, x = made(AnyOrder())[0], drawn(12, 3)
    orders = [("last", "first"), ("first", "last"), ("last", "first")]
    calls = [partial(net, part, names) for part, names in zip(x.split(4), orders, strict=True)]
    assert refresh_norm_statistics(net, lambda: calls, layerwise=True) == ["last", "first"]
    calls = [partial(net, x, ("first", "last")), *calls]
    names = refresh_norm_statistics(net, lambda: [*calls, calls[0]], layerwise=True)
    assert names == ["first", "last"]  # registered the other way round


def test_a_layer_that_comes_back_is_where_it_is_first():
    net, x = made(AnyOrder())[0], drawn(12, 3)
    calls = [partial(net, x, ("first", "middle", "first"))]
    names = refresh_norm_statistics(net, lambda: calls, layerwise=True)
    assert names == ["first", "middle"]


def test_dropout_stays_off():
    net, x = made(nn.Dropout(0.5), nn.BatchNorm1d(3)), drawn(20, 3)
    refresh_norm_statistics(net, passes_over(net, x.split(6)))
    truth = {"1.running_mean": x.mean(0), "1.running_var": x.var(0)}
    assert_equal(statistics(net), truth, 1e-12)


def test_a_batch_with_one_value_a_channel_is_normalised_as_before():
    net, outputs = made(nn.BatchNorm1d(3)), []
    x = drawn(5, 3)
    expected = net(x[4:])
    calls = [lambda part=part: outputs.append(net(part)) for part in x.split(4)]
    refresh_norm_statistics(net, lambda: calls)
    assert torch.equal(outputs[1], expected)
    assert_equal(statistics(net), of_one_big_batch(net, x), 1e-12)
    scaled = (x[:4] - x[:4].mean(0)) / (x[:4].var(0, correction=0) + net[0].eps).sqrt()
    torch.testing.assert_close(outputs[0], scaled * net[0].weight + net[0].bias)


def test_the_input_may_be_given_by_name():
    net, x = made(nn.BatchNorm1d(3))[0], drawn(6, 3)
    refresh_norm_statistics(net, lambda: [lambda: net(input=x)])
    assert_equal({"var": net.running_var}, {"var": x.var(0)}, 1e-12)


# -- what is left behind ---------------------------------------------------------------------------


def hooks_of(net):
    return [
        hook
        for layer in net.modules()
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks)
        for hook in hooks
    ]


def state_of(net):
    """Return everything about a net that this file may not change on failure."""
    tensors = {name: (id(b), b.clone()) for name, b in net.named_buffers()}
    modes = {name: layer.training for name, layer in net.named_modules()}
    return tensors, modes, hooks_of(net)


def assert_same_state(net, before):
    tensors, modes, hooks = state_of(net)
    assert (modes, hooks) == before[1:]
    assert {n: i for n, (i, _) in tensors.items()} == {n: i for n, (i, _) in before[0].items()}
    assert all(torch.equal(b, before[0][n][1]) for n, (_, b) in tensors.items())


@pytest.mark.parametrize("is_training", [False, True])
def test_only_the_statistics_change(is_training):
    net, x = mlp(torch.float64).train(is_training), drawn(24, 4)
    before = state_of(net)
    refresh_norm_statistics(net, passes_over(net, x.split([23, 1])))
    after = state_of(net)
    assert after[1:] == before[1:]
    for name, (address, value) in after[0].items():
        assert address == before[0][name][0]
        assert torch.equal(value, before[0][name][1]) == name.endswith("tracked")
        assert not value.requires_grad


def test_a_gradient_can_be_taken_in_the_forward():
    net, x, seen = mlp(torch.float64), drawn(9, 4), []

    def call():
        net(x).sum().backward()
        seen.append(torch.is_grad_enabled())

    refresh_norm_statistics(net, lambda: [call], layerwise=True)
    assert seen == [True] * 3
    assert net[0].weight.grad is not None
    with torch.no_grad():
        refresh_norm_statistics(net, passes_over(net, [x]))
    with torch.inference_mode():
        refresh_norm_statistics(net, passes_over(net, [x]), layerwise=True)
    assert not net[1].running_mean.is_inference()
    net(x).sum().backward()


def test_no_graph_outlives_its_call():
    net, x, seen = mlp(torch.float64), drawn(9, 4), []

    def call():
        assert all(each() is None for each in seen)
        inputs = x * 2
        net(inputs)  # whose graph holds its inputs
        seen.append(weakref.ref(inputs))

    refresh_norm_statistics(net, lambda: [call] * 3)
    assert len(seen) == 3


class Fails(nn.BatchNorm1d):
    """Fails at the second batch, in the middle of its work."""

    def __init__(self, kind, at):
        super().__init__(5)
        self.kind = kind
        self.at = at
        self.uses = itertools.count(1)  # which no caller can undo

    def forward(self, x):
        output = super().forward(x)
        if next(self.uses) == self.at:
            raise self.kind("in the layer")
        return output


@pytest.mark.parametrize("at", [2, 4, 7])  # layerwise there are three batches a pass, three passes
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_forward_that_fails(kind, is_training, at):
    net, x = mlp(torch.float64), drawn(24, 4)
    net[5] = Fails(kind, at).to(torch.float64)
    net.train(is_training)
    before = state_of(net)
    with pytest.raises(kind, match="in the layer"):
        refresh_norm_statistics(net, passes_over(net, x.split(8)), layerwise=True)
    assert_same_state(net, before)


def test_a_failure_that_the_call_gets_over():
    net, x = mlp(torch.float64), drawn(24, 4)
    net[5] = Fails(RuntimeError, 2).to(torch.float64).eval()
    modes, before = [], state_of(net)

    def call(part):
        with contextlib.suppress(RuntimeError):
            net(part)
        modes.append([layer.training for layer in net])
        assert all(id(b) == before[0][name][0] for name, b in net.named_buffers())

    refresh_norm_statistics(net, lambda: [partial(call, part) for part in x.split(8)])
    assert not any(itertools.chain(*modes))


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(4, 2), None], ids=str)
def test_the_layer_says_what_is_wrong_with_its_input(wrong):
    net = made(nn.BatchNorm1d(3), dtype=torch.float32)[0]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever torch raises
        net.train()(wrong)
    net.eval()
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        refresh_norm_statistics(net, lambda: [lambda: net(wrong)])
    assert hooks_of(net) == []


class Undoes:
    """A pass that has a net of copies run, puts everything back after each call and at its end."""

    def __init__(self, net, parts):
        self.net = net
        self.parts = parts
        self.num_ends = 0

    def restore(self, saved):
        for layer, attributes in saved.items():
            for key, value in attributes.items():
                if isinstance(value, dict):
                    layer.__dict__[key].clear()
                    layer.__dict__[key].update(value)
                else:
                    layer.__dict__[key] = value

    def remember(self):
        return {
            layer: {k: type(v)(v) if isinstance(v, dict) else v for k, v in vars(layer).items()}
            for layer in self.net.modules()
        }

    def __call__(self):
        saved = self.remember()
        try:
            for part in self.parts:
                yield partial(self.call, part, saved)
        finally:
            self.restore(saved)
            self.num_ends += 1

    def call(self, part, saved):
        copies = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        try:
            functional_call(self.net.eval(), copies, (part,))
        finally:
            self.restore(saved)


@pytest.mark.parametrize("layerwise", [False, True])
def test_calls_that_undo_all_they_do(layerwise):
    net, x = mlp(torch.float64), drawn(24, 4) / 9
    twin = copy.deepcopy(net)
    net.train()
    before = state_of(net)
    passes = Undoes(net, x.split(8))
    refresh_norm_statistics(net, passes, layerwise=layerwise)
    refresh_norm_statistics(twin, passes_over(twin, x.split(8)), layerwise=layerwise)
    assert_equal(statistics(net), statistics(twin), 1e-15)
    assert state_of(net)[1:] == before[1:]
    assert passes.num_ends == (3 if layerwise else 1)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_pass_ends_before_the_hooks_go(kind):
    net, x = mlp(torch.float64), drawn(24, 4)
    net[5] = Fails(kind, 2).to(torch.float64)
    net.train()
    before = state_of(net)
    passes = Undoes(net, x.split(8))
    with pytest.raises(kind, match="in the layer"):
        refresh_norm_statistics(net, passes)
    assert passes.num_ends == 1
    assert_same_state(net, before)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite(value, layerwise):
    net, x = made(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)), drawn(8, 3)
    with torch.no_grad():
        net[1].weight[0, 0] = value
    before = state_of(net)
    with pytest.raises(ValueError, match=r"the layer `2` inputs with finite statistics, got nan"):
        refresh_norm_statistics(net, passes_over(net, x.split(3)), layerwise=layerwise)
    assert_same_state(net, before)


def test_statistics_that_overflow_where_they_are_stored():
    net, x = made(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), drawn(8, 3) * 1e4
    net[0].half()
    net[0].forward = lambda values: values
    before = state_of(net)
    with pytest.raises(ValueError, match=r"the layer `0` inputs with finite statistics, got inf"):
        refresh_norm_statistics(net, passes_over(net, x.split(4)))
    assert_same_state(net, before)


@pytest.mark.parametrize("layerwise", [False, True])
def test_no_data(layerwise):
    net = mlp(torch.float64)
    with pytest.raises(ValueError, match="`passes` must give at least one batch, got none"):
        refresh_norm_statistics(net, list, layerwise=layerwise)
    assert hooks_of(net) == []


def test_data_that_can_be_read_only_once():
    net = mlp(torch.float64)
    calls = iter(passes_over(net, drawn(9, 4).split(3))())
    before = state_of(net)
    with pytest.raises(ValueError, match=r"got none\. Is the data an iterator that was used up"):
        refresh_norm_statistics(net, lambda: calls, layerwise=True)
    assert_same_state(net, before)


def test_passes_that_differ():
    net, x, num_passes = made(AnyOrder())[0], drawn(6, 3), itertools.count()
    before = state_of(net)

    def passes():
        names = ("first", "middle") if next(num_passes) == 0 else ("first",)
        return [partial(net, x, names)]

    with pytest.raises(ValueError, match="that does not reach the layer `middle`, as the first"):
        refresh_norm_statistics(net, passes, layerwise=True)
    assert_same_state(net, before)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.BatchNorm1d(3), drawn(1, 3)),
        (nn.InstanceNorm1d(3, track_running_stats=True), drawn(4, 3, 1)),
    ],
)
def test_too_little_data_for_a_variance(layer, x):
    net = made(copy.deepcopy(layer))
    before = state_of(net)
    with pytest.raises(ValueError, match=r"the layer `0` two values a channel .*, got one"):
        refresh_norm_statistics(net, passes_over(net, [x]))
    assert_same_state(net, before)
    with pytest.raises(ValueError, match="must give the layer two values"):
        refresh_norm_statistics(net[0], passes_over(net, [x]))


def test_frozen_names_that_do_not_exist():
    net = made(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"`frozen` must hold .*, got \['1'\]. .* \['0'\]"):
        refresh_norm_statistics(net, list, frozen=["0", "1"])


def test_nothing_to_refresh_starts_no_pass():
    def passes():
        raise AssertionError

    assert refresh_norm_statistics(nn.Linear(2, 2), passes) == []
    assert refresh_norm_statistics(nn.BatchNorm1d(2), passes, frozen=[""]) == []


# -- which layers ----------------------------------------------------------------------------------


def test_tracking_layers():
    net = nn.ModuleDict(
        {
            "batch": nn.BatchNorm1d(2),
            "own": type("Own", (nn.modules.batchnorm._BatchNorm,), {})(2),
            "synchronised": nn.SyncBatchNorm(2),
            "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            "by batch": nn.BatchNorm1d(2, track_running_stats=False),
            "by instance": nn.InstanceNorm1d(2),
            "lazy": nn.LazyBatchNorm1d(),
            "lazy instance": nn.LazyInstanceNorm1d(track_running_stats=True),
            "group": nn.GroupNorm(1, 2),
            "layer": nn.LayerNorm(2),
        }
    )
    net["again"] = net["batch"]
    assert list(tracking_layers(net)) == ["batch", "own", "synchronised", "instance"]
    net["lazy"](torch.ones(2, 3))
    assert "lazy" in tracking_layers(net)
    net["instance"].track_running_stats = False
    assert "instance" not in tracking_layers(net)
    assert list(tracking_layers(net["batch"])) == [""]


def test_statistics_that_are_no_longer_tracked_but_used():
    net, x = made(nn.BatchNorm1d(3)), drawn(7, 3)
    net[0].track_running_stats = False
    before = net(x)
    refresh_norm_statistics(net, passes_over(net, x.split(3)))
    truth = {"0.running_mean": x.mean(0), "0.running_var": x.var(0)}
    assert_equal(statistics(net), truth, 1e-12)
    assert not torch.equal(net(x), before)


# -- several processes -----------------------------------------------------------------------------


class Ranks:
    """Threads that sum as processes do, and count how often."""

    def __init__(self, num_ranks, in_place):
        self.barrier = threading.Barrier(num_ranks)
        self.given = [None] * num_ranks
        self.shapes = [[] for _ in range(num_ranks)]
        self.in_place = in_place

    def reduce_of(self, rank):
        def reduce(tensor):
            self.shapes[rank].append(tuple(tensor.shape))
            self.given[rank] = tensor.clone()
            self.barrier.wait(10)
            total = sum(self.given)
            self.barrier.wait(10)
            return tensor.copy_(total) if self.in_place else total

        return reduce

    def run(self, nets, passes, **options):
        results = [None] * len(nets)

        def work(rank):
            try:
                results[rank] = refresh_norm_statistics(
                    nets[rank], passes[rank], reduce=self.reduce_of(rank), **options
                )
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(nets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(set(map(tuple, self.shapes))) == 1  # as often, and of the same shapes
        return results


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_ranks_find_what_one_process_does(name, in_place, layerwise):
    build, shape = NETS[name]
    net, x = build(torch.float64), drawn(24, *shape) / 9
    nets = [copy.deepcopy(net) for _ in range(3)]
    parts = x.split([9, 2, 8, 5])
    refresh_norm_statistics(net, passes_over(net, parts), layerwise=layerwise)
    shares = [parts[:2], parts[2:], []]  # one has no data at all
    passes = [passes_over(each, share) for each, share in zip(nets, shares, strict=True)]
    found = Ranks(3, in_place).run(nets, passes, layerwise=layerwise)
    assert found == [NORMS_IN[name]] * 3
    for each in nets:
        assert_equal(statistics(each), statistics(net), 1e-12)
        assert all(torch.equal(b, statistics(nets[0])[n]) for n, b in statistics(each).items())


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_layer_that_one_rank_does_not_reach(layerwise):
    nets = [made(AnyOrder())[0] for _ in range(2)]
    x = drawn(12, 3)
    passes = [
        lambda: [partial(nets[0], x[:6], ("first", "last"))],
        lambda: [partial(nets[1], x[6:], ("first",))],
    ]
    found = Ranks(2, True).run(nets, passes, layerwise=layerwise)
    assert found == [["first", "last"] if layerwise else ["last", "first"]] * 2
    assert_equal({"var": nets[1].first.running_var}, {"var": x.var(0)}, 1e-12)
    assert_equal(statistics(nets[0]), statistics(nets[1]), 1e-15)


def test_ranks_agree_on_an_order_that_none_sees_whole():
    nets = [made(AnyOrder())[0] for _ in range(2)]
    x = drawn(12, 3)
    passes = [
        lambda: [partial(nets[0], x[:6], ("middle", "last"))],
        lambda: [partial(nets[1], x[6:], ("first", "middle"))],
    ]
    found = Ranks(2, False).run(nets, passes, layerwise=True)
    assert found == [["first", "middle", "last"]] * 2


def test_ranks_raise_together():
    nets = [made(nn.BatchNorm1d(3)) for _ in range(2)]
    x = drawn(8, 3)
    x[0, 0] = torch.nan
    passes = [passes_over(nets[0], [x[:4]]), passes_over(nets[1], [x[4:]])]
    found = Ranks(2, True).run(nets, passes)
    assert [type(each) for each in found] == [StatisticsNotFiniteError] * 2
    found = Ranks(2, True).run(nets, [list, list])
    assert ["got none" in str(each) for each in found] == [True, True]


class Synchronised(nn.SyncBatchNorm):
    """Notes its mode, and leaves out the exchange, which needs a GPU."""

    def forward(self, x):
        self.modes = [*getattr(self, "modes", []), self.training]
        return x


def of_one_rank():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    net, x = mlp(torch.float64), drawn(24, 4) / 9
    share = x.split([9, 2, 8, 5])[rank::2]

    def reduce(tensor):
        torch.distributed.all_reduce(tensor)
        return tensor

    found = []
    for layerwise in (False, True):
        refresh_norm_statistics(net, passes_over(net, share), layerwise=layerwise, reduce=reduce)
        found.append(statistics(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = made(Synchronised(3))[0]
        parts = [drawn(1, 3, seed=rank), drawn(2 * rank, 3)]
        refresh_norm_statistics(layer, passes_over(layer, parts), reduce=reduce)
    return found, layer.modes


@pytest.mark.distributed
def test_two_processes(tmp_path):
    ranks = run_in_two_processes(of_one_rank, tmp_path)
    net, x = mlp(torch.float64), drawn(24, 4) / 9
    for i, layerwise in enumerate((False, True)):
        refresh_norm_statistics(net, passes_over(net, x.split([9, 2, 8, 5])), layerwise=layerwise)
        for found, _ in ranks:
            assert_equal(found[i], statistics(net), 1e-12)
    # A layer whose batch is that of all processes is in train mode on each, whatever it sees.
    assert [modes for _, modes in ranks] == [[True, True]] * 2
