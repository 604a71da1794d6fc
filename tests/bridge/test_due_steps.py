"""Which steps are due, asked before each batch of a Trainer, and of stand-ins for one."""

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.bridge.due_steps import DueSteps, begins_step


class Asks(pl.Callback):
    """Notes the batches that are the first of a due step."""

    def __init__(self, **options):
        self.due = DueSteps(**options)
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.due.before_batch(trainer, batch_idx):
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.seen.append((step, trainer.current_epoch, batch_idx))
            with self.due.measuring(step):
                pass


class Boring(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_run_with_accumulation():
    asks = Asks(every_n_steps=3)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=2,
        callbacks=[asks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(Boring(), DataLoader(torch.ones(5, 1), batch_size=1))
    # three steps an epoch, of the batches 0 and 1, 2 and 3, 4
    assert asks.seen == [(0, 0, 0), (2, 0, 4), (5, 1, 4), (7, 2, 2), (8, 2, 4)]


def trainer_at(step, *, epoch=0, **settings):
    defaults = {
        "max_steps": -1,
        "max_epochs": 10,
        "global_step": step,
        "optimizers": [None],
        "accumulate_grad_batches": 1,
        "num_training_batches": 100,
        "current_epoch": epoch,
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=step)),
        "strategy": SimpleNamespace(broadcast=lambda value: value),
    }
    return SimpleNamespace(**defaults | settings)


def measured_once(**options):
    due = DueSteps(**{"every_n_steps": 50} | options)
    with due.measuring(0):
        pass
    return due


def test_the_first_step_of_a_run_is_due_until_it_is_measured():
    due = DueSteps(every_n_steps=50)
    assert due.before_batch(trainer_at(0), 0)
    assert due.before_batch(trainer_at(7), 7)
    with due.measuring(7):
        pass
    assert not due.before_batch(trainer_at(8), 8)
    assert due.before_batch(trainer_at(49), 49)
    resumed = DueSteps(every_n_steps=50)
    resumed.load_state_dict(due.state_dict())
    assert not resumed.before_batch(trainer_at(8), 8)
    due.forget()
    assert due.before_batch(trainer_at(8), 8)


def test_a_step_begins_with_its_first_batch():
    due, trainer = measured_once(every_n_steps=1), trainer_at(3, accumulate_grad_batches=4)
    assert [due.before_batch(trainer, i) for i in range(12, 17)] == [True, *[False] * 3, True]
    assert [begins_step(trainer, i) for i in range(4)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("num_batches", "accumulated", "at_end"),
    [(100, 1, 98), (10, 3, 6), (9, 3, 3), (7, 3, 3), (2, 1, 0), (1, 1, 0), (3, 4, 0)],
)
def test_the_step_at_the_end_is_the_last_of_a_whole_batch(num_batches, accumulated, at_end):
    due = measured_once()
    settings = {"num_training_batches": num_batches, "accumulate_grad_batches": accumulated}
    found = [
        i for i in range(num_batches) if due.before_batch(trainer_at(1, epoch=9, **settings), i)
    ]
    assert found == [at_end]
    others = [trainer_at(1, epoch=epoch, **settings) for epoch in (0, 8)]
    assert not any(due.before_batch(each, i) for each in others for i in range(num_batches))


def test_there_is_a_step_at_the_end_only_where_it_is_known():
    due = measured_once()
    endless = {"num_training_batches": math.inf, "epoch": 9}
    assert not due.before_batch(trainer_at(3, **endless), 3)
    assert not due.before_batch(trainer_at(3, max_epochs=-1, epoch=-2), 3)
    assert due.before_batch(trainer_at(6, max_steps=7, **endless), 3)
    assert not due.before_batch(trainer_at(5, max_steps=7, **endless), 3)
    two = {"optimizers": [None, None], "max_steps": 8}  # 8 steps, in 4 batches
    assert not due.before_batch(trainer_at(4, **two), 2)
    assert due.before_batch(trainer_at(6, **two), 3)


def test_a_step_that_costs_too_much_is_passed_over_unless_it_is_first_or_at_the_end():
    due = measured_once(max_overhead=0.05)
    due.start()
    due._spent = 1e9
    assert not due.before_batch(trainer_at(49), 49)
    assert due.num_passed_over == 1
    assert due.before_batch(trainer_at(1, epoch=9), 98)
    due.forget()
    assert due.num_passed_over == 0
    assert due.before_batch(trainer_at(1), 1)
    assert due.overhead == 0


@pytest.mark.parametrize("period", [0, -1, 1.5, True, None])
def test_what_is_no_period_is_refused(period):
    with pytest.raises(ValueError, match="`every_n_steps` must be an integer of at least 1"):
        DueSteps(every_n_steps=period)
