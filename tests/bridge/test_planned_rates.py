"""The schedule that was foreseen, against a run that follows it."""

import copy
import random
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import lr_scheduler

from lightning_optkit.bridge.planned_rates import UnknownScheduleError, planned_rates
from lightning_optkit.bridge.run_length import steps_of_run
from tests.callbacks.warmup_modules import SGD, Manual, Net, data, fit, stream, trainer_of
from tests.contracts import assert_same, rng_state


class Foresees(pl.Callback):
    """Notes the rates that are foreseen, and whether that left a trace."""

    def __init__(self, num_steps=None):
        self.num_steps = num_steps
        self.unknown = None

    def on_train_start(self, trainer, pl_module):
        before = self.traces(trainer)
        try:
            self.rates = planned_rates(trainer, self.num_steps or steps_of_run(trainer))
        except UnknownScheduleError as error:
            self.unknown = str(error)
        assert_same(before, self.traces(trainer))

    def traces(self, trainer):
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        return {
            "schedulers": [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers],
            "optimizers": [copy.deepcopy(o.state_dict()) for o in trainer.optimizers],
            "attributes": [sorted(vars(each)) for each in [*schedulers, *trainer.optimizers]],
            "rng": rng_state(),
        }


def foreseen_and_made(module, *callbacks, **options):
    """Return the rates foreseen, and those of the run: one list a group each."""
    foresees = Foresees()
    trainer = fit(module, foresees, *callbacks, max_epochs=3, **options)
    assert foresees.unknown is None
    (foreseen,) = foresees.rates
    made = [list(group) for group in zip(*trainer.optimizers[0].seen, strict=True)]
    return [list(group) for group in foreseen], made


def two_groups(module):
    first, second = module.net[0], module.net[2]
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.03}]
    return SGD(groups, lr=0.1, momentum=0.9)


def of_tensors(module):
    return torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1))


class WithWeights:
    """A rate that holds on to the module, as bound methods of it do."""

    def __init__(self, optimizer):
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]

    def __deepcopy__(self, memo):
        raise AssertionError("parameters were copied")

    def __call__(self, step):
        return 1 / (1 + step)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.8),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=25),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "random": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 + 0 * random.random()),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_follows_the_schedule_that_was_foreseen(name):
    foreseen, made = foreseen_and_made(Net(two_groups, SCHEDULERS[name]))
    assert foreseen == made
    assert len(made[0]) == 24


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # of Lightning's own
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"max_steps": 13}], ids=str
)
def test_schedulers_are_stepped_as_lightning_does(interval, options):
    foreseen, made = foreseen_and_made(
        Net(two_groups, SCHEDULERS["exponential"], interval), **options
    )
    assert foreseen == made
    epochs = 2 if "max_steps" in options else 3
    assert len(set(made[0])) == (len(made[0]) if interval == "step" else epochs)


class Often(Net):
    """Two schedulers of one optimizer, of other frequencies."""

    def configure_optimizers(self):
        optimizer = two_groups(self)
        every_third = {
            "scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9),
            "interval": "step",
            "frequency": 3,
        }
        every_other = {"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5), "frequency": 2}
        return [optimizer], [every_third, every_other]


@pytest.mark.parametrize("accumulated", [None, {0: 2, 1: 4, 2: 1}])
def test_frequencies_and_accumulation_that_changes_are_followed(accumulated):
    callbacks = [] if accumulated is None else [GradientAccumulationScheduler(accumulated)]
    foreseen, made = foreseen_and_made(Often(), *callbacks)
    assert foreseen == made
    assert len(set(made[0])) > 3


def test_a_run_that_is_prolonged_is_foreseen_from_where_it_is():
    foresees, module = Foresees(), Often()
    trainer = trainer_of(foresees, max_epochs=1)
    for epochs in (1, 4):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, data())
        made = [rates[0] for rates in trainer.optimizers[0].seen]
        assert list(foresees.rates[0][0]) == made
    assert len(made) == 24


def test_tensors_are_followed_and_stay():
    class Notes(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.lr, self.rates = trainer.optimizers[0].param_groups[0]["lr"], []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert optimizer.param_groups[0]["lr"] is self.lr
            self.rates.append(float(self.lr))

    foresees, notes = Foresees(), Notes()
    fit(Net(of_tensors, SCHEDULERS["exponential"]), foresees, notes)
    assert list(foresees.rates[0][0]) == notes.rates


def test_without_a_scheduler_the_rate_is_constant():
    foreseen, made = foreseen_and_made(Net(two_groups))
    assert foreseen == made == [[0.1] * 24, [0.03] * 24]
    foresees = Foresees(5)
    fit(Manual(), foresees)
    assert [list(group) for optimizer in foresees.rates for group in optimizer] == [[1.0] * 5] * 2


def test_a_part_of_the_run_is_enough():
    foresees = Foresees(4)
    fit(Net(scheduler=SCHEDULERS["one_cycle"]), foresees)
    assert foresees.rates[0][0].shape == (4,)


def test_data_without_a_length_are_followed_step_by_step():
    foresees = Foresees(8)
    trainer = fit(Net(two_groups, SCHEDULERS["exponential"]), foresees, loader=stream())
    assert list(foresees.rates[0][0]) == [rates[0] for rates in trainer.optimizers[0].seen[:8]]


def test_neither_module_nor_parameters_are_copied():
    """A bound method of the module is a scheduler's usual function."""

    class Own(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the module was copied")

        def rate(self, step):
            return 1 / (1 + step)

        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=1.0)
            return [optimizer], [lr_scheduler.LambdaLR(optimizer, self.rate)]

    foreseen, made = foreseen_and_made(Own())
    assert foreseen == made


class OwnSchedulerStep(Net):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


class OwnOptimizerStep(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (
            lambda: Net(
                scheduler=lr_scheduler.ReduceLROnPlateau, log=lambda module: {"level": 1.0}
            ),
            {},
            "waits for a metric",
        ),
        (lambda: Manual(schedulers=True), {}, "manual optimization"),
        (lambda: OwnSchedulerStep(scheduler=SCHEDULERS["step"]), {}, "`lr_scheduler_step`"),
        (OwnOptimizerStep, {}, "`optimizer_step`"),
        (
            lambda: Net(scheduler=lambda o: lr_scheduler.LambdaLR(o, WithWeights(o))),
            {},
            "LambdaLR cannot be copied .*parameters were copied",
        ),
        (
            lambda: Net(scheduler=SCHEDULERS["step"], interval="epoch"),
            {"loader": stream()},
            "counts epochs",
        ),
    ],
    ids=["plateau", "manual", "lr_scheduler_step", "optimizer_step", "copy", "stream"],
)
def test_what_cannot_be_known_is_said(module, options, reason):
    foresees = Foresees(3)
    fit(module(), foresees, **options)
    assert re.search(reason, foresees.unknown)
