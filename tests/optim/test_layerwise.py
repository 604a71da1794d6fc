"""LARS and LAMB as optimizers of torch's kind: what users and other tools rely on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optkit.measures import stability_threshold
from lightning_optkit.optim import LAMB, LARS, layerwise
from tests.optim.loops import random_gradients, run, start

LARS_OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "trust_coefficient": 0.05}
LAMB_OPTIONS = {"lr": 0.02, "weight_decay": 0.1}
MAKERS = {
    "lars": lambda params, **more: LARS(params, **LARS_OPTIONS | more),
    "folded": lambda params, **more: LARS(params, **LARS_OPTIONS | {"fold_lr": True} | more),
    "nesterov": lambda params, **more: LARS(params, **LARS_OPTIONS | {"nesterov": True} | more),
    "bare": lambda params, **more: LARS(params, **LARS_OPTIONS | {"momentum": 0.0} | more),
    "lamb": lambda params, **more: LAMB(params, **LAMB_OPTIONS | more),
    "captured": lambda params, **more: LAMB(params, **LAMB_OPTIONS | {"capturable": True} | more),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
both = pytest.mark.parametrize("make", [MAKERS["lars"], MAKERS["lamb"]], ids=["lars", "lamb"])


def assert_equal(found, truth):
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


# -- how parameters are put together --------------------------------------------------------------


@every
@pytest.mark.parametrize("scaled", [True, False])
def test_one_by_one_is_the_same_to_the_bit(make, scaled, monkeypatch):
    steps = random_gradients(12, torch.float32)
    ends, ratios = [], []
    for foreach, full in [(None, 2**19), (False, 2**19), (True, 6)]:
        monkeypatch.setattr(layerwise, "_FULL", full)
        optimizer = make(start(torch.float32), foreach=foreach, layerwise=scaled)
        ends.append(run(optimizer, steps))
        ratios.append(optimizer.last_trust_ratios().nan_to_num(-1))
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])
    assert_equal(ratios[:2], ratios[1:])


def test_buckets_are_full_at_some_size(monkeypatch):
    monkeypatch.setattr(layerwise, "_FULL", 10)
    optimizer = LAMB([nn.Parameter(torch.ones(n)) for n in (4, 7, 1, 30, 2)])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    assert [bucket.positions for bucket in optimizer._buckets()] == [(0, 1), (2, 3), (4,)]


@every
def test_dtypes_and_groups_do_not_touch_one_another(make):
    """Each parameter ends where it would alone."""
    steps = random_gradients(8)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64]
    mixed = [nn.Parameter(p.detach().to(t)) for p, t in zip(start(), dtypes, strict=True)]
    steps = [
        [None if g is None else g.to(t) for g, t in zip(grads, dtypes, strict=True)]
        for grads in steps
    ]
    alone = [nn.Parameter(parameter.detach().clone()) for parameter in mixed]
    optimizer = make([{"params": mixed[:3]}, {"params": mixed[3:], "weight_decay": 0.0}])
    found = run(optimizer, steps)
    for i, parameter in enumerate(alone):
        own = make([parameter], weight_decay=0.1 if i < 3 else 0.0)
        (end,) = run(own, [[grads[i]] for grads in steps])
        torch.testing.assert_close(found[i], end, rtol=0, atol=0)
        assert found[i].dtype == dtypes[i]
    assert optimizer.last_trust_ratios().dtype == torch.float64


@every
def test_half_precision_has_norms_of_single(make):
    """Summed in bfloat16, the squares of 40,000 equal numbers would stop at 256 of them."""
    size = 40_000
    half = nn.Parameter(torch.full((size,), 0.5, dtype=torch.bfloat16))
    full = nn.Parameter(torch.full((size,), 0.5))
    ratios = []
    for parameter in (half, full):
        optimizer = make([parameter])
        parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
        ratios.append(optimizer.last_trust_ratios())
    assert ratios[0].dtype == torch.float32
    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-2, atol=0)  # LAMB's update is rounded
    torch.testing.assert_close(half.float(), full, rtol=8e-3, atol=0)


@every
def test_nothing_at_all_can_be_stepped(make):
    empty = nn.Parameter(torch.empty(0, 3))
    some = nn.Parameter(torch.ones(2))
    optimizer = make([{"params": [empty, some]}, {"params": []}])
    optimizer.step()  # no gradients
    assert optimizer.last_trust_ratios().isnan().tolist() == [True, True]
    empty.grad, some.grad = torch.empty(0, 3), torch.ones(2)
    optimizer.step()
    assert optimizer.last_trust_ratios()[0] == 1
    assert not torch.equal(some, torch.ones(2))
    assert torch.isfinite(some).all()
    nothing = make([{"params": []}])
    nothing.step()
    assert nothing.last_trust_ratios().shape == (0,)


@every
def test_memory_formats_are_kept(make):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    last = nn.Parameter(x.clone(memory_format=torch.channels_last))
    first = nn.Parameter(x.clone())
    for parameter in (last, first):
        optimizer = make([parameter])
        run(optimizer, [[x.cos()], [x.sin()]])
        for value in optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.stride() == parameter.stride()
    torch.testing.assert_close(last, first, rtol=1e-6, atol=1e-7)


@both
def test_a_parameter_that_is_not_finite_harms_no_other(make):
    good, bad = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = make([bad, good])
    bad.grad, good.grad = torch.tensor([1.0, torch.inf, 2.0]), torch.ones(3)
    optimizer.step()
    assert not torch.isfinite(bad).all()  # it shows
    assert torch.isfinite(good).all()


# -- gradients -------------------------------------------------------------------------------------


@every
def test_gradients_are_never_written_to(make):
    for options in ({}, {"maximize": True}, {"weight_decay": 0.0}, {"layerwise": False}):
        params = start()
        optimizer = make(params, **options)
        for grads in random_gradients(4):
            kept = [None if g is None else g.clone() for g in grads]
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            for parameter, grad, before in zip(params, grads, kept, strict=True):
                assert parameter.grad is grad
                assert grad is None or torch.equal(grad, before)


@every
def test_parameters_without_gradient_stay_and_count_no_step(make):
    params = start()
    optimizer = make(params)
    run(optimizer, random_gradients(4))
    before = params[3].detach().clone()
    steps = random_gradients(6, seed=3)
    run(optimizer, [[*grads[:3], None, grads[4]] for grads in steps])
    assert torch.equal(params[3], before)
    if isinstance(optimizer, LAMB):
        counts = [int(optimizer.state[parameter]["step"]) for parameter in params]
        assert counts == [10, 7, 10, 1, 10]


@both
def test_sparse_gradients_are_refused(make):
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = make(embedding.parameters())
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"Gradients must be dense, got a sparse one\. Write"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@both
def test_complex_parameters_are_refused(make):
    with pytest.raises(TypeError, match=r"`params` must be real, got .* torch.complex64\. Hold"):
        make([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = make(start())
    with pytest.raises(TypeError, match="must be real"):
        optimizer.add_param_group({"params": torch.ones(2, dtype=torch.complex64)})
    assert len(optimizer.param_groups) == 1


# -- what torch's optimizers can -------------------------------------------------------------------


@every
def test_the_closure_makes_the_gradients(make):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make([w])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 5
    assert calls == [True]
    assert w.detach().norm() < 5**0.5
    assert w.requires_grad
    assert w.is_leaf


@every
def test_hooks_run_once(make):
    optimizer = make(start())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"note": 1})
    run(optimizer, random_gradients(1))
    assert seen == ["before", "after"]
    assert optimizer.state_dict()["note"] == 1
    subclass = type("Subclass", (type(optimizer),), {})
    run(subclass(start(), lr=0.1), random_gradients(1))
    assert seen == ["before", "after"]


def stored_and_read(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@every
@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle"])
def test_a_run_goes_on_to_the_bit(make, way, tmp_path):
    steps = random_gradients(9)
    truth = run(make(start()), steps)
    first = make(start())
    run(first, steps[:4])
    if way == "file":
        params = [nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
        again = make(params, lr=7.0, weight_decay=7.0)  # the file knows better
        again.load_state_dict(stored_and_read(first.state_dict(), tmp_path))
    else:
        again = copy.deepcopy(first) if way == "deepcopy" else pickle.loads(pickle.dumps(first))
    assert again.last_trust_ratios().isnan().all()
    assert_equal(run(again, steps[4:]), truth)


@every
def test_a_state_is_cast_as_torch_casts_it(make, tmp_path):
    """To the dtype of the parameter, counts excepted."""
    params = start()
    optimizer = make(params)
    run(optimizer, random_gradients(5))
    narrow = make([nn.Parameter(p.detach().bfloat16()) for p in params])
    narrow.load_state_dict(stored_and_read(optimizer.state_dict(), tmp_path))
    for state in narrow.state.values():
        for name, value in state.items():
            if name != "step":
                assert value.dtype == torch.bfloat16
    run(narrow, random_gradients(2, torch.bfloat16))


@pytest.mark.parametrize("capturable", [False, True])
def test_counts_are_where_the_step_reads_them(capturable, tmp_path):
    """Whatever wrote them: a number, or a tensor on the parameter's device."""
    optimizer = LAMB(start(), capturable=capturable)
    run(optimizer, random_gradients(5))
    state = stored_and_read(optimizer.state_dict(), tmp_path)
    state["param_groups"][0]["capturable"] = not capturable
    again = LAMB(start())
    again.load_state_dict(state)
    kinds = {type(state["step"]) for state in again.state.values()}
    assert kinds == ({int} if capturable else {torch.Tensor})
    steps = [{int(state["step"]) for state in o.state.values()} for o in (optimizer, again)]
    assert steps[0] == steps[1] == {5, 4, 2}


def test_a_run_of_sgd_or_adamw_can_be_gone_on_with():
    for theirs, ours in [
        (torch.optim.SGD(start(), lr=0.1, momentum=0.9), LARS(start(), lr=1.0)),
        (torch.optim.AdamW(start(), lr=0.1), LAMB(start())),
    ]:
        run(theirs, random_gradients(4))
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        with torch.no_grad():
            groups = (optimizer.param_groups[0]["params"] for optimizer in (ours, theirs))
            for mine, other in zip(*groups, strict=True):
                mine.copy_(other)
        ours.param_groups[0]["layerwise"] = False
        steps = random_gradients(4, seed=7)
        torch.testing.assert_close(run(ours, steps), run(theirs, steps), rtol=1e-12, atol=1e-14)


@every
@pytest.mark.parametrize("scaled", [True, False])
def test_a_rate_may_be_a_tensor(make, scaled):
    steps = random_gradients(6)
    for shape in ((), (1,)):
        rate = torch.full(shape, 0.03, dtype=torch.float64)
        number, tensor = (make(start(), lr=lr, layerwise=scaled) for lr in (0.03, rate))
        torch.testing.assert_close(run(tensor, steps), run(number, steps), rtol=1e-12, atol=1e-15)
        rate.fill_(0.3)  # as a schedule does in a graph
        number.param_groups[0]["lr"] = 0.3
        torch.testing.assert_close(run(tensor, steps), run(number, steps), rtol=1e-12, atol=1e-15)


@every
def test_schedules_set_the_rate(make):
    optimizer = make(start())
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, random_gradients(1))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2
    one = make(start())
    run(one, random_gradients(1))
    one.param_groups[0]["lr"] = rate / 2
    steps = random_gradients(2, seed=5)
    assert_equal(run(optimizer, steps), run(one, steps))


@both
def test_a_group_can_be_added(make):
    optimizer = make(start())
    run(optimizer, random_gradients(3))
    more = start(seed=9)[:2]
    optimizer.add_param_group({"params": more, "layerwise": False, "lr": 0.5})
    grads = random_gradients(1, seed=4)[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, grad in zip(params, [*grads, None, None], strict=True):
        parameter.grad = grad
    more[1].grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    ratios = optimizer.last_trust_ratios()
    assert ratios.shape == (7,)
    assert ratios[5].isnan()
    assert ratios[6] == 1


@both
def test_mixed_precisions_scaler_unscales_and_skips(make):
    scaled, plain = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizer, truth = make([scaled]), make([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for factor in (1.0, torch.inf, 3.0):
        scaler.scale(factor * scaled.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != torch.inf:
            (factor * plain.square().sum()).backward()
            truth.step()
        optimizer.zero_grad()
        truth.zero_grad()
    assert_equal([scaled], [plain])


def test_a_step_can_be_compiled():
    make = MAKERS["captured"]
    steps = random_gradients(5)[3:]
    steps = [grads for grads in steps if None not in grads] * 2
    torch._dynamo.reset()
    eager, compiled = make(start()), make(start())
    compiled.step = torch.compile(compiled.step, backend="eager")
    torch.testing.assert_close(run(compiled, steps), run(eager, steps), rtol=1e-12, atol=0)


# -- ratios ----------------------------------------------------------------------------------------


@both
def test_last_ratios_are_in_the_order_of_parameters(make):
    a, b, c, d = (nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0, 3.0, 4.0))
    optimizer = make(
        [{"params": [a, b]}, {"params": [c], "layerwise": False}, {"params": [d]}], weight_decay=0.0
    )
    assert optimizer.last_trust_ratios().isnan().tolist() == [True] * 4
    a.grad, c.grad, d.grad = (torch.full((2,), value) for value in (4.0, 1.0, 2.0))
    optimizer.step()
    found = optimizer.last_trust_ratios().tolist()
    ratios = (0.05 / 4, 0.05 * 4 / 2) if isinstance(optimizer, LARS) else (1, 4)
    truth = [ratios[0], torch.nan, 1, ratios[1]]
    assert found == pytest.approx(truth, rel=1e-5, nan_ok=True)
    optimizer.last_trust_ratios().zero_()  # a copy
    assert optimizer.last_trust_ratios()[0] != 0
    a.grad = c.grad = d.grad = None
    optimizer.step()
    assert optimizer.last_trust_ratios().isnan().all()


# -- nothing waits for a device --------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor, which would wait for its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func), "a tensor is read"
        return func(*args, **kwargs or {})


@every
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_reads_no_tensor(make, as_tensor):
    lr = torch.tensor(0.1) if as_tensor else 0.1
    for options in ({}, {"layerwise": False}, {"foreach": False}):
        optimizer = make(start(), lr=lr, **options)
        with NoReads():
            run(optimizer, random_gradients(3))
            optimizer.last_trust_ratios()


@every
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_needs_no_numbers(make, as_tensor):
    """On the meta device there are none: whatever asked for one would fail."""
    lr = torch.tensor(0.1, device="meta") if as_tensor else 0.1
    for options in ({}, {"layerwise": False}, {"foreach": False}):
        params = [nn.Parameter(p.detach().to("meta")) for p in start(torch.float32)]
        optimizer = make(params, lr=lr, **options)
        for _ in range(2):
            for parameter in params:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert optimizer.last_trust_ratios().device.type == "meta"


# -- other tools -----------------------------------------------------------------------------------


@both
def test_a_stability_threshold_is_not_known(make):
    optimizer = make(start())
    with pytest.raises(TypeError, match=r"`optimizer` must be one whose .* got (LARS|LAMB)\."):
        stability_threshold(optimizer, {"w": optimizer.param_groups[0]["params"][0]})


# -- on a GPU --------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def cuda_start():
    return [nn.Parameter(p.detach().cuda()) for p in start(torch.float32)]


def cuda_gradients(num_steps):
    steps = random_gradients(num_steps, torch.float32)
    return [[None if g is None else g.cuda() for g in grads] for grads in steps]


@pytest.mark.gpu
@needs_gpu
@every
def test_a_gpu_is_not_waited_for_and_does_the_same(make):
    truth = run(make(start(torch.float32)), random_gradients(12, torch.float32))
    steps = cuda_gradients(12)
    for foreach in (None, False):
        for lr in (None, torch.tensor(0.1, device="cuda")):
            optimizer = make(cuda_start(), foreach=foreach)
            if lr is not None:
                optimizer.param_groups[0]["lr"] = lr.fill_(optimizer.param_groups[0]["lr"])
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = run(optimizer, steps)
                ratios = optimizer.last_trust_ratios()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert ratios.is_cuda
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("make", [MAKERS["lars"], MAKERS["captured"]], ids=["lars", "lamb"])
def test_a_graph_replays_steps(make):
    params, twins = cuda_start(), cuda_start()
    optimizer, truth = make(params), make(twins)
    for group in (params, twins):
        for parameter in group:
            parameter.grad = torch.ones_like(parameter)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()  # makes the state
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()  # is recorded, not made
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(4):
        truth.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_wants_counts_on_the_device():
    optimizer = LAMB(cuda_start())
    run(optimizer, cuda_gradients(4)[3:])
    message = "`capturable` must be True in a CUDA graph"
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match=message):
        optimizer.step()
