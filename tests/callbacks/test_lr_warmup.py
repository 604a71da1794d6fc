"""LRWarmup in a real Trainer: at which rate each step is made."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import pickle
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from matplotlib.figure import Figure
from torch.optim import lr_scheduler

from lightning_optkit import AccuracyAbove, BatchScaling, ErrorBelow, LRWarmup
from lightning_optkit.methods.warmup import noam_factor, radam_factor
from tests.callbacks.averaging_modules import warned
from tests.callbacks.warmup_modules import (
    BATCHES,
    Adam,
    Manual,
    Net,
    data,
    fit,
    rates_of,
    sgd,
    stream,
    trainer_of,
)
from tests.contracts import MODULES, assert_resumes

ALL = 2 * BATCHES
"""Steps of a run."""


@pytest.fixture(autouse=True)
def _without_ink(monkeypatch):
    """Write empty pictures: `tests/figures/test_schedule.py` draws them."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: path.touch())


def then_ones(*factors, steps=ALL):
    return [*factors, *[1.0] * (steps - len(factors))]


def approx(rates):
    return pytest.approx(rates, rel=1e-14, abs=0)


# -- which factor each step has ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"steps": 5}, then_ones(0.2, 0.4, 0.6, 0.8)),
        ({"steps": 1}, then_ones()),
        ({"steps": 4, "start_factor": 0.5}, then_ones(0.625, 0.75, 0.875)),
        ({"steps": 3, "shape": "constant"}, then_ones(0.1, 0.1, 0.1)),
        ({"steps": 2, "shape": "constant", "start_factor": 0.25}, then_ones(0.25, 0.25)),
        (
            {"steps": 4, "shape": "cosine"},
            then_ones((1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2),
        ),
        (
            {"steps": 3, "shape": "exponential", "start_factor": 0.1},
            [1 - 0.9 * math.exp(-(t + 1) / 3) for t in range(ALL)],
        ),
        (
            {"steps": 4, "shape": "noam", "d_model": 16},
            [noam_factor(t, warmup_steps=4, d_model=16) for t in range(ALL)],
        ),
        ({"epochs": 1}, then_ones(*[k / 8 for k in range(1, 8)])),
        ({"epochs": 0.5}, then_ones(0.25, 0.5, 0.75)),
        ({"epochs": 0.3}, then_ones(1 / 3, 2 / 3)),  # 2.4 steps, rounded up
        ({"epochs": 1e-12}, then_ones()),
        ({"epochs": 1.25}, then_ones(*[k / 10 for k in range(1, 10)])),
        ({"fraction": 0.25}, then_ones(0.25, 0.5, 0.75)),
        ({"fraction": 0.26}, then_ones(0.2, 0.4, 0.6, 0.8)),
        ({"fraction": 0.01}, then_ones()),
        ({"shape": lambda t: 1 / (t + 2)}, [1 / (t + 2) for t in range(ALL)]),
    ],
    ids=map(str, itertools.count()),  # functions have an address in their text
)
def test_each_step_has_its_factor(settings, factors):
    module = Net()
    trainer = fit(module, LRWarmup(**settings))
    assert rates_of(trainer) == approx(factors)
    assert module.found == [[1.0]] * ALL  # no one else sees it
    assert "step" not in vars(trainer.optimizers[0])


@pytest.mark.parametrize("shape", ["untuned", "radam"])
def test_each_group_has_the_factor_of_its_own_memory(shape):
    def adam(module):
        first, second = module.net[0], module.net[2]
        groups = [
            {"params": first.parameters(), "betas": (0.9, 0.75)},  # a length of 8
            {"params": second.parameters(), "lr": 0.5, "betas": (0.9, 0.875)},
        ]
        return Adam(groups, lr=1.0)

    trainer = fit(Net(adam), LRWarmup(shape=shape))
    found = trainer.optimizers[0].seen
    if shape == "untuned":
        assert found == [[min((t + 1) / 8, 1), 0.5 * min((t + 1) / 16, 1)] for t in range(ALL)]
    else:
        expected = [[radam_factor(t, beta2=b) for b in (0.75, 0.875)] for t in range(ALL)]
        assert found == [approx([a, 0.5 * b]) for a, b in expected]


# -- beside whatever changes the rate or the steps ---------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "epochs", "rates"),
    [
        (1, 0.5, [0.25, 0.5, 0.75 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]),
        (2, 1, [0.25, 0.5, 0.75 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]),
        (5, 1.5, [1 / 3, 2 / 3, 1 / 2, 1 / 2]),  # a step after 5 batches, and after 8
        (3, 1, [1 / 3, 2 / 3, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
    ],
)
def test_it_multiplies_the_schedule_by_the_factor_of_optimizer_steps(accumulate, epochs, rates):
    module = Net(scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.5))
    trainer = fit(module, LRWarmup(epochs=epochs), accumulate_grad_batches=accumulate, max_epochs=2)
    assert rates_of(trainer)[: len(rates)] == approx(rates)


class Clean(pl.Callback):
    """Notes the stored rate as a step comes."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


SCHEDULERS = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=40),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # OneCycle, accumulation
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_goes_its_own_way(name):
    options = {"accumulate_grad_batches": 3, "max_epochs": 3}
    standard = [Net(scheduler=SCHEDULERS[name], log=lambda module: {"level": 1.0}) for _ in "ab"]
    without, clean = fit(standard[0], **options), Clean()
    trainer = fit(standard[1], LRWarmup(epochs=2), clean, **options)
    factors = then_ones(*[k / 6 for k in range(1, 6)], steps=9)
    assert clean.rates == rates_of(without)
    expected = [f * rate for f, rate in zip(factors, rates_of(without), strict=True)]
    assert rates_of(trainer) == expected
    assert len(set(rates_of(without))) > 3


def test_accumulation_that_changes_is_followed():
    """Two steps in the first epoch, four in each later one."""
    accumulation = GradientAccumulationScheduler({0: 4, 1: 2})
    trainer = fit(Net(), LRWarmup(epochs=1.5), accumulation, max_epochs=3)
    assert rates_of(trainer) == approx(then_ones(0.25, 0.5, 0.75, steps=10))
    accumulation = GradientAccumulationScheduler({0: 4, 1: 2})
    trainer = fit(Net(), LRWarmup(fraction=0.3), accumulation, max_epochs=3)
    assert rates_of(trainer) == approx(then_ones(1 / 3, 2 / 3, steps=10))


class Overflows(Net):
    """Its gradients overflow in some batches, in which a scaler skips the step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if batch_idx in (0, 3, 4) else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_mixed_precision_skipped_do_not_count(fused):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module = Overflows(lambda m: sgd(m, fused=fused))
    trainer = fit(module, LRWarmup(steps=4), plugins=[precision])
    steps = then_ones(0.25, 0.5, 0.75, steps=10)
    if fused:  # it is called, and skips by itself
        for batch in (0, 3, 4, 8, 11, 12):
            steps.insert(batch, steps[batch])
    assert rates_of(trainer) == approx(steps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_fused_optimizer_with_a_tensor_for_a_rate_warms_up():
    def adam(module):
        lr = torch.tensor(1.0, device=module.net[0].weight.device)
        return Adam(module.parameters(), lr=lr, fused=True)

    trainer = fit(Net(adam), LRWarmup(4), accelerator="gpu", devices=1, precision="bf16-mixed")
    assert rates_of(trainer) == pytest.approx(then_ones(0.25, 0.5, 0.75), rel=1e-6)
    assert trainer.optimizers[0].param_groups[0]["lr"].item() == 1.0


def test_a_fraction_is_rounded_up_but_for_the_rounding_of_its_product(monkeypatch):
    monkeypatch.setattr("lightning_optkit.bridge.warmup_settings.steps_of_run", lambda trainer: 100)
    assert 0.07 * 100 > 7
    for fraction, length in ((0.07, 7), (0.071, 8)):
        assert LRWarmup(fraction=fraction)._settings.lengths(trainer_of(), 2) == [length] * 2


def test_lengths_of_a_limited_run():
    trainer = fit(Net(), LRWarmup(fraction=0.5), max_steps=10)
    assert rates_of(trainer) == approx(then_ones(0.2, 0.4, 0.6, 0.8, steps=10))
    trainer = fit(Net(), LRWarmup(epochs=1), limit_train_batches=3)
    assert rates_of(trainer) == approx(then_ones(1 / 3, 2 / 3, steps=6))
    loaders = {"a": data(), "b": data(batch_size=8)}
    trainer = fit(Net(), LRWarmup(epochs=0.5), loader=loaders)  # until the longest is done
    assert rates_of(trainer) == approx(then_ones(0.25, 0.5, 0.75))
    trainer = fit(Net(), LRWarmup(fraction=0.5), loader=stream(), max_steps=6)
    assert rates_of(trainer) == approx(then_ones(1 / 3, 2 / 3, steps=6))
    trainer = fit(Net(), LRWarmup(steps=3), loader=stream())
    assert rates_of(trainer) == approx(then_ones(1 / 3, 2 / 3))


def test_a_trial_run_has_nothing_to_say():
    for settings in ({"steps": 500}, {"epochs": 5}, {"until": ErrorBelow("error", 0.8)}):
        trainer = fit(Net(), LRWarmup(**settings), fast_dev_run=True)
        assert len(rates_of(trainer)) == 1


# -- manual optimization, several optimizers ---------------------------------------------------


def test_optimizers_warm_up_by_their_own_steps():
    trainer = fit(Manual(), LRWarmup(steps=[6, 4]))
    assert rates_of(trainer, 0) == approx(then_ones(*[k / 6 for k in range(1, 6)], steps=3 * ALL))
    assert rates_of(trainer, 1) == approx(then_ones(0.25, 0.5, 0.75, steps=BATCHES))


@pytest.mark.parametrize("settings", [{"epochs": 0.5}, {"fraction": 0.25}], ids=str)
def test_what_is_not_known_in_steps_is_counted_in_batches(settings):
    trainer = fit(Manual(), LRWarmup(**settings))
    first = [f for f in then_ones(0.25, 0.5, 0.75) for _ in range(3)]
    assert rates_of(trainer, 0) == approx(first)
    assert rates_of(trainer, 1) == approx(then_ones(0.5, steps=BATCHES))  # in each other batch


def test_batches_are_counted_from_where_training_begins():
    callback, module = LRWarmup(epochs=0.5), Manual()
    trainer = trainer_of(callback)
    for epochs in (2, 4):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, data())
        assert rates_of(trainer, 1) == approx(then_ones(0.5, steps=BATCHES))


@pytest.mark.parametrize("optimizers", [1, [1]])
def test_optimizers_that_are_not_named_are_left_alone(optimizers):
    trainer = fit(Manual(), LRWarmup(steps=4, optimizers=optimizers))
    assert rates_of(trainer, 0) == [1.0] * 3 * ALL
    assert rates_of(trainer, 1) == approx(then_ones(0.25, 0.5, 0.75, steps=BATCHES))


def test_two_warm_up_two_optimizers():
    first, second = LRWarmup(2, optimizers=0), LRWarmup(4, shape="constant", optimizers=[1])
    assert first.state_key != second.state_key
    trainer = fit(Manual(), first, second)
    assert rates_of(trainer, 0) == approx(then_ones(0.5, steps=3 * ALL))
    assert rates_of(trainer, 1) == then_ones(*[0.1] * 4, steps=BATCHES)


def test_it_leaves_and_begins_anew():
    callback = LRWarmup(3)
    for _ in range(2):
        trainer = fit(Net(), callback, max_epochs=1)
        assert rates_of(trainer) == approx(then_ones(1 / 3, 2 / 3, steps=BATCHES))
        pickle.dumps(callback)
    trainer, module = trainer_of(callback, max_epochs=1), Net()
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, data())
        assert rates_of(trainer) == approx(then_ones(1 / 3, 2 / 3, steps=BATCHES))


# -- a condition -------------------------------------------------------------------------------


def falling(module):
    """Return an error that is 0.8 in the fifth batch, and below it from the sixth on."""
    return {"train_error": 1.3 - module.num_batches / 10}


def released(after, *, held=0.1, steps=ALL):
    return then_ones(*[held] * after, steps=steps)


def test_a_condition_holds_the_rate_and_releases_it_for_good(caplog):
    module = Net(log=lambda m: {"train_error": 0.7 if m.num_batches == 6 else 0.9})
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer = fit(module, LRWarmup(until=ErrorBelow("train_error", 0.8)))
    assert rates_of(trainer) == released(6)
    assert "LRWarmup of SGD: factor 0.1 until train_error < 0.8" in caplog.text
    assert "LRWarmup: train_error < 0.8 after 6 steps, released." in caplog.text


@pytest.mark.parametrize(
    ("settings", "after"),
    [
        ({"until": ErrorBelow("train_error", 0.8), "start_factor": 0.25}, 6),
        ({"until": AccuracyAbove("train_error", 0.85), "start_factor": 0.5}, 1),
        ({"until": lambda metrics: metrics["train_error"] < 0.75, "start_factor": 0.5}, 6),
    ],
    ids=["error", "accuracy", "function"],
)
def test_any_condition_on_metrics_is_one(settings, after):
    trainer = fit(Net(log=falling), LRWarmup(**settings))
    assert rates_of(trainer) == released(after, held=settings["start_factor"])


class LogsLate(Net):
    """Logs as users do: in `validation_step`, and as an epoch ends."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.1 * self.num_batches)

    def on_train_epoch_end(self):
        self.log("epoch_acc", float(self.trainer.current_epoch))


@pytest.mark.parametrize(
    ("until", "after"),
    [
        (AccuracyAbove("val_acc", 0.35), 4),  # not in the check before training, nor at 2 batches
        (AccuracyAbove("epoch_acc", -1), BATCHES),
        (AccuracyAbove("epoch_acc", 0), 2 * BATCHES),
    ],
    ids=str,
)
def test_metrics_of_validation_and_of_the_epoch_are_seen_before_the_next_step(until, after):
    module, trainer = LogsLate(), trainer_of(LRWarmup(until=until), val_check_interval=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(), data())
    assert rates_of(trainer) == released(after, steps=3 * BATCHES)


def test_a_condition_that_never_holds_is_told():
    with warned(r"never released .*: train_error < -9 did not hold, .* 0\.1 times"):
        trainer = fit(Net(log=falling), LRWarmup(until=ErrorBelow("train_error", -9)))
    assert rates_of(trainer) == [0.1] * ALL


def test_a_metric_that_is_missing_is_told_once():
    callback = LRWarmup(until=ErrorBelow("train_err", 0.8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(log=falling), callback, max_epochs=3)
    texts = [str(w.message) for w in caught if "until" in str(w.message)]
    missing, never = texts
    assert re.search("'train_err' after an epoch that logged .*'train_error'", missing)
    assert "never released" in never
    with warned("logged none"):  # also where there is one epoch
        fit(Net(), LRWarmup(until=ErrorBelow("error", 0.8)), max_epochs=1)


# -- interrupted and resumed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_name", "settings", "options"),
    [
        ("classifier", {"epochs": 2.5, "shape": "cosine"}, {"accumulate_grad_batches": 2}),
        ("autoencoder", {"shape": "radam"}, {"precision": "bf16-mixed"}),
        ("gan", {"steps": [12, 14]}, {}),
        ("gan", {"epochs": 2.5}, {}),
        ("classifier", {"until": ErrorBelow("loss_step", 1.3)}, {}),  # after the sixth step
        ("classifier", {"until": ErrorBelow("loss_step", 1.2)}, {}),  # after the eleventh
    ],
    ids=str,
)
def test_a_run_that_was_interrupted_equals_one_that_was_not(
    module_name, settings, options, tmp_path
):
    callback = assert_resumes(lambda: LRWarmup(**settings), module_name, tmp_path, **options)
    assert callback._warmup.is_over == (settings != {"shape": "radam"})


class Resumable(LogsLate):
    """The same, with steps that matter."""

    def training_step(self, batch, batch_idx):
        return 1e4 * super().training_step(batch, batch_idx)


def test_what_is_logged_as_an_epoch_ends_is_in_the_checkpoint_of_that_moment(tmp_path, monkeypatch):
    """A resumed run does not have the metrics of the epoch before."""
    monkeypatch.setitem(MODULES, "logs late", lambda: (Resumable(), data()))
    monkeypatch.delattr(LogsLate, "validation_step")
    until = AccuracyAbove("epoch_acc", 0.5)  # at the end of the second epoch: there it is cut
    callback = assert_resumes(lambda: LRWarmup(until=until), "logs late", tmp_path)
    assert callback._warmup.is_over


@pytest.mark.parametrize(
    ("before", "after", "length"),
    [
        ({"fraction": 0.5}, {"fraction": 0.5}, 4),  # of the first run
        ({"epochs": 0.5}, {"fraction": 0.5}, 8),  # of what is left of the second
        ({"steps": 4}, {"steps": 10}, 10),
    ],
    ids=str,
)
def test_the_length_of_a_prolonged_run_stays_unless_another_is_asked(
    before, after, length, tmp_path
):
    trainer = fit(Net(), LRWarmup(**before, shape="exponential"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = trainer_of(LRWarmup(**after, shape="exponential"), max_epochs=3)
    trainer.fit(Net(), data(), ckpt_path=tmp_path / "half.ckpt")
    expected = [-math.expm1(-(t + 1) / length) for t in range(BATCHES, 3 * BATCHES)]
    assert rates_of(trainer) == approx(expected)


def test_checkpoints_hold_the_schedule_alone(tmp_path):
    module = Net(scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.5))
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(module, LRWarmup(6), checkpoint, enable_checkpointing=True, max_epochs=1)
    path = tmp_path / "epoch=0-step=3.ckpt"
    stored = torch.load(path, weights_only=True)
    assert stored["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    assert stored["callbacks"]["LRWarmup[]"]["warmup"]["watch"]["num_steps"] == [3]
    for callback in (LRWarmup(6), LRWarmup(6, name="other")):  # the second begins in the midst
        trainer = trainer_of(callback, max_epochs=1)
        with warned("callbacks used to create the checkpoint"):
            trainer.fit(Net(scheduler=module.scheduler), data(), ckpt_path=path)
        begins = 3 if callback.state_key == "LRWarmup[]" else 0
        factors = [min((t + 1) / 6, 1.0) for t in range(begins, begins + 5)]
        halves = [0.5, 0.25, 0.25, 0.125, 0.125]
        assert rates_of(trainer) == approx([f * h for f, h in zip(factors, halves, strict=True)])


# -- what is logged ----------------------------------------------------------------------------


def logged(folder):
    """Return the columns of the log: by name, values by step."""
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value != "":
                found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


def logger_of(folder):
    return CSVLogger(folder, name="csv", version=0)


@pytest.mark.parametrize(
    ("interval", "first"), [("step", True), ("epoch", False)], ids=["monitor first", "monitor last"]
)
def test_the_log_and_the_monitor_say_what_steps_were_made_at(interval, first, tmp_path):
    monitor, callback = LearningRateMonitor(interval), LRWarmup(5)
    module = Net(scheduler=lambda o: lr_scheduler.StepLR(o, 3, 0.5))
    callbacks = [monitor, callback] if first else [callback, monitor]
    trainer = fit(module, *callbacks, logger=logger_of(tmp_path), log_every_n_steps=1)
    rates = dict(enumerate(rates_of(trainer)))
    log = logged(tmp_path)
    assert log["optkit-lr/effective/SGD"] == rates
    assert log["optkit-lr/factor/SGD"] == approx(dict(enumerate(then_ones(0.2, 0.4, 0.6, 0.8))))
    shown = rates if interval == "step" else {0: rates[0], BATCHES: rates[BATCHES]}
    assert log["lr-SGD"] == shown
    assert log["optkit-events/warmup"] == {3: 4.0}  # four steps below the full rate
    assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(monitor))
    assert (tmp_path / "csv" / "version_0" / "optkit-lr-schedule.png").exists()


def test_the_log_of_several_optimizers(tmp_path):
    callbacks = [LRWarmup(4, optimizers=0), LRWarmup(epochs=0.5, optimizers=1, name="critic")]
    fit(Manual(), *callbacks, logger=logger_of(tmp_path), log_every_n_steps=4)
    log = logged(tmp_path)
    assert log["optkit-lr/factor/SGD"] == {3: 1.0, 7: 1.0, 11: 1.0, 15: 1.0}
    assert log["optkit-lr/effective/SGD-1"] == {3: 1.0, 7: 1.0, 11: 1.0, 15: 1.0}
    assert log["optkit-events/warmup_0"] == {0: 3.0}  # in the first batch
    assert log["optkit-events/warmup_critic"] == {2: 1.0}  # in batches; one step was made
    for name in ("0", "critic"):
        assert (tmp_path / "csv" / "version_0" / f"optkit-lr-schedule_{name}.png").exists()


def test_the_log_of_optimizers_that_step_at_other_times(tmp_path):
    """The first has made three steps when the second has yet to make one."""
    trainer = fit(Manual(), LRWarmup([30, 6]), logger=logger_of(tmp_path), log_every_n_steps=1)
    log = logged(tmp_path)
    assert log["optkit-lr/factor/SGD"] == dict(enumerate(rates_of(trainer, 0)[2::3]))
    twice = [rate for rate in rates_of(trainer, 1) for _ in "ab"]  # the last one's stays
    assert log["optkit-lr/factor/SGD-1"] == dict(enumerate(twice[:-1], start=1))
    assert log["optkit-lr/effective/SGD-1"] == log["optkit-lr/factor/SGD-1"]
    assert log["optkit-events/warmup"] == {9: 30.0}  # with the second's fifth


def test_the_log_follows_accumulation_and_groups(tmp_path):
    def adam(module):
        groups = [
            {"params": module.net[layer].parameters(), "betas": (0.9, beta2)}
            for layer, beta2 in ((0, 0.5), (2, 0.75))
        ]
        return Adam(groups, lr=1.0)

    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 2}
    fit(Net(adam), LRWarmup(shape="untuned"), logger=logger_of(tmp_path), **options)
    log = logged(tmp_path)
    assert log["optkit-lr/factor/Adam/pg1"] == {1: 0.5, 3: 1.0, 5: 1.0, 7: 1.0}
    assert log["optkit-lr/factor/Adam/pg2"] == {1: 0.25, 3: 0.5, 5: 0.75, 7: 1.0}
    assert log["optkit-lr/effective/Adam/pg2"] == log["optkit-lr/factor/Adam/pg2"]
    assert log["optkit-events/warmup"] == {6: 7.0}
    text = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert len(text.splitlines()) == 1 + 4 + 1  # each step once, and the event


def test_a_release_is_an_event(tmp_path):
    callback = LRWarmup(until=ErrorBelow("train_error", 0.75))
    fit(Net(log=falling), callback, logger=logger_of(tmp_path), log_every_n_steps=1)
    log = logged(tmp_path)
    assert log["optkit-events/warmup"] == {5: 6.0}
    assert log["optkit-lr/factor/SGD"] == dict(enumerate(released(6)))


@pytest.mark.parametrize(("until", "step"), [("val_acc", 3), ("epoch_acc", 7)])
def test_an_event_is_logged_at_the_step_it_followed(until, step, tmp_path):
    callback = LRWarmup(until=AccuracyAbove(until, 0.3 if until == "val_acc" else -1))
    trainer = trainer_of(callback, logger=logger_of(tmp_path), val_check_interval=4)
    trainer.fit(LogsLate(), data(), data())
    (logged_at,) = logged(tmp_path)["optkit-events/warmup"]
    assert logged_at == step


def test_with_batch_scaling_all_factors_are_in_the_rate_that_is_logged_once(tmp_path):
    scaling = BatchScaling(2, warmup_epochs=0)  # batches of 4
    trainer = fit(Net(), LRWarmup(4), scaling, logger=logger_of(tmp_path), log_every_n_steps=1)
    rates = [2 * f for f in then_ones(0.25, 0.5, 0.75)]
    assert rates_of(trainer) == approx(rates)
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    with path.open() as file:
        found = [row["optkit-lr/effective/SGD"] for row in csv.DictReader(file)]
    assert [float(f) for f in found if f] == approx(rates)


def test_the_hooks_of_the_monitor_are_given_back_after_an_error(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            raise RuntimeError("the machine is gone")

    monitor, module = LearningRateMonitor(), Net()
    trainer = trainer_of(LRWarmup(5), monitor, Fails(), logger=logger_of(tmp_path))
    with pytest.raises(RuntimeError, match="the machine is gone"):
        trainer.fit(module, data())
    assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(monitor))
    assert "step" not in vars(trainer.optimizers[0])


# -- the plan ----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Return what is handed to the figure."""
    from lightning_optkit.figures import schedule

    real, calls = schedule.schedule_figure, []

    def notes(used, scheduled=None, **options):
        calls.append((used, scheduled, options))
        return real(used, scheduled, **options)

    monkeypatch.setattr(schedule, "schedule_figure", notes)
    return calls


def test_the_picture_shows_what_the_run_does(drawn, tmp_path, caplog):
    module = Net(scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, ALL))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer = fit(module, LRWarmup(epochs=0.5), logger=logger_of(tmp_path))
    ((used, scheduled, options),) = drawn
    assert list(used["SGD"]) == rates_of(trainer)
    assert list(scheduled["SGD"]) == [rates[0] for rates in module.found]
    assert options == {
        "title": "LRWarmup of SGD: linear from factor 0 over 4 steps",
        "end": 3,
        "unit": "optimizer step",
    }
    assert options["title"] in caplog.text


@pytest.mark.parametrize(
    ("module", "settings", "lengths", "words"),
    [
        (lambda: Net(scheduler=SCHEDULERS["plateau"]), {"steps": 4}, {"SGD": ALL}, "a metric"),
        (lambda: Manual(schedulers=True), {"epochs": 1}, {"SGD": ALL, "SGD-1": ALL}, "8 batches"),
        (
            lambda: Manual(schedulers=True),
            {"steps": [4, 6]},
            {"SGD": 1000, "SGD-1": 1000},
            "manual",
        ),
    ],
    ids=["plateau", "batches", "manual"],
)
def test_where_the_schedule_is_not_known_the_picture_shows_the_factor(
    module, settings, lengths, words, drawn, tmp_path, caplog
):
    net = module()
    net.to_log = lambda module: {"level": 1.0}
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(net, LRWarmup(**settings), logger=logger_of(tmp_path), max_epochs=2)
    ((used, scheduled, _),) = drawn
    assert scheduled is None
    assert {name: len(factors) for name, factors in used.items()} == lengths
    assert list(used["SGD"][:2]) == [0.25, 0.5] or settings == {"epochs": 1}
    assert words in caplog.text


def test_a_picture_is_drawn_as_a_run_begins_and_of_no_more_than_can_be_seen(drawn, tmp_path):
    def saved(callback, name, ckpt_path=None, **options):
        trainer = trainer_of(callback, logger=logger_of(tmp_path / name), **options)
        trainer.fit(Net(), data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / name / "whole.ckpt")

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    def curved():
        return LRWarmup(3_000, shape="exponential")

    saved(curved(), "first", max_epochs=1)
    saved(curved(), "resumed", tmp_path / "first" / "whole.ckpt")  # it has one
    for name, options in (("trial", {"fast_dev_run": True}), ("long", {"max_epochs": 99_999})):
        fit(Net(), curved(), Stops(), logger=logger_of(tmp_path / name), **options)
    assert [len(used["SGD"]) for used, _, _ in drawn] == [BATCHES, 10_000]


def test_a_picture_that_fails_is_one_warning(monkeypatch, tmp_path):
    from lightning_optkit.figures import schedule

    def fails(*args, **kwargs):
        raise RuntimeError("no ink")

    monkeypatch.setattr(schedule, "schedule_figure", fails)
    with warned("could not draw its schedule: RuntimeError.'no ink'"):
        trainer = fit(Net(), LRWarmup(2), logger=logger_of(tmp_path))
    assert rates_of(trainer) == approx(then_ones(0.5))


@pytest.mark.parametrize(
    ("settings", "options", "text"),
    [
        ({"steps": 18}, {}, "run of 16 steps, got .* full rate after 17"),
        ({"epochs": 2.2}, {"accumulate_grad_batches": 4}, "run of 4 steps, got .* after 4"),
        ({"steps": 16, "shape": "constant"}, {}, "run of 16 steps, got .* after 16"),
    ],
    ids=str,
)
def test_a_warmup_that_is_longer_than_the_run_is_told(settings, options, text):
    with warned(text):
        fit(Net(), LRWarmup(**settings), **options)


def test_a_warmup_as_long_as_the_run_is_none_of_that():
    trainer = fit(Net(), LRWarmup(16))
    assert rates_of(trainer) == approx([(t + 1) / 16 for t in range(16)])
    fit(Manual(), LRWarmup(40))  # of 48 steps in 16 batches


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "Exactly one of `steps`, `epochs`, `fraction` and `until` must be given, got none"),
        ({"steps": 5, "epochs": 1}, "got steps=5, epochs=1"),
        ({"fraction": 0.1, "until": max}, "Exactly one"),
        ({"shape": "noam", "d_model": 8}, "Exactly one"),
        ({"shape": "untuned", "steps": 5}, "No length .*'untuned', got steps=5: β₂"),
        ({"shape": "radam", "until": max}, "No length"),
        ({"shape": abs, "epochs": 5}, "No length .*the function says"),
        ({"steps": 5, "shape": "square"}, "`shape` must be one of 'linear'.* got 'square'"),
        ({"steps": 5, "shape": ""}, "`shape` must be one of"),
        ({"steps": 5, "shape": True}, "`shape` must be one of"),
        ({"until": max, "shape": "linear"}, "`shape` must be 'constant' with `until`"),
        ({"steps": 0}, "`steps` must be an integer of at least 1"),
        ({"steps": 2.5}, "`steps` must be"),
        ({"steps": True}, "`steps` must be"),
        ({"steps": "500"}, "`steps` must be"),
        ({"steps": []}, "`steps` must be"),
        ({"steps": [5, 0]}, "`steps` must be"),
        ({"epochs": 0}, "`epochs` must be a positive number"),
        ({"epochs": True}, "`epochs` must be"),
        ({"epochs": math.nan}, "`epochs` must be"),
        ({"epochs": math.inf}, "`epochs` must be"),
        ({"fraction": 0}, r"`fraction` must be in \(0, 1\]"),
        ({"fraction": 1.1}, "`fraction` must be"),
        ({"fraction": "0.1"}, "`fraction` must be"),
        ({"until": "train_error"}, "`until` must be a condition"),
        ({"steps": 5, "start_factor": 1.0}, r"`start_factor` must be in \[0, 1\)"),
        ({"steps": 5, "start_factor": -0.1}, "`start_factor` must be"),
        ({"steps": 5, "start_factor": True}, "`start_factor` must be"),
        ({"steps": 5, "start_factor": 0, "shape": "constant"}, "nothing would be trained"),
        ({"until": max, "start_factor": 0.0}, "nothing would be trained, and the condition"),
        ({"shape": "untuned", "start_factor": 0.1}, "`start_factor` must be left out"),
        ({"shape": abs, "start_factor": 0.1}, "`start_factor` must be left out"),
        ({"shape": "noam", "steps": 5, "d_model": 8, "start_factor": 0.1}, "left out"),
        ({"shape": "noam", "steps": 5}, "`d_model` must be given with shape='noam'"),
        ({"steps": 5, "d_model": 512}, "`d_model` must be given with shape='noam'"),
        ({"shape": "noam", "steps": 5, "d_model": 0}, "`d_model` must be an integer"),
        ({"steps": 5, "optimizers": -1}, "`optimizers` must be an index"),
        ({"steps": 5, "optimizers": []}, "`optimizers` must be"),
        ({"steps": 5, "optimizers": [0, 0]}, "`optimizers` must be"),
        ({"steps": 5, "optimizers": True}, "`optimizers` must be"),
        ({"steps": 5, "optimizers": "0"}, "`optimizers` must be"),
        ({"steps": 5, "name": "The critic"}, "`name` must be snake_case"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(settings, text):
    error = TypeError if text.startswith("`until`") else ValueError
    with pytest.raises(error, match=text):
        LRWarmup(**settings)


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "text"),
    [
        (Net, [{"epochs": 1}], {"loader": stream()}, "`epochs` must not be given here, got 1"),
        (Net, [{"fraction": 0.1}], {"loader": stream()}, "`fraction` must not be given here"),
        (Net, [{"fraction": 0.1}], {"max_epochs": -1}, "no end that is known. Write `steps="),
        (Manual, [{"fraction": 0.1}], {"max_epochs": -1, "max_steps": 5}, "no end that is known"),
        (Net, [{"shape": "untuned"}], {}, "an optimizer with `betas`, such as Adam, got .*SGD"),
        (Net, [{"steps": 5, "optimizers": 1}], {}, "`optimizers` must be indices below 1"),
        (Net, [{"steps": [5, 5]}], {}, "`steps` must be one number or one for each of the 1"),
        (Manual, [{"steps": [5]}], {}, "one for each of the 2 optimizers that are warmed up"),
        (
            Manual,
            [{"steps": 5}, {"steps": 2, "optimizers": 1}],
            {},
            "Optimizer 1 must have one warmup of its learning rate, got two",
        ),
    ],
    ids=range(9),
)
def test_what_cannot_be_is_refused_before_the_first_step(module, callbacks, options, text):
    net = module()
    with pytest.raises(MisconfigurationException, match=text):
        fit(net, *[LRWarmup(**settings) for settings in callbacks], **options)
    assert all("step" not in vars(o) for o in net.trainer.optimizers)
    assert all(optimizer.seen == [] for optimizer in net.trainer.optimizers)


def test_two_warmups_of_one_rate_are_refused():
    with pytest.raises(MisconfigurationException, match=r"one warmup .*Leave out `LRWarmup`"):
        fit(Net(), LRWarmup(5), BatchScaling(1, warmup_epochs=1))


def test_a_memory_that_is_too_short_for_radam_is_refused():
    module = Net(lambda m: Adam(m.parameters(), betas=(0.9, 0.5)))
    with pytest.raises(ValueError, match=r"`beta2` must be above 0\.6"):
        fit(module, LRWarmup(shape="radam"))


@pytest.mark.parametrize("returned", [None, -1.0, math.nan, math.inf, "1", True])
def test_a_function_must_return_a_factor(returned):
    module = Net()
    with pytest.raises(ValueError, match="`shape` must return a number of at least 0, got"):
        fit(module, LRWarmup(shape=lambda step: returned))
    assert module.num_batches == 0
    with pytest.raises(ValueError, match="at step 3"):
        fit(module, LRWarmup(shape=lambda step: returned if step == 3 else 1.0))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 1.0
