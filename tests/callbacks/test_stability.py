"""Stability in a real Trainer."""

from __future__ import annotations

import csv
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optkit import Stability, is_probing
from lightning_optkit.board import tags
from lightning_optkit.callbacks import stability
from lightning_optkit.measures import HessianOperator
from tests.contracts import assert_observer
from tests.modules import GAN, MODULES, image_loader, images
from tests.quadratics import symmetric


def every_step(**options: Any) -> Stability:
    return Stability(**{"every_n_steps": 1, "max_overhead": None, "num_batches": 2} | options)


def train(module, data, *callbacks, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 1} | options,
    )
    trainer.fit(module, data)
    return trainer


def logged(trainer: pl.Trainer, topic: str = "optkit-stability") -> dict[str, float]:
    found = trainer.callback_metrics.items()
    return {k.split("/")[1]: float(v) for k, v in found if k.startswith(f"{topic}/")}


def rows(logger: CSVLogger) -> list[dict[str, float]]:
    """Return what was logged at each step."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [
            {k.split("/")[-1]: float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(file)
            if row.get("optkit-stability/lambda_max")
        ]


# -- the observer's contract -----------------------------------------------------------------------


@pytest.mark.parametrize("module_name", MODULES)
def test_training_is_bit_identical(module_name, tmp_path):
    assert_observer(every_step, module_name, tmp_path, limit_train_batches=3)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("module_name", ["classifier", "autoencoder"])
def test_training_is_bit_identical_under(module_name, options, tmp_path):
    assert_observer(every_step, module_name, tmp_path, **options)


@pytest.mark.parametrize("module_name", ["classifier", "gan"])
def test_training_is_bit_identical_in_train_mode(module_name, tmp_path):
    assert_observer(lambda: every_step(mode="train"), module_name, tmp_path)


def test_training_is_bit_identical_for_the_second_optimizer(tmp_path):
    assert_observer(
        lambda: every_step(optimizer_index=1, loss_index=1), "gan", tmp_path, precision="bf16-mixed"
    )


# -- what it measures ------------------------------------------------------------------------------

MATRIX = symmetric([-1.0, 0.5, 2.0, 3.0, 8.0])


class Bowl(pl.LightningModule):
    """The loss ``w @ A @ w / 2`` whose Hessian is known, in two parameters, on any batch."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.3, 0.8, 0.2], dtype=torch.float64))
        self.optimizer, self.options = optimizer, options

    def training_step(self, batch, batch_idx):
        w = torch.cat([self.a, self.b])
        return w @ MATRIX @ w / 2

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def numbers(count: int = 3) -> DataLoader:
    return DataLoader([torch.zeros(1) for _ in range(count)], batch_size=None)


def exact(**options: Any) -> Stability:
    return every_step(**{"rtol": 1e-9, "num_batches": 1} | options)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"lr": 0.1}, 20.0),
        ({"lr": 0.01, "momentum": 0.9}, 380.0),
        ({"lr": 0.01, "momentum": 0.5, "nesterov": True}, 150.0),
    ],
)
def test_the_ratio_of_a_quadratic(options, threshold):
    module = Bowl(**options)
    found = logged(train(module, numbers(), exact()))
    assert found["threshold"] == pytest.approx(threshold, rel=1e-6)  # logged as float32
    assert found["lambda_max"] == pytest.approx(8.0, rel=1e-6)
    assert found["ratio"] == pytest.approx(8.0 / threshold, rel=1e-6)
    assert found["learning_rate"] == pytest.approx(options["lr"])
    assert found["lambda_max_error"] < 1e-6
    w = torch.cat([module.a, module.b]).detach()
    g = MATRIX @ w
    assert found["step_along_gradient"] == pytest.approx(float(g @ g / (g @ MATRIX @ g)), rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_ratio_of_an_adaptive_optimizer(kind, decay):
    module = Bowl(kind, lr=0.1, weight_decay=decay)
    trainer = train(module, numbers(5), exact())
    state = trainer.optimizers[0].state
    square = torch.cat([state[p]["exp_avg_sq"] for p in (module.a, module.b)])
    d = 1 / ((square / (1 - 0.999**5)).sqrt() + 1e-8)
    decoupled = kind is torch.optim.AdamW
    hessian = MATRIX if decoupled else MATRIX + decay * torch.eye(5).double()
    top = float(torch.linalg.eigvals(d[:, None] * hessian).real.max())
    threshold = (2 - 0.1 * decay * decoupled) * 1.9 * (1 - 0.9**5) / (0.1 * 0.1)
    found = logged(trainer)
    assert found["threshold"] == pytest.approx(threshold, rel=1e-6)
    assert found["lambda_max"] == pytest.approx(top, rel=1e-6)
    assert found["ratio"] == pytest.approx(top / threshold, rel=1e-6)


def test_a_part_of_the_parameters():
    found = logged(train(Bowl(lr=0.1), numbers(), exact(parameters=["b"])))
    block = float(torch.linalg.eigvalsh(MATRIX[2:, 2:])[-1])
    assert found["ratio"] == pytest.approx(block / 20, rel=1e-6)


class Regression(pl.LightningModule):
    """A small net, the whole data in each batch."""

    def __init__(self, learning_rate=0.1, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4))
        self.learning_rate, self.optimizer, self.options = learning_rate, optimizer, options

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch[0]), nn.functional.one_hot(batch[1], 4).float()) * 2

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.learning_rate, **self.options)


def whole_data(num_steps: int) -> DataLoader:
    return DataLoader([images()] * num_steps, batch_size=None)


def run_to_the_edge(folder: Path, module: pl.LightningModule, num_steps: int) -> list[dict]:
    logger = CSVLogger(folder)
    train(module, whole_data(num_steps), every_step(num_batches=1), logger=logger)
    return rows(logger)


def test_gradient_descent_trains_at_the_edge_of_stability(tmp_path):
    """Cohen et al. 2021: the sharpness rises to 2 / lr, and hovers there."""
    torch.manual_seed(0)
    found = run_to_the_edge(tmp_path, Regression(learning_rate=0.15), 400)
    ratios = torch.tensor([row["ratio"] for row in found])
    assert len(ratios) == 400
    assert ratios[:20].max() < 0.95
    assert ((ratios[-100:] > 0.9) & (ratios[-100:] < 1.1)).all()
    assert ratios[-100:].mean() == pytest.approx(1, abs=0.02)
    products = torch.tensor([row["num_matvecs"] for row in found])
    assert (products[1:] - 1).mean() <= 5  # one is for the step along the gradient
    assert products[0] > products[1:].median() + 2  # cold, with the self-check


def test_it_follows_lambda_max_to_its_tolerance(tmp_path):
    module = Regression(learning_rate=0.2)
    x, y = images()
    truth: list[float] = []

    def loss(p):
        output = functional_call(module.net, p, (x,))
        return mse_loss(output, nn.functional.one_hot(y, 4).float()) * 2

    class Truth(pl.Callback):
        def on_train_batch_end(self, *_):
            params = {k: p.detach().clone() for k, p in module.net.named_parameters()}
            operator = HessianOperator(loss, params, self_check=False)
            truth.append(float(torch.linalg.eigvalsh(operator.dense())[-1]))

    logger = CSVLogger(tmp_path)
    train(module, whole_data(10), every_step(num_batches=1), Truth(), logger=logger)
    for row, exact_value in zip(rows(logger), truth, strict=True):
        assert row["lambda_max"] == pytest.approx(exact_value, rel=1e-3)
        assert abs(row["lambda_max"] - exact_value) <= row["lambda_max_error"] + 1e-6 * exact_value


def test_two_vectors_are_followed_and_now_and_then_looked_for_afresh(monkeypatch):
    seen = []
    real = stability.top_eigenpairs

    def recorded(operator, k, *, start, **options):
        found = real(operator, k, start=start, **options)
        seen.append((start, found.vectors))
        return found

    monkeypatch.setattr(stability, "top_eigenpairs", recorded)
    monkeypatch.setattr(stability, "_FOLLOWED", 3)
    train(Bowl(lr=0.01), numbers(7), exact())
    assert [start is None for start, _ in seen] == [True, False, False] * 2 + [True]
    for (_, previous), (start, _) in pairwise(seen):
        assert start is None or torch.equal(start, previous)
    assert seen[0][1].shape == (2, 5)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("cadence", [{}, {"every_n_steps": None, "every_n_epochs": 1}])
def test_the_learning_rate_is_that_of_the_step_just_made(interval, cadence, tmp_path):
    used = []

    class Scheduled(Bowl):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    logger = CSVLogger(tmp_path)
    train(Scheduled(), numbers(2), exact(**cadence), logger=logger, max_epochs=2)
    found = rows(logger)
    expected = used[1::2] if cadence else used
    assert [row["learning_rate"] for row in found] == pytest.approx(expected)
    assert [row["threshold"] for row in found] == pytest.approx([2 / lr for lr in expected])


def test_two_optimizers_each_with_its_own_parameters():
    module, data = MODULES["gan"]()
    first = every_step(name="generator")
    second = every_step(name="critic", optimizer_index=1, loss_index=1)
    trainer = train(module, data, first, second, limit_train_batches=3)
    for topic in ("generator", "critic"):
        found = logged(trainer, f"optkit-stability-{topic}")
        assert found["ratio"] == pytest.approx(found["lambda_max"] / found["threshold"], rel=1e-6)
        # Adam at step 3; each optimizer counts its own
        rate = found["learning_rate"]
        assert found["threshold"] == pytest.approx(3.8 * (1 - 0.9**3) / (0.1 * rate), rel=1e-5)


def test_every_tag_is_logged_and_nothing_else():
    trainer = train(*MODULES["classifier"](), every_step(), limit_train_batches=3)
    assert set(logged(trainer)) == {tag.name for tag in tags.STABILITY_SCALARS}


def test_what_is_not_defined_is_left_out():
    still = logged(train(Bowl(lr=0.0), numbers(), exact()))
    assert set(still) >= {"lambda_max", "ratio", "learning_rate"}
    assert still["ratio"] == 0
    assert "threshold" not in still
    down = Bowl(lr=0.01)
    _, vectors = torch.linalg.eigh(MATRIX)
    w = vectors[:, 0]  # along the eigenvalue of -1
    down.a.data, down.b.data = w[:2].clone(), w[2:].clone()
    found = logged(train(down, numbers(1), exact()))
    assert "step_along_gradient" not in found
    assert found["lambda_max"] == pytest.approx(8.0, rel=1e-6)


def test_the_products_are_compared_once_a_run(tmp_path):
    counts = []
    for self_check in (True, False):
        logger = CSVLogger(tmp_path / str(self_check))
        train(Bowl(lr=0.01), numbers(4), exact(self_check=self_check), logger=logger)
        counts.append([row["num_matvecs"] for row in rows(logger)])
    checked, unchecked = counts
    assert checked[0] == unchecked[0] + 2
    assert checked[1:] == unchecked[1:]


def test_lockstep_measures_the_same():
    found = []
    for graphs in ("cached", "lockstep"):
        torch.manual_seed(0)
        observer = every_step(graphs=graphs, rtol=1e-6)
        options = {"limit_train_batches": 3}
        found.append(logged(train(Regression(), image_loader(), observer, **options)))
    for key in ("lambda_max", "ratio", "step_along_gradient"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4)


class Thawing(Bowl):
    """Freezes a part at first."""

    def on_train_batch_start(self, batch, batch_idx):
        self.b.requires_grad_(batch_idx > 1)


def test_parameters_that_thaw(tmp_path):
    module = Thawing(lr=0.1)
    module.b.requires_grad_(False)
    logger = CSVLogger(tmp_path)
    train(module, numbers(4), exact(), logger=logger)
    head = float(torch.linalg.eigvalsh(MATRIX[:2, :2])[-1])
    found = [row["lambda_max"] for row in rows(logger)]
    assert found == pytest.approx([head, head, 8.0, 8.0], rel=1e-6)


# -- optimizers without a threshold ----------------------------------------------------------------


class OwnStep(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def ours(caught) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("Stability")]


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (torch.optim.LBFGS, {"lr": 0.01}, r"known \(SGD, Adam, .*got LBFGS"),
        (OwnStep, {"lr": 0.01}, "got OwnStep. A subclass may not override `step`"),
        (torch.optim.SGD, {"lr": 0.01, "maximize": True}, "must minimize, got `maximize=True`"),
    ],
)
def test_one_warning_before_the_first_step_and_the_plain_eigenvalue(kind, options, message):
    with pytest.warns(UserWarning, match=f"without a threshold and a ratio.*{message}") as caught:
        found = logged(train(Bowl(kind, **options), numbers(), exact()))
    assert len(ours(caught)) == 1
    assert found["lambda_max"] == pytest.approx(8.0, rel=1e-6)
    assert found["learning_rate"] == pytest.approx(0.01)
    assert set(found) == {tag.name for tag in tags.STABILITY_SCALARS} - {"threshold", "ratio"}


class LateCritic(GAN):
    """A critic that is never stepped."""

    def configure_optimizers(self):
        return super().configure_optimizers()[0]

    def training_step(self, batch, batch_idx):
        optimizer, _ = self.optimizers()
        loss = self.critic(self.generator(torch.randn(4, 3))).mean()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_an_optimizer_that_made_no_step_has_no_threshold_yet():
    with pytest.warns(UserWarning, match="must have made a step, got Adam") as caught:
        trainer = train(
            LateCritic(), image_loader(), every_step(optimizer_index=1), limit_train_batches=3
        )
    assert len(ours(caught)) == 1
    assert logged(trainer) == {}


# -- before and after ------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    observer, module = exact(), Bowl(torch.optim.Adam, lr=0.1)
    trainer = train(module, numbers(), observer)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert observer._optimizer is None
    assert observer._vectors is None
    assert observer._history == []
    trainer.fit_loop.max_epochs = 2  # and it can be used again
    trainer.fit(module, numbers())
    assert logged(trainer)["lambda_max"] > 0
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_nothing_is_left_behind_by_an_interrupted_run():
    class Stops(Bowl):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("stop here")

    observer, module = exact(), Stops(lr=0.1)
    kept = []
    configured = module.configure_optimizers
    module.configure_optimizers = lambda: kept.append(configured()) or kept[0]
    with pytest.raises(RuntimeError, match="stop here"):
        train(module, numbers(4), observer)
    assert not kept[0]._optimizer_step_pre_hooks
    assert observer._vectors is None


def test_a_resumed_run_goes_on_and_its_checkpoint_is_small(tmp_path):
    module = Bowl(torch.optim.Adam, lr=0.1)
    trainer = train(module, numbers(), exact())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    state = saved["Stability[optkit-stability]"]
    assert not any(isinstance(value, Tensor) for value in state["cadence"].values())
    assert list(state) == ["cadence"]
    straight = train(Bowl(torch.optim.Adam, lr=0.1), numbers(), exact(), max_epochs=2)
    again = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[exact()], max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    again.fit(Bowl(torch.optim.Adam, lr=0.1), numbers(), ckpt_path=tmp_path / "last.ckpt")
    for key in ("threshold", "ratio", "lambda_max"):
        assert logged(again)[key] == pytest.approx(logged(straight)[key], rel=1e-6)


def test_tensorboard_gets_one_figure_of_all_points(tmp_path, monkeypatch):
    drawn = []
    real = stability.Stability.figures

    def figures(self, result):
        drawn.append([step for step, _ in self._history])
        return real(self, result)

    monkeypatch.setattr(stability.Stability, "figures", figures)
    logger = TensorBoardLogger(tmp_path)
    train(Bowl(lr=0.1), numbers(5), exact(), logger=logger)
    log = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    assert [image.step for image in log.Images("optkit-stability/history")] == [4]
    assert [point.step for point in log.Scalars("optkit-stability/ratio")] == [0, 1, 2, 3, 4]
    assert drawn == [[0, 1, 2, 3, 4]]


def test_the_history_is_bounded_and_keeps_both_ends(monkeypatch):
    drawn = []
    monkeypatch.setattr(stability, "_MAX_POINTS", 6)
    monkeypatch.setattr(
        stability.Stability, "figures", lambda self, _: drawn.extend(self._history) or {}
    )
    train(Bowl(lr=0.01), numbers(30), exact())
    steps = [step for step, _ in drawn]
    assert len(steps) <= 6
    assert (steps[0], steps[-1]) == (0, 29)
    assert steps == sorted(set(steps))


def test_the_default_cadence_stays_within_the_budget(tmp_path):
    logger = CSVLogger(tmp_path)
    observer = Stability(num_batches=1, max_overhead=1e-6)
    train(Bowl(lr=0.01), numbers(8), observer, logger=logger)
    assert [row["step"] for row in rows(logger)] == [0, 7]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_index": -1}, "`optimizer_index` must be at least 0, got -1"),
        ({"rtol": -1e-3}, "`rtol` must be at least 0"),
        ({"rtol": math.nan}, "`rtol` must be at least 0"),
        ({"graphs": "none"}, "`graphs` must be 'cached' or 'lockstep', got 'none'"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, "At most one of"),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1"),
        ({"mode": "test"}, "`mode` must be 'eval' or 'train'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Stability(**options)


class NoStep(pl.Callback):
    def on_train_batch_start(self, *_):
        raise AssertionError("training began")


@pytest.mark.parametrize(
    ("observer", "error", "message"),
    [
        (
            lambda: every_step(optimizer_index=2),
            MisconfigurationException,
            "must be that of one of the module's 2 optimizers, counted from 0, got 2",
        ),
        (
            lambda: every_step(parameters=["critic.*"]),
            ValueError,
            r"must be owned by optimizer 0, got critic\.0\.weight.*Set `optimizer_index`",
        ),
        (lambda: every_step(parameters=["crit"]), ValueError, "must match the name"),
    ],
)
def test_bad_choices_are_refused_before_the_first_step(observer, error, message):
    with pytest.raises(error, match=message):
        train(GAN(), image_loader(), NoStep(), observer())


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


class Opaque(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return OnceDifferentiable.apply(loss) if is_probing() else loss


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_wrong_derivatives_are_refused_with_one_warning():
    with pytest.warns(UserWarning, match="wrong second derivatives") as caught:
        trainer = train(Opaque(), whole_data(3), every_step())
    assert len(ours(caught)) == 1
    assert logged(trainer) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        measured = train(Opaque(), whole_data(1), every_step(self_check=False))
    assert logged(measured)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
    def test_training_is_bit_identical(self, precision, tmp_path):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert_observer(
                every_step, "lstm", tmp_path, accelerator="gpu", devices=1, precision=precision
            )
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}])
    def test_ratio_is_that_of_the_cpu(self, options):
        found = {}
        for accelerator in ("cpu", "gpu"):
            torch.manual_seed(0)
            extra = options if accelerator == "gpu" else {}
            module = Regression(0.01, torch.optim.AdamW, **extra)
            observer = every_step(num_batches=1, rtol=1e-5)
            found[accelerator] = logged(
                train(module, whole_data(3), observer, accelerator=accelerator)
            )
        for key in ("threshold", "ratio", "learning_rate"):
            assert found["gpu"][key] == pytest.approx(found["cpu"][key], rel=1e-3)
