"""BatchScaling in a real Trainer, step by step against the rates written down."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_optkit import BatchScaling
from lightning_optkit.bridge.optimizer_steps import RateInStep
from tests.bridge.test_momentum_correction import Folds
from tests.contracts import assert_resumes, assert_same

BATCH, BATCHES = 4, 8


class Seen(torch.optim.SGD):
    """Notes the rates that it updates with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.seen.append([float(group["lr"]) for group in self.param_groups])
        super().step()
        return loss


def seen(module):
    groups = [{"params": module.net[0].parameters()}]
    groups.append({"params": module.net[2].parameters(), "lr": 0.03})
    return Seen(groups, lr=0.1, momentum=0.9)


class Net(pl.LightningModule):
    """A small net whose optimizer and scheduler are given."""

    def __init__(self, optimizer=seen, scheduler=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(3)
        for p in self.parameters():
            p.data = torch.rand(p.shape, generator=generator) - 0.5
        self.optimizer = optimizer
        self.scheduler = scheduler

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self)
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Two(Net):
    """Manual optimization with two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [Seen(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


def data(batch_size=BATCH, num_samples=BATCH * BATCHES):
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(num_samples, n, generator=generator) for n in (3, 1))
    return DataLoader(TensorDataset(x, y), batch_size)


def trainer_of(*callbacks, **options):
    defaults = {"max_epochs": 3, "logger": False, "accelerator": "cpu"}
    off = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults |= dict.fromkeys(off, False)
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(module, *callbacks, loader=None, ckpt_path=None, **options):
    """Train for three epochs of 8 batches of 4; return the Trainer."""
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def rates(trainer, optimizer=0):
    return trainer.optimizers[optimizer].seen


def growing(factors, num_steps):
    """Return what each step is multiplied by, given the factor that its batch asks for."""
    return [
        1 + (s - 1) * (t + 1) / num_steps if s > 1 and t < num_steps else s
        for t, s in enumerate(factors)
    ]


def times(factors, plain):
    """Return rates of a run without, each step multiplied by its factor."""
    return [
        pytest.approx([f * lr for lr in lrs], rel=1e-14)
        for f, lrs in zip(factors, plain, strict=True)
    ]


def lines(caplog):
    found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("BatchScaling")]
    caplog.clear()
    return found


@pytest.fixture(autouse=True)
def _informed(caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")


class Stores(pl.Callback):
    """Notes the rates that everyone else finds."""

    def __init__(self):
        self.stored = []

    def on_train_batch_end(self, trainer, *_):
        self.stored.append([float(g["lr"]) for g in trainer.optimizers[0].param_groups])

    on_train_batch_start = on_before_optimizer_step = on_train_batch_end


# -- rates ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "none": None,
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=40),
}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # OneCycle, accumulation
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("accumulate", "rule", "num_steps"),
    [(1, "linear", 12), (2, "linear", 6), (5, "sqrt", 3), (1, "none", 0)],
)
def test_every_step_is_made_at_the_factor_times_the_scheduled_rate(
    accumulate, rule, num_steps, scheduler
):
    options = {"accumulate_grad_batches": accumulate}
    module, plain = Net(scheduler=SCHEDULERS[scheduler]), Net(scheduler=SCHEDULERS[scheduler])
    left, right = Stores(), Stores()
    trainer = fit(module, BatchScaling(3, rule, warmup_epochs=1.5), left, **options)
    reference = fit(plain, right, **options)
    factor = {"linear": 4 * accumulate / 3, "sqrt": math.sqrt(20 / 3), "none": 1.0}[rule]
    factors = growing([factor] * len(rates(reference)), num_steps)
    assert rates(trainer) == times(factors, rates(reference))
    assert len(factors) == 3 * -(-BATCHES // accumulate)
    assert left.stored == right.stored
    for one, other in zip(
        trainer.lr_scheduler_configs, reference.lr_scheduler_configs, strict=True
    ):
        assert one.scheduler.state_dict() == other.scheduler.state_dict()
    assert "step" not in vars(trainer.optimizers[0]) or scheduler != "none"
    if rule == "none":
        assert_same(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize("order", [1, -1])
def test_a_change_of_accumulation_is_followed_and_told(order, caplog, tmp_path):
    """From 1 to 4 batches after an epoch, then to 2: 8, 2 and 4 steps."""
    scaling, accumulation = (
        BatchScaling(8, warmup_epochs=2),
        GradientAccumulationScheduler({0: 1, 1: 4, 2: 2}),
    )
    monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1}
    trainer = fit(Net(), *[scaling, accumulation][::order], monitor, **options)
    factors = growing([0.5] * 8 + [2.0] * 2 + [1.0] * 4, 10)
    assert factors[8:10] == [1.9, 2.0]
    assert rates(trainer) == times(factors, [[0.1, 0.03]] * 14)
    assert lines(caplog) == [
        "BatchScaling: 4 a device × 1 accumulated × 1 device = 4, 0.5 × 8: rate × 0.5 (linear)",
        "BatchScaling: 4 a device × 4 accumulated × 1 device = 16, 2 × 8: rate × 2 (linear), "
        "warmed up over 10 steps",
        "BatchScaling: 4 a device × 2 accumulated × 1 device = 8, 1 × 8: rate × 1 (linear)",
    ]
    logged = table(logger)
    at_end = [rates(trainer)[t] for t in range(14)]
    for j, name in enumerate(("Seen/pg1", "Seen/pg2")):
        assert column(logged, f"optkit-lr/effective/{name}") == [lrs[j] for lrs in at_end]
    assert column(logged, "optkit-lr/batch_size") == [4.0] * 8 + [16.0] * 2 + [8.0] * 4
    assert column(logged, "optkit-lr/scale") == [0.5] * 8 + [2.0] * 2 + [1.0] * 4
    assert [(row["step"], value) for row, value in events(logged)] == [("9", 2.0)]
    shown = dict(zip(monitor_steps(logged), column(logged, "lr-Seen/pg1"), strict=False))
    assert shown == {str(t): at_end[t][0] for t in range(14)}


def table(logger):
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(logged, name):
    """Return the last value of each step."""
    by_step = {row["step"]: float(row[name]) for row in logged if row.get(name)}
    return list(by_step.values())


def events(logged):
    name = "optkit-events/batch_scaling"
    return [(row, float(row[name])) for row in logged if row.get(name)]


def monitor_steps(logged):
    return dict.fromkeys(row["step"] for row in logged if row.get("lr-Seen/pg1"))


class Accumulates(pl.Callback):
    """Changes the accumulation in a hook that comes after all of ours."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            trainer.accumulate_grad_batches = 3


def test_a_change_by_others_holds_from_the_very_next_step():
    trainer = fit(Net(), BatchScaling(4, warmup_epochs=0), Accumulates(), max_epochs=2)
    factors = [1.0] * 10 + [3.0] * 3  # batches 2, 3 to 5, 6 to 7
    assert rates(trainer) == times(factors, [[0.1, 0.03]] * 13)


class Alternates(Two):
    """The second optimizer steps in every other batch."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            optimizer.step()


@pytest.mark.parametrize("same_trainer", [True, False])
def test_in_manual_optimization_all_grow_with_the_batches(same_trainer, caplog, tmp_path):
    scaling, module, logger = BatchScaling(2, warmup_epochs=1.5), Alternates(), CSVLogger(tmp_path)
    trainer = None
    for max_epochs in (2, 4):  # a second fit starts anew, also in a Trainer that goes on
        if trainer is None or not same_trainer:
            trainer = trainer_of(scaling, max_epochs=2, logger=logger, log_every_n_steps=1)
        trainer.fit_loop.max_epochs = max_epochs if same_trainer else 2
        trainer.fit(module, data())
        factors = growing([2.0] * 16, 12)
        assert rates(trainer, 0) == times(factors, [[0.1]] * 16)
        assert rates(trainer, 1) == times(factors[1::2], [[0.1]] * 8)
        (line,) = lines(caplog)
        assert line.endswith("warmed up over 12 batches")
    if same_trainer:
        found = [(row["step"], value) for row, value in events(table(logger))]
        assert found == [("11", 2.0), ("27", 2.0)]


class Reloads(Net):
    """Its batches grow from epoch to epoch."""

    def train_dataloader(self):
        return data(batch_size=4 * 2**self.current_epoch)


def test_new_dataloaders_are_looked_at(caplog):
    trainer = trainer_of(
        BatchScaling(4, warmup_epochs=0), reload_dataloaders_every_n_epochs=1, max_epochs=3
    )
    trainer.fit(Reloads())
    assert rates(trainer) == times([1.0] * 8 + [2.0] * 4 + [4.0] * 2, [[0.1, 0.03]] * 14)
    assert [line.split(" = ")[1].split(",")[0] for line in lines(caplog)] == ["4", "8", "16"]


def test_optimizers_grow_with_their_own_steps_and_one_may_be_left_alone(tmp_path):
    trainer = fit(Two(), BatchScaling(2, warmup_epochs=1, optimizers=[1]), max_epochs=2)
    assert rates(trainer, 0) == [[0.1]] * 16
    assert rates(trainer, 1) == times(growing([2.0] * 16, 8), [[0.1]] * 16)
    both = [
        BatchScaling(2, "sqrt", 0.5, optimizers=[0]),
        BatchScaling(2, "linear", 0, optimizers=[1]),
    ]
    trainer = fit(Two(), *both, max_epochs=1)
    assert rates(trainer, 0) == times(growing([math.sqrt(2)] * 8, 4), [[0.1]] * 8)
    assert rates(trainer, 1) == [[0.2]] * 8


def test_a_batch_that_is_given_takes_the_place_of_the_loaders(caplog):
    trainer = fit(Net(), BatchScaling(4, warmup_epochs=0, batch_size=32), max_epochs=1)
    assert rates(trainer) == times([8.0] * 8, [[0.1, 0.03]] * 8)
    (line,) = lines(caplog)
    assert line.endswith("32 a device × 1 accumulated × 1 device = 32, 8 × 4: rate × 8 (linear)")


def test_a_second_fit_starts_anew():
    scaling, module = BatchScaling(2, warmup_epochs=1), Net()
    expected = times(growing([2.0] * 8, 8), [[0.1, 0.03]] * 8)
    for _ in range(2):
        assert rates(fit(module, scaling, max_epochs=1)) == expected


def test_a_second_fit_that_goes_on_warms_up_in_the_epochs_that_it_makes():
    """Of 2 and then 8 steps; the first two had 4."""
    accumulation = GradientAccumulationScheduler({0: 2, 2: 4, 3: 1})
    trainer = trainer_of(BatchScaling(2, warmup_epochs=2), accumulation, max_epochs=2)
    module = Net()
    trainer.fit(module, data())
    trainer.accumulate_grad_batches, trainer.fit_loop.max_epochs = 1, 4
    trainer.fit(module, data())
    factors = growing([8.0] * 2 + [2.0] * 8, 10)
    assert rates(trainer) == times(factors, [[0.1, 0.03]] * 10)


def test_a_rate_in_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(0.1)
    module = Net(lambda m: Seen(m.parameters(), lr=rate))
    trainer = fit(module, BatchScaling(2, warmup_epochs=1), max_epochs=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] is rate
    assert float(rate) == float(torch.tensor(0.1))
    expected = [f * 0.1 for f in growing([2.0] * 8, 8)]
    assert [lr for (lr,) in rates(trainer)] == pytest.approx(expected, rel=1e-6)


def test_with_another_warmup_it_multiplies_if_it_has_none_itself():
    other = Rules(RateInStep(lambda i, j, lr: lr * 0.5, role="warmup"))
    trainer = fit(Net(), other, BatchScaling(2, warmup_epochs=0), max_epochs=1)
    assert rates(trainer) == times([1.0] * 8, [[0.1, 0.03]] * 8)


class Rules(pl.Callback):
    def __init__(self, rule):
        self.rule = rule

    def on_train_start(self, trainer, pl_module):
        self.rule.attach(trainer)

    def on_train_end(self, trainer, pl_module):
        self.rule.detach()

    def on_exception(self, trainer, *_):
        self.rule.detach()


# -- momentum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "fold_lr"), [(None, True), (True, False)])
def test_a_folded_velocity_trains_as_sgd_does(chosen, fold_lr):
    scheduler = SCHEDULERS["exponential"]
    scaling = [BatchScaling(2, warmup_epochs=1, momentum_correction=chosen) for _ in range(2)]
    folds = Net(lambda m: Folds(m.parameters(), lr=0.02, fold_lr=fold_lr), scheduler)
    sgd = Net(lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9), scheduler)
    trainer = fit(folds, scaling[0], precision="64-true")
    if chosen:
        scaling[1] = BatchScaling(2, warmup_epochs=1)
    fit(sgd, scaling[1], precision="64-true")
    for name, p in folds.state_dict().items():
        torch.testing.assert_close(p, sgd.state_dict()[name], rtol=1e-11, atol=1e-13)
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
    factors = growing([2.0] * 24, 8)
    used = [f * 0.9**t for t, f in enumerate(factors)]
    ratios = [0.9] + [0.9 * b / a for a, b in itertools.pairwise(used)]
    assert [m for (m,) in trainer.optimizers[0].seen] == pytest.approx(ratios, rel=1e-13)


def test_sgd_is_not_corrected_by_default():
    momenta, module = Momenta(), Net(lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9))
    fit(module, BatchScaling(2, warmup_epochs=1), momenta, max_epochs=1)
    assert momenta.seen == [0.9] * 8


class Momenta(pl.Callback):
    """Notes the momenta inside the update."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *_: self.seen.append(optimizer.param_groups[0]["momentum"])
        )


# -- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_name", "options"),
    [
        ("classifier", {}),
        ("classifier", {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}),
        ("gan", {}),
    ],
    ids=str,
)
def test_training_interrupted_and_resumed_equals_training_that_was_not(
    module_name, options, tmp_path
):
    """In the warmup, whose rate differs from step to step; with a momentum that follows it."""
    scaling = assert_resumes(
        lambda: BatchScaling(2, "sqrt", 2.5, momentum_correction=True),
        module_name,
        tmp_path,
        **options,
    )
    num_steps = 8 if options else 13
    assert scaling.state_dict()["warmup"] == {
        "num_steps": num_steps,
        "ahead": [0] * (1 + (module_name == "gan")),
        "first_epoch": 0,
        "first_batch": 0,
    }
    saved = torch.load(tmp_path / "mid-epoch.ckpt", weights_only=True)
    (stored,) = {o["param_groups"][0]["lr"] for o in saved["optimizer_states"]}
    assert stored == pytest.approx(0.05 * 0.5 if module_name == "classifier" else 1e-2 * 0.9**9)


@pytest.mark.filterwarnings("ignore:`warmup_epochs` should be less")
def test_what_was_done_of_the_warmup_stays_done_where_steps_are_others(tmp_path, caplog):
    """Two of four epochs with 8 steps each, then 4 a step: half of the warmup is left."""
    path = tmp_path / "half.ckpt"
    first = fit(Net(), BatchScaling(2, warmup_epochs=4), max_epochs=2, max_steps=16)
    first.save_checkpoint(path)
    lines(caplog)
    options = {"max_epochs": 5, "accumulate_grad_batches": 2, "ckpt_path": path}
    scaling = BatchScaling(2, warmup_epochs=4)
    trainer = fit(Net(), scaling, **options)
    factors = [1 + 3 * (8 + t + 1) / 16 for t in range(8)] + [4.0] * 4
    assert rates(trainer) == times(factors, [[0.1, 0.03]] * 12)
    assert lines(caplog) == [
        "BatchScaling: 4 a device × 2 accumulated × 1 device = 8, 4 × 2: rate × 4 (linear), "
        "warmed up over 16 steps; 4 before the run was interrupted"
    ]
    warmup = scaling.state_dict()["warmup"]
    assert warmup == {"num_steps": 16, "ahead": [-8], "first_epoch": 0, "first_batch": 0}
    trainer.save_checkpoint(path)  # 28 steps, the warmup's 16 among them
    again = fit(Net(), BatchScaling(2, warmup_epochs=4), max_epochs=6, ckpt_path=path)
    assert rates(again) == times([2.0] * 8, [[0.1, 0.03]] * 8)
    assert len(lines(caplog)) == 1


# -- what is told --------------------------------------------------------------------------------


def test_without_a_rule_the_batch_is_told_and_logged(caplog, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = fit(Net(), BatchScaling(16, "none"), logger=logger, log_every_n_steps=3)
    assert rates(trainer) == [[0.1, 0.03]] * 24
    assert lines(caplog) == [
        "BatchScaling: 4 a device × 1 accumulated × 1 device = 4, 0.25 × 16: rate as it is (none)"
    ]
    logged = table(logger)
    steps = [row["step"] for row in logged if row["optkit-lr/batch_size"]]
    assert steps == ["0", *map(str, range(2, 24, 3))]
    assert set(column(logged, "optkit-lr/scale")) == {1.0}
    assert "optkit-events/batch_scaling" not in logged[0]
    assert float(trainer.callback_metrics["optkit-lr/batch_size"]) == 4.0


@pytest.mark.parametrize(
    ("kind", "is_adaptive"),
    [
        *[(name, True) for name in ("Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta")],
        *[(name, False) for name in ("SGD", "ASGD", "Rprop")],
    ],
)
def test_the_linear_rule_is_warned_of_where_steps_are_adaptive(kind, is_adaptive, recwarn):
    def fitted(**options):
        module = Net(lambda m: getattr(torch.optim, kind)(m.parameters(), lr=1e-3))
        scaling = BatchScaling(warmup_epochs=0, **{"reference_batch_size": 2} | options)
        fit(module, scaling, fast_dev_run=2)
        return [str(w.message) for w in recwarn.list if "`rule`" in str(w.message)]

    assert fitted(rule="sqrt") == fitted(reference_batch_size=BATCH) == []
    found = fitted()
    assert len(found) == is_adaptive
    if found:
        assert f"`rule` should be 'sqrt' for {kind}, got 'linear'" in found[0]


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"max_epochs": 2}, True),
        ({"max_steps": 20, "max_epochs": -1}, True),
        ({"max_epochs": 3}, False),
        ({"max_epochs": 2, "fast_dev_run": True}, False),
        ({"max_epochs": 2, "reference": 4}, False),
    ],
    ids=str,
)
def test_a_warmup_longer_than_the_run_is_warned_of(options, warned, recwarn):
    fit(Net(), BatchScaling(options.pop("reference", 2), warmup_epochs=3), **options)
    found = [w for w in recwarn.list if "`warmup_epochs` should be less" in str(w.message)]
    assert len(found) == warned


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_batch_size": 0}, "`reference_batch_size` must be an integer of at least 1"),
        ({"reference_batch_size": 256.0}, "`reference_batch_size` must be an integer"),
        ({"reference_batch_size": True}, "`reference_batch_size` must be an integer"),
        ({"rule": "cubic"}, "`rule` must be 'linear', 'sqrt' or 'none', got 'cubic'"),
        ({"warmup_epochs": -1}, "`warmup_epochs` must be a number of at least 0, got -1"),
        ({"warmup_epochs": math.inf}, "`warmup_epochs` must be a number"),
        ({"warmup_epochs": math.nan}, "`warmup_epochs` must be a number"),
        ({"warmup_epochs": "5"}, "`warmup_epochs` must be a number"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer"),
        ({"optimizers": []}, r"`optimizers` must be an index or a list of .* \[0, 1\], got \[\]"),
        ({"optimizers": [-1]}, "`optimizers` must be an index"),
        ({"optimizers": [True]}, "`optimizers` must be an index"),
        ({"optimizers": "0"}, "`optimizers` must be an index"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchScaling(**options)


def test_another_correction_is_refused():
    with pytest.raises(TypeError, match="`momentum_correction` must be True, False or None, got 1"):
        BatchScaling(momentum_correction=1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data().dataset)


def refused(*callbacks, module=None, **options):
    """Return the message with which a run is refused before its first step."""
    module = Net() if module is None else module
    with pytest.raises(MisconfigurationException) as error:
        fit(module, *callbacks, **options)
    assert module.trainer.global_step == 0
    assert all("step" not in vars(optimizer) for optimizer in module.trainer.optimizers)
    return str(error.value)


def test_data_without_a_length_have_no_epochs_to_warm_up_in():
    loader = DataLoader(Stream(), BATCH)
    message = refused(BatchScaling(2), loader=loader)
    assert message.startswith("`warmup_epochs` must be 0 where the data have no length, got 5")
    assert (
        "Write `BatchScaling(warmup_epochs=0)`, and warm up with `LRWarmup(steps=...)`" in message
    )
    for scaling, factor in (
        (BatchScaling(2, warmup_epochs=0), 2.0),
        (BatchScaling(2, "none"), 1.0),
    ):
        trainer = fit(Net(), scaling, loader=loader, max_epochs=1)
        assert rates(trainer) == times([factor] * 8, [[0.1, 0.03]] * 8)


def test_a_batch_that_is_not_known_is_asked_for():
    loader = DataLoader([(x[None], y[None]) for x, y in data().dataset], batch_size=None)
    assert refused(BatchScaling(2), loader=loader).startswith("`batch_size` must be given where")
    trainer = fit(Net(), BatchScaling(2, batch_size=1), loader=loader, max_steps=2)
    assert rates(trainer) == times([0.5] * 2, [[0.1, 0.03]] * 2)


@pytest.mark.parametrize("order", [1, -1])
def test_two_warmups_of_one_optimizer_are_refused_with_what_to_write(order):
    other = Rules(RateInStep(lambda i, j, lr: lr, role="warmup"))
    message = refused(*[BatchScaling(2), other][::order], max_epochs=6)
    assert message.startswith("Optimizer 0 must have one warmup of its learning rate, got two")
    assert "Write `BatchScaling(warmup_epochs=0)`, or give them different optimizers" in message


def test_two_scalings_of_one_optimizer_are_refused():
    scalings = BatchScaling(2, warmup_epochs=0), BatchScaling(2, warmup_epochs=0, optimizers=[0])
    assert "must have one batch scaling of its learning rate" in refused(*scalings)


def test_an_optimizer_that_is_not_there_is_refused():
    message = refused(BatchScaling(2, optimizers=[0, 2]), module=Two())
    assert message.startswith("`optimizers` must be indices below 2, the number of the module's")


def test_nesterovs_momentum_is_refused_where_it_would_be_corrected():
    module = Net(lambda m: Seen(m.parameters(), lr=0.1, momentum=0.9, nesterov=True))
    scaling = BatchScaling(2, warmup_epochs=0, momentum_correction=True)
    assert "must not use Nesterov's momentum" in refused(scaling, module=module)
