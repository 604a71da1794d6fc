"""Sizes, losses and gradient norms of the batches of a step, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_optkit.bridge.step_batches import StepBatches


def trainer_of(accumulated=1, scale=None):
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    return SimpleNamespace(
        accumulate_grad_batches=accumulated,
        precision_plugin=SimpleNamespace(scaler=scaler),
        world_size=1,
    )


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize(("planned", "sizes"), [(3, [4, 4, 4]), (3, [4, 2]), (1, [5])])
def test_a_step_of_accumulated_batches(planned, sizes, scale):
    trainer, batches = trainer_of(planned, scale), StepBatches(torch.linalg.vector_norm)
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(size, 3, generator=generator).double() for size in sizes]
    batches.start([weight])
    for batch in data:
        batches.next_batch({"x": batch, "weight": torch.tensor(1.0)})
        loss = (batch @ weight).mean()
        (loss * (scale or 1.0) / planned).backward()  # as the loop and the scaler do
        batches.after_batch(trainer, {"loss": loss.detach() / planned})
    batches.before_step(trainer)
    found = batches.of_all_ranks(trainer)
    assert found.sizes == tuple(sizes)
    assert found.batch_size == sum(sizes)
    assert found.losses == pytest.approx([float(batch.sum(1).mean()) for batch in data], rel=1e-12)
    assert found.loss == pytest.approx(sum(found.losses) / len(sizes))
    squares = [float(batch.mean(0).square().sum()) for batch in data]
    assert found.square_norms == pytest.approx(squares, rel=1e-12)
    assert found.share == len(sizes) / planned
    mean = weight.grad / (scale or 1.0) / found.share  # the plain mean, from what training has
    expected = sum(batch.mean(0) for batch in data) / len(data)
    torch.testing.assert_close(mean, expected)
    assert not weight._backward_hooks


@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        ({"loss": torch.tensor(2.0), "extra": 1}, 2.0),
        (torch.tensor([2.0]), 2.0),
        ({"loss": torch.ones(2)}, math.nan),
        ({}, math.nan),
        (None, math.nan),
        ({"loss": "high"}, math.nan),
    ],
)
def test_a_loss_is_read_where_there_is_one(outputs, loss):
    batches = StepBatches(torch.linalg.vector_norm)
    batches.start()
    batches.next_batch(torch.ones(3, 1))
    batches.before_step(trainer_of())
    batches.after_batch(trainer_of(), outputs)
    found = batches.of_all_ranks(trainer_of())
    assert found.loss == pytest.approx(loss, nan_ok=True)
    assert math.isnan(found.square_norms[0])  # nobody asked


def test_a_size_that_cannot_be_told_is_not_a_number():
    batches = StepBatches(torch.linalg.vector_norm)
    batches.start()
    batches.next_batch([torch.ones(3), torch.ones(2)])
    batches.after_batch(trainer_of(), None)
    assert math.isnan(batches.of_all_ranks(trainer_of()).batch_size)


def test_a_step_that_begins_anew_forgets():
    trainer, batches = trainer_of(2), StepBatches(torch.linalg.vector_norm)
    weight = nn.Parameter(torch.ones(1))
    for _ in range(2):
        batches.start([weight])
        for _ in range(2):
            batches.next_batch(torch.ones(3))
            (3 * weight).sum().backward()
            batches.after_batch(trainer, None)
        batches.before_step(trainer)
        batches.before_step(trainer)  # once is enough
    found = batches.of_all_ranks(trainer)
    assert found.sizes == (3.0, 3.0)
    assert found.square_norms == (36.0, 36.0)
    batches.start([weight])
    batches.close()
    assert not weight._backward_hooks
