"""A module's loss as a function of its parameters, against ``torch.func.functional_call``."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import (
    HessianOperator,
    LossSurface,
    ModuleLoss,
    loss_line,
    loss_plane,
)
from lightning_optkit.measures.landscape import plane_passes
from lightning_optkit.measures.module_loss import tensors_replaced


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.again(torch.tanh(self.norm(self.first(x))))


class Recurrent(nn.Module):
    """Which keeps its weights in a list of its own."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, -1]


def problem(make):
    torch.manual_seed(0)
    net = make().double().eval()
    x, y = torch.randn(8, 4).double(), torch.randint(4, (8,))
    moved = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in net.named_parameters()}
    loss = ModuleLoss(net, lambda net: cross_entropy(net(x), y))
    return net, loss, moved, lambda p: cross_entropy(functional_call(net, p, (x,)), y)


@pytest.mark.parametrize("make", [Tied, Recurrent])
def test_loss_and_gradient_are_those_of_functional_call(make):
    net, loss, moved, truth = problem(make)
    before = dict(net.named_parameters())
    leaves = [{n: p.clone().requires_grad_() for n, p in moved.items()} for _ in range(2)]
    losses = loss(leaves[0]), truth(leaves[1])
    assert torch.equal(*losses)
    assert loss(moved) != loss({})
    for value in losses:
        value.backward()
    for name in moved:
        assert torch.equal(leaves[0][name].grad, leaves[1][name].grad)
    assert all(p is before[n] and p.grad is None for n, p in net.named_parameters())


def test_second_derivatives_and_a_line_are_those_of_functional_call():
    _, loss, moved, truth = problem(Tied)
    ours, theirs = (HessianOperator(f, moved) for f in (loss, truth))
    assert torch.equal(ours.dense(), theirs.dense())
    direction = torch.randn(ours.num_parameters, generator=torch.Generator().manual_seed(1))
    lines = [loss_line(s, direction.double(), torch.linspace(-1, 1, 5)) for s in (ours, theirs)]
    assert torch.equal(lines[0].losses, lines[1].losses)


def test_some_parameters_and_buffers_are_enough():
    net, loss, moved, truth = problem(Tied)
    some = {"norm.running_mean": torch.ones(4).double(), "first.weight": moved["first.weight"]}
    assert torch.equal(loss(some), truth(some))
    assert torch.equal(net.norm.running_mean, torch.zeros(4).double())


def test_the_module_is_as_it_was_also_after_an_error():
    net, loss, moved, _ = problem(Tied)
    before = dict(net.named_parameters())
    with pytest.raises(ValueError, match=r"must have names of .* got \['second.weight'\]"):
        loss({"second.weight": moved["first.weight"]})
    with pytest.raises(RuntimeError), tensors_replaced(net, moved):
        net(torch.ones(8, 5).double())
    assert all(p is before[name] for name, p in net.named_parameters())
    assert net.again.weight is net.first.weight


def test_a_held_module_is_prepared_once_for_all_batches():
    net, _, moved, _ = problem(Tied)
    weights = []

    def of(x):
        def loss(net):
            weights.append(net.first.weight)
            return net(x).square().mean()

        return ModuleLoss(net, loss)

    batches = [torch.randn(8, 4).double() for _ in range(2)]
    surface = LossSurface([of(x) for x in batches], moved, weights=[1, 3])
    way = torch.ones(surface.num_parameters, dtype=torch.float64)
    with surface.along() as losses:
        found = losses(way, [0.0, 0.1])
    assert len({id(weight) for weight in weights}) == 1
    there = {name: p + 0.1 for name, p in moved.items()}
    truth = [(1 * of(batches[0])(p) + 3 * of(batches[1])(p)) / 4 for p in (moved, there)]
    torch.testing.assert_close(found, torch.stack(truth).detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda net, x: (setattr(net.first.weight, "data", net.first.weight.data * 1.0), net(x))[1],
        lambda net, x: net(x) + sum(p.sum() for p in net.parameters() if p.requires_grad),
        lambda net, x: torch.autograd.grad(
            net(x).square().sum(), net.first.weight, create_graph=True
        )[0],
    ],
    ids=["gives its weights new data", "asks which are trained", "differentiates"],
)  # fmt: skip
def test_losses_along_a_line_are_those_of_single_calls(loss):
    net, _, moved, _ = problem(Tied)
    net.again.bias.requires_grad_(False)
    x = torch.randn(8, 4).double()
    batches = [ModuleLoss(net, lambda net, s=s: loss(net, s * x).square().mean()) for s in (1, 2)]
    surface = LossSurface(batches, {n: p for n, p in moved.items() if n != "again.bias"})
    way = torch.ones(surface.num_parameters, dtype=torch.float64)
    positions = torch.linspace(-1, 1, 5)
    truth = torch.stack([surface.loss(t * way) for t in positions])
    torch.testing.assert_close(loss_line(surface, way, positions).losses, truth, rtol=1e-12, atol=0)
    assert len(set(truth.tolist())) == 5


def test_directions_of_another_shape_and_planes_of_another_grid_are_refused():
    _, loss, moved, _ = problem(Tied)
    surface = LossSurface(loss, moved)
    with pytest.raises(ValueError, match=r"`direction` must have the shape \(32,\)"):
        loss_line(surface, torch.ones(1), torch.ones(2))
    way = torch.ones(2, surface.num_parameters, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`directions` must have the shape \(2, 32\)"):
        loss_plane(surface, way[:1])
    known = loss_plane(surface, way, resolution=3)
    with pytest.raises(ValueError, match="`known` must be a plane of the same `resolution`"):
        next(plane_passes(surface, way, resolution=3, span=5.0, known=known))
