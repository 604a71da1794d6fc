"""Gradients batch by batch, against gradients that are taken one at a time."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_optkit.bridge.local_gradients import LocalGradients

norm = torch.linalg.vector_norm


def batches_of(count, seed=0):
    return torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(seed)).double()


def net_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def accumulate(net, batches, watch=None):
    for batch in batches:
        if watch is not None:
            watch.next_batch()
        net(batch).square().mean().backward()


def squares_of(net, batches):
    found = []
    for batch in batches:
        gradients = torch.autograd.grad(net(batch).square().mean(), list(net.parameters()))
        found.append(sum(float(g.square().sum()) for g in gradients))
    return found


def test_each_batch_has_its_own_gradient_while_they_accumulate():
    net, watch, batches = net_of(), LocalGradients(norm), batches_of(3)
    for _ in range(2):  # again, on top of what is there
        watch.start(net.parameters())
        accumulate(net, batches, watch)
        assert watch.stop() == pytest.approx(squares_of(net, batches), rel=1e-12)


def test_no_bit_of_the_gradients_changes_and_no_hook_stays():
    without, with_it, watch = net_of(), net_of(), LocalGradients(norm)
    accumulate(without, batches_of(3))
    watch.start(with_it.parameters())
    accumulate(with_it, batches_of(3), watch)
    assert all(p._backward_hooks for p in with_it.parameters())
    watch.stop()
    assert not any(p._backward_hooks for p in with_it.parameters())
    for a, b in zip(without.parameters(), with_it.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.stride() == b.grad.stride()
    watch.start(with_it.parameters())
    watch.close()
    assert not any(p._backward_hooks for p in with_it.parameters())


def test_a_parameter_that_a_batch_does_not_use_has_a_gradient_of_zero():
    used, unused, watch = (
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2)),
        LocalGradients(norm),
    )
    watch.start([used, unused])
    for loss in (lambda: (2 * used).sum() + (3 * unused).sum(), (2 * used).sum):
        watch.next_batch()
        loss().backward()
    watch.next_batch()  # without a backward pass
    found = watch.stop()
    assert found[:2] == pytest.approx([8.0 + 18.0, 8.0], rel=1e-6)
    assert math.isnan(found[2])


def test_a_shared_parameter_is_met_once():
    net, watch, x = net_of(), LocalGradients(norm), batches_of(1)[0]
    watch.start(net.parameters())
    watch.next_batch()
    (net(x) * net(2 * x)).mean().backward()
    gradient = [p.grad for p in net.parameters()]
    expected = sum(float(g.square().sum()) for g in gradient)
    assert watch.stop() == pytest.approx([expected], rel=1e-12)


def test_a_gradient_in_pieces_is_refused():
    net, watch, x = net_of(), LocalGradients(norm), batches_of(1)[0].requires_grad_()
    watch.start(net.parameters())
    watch.next_batch()
    parts = [checkpoint(net, each, use_reentrant=True) for each in (x, 2 * x)]
    sum(part.mean() for part in parts).backward()
    with pytest.raises(
        RuntimeError, match="must come whole, once for each batch, got it in pieces"
    ):
        watch.stop()
    watch.start(net.parameters())  # the next step is its own
    accumulate(net, batches_of(2), watch)
    assert len(watch.stop()) == 2


def test_a_failure_leaves_the_backward_pass_alone():
    def fails(gradient):
        raise KeyError("norm")

    net, watch, expected = net_of(), LocalGradients(fails), net_of()
    accumulate(expected, batches_of(2))
    watch.start(net.parameters())
    accumulate(net, batches_of(2), watch)
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    with pytest.raises(KeyError):
        watch.stop()
    assert not any(p._backward_hooks for p in net.parameters())


def test_numbers_that_are_not_finite_are_kept():
    weight, watch = nn.Parameter(torch.ones(1)), LocalGradients(norm)
    watch.start([weight])
    for factor in (math.inf, math.nan, 2.0):
        watch.next_batch()
        (weight * factor).sum().backward()
    found = watch.stop()
    assert (found[0], found[2]) == (math.inf, 4.0)
    assert math.isnan(found[1])
