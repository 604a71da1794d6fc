"""GradientMonitor in a real Trainer."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy

from lightning_optkit import GradientMonitor
from lightning_optkit.board import tags
from lightning_optkit.callbacks import gradient_monitor
from lightning_optkit.measures.gradient_noise import noise_point
from tests.contracts import assert_observer
from tests.modules import GAN, image_loader

# Lightning's own, once a fit; `pytest.warns` hands on what it does not match, and loses the origin
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def every_step(**options: Any) -> GradientMonitor:
    return GradientMonitor(**{"every_n_steps": 1, "max_overhead": None} | options)


def train(module, data, *callbacks, **options) -> pl.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 1} | options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def logged(trainer: pl.Trainer, topic: str = "optkit-gradient") -> dict[str, float]:
    found = trainer.callback_metrics.items()
    return {k.split("/")[1]: float(v) for k, v in found if k.startswith(f"{topic}/")}


def steps(monitor: GradientMonitor) -> list[int]:
    return [each.step for each in monitor.history]


# -- the observer's contract -----------------------------------------------------------------------

CRITIC = {"parameters": ["critic.*"], "loss_index": 1}


@pytest.mark.parametrize(
    ("module_name", "options", "settings"),
    [
        ("classifier", {}, {}),
        ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, {}),
        ("gan", {}, CRITIC),
        ("autoencoder", {"gradient_clip_val": 0.1}, {"mode": "eval"}),
        ("transformer", {}, {"every_n_steps": 2}),
        ("compiled_inside", {"accumulate_grad_batches": 2}, {}),
    ],
    ids=str,
)
def test_training_is_bit_identical(module_name, options, settings, tmp_path):
    options = {"limit_train_batches": 3} | options
    assert_observer(lambda: every_step(**settings), module_name, tmp_path, **options)


# -- what it measures ------------------------------------------------------------------------------


class Regression(pl.LightningModule):
    """A small net in float64 whose gradients can be taken by hand."""

    def __init__(self, optimizer=torch.optim.SGD, lr=0.1, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.double()
        self.optimizer, self.lr, self.options = optimizer, lr, options

    def loss(self, batch):
        return mse_loss(self.head(self.body(batch))[:, 0], batch.sum(1))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr, **self.options)


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator).double() for size in sizes]


def loader(*sizes: int) -> DataLoader:
    return DataLoader(batches(*sizes), batch_size=None)


class Witness(pl.Callback):
    """Keeps what training has before and after each step; it comes after the monitor."""

    def __init__(self):
        self.before, self.after = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = dict(pl_module.named_parameters())
        self.before.append(
            {n: (p.detach().clone(), p.grad.clone()) for n, p in named.items()},
        )

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def norm_of(tensors, layer):
    return math.sqrt(
        sum(float(t.square().sum()) for n, t in tensors.items() if n.startswith(layer))
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_is_that_of_training_before_clipping(kind):
    monitor, witness = every_step(), Witness()
    module = Regression(kind, lr=0.01)
    trainer = train(module, loader(4, 5, 6), monitor, witness, gradient_clip_val=1e-3)
    assert steps(monitor) == [0, 1, 2]
    for report, before, after in zip(monitor.history, witness.before, witness.after, strict=True):
        gradients = {name: g for name, (_, g) in before.items()}
        weights = {name: w for name, (w, _) in before.items()}
        updates = {name: after[name] - w for name, w in weights.items()}
        assert [row.layer for row in report.table.rows] == ["body.0", "body.2", "head"]
        for row in (*report.table.rows, report.table.total):
            layer = "" if row.layer == "all" else row.layer
            expected = [norm_of(each, layer) for each in (gradients, weights, updates)]
            assert row.numbers[:3] == pytest.approx(expected, rel=1e-12)
            assert row.trust_ratio == pytest.approx(expected[1] / expected[0], rel=1e-12)
            assert row.update_ratio == pytest.approx(expected[2] / expected[1], rel=1e-12)
    total = monitor.history[-1].table.total
    assert total.gradient_norm > 1e-2
    found = logged(trainer)
    assert found["gradient_norm"] == pytest.approx(total.gradient_norm, rel=1e-6)
    if kind is torch.optim.SGD:
        assert found["update_norm"] == pytest.approx(0.01 * 1e-3, rel=1e-3)  # of the clipped one
        assert "effective_learning_rate" not in found
    else:
        sigma = [
            ((s["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8).flatten()
            for s in trainer.optimizers[0].state.values()
        ]
        rate = 0.01 / float(torch.cat(sigma).square().mean().sqrt())
        assert found["effective_learning_rate"] == pytest.approx(rate, rel=1e-6)
    assert found["batch_size"] == 6


def point_by_hand(module, parts):
    """Return the noise of the gradients of these batches at the module's weights."""
    gradients = []
    for part in parts:
        each = torch.autograd.grad(module.loss(part), list(module.parameters()))
        gradients.append(torch.cat([g.flatten() for g in each]))
    mean = sum(gradients) / len(gradients)
    return noise_point(
        [float(g @ g) for g in gradients], float(mean @ mean), [len(p) for p in parts]
    )


def assert_noise(monitor, points):
    """Fail unless the monitor averaged these points."""
    noise = monitor.history[-1].noise
    assert noise.num_points == len(points)
    for name in ("variance", "square_norm"):
        expected = sum(getattr(point, name) for point in points) / len(points)
        assert getattr(noise, name) == pytest.approx(expected, rel=1e-9)


class Weights(pl.Callback):
    """Keeps the weights before each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        copy = Regression()
        copy.load_state_dict(pl_module.state_dict())
        self.seen.append(copy)


def test_noise_of_two_halves_of_each_batch():
    monitor, weights = every_step(noise_window=2), Weights()
    trainer = train(Regression(), loader(80, 71, 60), weights, monitor)
    points = [
        point_by_hand(module, [batch[: len(batch) // 2], batch[len(batch) // 2 :]])
        for module, batch in zip(weights.seen, batches(80, 71, 60), strict=True)
    ]
    assert_noise(monitor, points[1:])  # the window
    first = monitor.history[0].noise
    assert first.variance == pytest.approx(points[0].variance, rel=1e-9)
    found, noise = logged(trainer), monitor.history[-1].noise
    assert found["noise_source"] == 3
    assert found["noise_scale"] == pytest.approx(noise.value, rel=1e-6)
    assert found["critical_batch_size"] == found["noise_scale"]
    assert found["noise_scale_standard_error"] == pytest.approx(noise.standard_error, rel=1e-6)


def test_noise_of_accumulated_batches_of_unequal_size():
    """The last step accumulates two of three planned batches, and the next epoch one alone."""
    monitor, weights = every_step(), Weights()
    data = batches(4, 5, 3, 6, 2)
    trainer = train(
        Regression(), DataLoader(data, batch_size=None), weights, monitor, accumulate_grad_batches=3
    )
    points = [point_by_hand(weights.seen[0], data[:3]), point_by_hand(weights.seen[3], data[3:])]
    assert_noise(monitor, points)
    assert [report.batch_size for report in monitor.history] == [12, 8]
    losses = [float(module.loss(b).detach()) for module, b in zip(weights.seen, data, strict=True)]
    assert monitor.history[0].loss == pytest.approx(sum(losses[:3]) / 3, rel=1e-12)
    assert monitor.history[1].loss == pytest.approx(sum(losses[3:]) / 2, rel=1e-12)
    assert logged(trainer)["noise_source"] == 0
    lone = every_step()
    train(Regression(), loader(4, 5, 3, 6), lone, accumulate_grad_batches=3)
    assert lone.history[-1].noise.num_points == 1  # one batch alone says nothing of noise


class Dropping(Regression):
    """All samples are the same; what differs is the dropout."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body.append(nn.Dropout(0.5))


def test_passes_beside_training_draw_their_own_dropout():
    batch = batches(1)[0].expand(8, 3)
    data = DataLoader([batch] * 3, batch_size=None)
    monitor = every_step(noise_window=1)
    train(Dropping(lr=0.0), data, monitor)
    variances = [report.noise.variance for report in monitor.history]
    assert all(variance > 1e-6 for variance in variances)  # other masks in each half
    assert len(set(variances)) == 3  # and in each step
    for settings in ({"mode": "eval"}, {"loss_fn": lambda module, batch: module.head.bias.sum()}):
        still = every_step(**settings)
        train(Dropping(lr=0.0), data, still)
        assert still.history[-1].noise.variance == pytest.approx(0.0, abs=1e-12)
    assert still.history[-1].noise.square_norm == pytest.approx(1.0)


class Groups(Regression):
    def configure_optimizers(self):
        groups = [
            {"params": self.body.parameters(), "lr": 1e-3},
            {"params": self.head.parameters(), "lr": 1e-2},
        ]
        return torch.optim.Adamax(groups)


def test_groups_of_an_optimizer_have_their_own_rates():
    monitor, witness = every_step(parameters=["head.*", "body.0.bias"]), Witness()
    train(Groups(), loader(8), monitor, witness)
    (before,) = witness.before
    for layer, lr in (("body.0", 1e-3), ("head", 1e-2)):
        sigma = [g.abs() + 1e-8 for n, (_, g) in before.items() if n.startswith(layer)]
        sigma = sigma[1:] if layer == "body.0" else sigma  # the bias alone
        expected = lr / float(torch.cat([s.flatten() for s in sigma]).square().mean().sqrt())
        found = monitor.history[0].table[layer]
        assert found.learning_rate == pytest.approx(expected, rel=1e-9)
    assert [row.layer for row in monitor.history[0].table.rows] == ["body.0", "head"]


class Judged(Regression):
    """Its forward pass feeds a metric that squashes what it is given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.accuracy = BinaryAccuracy()

    def loss(self, batch):
        return super().loss(self(batch))

    def forward(self, batch):
        self.accuracy(batch[:, 0], (batch[:, 0] > 0).long())
        return batch


def test_dead_units_and_saturated_values():
    module = Regression(lr=0.0)
    with torch.no_grad():
        module.body[0].bias[:2] = -100.0
        module.body[2].bias[:1] = 100.0
    monitor = every_step(noise_scale=False)
    trainer = train(module, loader(16), monitor)
    values = module.body(batches(16)[0])
    assert monitor.history[0].activations.rows["body.1"][0] == 2 / 6
    expected = float((values.abs() >= 0.9).double().mean())
    assert monitor.history[0].activations.rows["body.3"][1] == expected
    assert expected >= 0.25
    found = logged(trainer)
    assert found["dead"] == pytest.approx(2 / 6)
    assert found["saturated"] == pytest.approx(expected)
    assert "noise_scale" not in found
    judged = every_step(noise_scale=False)
    train(Judged(), loader(16), judged)
    assert list(judged.history[0].activations.rows) == ["body.1", "body.3"]  # not the metric's
    none = every_step(activations=False, per_layer=False, parameters=["head.*"])
    found = logged(train(Regression(), loader(16), none))
    assert not {"dead", "saturated"} & set(found)
    (row,) = none.history[0].table.rows
    assert (row.layer, row.num_params) == ("all", 5)


class Overflows(Regression):
    """Its loss is infinite on the first two batches."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (math.inf if batch_idx < 2 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_skipped_steps_are_none(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    monitor, weights = every_step(every_n_steps=50), Weights()
    module = Overflows(lr=0.1, fused=fused)
    train(module, loader(*[4] * 6), weights, monitor, plugins=[precision])  # without a warning
    assert steps(monitor) == [2, 4]  # the first that was made, and one at the end
    first = monitor.history[0].table.total
    batch = batches(*[4] * 6)[2]
    gradient = torch.autograd.grad(weights.seen[2].loss(batch), weights.seen[2].parameters())
    expected = norm_of(dict(enumerate_names(gradient)), "")
    assert first.gradient_norm == pytest.approx(expected, rel=0.02)  # computed in half precision
    assert first.update_norm == pytest.approx(0.1 * first.gradient_norm, rel=1e-6)


def enumerate_names(tensors):
    return ((str(i), tensor) for i, tensor in enumerate(tensors))


# -- several optimizers ----------------------------------------------------------------------------


def test_two_optimizers_are_each_measured_at_their_step():
    monitor = every_step(noise_scale=False)
    pl.seed_everything(0, verbose=False)
    found = logged(train(GAN(), image_loader(), monitor, limit_train_batches=2))
    table = monitor.history[-1].table
    assert [row.layer for row in table.rows] == [
        "generator.0", "generator.2", "critic.0", "critic.2",
    ]  # fmt: skip
    assert all(row.update_norm > 0 and row.learning_rate > 0 for row in table.rows)
    assert found["gradient_norm"] == pytest.approx(table.total.gradient_norm, rel=1e-6)
    assert math.isnan(monitor.history[-1].loss)
    assert "loss" not in found


def test_the_noise_of_two_optimizers_is_left_out_with_a_word_and_measured_of_one():
    with pytest.warns(UserWarning, match="leaves out the noise scale.*parameters of one optimizer"):
        train(GAN(), image_loader(), monitor := every_step(), limit_train_batches=2)
    assert monitor.history[-1].noise is None
    critic = every_step(name="critic", **CRITIC)
    trainer = train(GAN(), image_loader(), critic, limit_train_batches=2)
    assert critic.history[-1].noise.num_points == 2
    assert "noise_source" not in logged(trainer)  # under another topic
    assert {row.layer for row in critic.history[-1].table.rows} == {"critic.0", "critic.2"}


def test_the_noise_is_that_of_the_loss_that_is_asked_for():
    generator = every_step(parameters=["generator.*"], loss_index=0)
    train(GAN(), image_loader(), generator, limit_train_batches=1)
    assert generator.history[0].noise.variance > 0
    other = every_step(parameters=["generator.*"], loss_index=1)  # the critic's stops before it
    with pytest.warns(UserWarning, match="the noise scale.*a loss that depends on the parameters"):
        train(GAN(), image_loader(), other, limit_train_batches=1)
    assert other.history[0].noise is None


class TakesTurns(GAN):
    """Steps one optimizer in even batches, the other in odd ones."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        part = (self.generator, self.critic)[batch_idx % 2]
        x = batch[0].flatten(1)[:, : (3, 36)[batch_idx % 2]]
        self.manual_backward(part(x).square().mean())
        optimizer.step()


def test_optimizers_that_take_turns_are_waited_for():
    monitor = every_step(every_n_steps=4, noise_scale=False)
    train(TakesTurns(), image_loader(), monitor, max_epochs=2)
    # due at 0, 3, 7, 11 and 14; each point spans two batches
    assert steps(monitor) == [1, 4, 8, 12, 15]
    assert all(len(report.table.rows) == 4 for report in monitor.history)


class Frozen(TakesTurns):
    """Its critic never steps."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, 0)


def test_an_optimizer_that_never_steps_is_waited_for_no_longer_than_a_period():
    monitor = every_step(every_n_steps=3, noise_scale=False)
    train(Frozen(), image_loader(), monitor)
    assert steps(monitor) == [3, 7]  # due at 0 and, until the end of training, at 5
    assert {row.layer for row in monitor.history[0].table.rows} == {"generator.0", "generator.2"}


class Silent(GAN):
    """Steps its optimizers behind Lightning's back."""

    def training_step(self, batch, batch_idx):
        first, _ = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.generator(torch.ones(4, 3)).square().mean())
        first.step()


def test_a_run_without_a_visible_step_says_so():
    with pytest.warns(UserWarning, match="measured nothing: it saw no optimizer step"):
        train(Silent(), image_loader(), every_step(noise_scale=False), limit_train_batches=2)


# -- what goes wrong -------------------------------------------------------------------------------


class Breaks(Regression):
    """The gradient of one layer is not a number."""

    def loss(self, batch):
        return super().loss(batch) + (self.body[2].weight * 0).sum().sqrt()


def test_a_gradient_that_is_not_finite_is_said_and_logged_as_it_is():
    monitor = every_step(activations=False)
    with pytest.warns(
        UserWarning, match=r"not finite at step 0, in 1 of 3 layers, `body\.2` first"
    ):
        trainer = train(Breaks(lr=0.0), loader(4, 4), monitor)
    found = logged(trainer)
    assert math.isnan(found["gradient_norm"])
    assert not {"trust_ratio", "noise_scale"} & set(found)
    assert monitor.history[0].table["head"].trust_ratio > 0
    assert len(monitor.history) == 2


class BreaksOnce(Breaks):
    """Its weights are put back: a rate of zero times a gradient that is not a number is none."""

    def on_train_start(self):
        self.before = {name: value.clone() for name, value in self.state_dict().items()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.load_state_dict(self.before)

    def training_step(self, batch, batch_idx):
        return self.loss(batch) if batch_idx == 0 else super(Breaks, self).loss(batch)


def test_a_gradient_that_is_not_finite_does_not_spoil_the_noise_of_others():
    monitor = every_step(activations=False)
    with pytest.warns(UserWarning, match="not finite at step 0"):
        train(BreaksOnce(lr=0.0), loader(8, 8, 8), monitor)
    assert monitor.history[0].noise is None
    assert monitor.history[-1].noise.num_points == 2
    assert math.isfinite(monitor.history[-1].noise.variance)


class Pairs(Regression):
    def training_step(self, batch, batch_idx):
        return self.loss(batch[0])


def test_a_batch_that_cannot_be_split_leaves_out_the_noise_alone():
    data = [(batch, torch.zeros(2)) for batch in batches(4, 4)]
    for options in ({}, {"accumulate_grad_batches": 2}):
        monitor = every_step()
        with pytest.warns(UserWarning, match="share .*first dimension") as caught:
            train(Pairs(), DataLoader(data, batch_size=None), monitor, **options)
        assert len([w for w in caught if "first dimension" in str(w.message)]) == 1
        assert monitor.history[-1].noise is None
        assert math.isnan(monitor.history[-1].batch_size)
        assert monitor.history[-1].activations.dead >= 0


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gradients_of_halves", "the noise scale"),
        ("ActivationRecorder", "activations"),
        ("tensor_norms", "a step"),
        ("step_table", "a step"),
        ("begins_step", "a step"),
    ],
)
def test_a_part_that_fails_says_so_once_and_training_goes_on(name, what, monkeypatch, tmp_path):
    expected = Regression()
    train(expected, loader(4, 5, 6))

    def fails(*_, **__):
        raise KeyError("broken")

    monkeypatch.setattr(gradient_monitor, name, fails)
    module, monitor = Regression(), every_step()
    with pytest.warns(UserWarning, match="GradientMonitor") as caught:
        train(module, loader(4, 5, 6), monitor)
    ours = [str(w.message) for w in caught if "GradientMonitor" in str(w.message)]
    assert sum("leaves out" in text for text in ours) == 1
    assert f"GradientMonitor leaves out {what}; training goes on untouched. KeyError" in ours[0]
    assert len(monitor.history) == (0 if what == "a step" else 3)
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(p._backward_hooks for p in module.parameters())


class HooksAfterSteps(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not trainer.fit_loop._should_accumulate():
            self.seen += [bool(p._backward_hooks) for p in pl_module.parameters()]


def test_no_hook_outlives_its_step_even_where_it_cannot_be_read(monkeypatch):
    def fails(self, trainer):
        raise KeyError("broken")

    monkeypatch.setattr(gradient_monitor.StepBatches, "before_step", fails)
    hooks, monitor = HooksAfterSteps(), every_step(every_n_steps=50)
    with pytest.warns(UserWarning, match="leaves out the noise scale"):
        train(Regression(), loader(*[4] * 6), monitor, hooks, accumulate_grad_batches=2)
    assert hooks.seen
    assert not any(hooks.seen)
    assert monitor.history[0].noise is None


def test_an_exception_in_training_leaves_nothing_behind():
    class Fails(Regression):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 1:
                raise ZeroDivisionError

    module, monitor = Fails(), every_step()
    with pytest.raises(ZeroDivisionError):
        train(module, loader(4, 5, 6), monitor, accumulate_grad_batches=1)
    assert monitor._visit._visits == {}
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks
    train(Regression(), loader(4, 5, 6), monitor)  # and it can be used again
    assert steps(monitor) == [0, 1, 2]


# -- when, and where to ----------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_its_points(tmp_path):
    path = tmp_path / "middle.ckpt"
    whole = every_step(every_n_steps=3)
    train(Regression(), loader(*[4] * 7), whole, max_epochs=2)
    first = every_step(every_n_steps=3)
    train(Regression(), loader(*[4] * 7), first, max_epochs=1).save_checkpoint(path)
    resumed = every_step(every_n_steps=3)
    train(Regression(), loader(*[4] * 7), resumed, max_epochs=2, ckpt_path=path)
    assert steps(whole) == [0, 2, 5, 8, 11, 12]
    assert steps(first) == [0, 2, 5]
    assert steps(resumed) == [8, 11, 12]
    for one, other in zip(whole.history[3:], resumed.history, strict=True):
        assert one.table == other.table
        assert one.noise == other.noise


def test_a_second_fit_begins_anew():
    monitor = every_step(every_n_steps=50)
    for _ in range(2):
        train(Regression(), loader(4, 5, 6, 7), monitor)
        assert steps(monitor) == [0, 2]
        assert monitor.history[-1].noise.num_points == 2


def test_of_a_long_run_the_older_points_are_thinned(monkeypatch):
    monkeypatch.setattr(gradient_monitor, "_MAX_POINTS", 6)
    monitor = every_step(activations=False, noise_scale=False)
    train(Regression(), loader(*[3] * 20), monitor)
    assert len(monitor.history) <= 6
    assert (steps(monitor)[0], steps(monitor)[-1]) == (0, 19)
    assert steps(monitor) == sorted(set(steps(monitor)))


def test_everything_reaches_the_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tensorboard")]
    module = Regression(torch.optim.AdamW, lr=1e-3)
    monitor = every_step()
    began = time.monotonic()
    train(module, loader(8, 8, 8), monitor, logger=loggers)
    elapsed = time.monotonic() - began
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {key.split("/")[1] for row in rows for key in row if key.startswith("optkit-gradient/")}
    assert found == {tag.name for tag in tags.GRADIENT_SCALARS}
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(0 < float(row["optkit-gradient/seconds"]) < elapsed for row in rows)
    assert rows[0]["optkit-gradient/noise_scale_standard_error"] == ""  # of one point
    events = EventAccumulator(loggers[1].log_dir, size_guidance={"tensors": 0})
    events.Reload()
    tensors = [
        [event.tensor_proto for event in events.Tensors(f"optkit-gradient/{name}")]
        for name in (tags.LAYER_STEPS, tags.LAYER_NAMES, tags.ACTIVATIONS, tags.ACTIVATION_NAMES)
    ]
    shapes = [[d.size for d in each[0].tensor_shape.dim] for each in tensors]
    assert shapes == [[3, 6], [3], [2, 2], [2]]
    assert list(tensors[1][0].string_val) == [b"body.0", b"body.2", b"head"]
    assert list(tensors[3][0].string_val) == [b"body.1", b"body.3"]
    assert len(tensors[0]) == 3
    figures = {
        f"optkit-gradient/{tags.GRADIENT_FIGURE}",
        f"optkit-gradient/{tags.TRUST_RATIO_FIGURE}",
    }
    assert figures == set(events.Tags()["images"])
    pictures = {file.name for file in Path(loggers[0].log_dir).glob("*.png")}
    assert pictures == {f"{figure.replace('/', '-')}.png" for figure in figures}


def test_a_report_is_printed_with_all_that_is_known():
    monitor = every_step()
    train(Regression(), loader(8, 8), monitor)
    first, last = (str(report) for report in monitor.history)
    assert first.startswith("step 0, loss ")
    assert "body.2" in first
    assert "±" not in first
    assert "samples" in last
    assert "body.1: dead" in last
    assert "body.3: saturated" in last


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"every_n_steps": None}, "`every_n_steps` must be an integer of at least 1, got None"),
        ({"noise_window": 0}, "`noise_window` must be an integer of at least 1, got 0"),
        ({"noise_window": True}, "`noise_window` must be an integer of at least 1, got True"),
        ({"max_overhead": 0.0}, "`max_overhead` must be a share in"),
        ({"mode": "test"}, "`mode` must be 'eval' or 'train'"),
        ({"loss_index": -1}, "`loss_index` must be at least 0"),
        ({"name": "Two Words"}, "`name` must be snake_case"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        GradientMonitor(**settings)


def test_what_is_wrong_with_a_run_is_refused_before_its_first_step():
    module = Regression()
    with pytest.raises(ValueError, match="`parameters` must match the name of a trainable"):
        train(module, loader(4), every_step(parameters=["tail.*"]))
    assert module.trainer.global_step == 0
    with pytest.raises(TypeError, match="must be a list of glob patterns"):
        every_step(parameters="head.*")
