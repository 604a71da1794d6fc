"""Batches in halves, and their gradients against gradients taken by hand."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optkit.bridge.batch_parts import num_rows
from lightning_optkit.bridge.half_batches import half_batches, half_gradients


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


ROWS = torch.arange(14.0).reshape(7, 2)
BATCHES = {
    "tensor": ROWS,
    "list": [ROWS, ROWS[:, 0]],
    "dict": {"x": ROWS, "name": "seven", "scale": torch.tensor(2.0), "none": None},
    "nested": {"inputs": (ROWS, {"mask": ROWS > 3}), "y": ROWS[:, 1].long()},
    "dataclass": Pair(ROWS, ROWS + 1),
}


def tensors(batch):
    found = []

    def see(item):
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            [see(each) for each in item.values()]
        elif isinstance(item, (list, tuple)):
            [see(each) for each in item]
        elif isinstance(item, Pair):
            [see(each) for each in (item.x, item.y)]

    see(batch)
    return found


@pytest.mark.parametrize("name", BATCHES)
def test_each_row_is_in_one_half(name):
    batch = BATCHES[name]
    first, second = half_batches(batch)
    assert (num_rows(batch), num_rows(first), num_rows(second)) == (7, 3, 4)
    assert type(first) is type(second) is type(batch)
    for whole, *halves in zip(tensors(batch), tensors(first), tensors(second), strict=True):
        if whole.ndim:
            assert torch.equal(torch.cat(halves), whole)
        else:
            assert all(torch.equal(half, whole) for half in halves)
    if name == "dict":
        assert (first["name"], second["none"]) == ("seven", None)


@pytest.mark.parametrize(
    "batch",
    [ROWS[:1], [ROWS, ROWS[:3]], "text", [], {"scale": torch.tensor(1.0)}, None, object()],
    ids=lambda batch: type(batch).__name__,
)
def test_what_cannot_be_split_is_refused(batch):
    with pytest.raises(MisconfigurationException, match="must share a first dimension of at least"):
        half_batches(batch)
    assert num_rows(batch) in (1, None)


def test_gradients_of_the_halves():
    torch.manual_seed(0)
    net, alone = (
        nn.Linear(2, 3),
        SimpleNamespace(
            world_size=1, strategy=SimpleNamespace(reduce_boolean_decision=lambda value: value)
        ),
    )

    def gradient(half, i):
        assert len(half) == (3, 4)[i]
        return list(torch.autograd.grad(net(half).square().mean(), list(net.parameters())))

    found = half_gradients(alone, ROWS, gradient)
    flat = [
        torch.cat([part.flatten() for part in gradient(half, i)]).double()
        for i, half in enumerate(half_batches(ROWS))
    ]
    assert found.batch_sizes == (3, 4)
    assert found.square_norms == pytest.approx([float(g @ g) for g in flat], rel=1e-6)
    mean = (flat[0] + flat[1]) / 2
    assert found.square_norm_of_mean == pytest.approx(float(mean @ mean), rel=1e-6)


def test_sparse_gradients_of_the_halves():
    table = nn.Embedding(9, 2, sparse=True)
    alone = SimpleNamespace(
        world_size=1, strategy=SimpleNamespace(reduce_boolean_decision=lambda value: value)
    )
    rows = torch.tensor([1, 1, 4, 4, 8])

    def gradient(half, i):
        return list(torch.autograd.grad(table(half).sum(), [table.weight]))

    found = half_gradients(alone, rows, gradient)
    assert found.square_norms == pytest.approx([8.0, 8.0 + 2.0])
    assert found.square_norm_of_mean == pytest.approx((8.0 + 8.0 + 2.0) / 4)


def test_a_rank_that_fails_takes_the_others_with_it():
    said = []
    trainer = SimpleNamespace(
        world_size=2,
        strategy=SimpleNamespace(reduce_boolean_decision=said.append),
    )
    with pytest.raises(MisconfigurationException):
        half_gradients(trainer, ROWS[:1], None)
    assert said == [False]
    with pytest.raises(RuntimeError, match="failed on another rank"):
        half_gradients(trainer, ROWS, None)
    assert said == [False, True]
