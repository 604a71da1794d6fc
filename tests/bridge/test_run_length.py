"""The steps that are to come, against a run that makes them."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_optkit.bridge.run_length import steps_of_next_epochs, steps_of_run
from tests.callbacks.warmup_modules import BATCHES, Manual, Net, data, fit, stream, trainer_of


class Foresees(pl.Callback):
    """Notes how many steps are to come as training starts."""

    def on_train_start(self, trainer, pl_module):
        self.run = steps_of_run(trainer)
        self.next_epoch = steps_of_next_epochs(trainer, 1)
        self.next_quarter = steps_of_next_epochs(trainer, 0.25)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"accumulate_grad_batches": 3, "limit_train_batches": 0.5},
        {"limit_train_batches": 5, "accumulate_grad_batches": 2},
        {"max_steps": 11},
        {"max_epochs": -1, "max_steps": 11, "accumulate_grad_batches": 3},
        {"max_steps": 99},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
    ],
    ids=str,
)
def test_a_run_makes_the_steps_that_were_foreseen(options):
    foresees = Foresees()
    trainer = fit(Net(), foresees, **options)
    assert foresees.run == trainer.global_step > 0


def test_accumulation_that_changes_is_followed():
    foresees = Foresees()
    trainer = fit(Net(), foresees, GradientAccumulationScheduler({0: 4, 1: 3}), max_epochs=3)
    assert foresees.run == trainer.global_step == 2 + 3 + 3
    assert (foresees.next_epoch, foresees.next_quarter) == (2, 1)


def test_a_run_that_is_prolonged_is_counted_from_where_it_is():
    foresees, module = Foresees(), Net()
    trainer = trainer_of(foresees, GradientAccumulationScheduler({0: 4, 1: 1}))
    trainer.fit(module, data())
    assert foresees.run == 2 + BATCHES
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, data())
    assert foresees.run == trainer.global_step - (2 + BATCHES) == 3 * BATCHES
    assert (foresees.next_epoch, foresees.next_quarter) == (8, 2)
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, 40
    trainer.fit(module, data())
    assert foresees.run == 40 - (2 + 4 * BATCHES)
    assert trainer.global_step == 40


def test_in_manual_optimization_batches_are_counted():
    foresees = Foresees()
    fit(Manual(), foresees)
    assert foresees.run == 2 * BATCHES
    fit(Manual(), foresees, max_epochs=-1, max_steps=5)  # of all optimizers
    assert foresees.run is None


def test_a_run_without_an_end_has_none():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    foresees = Foresees()
    for loader, options, run in (
        (data(), {"max_epochs": -1}, None),
        (stream(), {}, None),
        (stream(), {"max_steps": 7}, 7),
        (stream(), {"limit_train_batches": 3}, 6),
    ):
        fit(Net(), foresees, Stops(), loader=loader, **options)
        assert foresees.run == run
    fit(Net(), foresees, loader=stream())
    assert foresees.next_epoch is None
