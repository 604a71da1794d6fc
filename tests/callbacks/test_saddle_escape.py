"""SaddleEscape in a real Trainer."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit import SaddleEscape, is_probing
from lightning_optkit.board import tags
from tests.contracts import (
    SURVIVED,
    assert_resumes,
    assert_same,
    assert_survives_trainer_options,
    run,
)
from tests.modules import MODULES


class Product(pl.LightningModule):
    """The lecture's surface: the product of two weights, fitted to 1."""

    def __init__(self, start=(0.0, 0.0), optimizer=torch.optim.SGD, **settings):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(start))
        self.optimizer = optimizer
        self.settings = {"lr": 0.1} | settings

    def training_step(self, batch, batch_idx):
        return (batch - self.weights[0] * self.weights[1]).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.settings)


def train(module, *callbacks, num_steps=80, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 1} | options,
    )
    trainer.fit(module, DataLoader(torch.ones(num_steps, 1)))
    return trainer


def logged(trainer, topic="optkit-escape"):
    start = f"{topic}/"
    return {
        k.removeprefix(start): v.item()
        for k, v in trainer.callback_metrics.items()
        if k.startswith(start)
    }


def loss_of(module):
    return (1 - module.weights.detach().prod()).square().item()


# -- the lecture's saddle ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}),
        (torch.optim.RMSprop, {"lr": 0.01}),
        (torch.optim.LBFGS, {"lr": 0.5}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_leaves_the_saddle_that_gradient_descent_never_leaves(optimizer, settings):
    stays = Product(optimizer=optimizer, **settings)
    train(stays, num_steps=20)  # a step that moves nothing is followed by another
    assert stays.weights.tolist() == [0.0, 0.0]
    escapes = Product(optimizer=optimizer, **settings)
    trainer = train(escapes, SaddleEscape(every_n_steps=50, max_escapes=1), num_steps=300)
    assert loss_of(escapes) < 1e-6
    assert logged(trainer)["num_escapes"] == 1


def test_what_is_logged_is_the_surfaces_closed_form():
    trainer = train(Product(), SaddleEscape(max_radius=10.0))
    step = 10 * 0.01 * math.sqrt(2)
    found = logged(trainer)
    assert set(found) == {tag.name for tag in tags.ESCAPE_SCALARS}
    expected = {
        "gradient_norm": 0.0,
        "relative_gradient": 0.0,
        "spectral_radius": 2.0,
        "lambda_min": -2.0,
        "certified": 1.0,
        "step": step,
        "predicted": -(step**2),
        "actual": step**4 / 4 - step**2,
        "escaped": 1.0,
        "num_escapes": 1.0,
        "loss_before": 1.0,
        "loss_after": (1 - step**2 / 2) ** 2,
        "num_samples": 4.0,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert found["lambda_min_error"] < 1e-4
    assert logged(trainer, "optkit-events") == {"escape": pytest.approx(step)}


def test_every_attempt_is_on_the_trainers_axis(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = SaddleEscape(every_n_steps=20)
    train(Product(), callback, logger=logger, log_every_n_steps=1)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["optkit-escape/escaped"]]
    assert [row["step"] for row in rows] == ["0", "19", "39", "59"]
    assert [row["optkit-escape/escaped"] for row in rows] == ["1.0", "0.0", "0.0", "0.0"]
    assert [bool(row["optkit-events/escape"]) for row in rows] == [True, False, False, False]
    for row in rows[1:]:
        assert row["optkit-escape/loss_before"] == row["optkit-escape/loss_after"]


# -- else nothing ------------------------------------------------------------------------------


class Walled(Product):
    """A saddle so narrow that no step of the ladder lowers the loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e20 * self.weights.pow(4).sum()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lambda: Product((1.0, 1.0)), {"certified": 0.0, "step": 0.0}),
        (lambda: Product((2.0, 0.5)), {"certified": 0.0, "step": 0.0}),
        (lambda: Product((0.2, 0.1)), {"certified": 1.0}),
        (lambda: Walled(lr=0.0), {"certified": 1.0, "step": 0.0}),
    ],
    ids=["minimum", "valley", "slope", "narrow"],
)
def test_elsewhere_it_does_nothing(module, expected):
    ends = []
    for callbacks in ([], [SaddleEscape(every_n_steps=1)]):
        pl.seed_everything(3, verbose=False)
        end = module()
        trainer = train(end, *callbacks, num_steps=5)
        optimizer = trainer.optimizers[0].state_dict()
        ends.append((end.weights.detach(), end.weights.grad, optimizer, torch.get_rng_state()))
    assert_same(ends[0], ends[1])
    found = logged(trainer)
    assert found["escaped"] == found["num_escapes"] == 0
    assert found["loss_after"] == found["loss_before"]
    assert {key: found[key] for key in expected} == expected
    assert logged(trainer, "optkit-events") == {}
    if expected == {"certified": 1.0}:  # there is a way down; the gradient's is as good
        assert found["actual"] < 0
        assert found["relative_gradient"] > 0.1


def part_of(module_name):
    """Return which parameters may be moved: of two optimizers one's must be named."""
    return ["generator.*"] if module_name == "gan" else None


@pytest.mark.parametrize("module_name", ["classifier", "gan", "lstm"])
def test_ordinary_training_is_bit_identical(module_name, tmp_path):
    """No saddle on the way: no weight, no random stream, no metric differs."""
    without = run(module_name, [], tmp_path / "without", limit_train_batches=3)
    callback = SaddleEscape(
        every_n_steps=2, num_batches=2, gradient_tol=0.0, parameters=part_of(module_name)
    )
    with_it = run(module_name, [callback], tmp_path / "with", limit_train_batches=3)
    assert_same(without, with_it)
    assert callback.num_escapes == 0


# -- the intervener's contract -----------------------------------------------------------------


def eager(**options):
    """Return a callback that takes any step down, so that there is something to resume."""
    defaults = {"every_n_steps": 4, "num_batches": 2, "gradient_tol": 1e9, "max_matvecs": 10}
    return SaddleEscape(**defaults | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
def test_resumes(options, tmp_path):
    assert assert_resumes(eager, "classifier", tmp_path, **options).num_escapes > 0


@pytest.mark.parametrize(
    "settings",
    [{"every_n_epochs": 1, "every_n_steps": None}, {"every_n_steps": 3}, {"max_escapes": 3}],
    ids=str,
)
@pytest.mark.parametrize("module_name", ["autoencoder", "gan"])
def test_resumes_at_every_cadence(module_name, settings, tmp_path):
    settings = settings | {"parameters": part_of(module_name)}
    callback = assert_resumes(lambda: eager(**settings), module_name, tmp_path)
    assert callback.num_escapes >= 3


def test_two_optimizers_without_named_parameters_are_refused():
    module, data = MODULES["gan"]()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[eager()],
        logger=False,
        enable_checkpointing=False,
        max_epochs=1,
    )
    with pytest.raises(MisconfigurationException, match="`parameters` must name what to move"):
        trainer.fit(module, data)


def test_resumes_for_a_part_of_a_gan(tmp_path):
    def critic():
        return eager(parameters=["critic.*"], loss_index=1, name="critic")

    assert assert_resumes(critic, "gan", tmp_path).num_escapes > 0


@pytest.mark.parametrize("name", SURVIVED)
def test_survives(name, tmp_path):
    callback = assert_survives_trainer_options(eager, "autoencoder", tmp_path, **SURVIVED[name])
    assert callback.num_escapes > 0


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_validation_holds_what_is_yet_to_be_done(tmp_path):
    """It is written before the epoch's end: whoever acts there has to act again."""

    class Validated(Product):
        def validation_step(self, batch, batch_idx):
            self.log("loss", loss_of(self))

        def val_dataloader(self):
            return DataLoader(torch.ones(1, 1))

    def options(folder):
        return {
            "max_epochs": 4,
            "num_steps": 3,
            "enable_checkpointing": True,
            "default_root_dir": folder,
            "num_sanity_val_steps": 0,
        }

    def checkpoint():
        return pl.callbacks.ModelCheckpoint(
            tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False
        )

    callback = eager(every_n_steps=None, max_radius=3.0)
    whole = Validated((1e-3, 0.0), lr=1e-3)
    train(whole, callback, checkpoint(), **options(tmp_path))
    assert callback.num_escapes == 4
    for epoch in (0, 2):
        resumed, callback = Validated((1e-3, 0.0), lr=1e-3), eager(every_n_steps=None, max_radius=3)
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, callbacks=[callback], max_epochs=4,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(
            resumed, DataLoader(torch.ones(3, 1)), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
        )
        assert torch.equal(resumed.weights, whole.weights)
        assert callback.num_escapes == 4


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_run_on_other_batches_is_told(tmp_path):
    module, loader = MODULES["autoencoder"]()
    options = {"limit_train_batches": 2, "accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        **options, max_epochs=1, callbacks=[eager()], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = DataLoader(loader.dataset, 4, shuffle=False)
    again = pl.Trainer(
        **options, max_epochs=2, callbacks=[eager()], enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="holds other batches than the interrupted run did"):
        again.fit(module, other, ckpt_path=tmp_path / "last.ckpt")


# -- what it writes ----------------------------------------------------------------------------


class Watch(pl.Callback):
    """Keeps what the callback before it found and left, at the first batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(
            {
                "buffers": {k: v.clone() for k, v in pl_module.named_buffers()},
                "optimizers": [o.state_dict() for o in trainer.optimizers],
                "parameters": {k: p.detach().clone() for k, p in pl_module.named_parameters()},
                "versions": [id(p) for p in pl_module.parameters()],
                "gradients": [p.grad for p in pl_module.parameters()],
            }
        )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_only_the_chosen_parameters_move(precision):
    before, after, callback = Watch(), Watch(), eager(parameters=["net.*"], every_n_steps=3)
    module, loader = MODULES["classifier"]()
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[before, callback, after], max_epochs=1, precision=precision,
        limit_train_batches=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert callback.num_escapes == 2
    for i, (one, two) in enumerate(zip(before.seen, after.seen, strict=True)):
        changed = {
            name
            for name, p in one["parameters"].items()
            if not torch.equal(p, two["parameters"][name])
        }
        assert bool(changed) == (i in (0, 3))
        assert all(name.startswith("net.") for name in changed)
        for name, p in two["parameters"].items():
            assert p.dtype == one["parameters"][name].dtype
        for key in ("buffers", "optimizers", "versions", "gradients"):
            assert_same(one[key], two[key], key)


def test_a_step_that_half_precision_rounds_away_is_undone():
    """At 256 bfloat16 knows no number nearer than 1: the step of 1/2 ends where it began."""

    class Coarse(Product):
        def training_step(self, batch, batch_idx):
            away = self.weights - torch.tensor([256.0, 0.0], dtype=self.weights.dtype)
            return batch.mean() - away[0] * away[0]

    callback = SaddleEscape(max_radius=1e-3)
    module = Coarse((256.0, 0.0), lr=0.0)
    trainer = train(module, callback, num_steps=2, precision="bf16-true")
    found = logged(trainer)
    assert found["step"] > 0
    assert found["actual"] < 0
    assert found["escaped"] == callback.num_escapes == 0
    assert found["loss_after"] == found["loss_before"]
    assert module.weights.tolist() == [256.0, 0.0]


def test_tied_weights_move_once():
    class Tied(Product):
        def __init__(self):
            super().__init__()
            self.again = self.weights

    module = Tied()
    trainer = train(module, SaddleEscape())
    assert logged(trainer)["escaped"] == 1
    assert loss_of(module) < 1e-6


def test_it_stops_after_max_escapes():
    one, many = Product((1e-3, 0.0), lr=0.0), Product((1e-3, 0.0), lr=0.0)
    trainer = train(one, eager(every_n_steps=1, max_escapes=1), num_steps=8)
    assert logged(trainer)["num_escapes"] == 1
    trainer = train(many, eager(every_n_steps=1), num_steps=8)
    assert logged(trainer)["num_escapes"] > 3


def test_a_second_fit_starts_anew():
    callback = SaddleEscape()
    train(Product(), callback)
    module = Product()
    train(module, callback)
    assert loss_of(module) < 1e-6
    assert callback.num_escapes == 1


# -- bad input, before the first step ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient_tol": -1.0}, ValueError, "`gradient_tol` must be at least 0, got -1.0"),
        ({"max_matvecs": 0}, ValueError, "`max_matvecs` must be at least 1, got 0"),
        ({"max_radius": -1.0}, ValueError, "`max_radius` must be positive and finite, got -1.0"),
        ({"max_escapes": 0}, ValueError, "`max_escapes` must be at least 1, got 0"),
        ({"graphs": "none"}, ValueError, "`graphs` must be 'cached' or 'lockstep', got 'none'"),
        ({"every_n_epochs": 2, "every_n_steps": 2}, ValueError, "At most one of"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be an integer of at least 1"),
        ({"mode": "test"}, ValueError, "`mode` must be 'eval' or 'train', got 'test'"),
        ({"num_batches": 0}, ValueError, "`num_batches` must be an integer of at least 1, got 0"),
        ({"parameters": "head"}, TypeError, r"Write `parameters=\['head'\]`"),
        ({"name": "My net"}, ValueError, "`name` must be snake_case"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SaddleEscape(**options)


class Failing(Product):
    """Fails in probes, from a given step on."""

    def __init__(self, fail, first=0, **settings):
        super().__init__(**settings)
        self.fail = fail
        self.first = first

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        late = self.trainer.global_step >= self.first
        return self.fail(loss) if is_probing() and late else loss


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


FAILURES = {
    "nan": (lambda loss: loss * torch.nan, "NaN or infinite"),
    "none": (lambda loss: None, "`training_step` must return the loss"),
    "detached": (lambda loss: loss.detach(), "a loss that depends on the parameters"),
    "wrong": (OnceDifferentiable.apply, "wrong second derivatives"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_measured_is_refused_before_the_first_step(name):
    class NoStep(pl.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("training began")

    fail, message = FAILURES[name]
    with pytest.raises(Exception, match=message):
        train(Failing(fail, start=(0.5, 0.2)), NoStep(), SaddleEscape())


def test_shards_are_refused():
    callback, trainer = SaddleEscape(), pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(MisconfigurationException, match="whole parameters on each device"):
        callback.on_train_start(trainer, Product())


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"must match the name.*weights"):
        train(Product(), SaddleEscape(parameters=["nett.*"]))


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("name", ["nan", "none", "detached"])
def test_a_failure_on_the_way_warns_once_and_does_nothing(name):
    fail, message = FAILURES[name]
    untouched = Product(start=(0.5, 0.2))
    train(untouched, num_steps=9)
    module = Failing(fail, first=2, start=(0.5, 0.2))
    callback = SaddleEscape(every_n_steps=2)
    with pytest.warns(UserWarning, match=f"measured nothing at step 1.*{message}") as caught:
        trainer = train(module, callback, num_steps=9)
    assert len([w for w in caught if "measured nothing" in str(w.message)]) == 1
    assert trainer.global_step == 9
    assert torch.equal(module.weights, untouched.weights)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_failure_after_the_step_puts_the_weights_back():
    class FailsAway(Product):
        """Can be measured at the origin, and tried from there, but not read once it has moved."""

        def training_step(self, batch, batch_idx):
            if is_probing() and self.moved:
                raise RuntimeError("gone")
            return super().training_step(batch, batch_idx)

        @property
        def moved(self):
            return callback.written

    class Noting(SaddleEscape):
        written = False

        def _move(self, *arguments, **settings):
            self.written = True
            try:
                return super()._move(*arguments, **settings)
            finally:
                self.written = False

    callback = Noting()
    module = FailsAway(lr=0.0)
    with pytest.warns(UserWarning, match="RuntimeError: gone"):
        train(module, callback, num_steps=2)
    assert module.weights.tolist() == [0.0, 0.0]
    assert callback.num_escapes == 0


def test_the_example_shows_what_it_says(tmp_path):
    path = Path(__file__).parents[2] / "examples" / "saddle_escape.py"
    command = [sys.executable, str(path), "--out", str(tmp_path / "pictures")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    losses = {row[0]: float(row[-1]) for row in rows if row[:1] in (["without"], ["with"])}
    assert losses["without"] == 1
    assert losses["with"] < 1e-6
    assert (tmp_path / "pictures" / "saddle_escape.png").stat().st_size > 10_000
    assert {file.name for file in tmp_path.iterdir()} == {"pictures", "optkit_logs"}
