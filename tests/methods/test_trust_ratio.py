"""Scaled gradients and updates against optimizers written out, and what they leave untouched."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_optkit.methods.trust_ratio import Layers, scaled_gradients, scaled_updates

SHAPES = ((3, 4), (5,), (), (2, 2), (4,))
SCALED = (0, 1, 3)  # the others are of the optimizer alone
DECAYS = (0.1, 0.1, 0.1, 0.0, 0.0)  # two groups


def norms(tensors):
    return torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])


def lars(layers, of_weights, of_gradients):
    """Return 0.02‖w‖ / (‖g‖ + β‖w‖)."""
    decays = torch.empty_like(of_weights)
    for settings, where in layers.by_group():
        decays[where] = settings["weight_decay"]
    return 0.02 * of_weights / (of_gradients + decays * of_weights)


def lamb(layers, of_weights, of_updates):
    """Return γ‖w‖ / ‖u‖."""
    rates = torch.empty_like(of_weights)
    for settings, where in layers.by_group():
        rates[where] = settings["lr"]
    return rates * of_weights / of_updates


def ones(layers, of_weights, of_others):
    return torch.ones_like(of_weights)


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(each.to(dtype)) for each in drawn]


def gradients_of(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def groups_of(params):
    return [
        {"params": params[:3], "weight_decay": DECAYS[0]},
        {"params": params[3:], "weight_decay": DECAYS[3], "lr": 0.3},
    ]


RATES = (0.5, 0.5, 0.5, 0.3, 0.3)


def stepped(optimizer, params, block=None, *, steps=4, **options):
    """Make some steps, each within the block; return the ratios of each."""
    scaled = {params[k] for k in SCALED}
    found = []
    for step in range(steps):
        for p, gradient in zip(params, gradients_of(step, params[0].dtype), strict=True):
            p.grad = gradient
        if block is None:
            optimizer.step()
            continue
        with block(optimizer, scaled, norms=norms, **options) as ratios:
            optimizer.step()
        found.append(ratios)
    return found


def numbers(tensors):
    return [t.detach().double().flatten().tolist() for t in tensors]


def size(values):
    return math.sqrt(math.fsum(x * x for x in values))


def assert_close(params, expected, *, rtol=1e-12):
    for p, values in zip(params, expected, strict=True):
        assert p.detach().flatten().tolist() == pytest.approx(values, rel=rtol, abs=1e-13)


# -- gradients ---------------------------------------------------------------------------------


def lars_by_hand(*, momentum, dampening, nesterov, sign, steps=4):
    """Return weights, in plain numbers: You et al.'s algorithm 1, with the rate outside."""
    weights = numbers(parameters())
    velocities = [None] * len(weights)
    for step in range(steps):
        for k, gradient in enumerate(numbers(gradients_of(step))):
            w, decay = weights[k], DECAYS[k]
            ratio = 1.0
            if k in SCALED:
                ratio = 0.02 * size(w) / (size(gradient) + decay * size(w))
            g = [ratio * (sign * x + decay * y) for x, y in zip(gradient, w, strict=True)]
            v = velocities[k]
            if v is None:
                v = g
            else:
                v = [momentum * a + (1 - dampening) * b for a, b in zip(v, g, strict=True)]
            velocities[k] = v
            move = [a + momentum * b for a, b in zip(g, v, strict=True)] if nesterov else v
            weights[k] = [y - RATES[k] * x for x, y in zip(move, w, strict=True)]
    return weights


SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "maximize": {"momentum": 0.9, "maximize": True},
}


@pytest.mark.parametrize("kind", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", SGDS)
def test_sgd_with_scaled_gradients_is_lars(name, kind):
    options = SGDS[name]
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5, **options, **kind)
    stepped(optimizer, params, scaled_gradients, ratios=lars)
    by_hand = lars_by_hand(
        momentum=options.get("momentum", 0.0),
        dampening=options.get("dampening", 0.0),
        nesterov=options.get("nesterov", False),
        sign=-1 if options.get("maximize") else 1,
    )
    assert_close(params, by_hand)


def test_the_ratios_are_told_while_gradients_are_scaled():
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5)
    ((scaled, ratios),) = stepped(optimizer, params, scaled_gradients, ratios=lars, steps=1)[0]
    assert [params[k] for k in SCALED] == scaled
    first, gradients = numbers(parameters()), numbers(gradients_of(0))
    expected = [
        0.02 * size(first[k]) / (size(gradients[k]) + DECAYS[k] * size(first[k])) for k in SCALED
    ]
    assert ratios.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SGDS)
@pytest.mark.parametrize("foreach", [True, False])
def test_ratios_of_one_leave_every_bit_of_the_step(name, foreach):
    results = []
    for block in (None, scaled_gradients, scaled_updates):
        params = parameters(torch.float32)
        options = SGDS[name] | {"foreach": foreach}
        optimizer = torch.optim.SGD(groups_of(params), lr=0.5, **options)
        stepped(optimizer, params, block, ratios=ones)
        results.append(params)
    for plain, *others in zip(*results, strict=True):
        assert all(torch.equal(plain, other) for other in others)


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_and_decay_are_the_users_again(fails):
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5, momentum=0.9, nesterov=True)
    params[4].grad = None
    mine = gradients_of(0)[:4]
    for p, gradient in zip(params, mine, strict=False):
        p.grad = gradient
    copies = [gradient.clone() for gradient in mine]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    before = params[4].detach().clone()
    try:
        with scaled_gradients(optimizer, set(params), norms=norms, ratios=lars):
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]
            assert not any(p.grad is gradient for p, gradient in zip(params, mine, strict=False))
            optimizer.step()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays
    for p, gradient, copy in zip(params, mine, copies, strict=False):
        assert p.grad is gradient
        assert torch.equal(gradient, copy)
    assert params[4].grad is None
    assert torch.equal(params[4], before)


def test_what_someone_else_puts_there_in_the_meantime_is_kept():
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5)
    for p, gradient in zip(params, gradients_of(0), strict=True):
        p.grad = gradient
    own = torch.zeros(5, dtype=torch.float64)
    with scaled_gradients(optimizer, set(params), norms=norms, ratios=lars):
        params[0].grad, params[1].grad = None, own
        optimizer.param_groups[0]["weight_decay"] = 0.7
    assert params[0].grad is None
    assert params[1].grad is own
    assert params[2].grad is not None
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]


def test_a_group_without_a_layer_to_scale_is_left_alone():
    params = parameters()
    groups = groups_of(params)
    groups[1]["weight_decay"] = 0.2
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for p, gradient in zip(params, gradients_of(0), strict=True):
        p.grad = gradient
    kept = params[3].grad
    with scaled_gradients(optimizer, {params[0]}, norms=norms, ratios=lars):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
        assert params[3].grad is kept


def test_ratios_that_fail_leave_everything():
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5)
    mine = gradients_of(0)
    for p, gradient in zip(params, mine, strict=True):
        p.grad = gradient

    def fail(*_):
        raise RuntimeError("a rank is gone")

    for block in (scaled_gradients, scaled_updates):
        with (
            pytest.raises(RuntimeError, match="a rank is gone"),
            block(optimizer, set(params), norms=norms, ratios=fail),
        ):
            pass
        assert all(p.grad is gradient for p, gradient in zip(params, mine, strict=True))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert numbers(params) == numbers(parameters())


def test_gradients_that_cannot_be_scaled_are_refused():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    p.grad = torch.eye(3, 2).to_sparse()
    with (
        pytest.raises(ValueError, match=r"must be dense .*sparse_coo one of shape \(3, 2\)"),
        scaled_gradients(optimizer, {p}, norms=norms, ratios=ones),
    ):
        pass
    p.grad = torch.ones(3, 2)
    optimizer.grad_scale = torch.tensor(2.0)  # as a gradient scaler tells a fused optimizer
    with (
        pytest.raises(ValueError, match=r"of SGD must be unscaled .* `fused=False`"),
        scaled_gradients(optimizer, {p}, norms=norms, ratios=ones),
    ):
        pass


# -- updates -----------------------------------------------------------------------------------


def lamb_by_hand(*, decays, steps=4, eps=1e-6, beta1=0.9, beta2=0.99):
    """Return weights, in plain numbers: You et al.'s algorithm 2."""
    weights = numbers(parameters())
    first = [[0.0] * len(w) for w in weights]
    second = [[0.0] * len(w) for w in weights]
    for step in range(1, steps + 1):
        for k, gradient in enumerate(numbers(gradients_of(step - 1))):
            w = weights[k]
            first[k] = [
                beta1 * m + (1 - beta1) * g for m, g in zip(first[k], gradient, strict=True)
            ]
            squares = zip(second[k], gradient, strict=True)
            second[k] = [beta2 * v + (1 - beta2) * g * g for v, g in squares]
            update = [
                m / (1 - beta1**step) / (math.sqrt(v / (1 - beta2**step)) + eps) + decays[k] * x
                for m, v, x in zip(first[k], second[k], w, strict=True)
            ]
            ratio = size(w) / size(update) if k in SCALED else 1.0
            weights[k] = [x - RATES[k] * ratio * u for x, u in zip(w, update, strict=True)]
    return weights


@pytest.mark.parametrize("kind", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_adamw_with_scaled_updates_is_lamb(kind):
    params = parameters()
    optimizer = torch.optim.AdamW(groups_of(params), 0.5, betas=(0.9, 0.99), eps=1e-6, **kind)
    found = stepped(optimizer, params, scaled_updates, ratios=lamb)
    assert_close(params, lamb_by_hand(decays=DECAYS), rtol=1e-10)
    ((scaled, ratios),) = found[0]
    assert [params[k] for k in SCALED] == scaled
    assert bool((ratios > 0).all())


def test_the_first_step_has_the_rate_times_the_norm_of_the_weights():
    params = parameters()
    before = parameters()
    optimizer = torch.optim.Adagrad(groups_of(params), lr=0.5)
    stepped(optimizer, params, scaled_updates, ratios=lamb, steps=1)
    for k in SCALED:
        moved, weights = (before[k] - params[k]).detach().norm(), before[k].detach().norm()
        assert float(moved / weights) == pytest.approx(RATES[k], rel=1e-12)


def test_a_rate_that_the_update_itself_overwrites_is_the_one_it_was_made_at():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.0, 2.0])
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([p], lr=rate)
    with scaled_updates(optimizer, {p}, norms=norms, ratios=lamb) as found:
        optimizer.step()
        rate.fill_(100.0)
    assert found[0][1].tolist() == [2.5]  # 0.5 · 5 / 1


def test_weights_after_a_block_that_failed_are_as_it_left_them():
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5)
    expected = parameters()
    stepped(torch.optim.SGD(groups_of(expected), lr=0.5), expected, steps=1)
    for p, gradient in zip(params, gradients_of(0), strict=True):
        p.grad = gradient
    block = scaled_updates(optimizer, set(params), norms=norms, ratios=lamb)
    found = block.__enter__()
    optimizer.step()
    interrupt = KeyboardInterrupt()
    assert not block.__exit__(KeyboardInterrupt, interrupt, None)
    assert found == []
    assert numbers(params) == numbers(expected)


def test_one_bucket_that_fails_leaves_the_other_unscaled():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([first, second], lr=0.5)
    first.grad, second.grad = torch.ones(2), torch.ones(2, dtype=torch.float64)
    calls = itertools.count()

    def fails_late(layers, of_weights, of_updates):
        if next(calls) == 1:
            raise RuntimeError("a rank is gone")
        return 7 * torch.ones_like(of_weights)

    with (
        pytest.raises(RuntimeError, match="a rank is gone"),
        scaled_updates(optimizer, {first, second}, norms=norms, ratios=fails_late),
    ):
        optimizer.step()
    assert numbers([first, second]) == [[0.5, 0.5]] * 2


# -- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [scaled_gradients, scaled_updates])
def test_parameters_of_all_dtypes_keep_them(block):
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64)
    shapes = ((2, 2), (3,), (), (2,))
    params = [nn.Parameter(torch.ones(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer = torch.optim.SGD(params, lr=0.25, weight_decay=2.0)
    with block(optimizer, set(params), norms=norms, ratios=lambda *_: _[1] * 0 + 0.5) as found:
        optimizer.step()
    assert [len(scaled) for scaled, _ in found] == [2, 1, 1]
    for p, dtype in zip(params, dtypes, strict=True):
        assert (p.dtype, p.grad.dtype) == (dtype, dtype)
        assert p.flatten().tolist() == [0.5] * p.numel()  # 1 - 0.25 * 0.5 * (2 + 2 * 1)


@pytest.mark.parametrize("block", [scaled_gradients, scaled_updates])
def test_gradients_in_need_of_a_graph_are_not_recorded(block):
    params = parameters()
    optimizer = torch.optim.SGD(groups_of(params), lr=0.5)
    for p, gradient in zip(params, gradients_of(0), strict=True):
        p.grad = gradient
    with torch.enable_grad(), block(optimizer, set(params), norms=norms, ratios=lars) as found:
        assert torch.is_grad_enabled()
        optimizer.step()
    assert not found[0][1].requires_grad
    assert all(p.is_leaf for p in params)


def test_layers_are_told_by_group():
    one, two = {"lr": 1}, {"lr": 1}
    layers = Layers([torch.zeros(())] * 5, [one, one, two, one, one])
    assert [(id(s), where) for s, where in layers.by_group()] == [
        (id(one), slice(0, 2)),
        (id(two), slice(2, 3)),
        (id(one), slice(3, 5)),
    ]
    assert list(Layers([], []).by_group()) == []
