"""EMA in a real Trainer."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_optkit import EMA, SWA
from lightning_optkit.bridge.averaging import span
from tests.callbacks.averaging_modules import (
    BATCHES,
    AdversarialNet,
    MadeInConfigureModel,
    MadeInSetup,
    Net,
    Odd,
    Snapshots,
    StopsAfter,
    assert_close,
    data,
    differs,
    fit,
    mean_of,
    samples,
    warned,
    weights_of,
)
from tests.contracts import assert_resumes, assert_same, rng_state, run


def ema_of(snapshots, decay, *, warmup=False):
    """Return Σ_t w_t model_t with w_t = (1 - d_t) Π_{u > t} d_u, in float64."""
    decays = [0.0] + [
        min(decay, (1 + n) / (10 + n)) if warmup else decay for n in range(1, len(snapshots))
    ]
    weights, rest = [], 1.0
    for d in reversed(decays):
        weights.insert(0, (1 - d) * rest)
        rest *= d
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    return mean_of(snapshots, weights)


# -- which models are averaged -----------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9, 0.999])
def test_the_average_is_its_closed_form(decay, warmup):
    ema, snapshots, module = EMA(decay, warmup=warmup), Snapshots(), Net()
    fit(module, ema, snapshots, precision="64-true")
    assert ema.num_averaged == 18
    assert_close(weights_of(module), ema_of(snapshots.by_step, decay, warmup=warmup), atol=1e-12)
    assert ema.summary == "EMA: average of 18 models, steps 1–18"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 4}, [0, 4, 8, 12, 16]),
        ({"start_step": 7}, list(range(7, 18))),
        ({"start_step": 7, "every_n_steps": 5}, [7, 12, 17]),
        ({"start_epoch": 2}, list(range(12, 18))),
        ({"start_epoch": 1, "start_step": 9, "every_n_steps": 3}, [9, 12, 15]),
        ({"start_epoch": 2, "start_step": 9}, list(range(12, 18))),
        ({"start_step": 17}, [17]),
    ],
    ids=str,
)
def test_the_first_model_is_the_one_at_start_and_nothing_before_it_enters(options, steps):
    ema, snapshots, module = EMA(0.8, warmup=False, **options), Snapshots(), Net()
    fit(module, ema, snapshots, precision="64-true")
    models = [snapshots.by_step[s] for s in steps]
    assert_close(weights_of(module), ema_of(models, 0.8), atol=1e-12)
    assert ema.summary.endswith(f", {span('step', steps[0] + 1, steps[-1] + 1)}")


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_a_half_life_is_in_steps(every_n_steps):
    ema = EMA(half_life=6, every_n_steps=every_n_steps, warmup=False)
    snapshots, module = Snapshots(), Net()
    fit(module, ema, snapshots, precision="64-true")
    decay = 0.5 ** (every_n_steps / 6)
    expected = ema_of(snapshots.by_step[::every_n_steps], decay)
    assert_close(weights_of(module), expected, atol=1e-12)


def test_it_agrees_with_torch():
    class Torchs(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not hasattr(self, "model"):
                self.model = AveragedModel(pl_module.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            self.model.update_parameters(pl_module.net)

    torchs, module = Torchs(), Net()
    fit(module, EMA(0.9, warmup=False), torchs, precision="64-true")
    assert_close(
        dict(module.net.named_parameters()),
        dict(torchs.model.module.named_parameters()),
        atol=1e-14,
    )


def test_steps_are_optimizer_steps_under_accumulation():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Net()
    fit(module, ema, snapshots, precision="64-true", accumulate_grad_batches=4)
    models = [snapshots.by_step[b] for b in (3, 5, 9, 11, 15, 17)]  # 4 batches, or the last 2
    assert_close(weights_of(module), ema_of(models, 0.8), atol=1e-12)


class Overflows(Net):
    """Its gradient is infinite in some batches."""

    def loss(self, batch):
        loss = super().loss(batch)
        bad = self.trainer.training and self.num_training_steps % BATCHES in (2, 5)
        return loss * float("inf") if bad else loss


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_mixed_precision_skipped_do_not_count(fused):
    def sgd(module):
        return torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    ema, snapshots = EMA(0.8, warmup=False, every_n_steps=2), Snapshots()
    module = Overflows(optimizer=sgd)
    trainer = fit(module, ema, snapshots, plugins=[precision])
    assert trainer.global_step == 18
    stepped = [b for b in range(18) if b % BATCHES not in (1, 4)]
    models = [snapshots.by_step[b] for b in stepped[::2]]
    assert ema.num_averaged == 6
    assert_close(weights_of(module), ema_of(models, 0.8), atol=1e-6)


def test_half_precision_is_averaged_in_single_precision():
    ema, snapshots, module = EMA(0.9999, warmup=False), Snapshots(), Net()
    loader = data(dtype=torch.bfloat16)
    fit(module, ema, snapshots, precision="bf16-true", loader=loader, val=False)
    expected = ema_of(snapshots.by_step, 0.9999)
    average = ema._weights.state(average_is_in_state_dict=True)["average"]
    for name, value in average.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), expected[name], rtol=0, atol=1e-6), name
    first = snapshots.by_step[0]
    assert any(not torch.equal(average[n], first[n].float()) for n in average)  # it moved


def test_validation_sees_the_average_with_the_last_step_in_it():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Net()
    fit(module, ema, snapshots, precision="64-true", val_check_interval=3)
    assert len(module.seen["validate"]) == 6
    for i, seen in enumerate(module.seen["validate"]):
        assert_close(seen, ema_of(snapshots.by_step[: 3 * i + 3], 0.8), atol=1e-12)


def test_the_sanity_check_before_training_sees_the_weights_of_training():
    class NotesSanity(Net):
        def validation_step(self, batch, batch_idx):
            self.note("validate")

    ema, module = EMA(), NotesSanity()
    fit(module, ema, epochs=1, num_sanity_val_steps=1, limit_val_batches=1)
    assert len(module.seen["validate"]) == 2
    assert differs(*module.seen["validate"])


# -- how runs end ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "options", "num_steps"),
    [
        ([], {"max_steps": 8}, 8),
        ([], {"epochs": -1, "max_steps": 8}, 8),
        ([StopsAfter(2)], {"epochs": 20}, 12),
        ([StopsAfter(2)], {"epochs": -1, "max_time": "00:00:00:30"}, 12),
        ([], {"epochs": 1}, 6),
        ([], {"fast_dev_run": True}, 1),
    ],
    ids=["max_steps", "no end of epochs", "early", "max_time", "one epoch", "fast_dev_run"],
)
def test_the_last_step_is_in_the_average_however_the_run_ends(callbacks, options, num_steps):
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Net()
    fit(module, ema, snapshots, *callbacks, precision="64-true", **options)
    assert len(snapshots.by_step) == num_steps
    assert_close(weights_of(module), ema_of(snapshots.by_step, 0.8), atol=1e-12)


def test_a_run_that_ends_before_start_keeps_its_trained_weights_and_says_so():
    ema, snapshots, module = EMA(start_epoch=5), Snapshots(), Net()
    with warned("`EMA` averaged nothing, and .* weights: training ended before it began"):
        fit(module, ema, snapshots, StopsAfter(2), epochs=20)
    assert_close(weights_of(module), snapshots.at_end, atol=0)
    assert ema.summary == "EMA: nothing averaged"


def test_a_callback_object_is_as_new_in_another_run():
    reused, fresh = EMA(start_step=2), EMA(start_step=2)
    fit(Net(), reused, epochs=5)
    first, second = Net(norm=True), Net(norm=True)
    fit(first, reused)
    fit(second, fresh)
    assert_same(weights_of(second), weights_of(first))
    assert_same(fresh.state_dict(), reused.state_dict())


def test_a_second_fit_of_the_same_trainer_counts_anew():
    ema, snapshots, module = EMA(0.8, warmup=False, every_n_steps=4), Snapshots(), Net()
    trainer = fit(module, ema, snapshots, precision="64-true")
    snapshots.by_step.clear()
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, data(dtype=torch.float64), data(dtype=torch.float64))
    assert len(snapshots.by_step) == 12
    models = [snapshots.by_step[s] for s in (0, 4, 8)]
    assert_close(weights_of(module), ema_of(models, 0.8), atol=1e-12)


# -- training itself ---------------------------------------------------------------------------


class AtTrainEnd(pl.Callback):
    """Notes what training leaves before anything is handed over."""

    def on_train_end(self, trainer, pl_module):
        self.found = {
            "weights": weights_of(pl_module),
            "gradients": [p.grad.clone() for p in pl_module.parameters() if p.grad is not None],
            "optimizers": [o.state_dict() for o in trainer.optimizers],
            "rng": rng_state(),
            "addresses kept": all(
                p is q for p, q in zip(pl_module.parameters(), self.before, strict=True)
            ),
        }

    def on_fit_start(self, trainer, pl_module):
        self.before = list(pl_module.parameters())


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"device": "cpu"}], ids=str)
def test_training_is_bit_identical_with_validation_on_the_average(refresh, options):
    options = dict(options)
    own = {"device": options.pop("device", None)}
    found, by_step = [], []
    for ema in ([], [EMA(0.9, refresh_norm_stats=refresh, **own)]):
        pl.seed_everything(7, verbose=False)
        at_end, snapshots = AtTrainEnd(), Snapshots()
        fit(
            Net(norm=True), *ema, at_end, snapshots, loader=data(shuffle=True),
            val_check_interval=0.5, **options,
        )  # fmt: skip
        found.append(at_end.found)
        by_step.append(snapshots.by_step)
    assert found[0]["addresses kept"]
    assert_same(found[0], found[1])
    assert_same(by_step[0], by_step[1])


@pytest.mark.parametrize(
    ("module_name", "options"),
    [
        ("classifier", {}),
        ("classifier", {"precision": "bf16-mixed"}),
        ("classifier", {"accumulate_grad_batches": 2}),
        ("gan", {}),
        ("gan", {"precision": "bf16-mixed"}),
        ("autoencoder", {"accumulate_grad_batches": 2}),
        ("compiled_inside", {}),
    ],
    ids=str,
)
def test_a_run_that_only_keeps_the_average_leaves_no_trace(module_name, options, tmp_path):
    without = run(module_name, [], tmp_path / "without", **options)
    ema = EMA(use_for=())
    with_it = run(module_name, [ema], tmp_path / "with", **options)
    assert_same(without, with_it)
    assert ema.num_averaged == (6 if "accumulate_grad_batches" in options else 10)


def test_the_weights_of_training_are_there_again_after_each_validation():
    class AfterValidation(pl.Callback):
        found = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.found = (*self.found, weights_of(pl_module))

    after, snapshots = AfterValidation(), Snapshots()
    fit(Net(norm=True), EMA(0.9), after, snapshots, val_check_interval=1)
    for before, now in zip(snapshots.by_step, after.found[1:], strict=False):
        assert_same(before, now)


# -- norm layers -------------------------------------------------------------------------------


def test_statistics_of_norm_layers_are_averaged():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Net(norm=True)
    fit(module, ema, snapshots, precision="64-true")
    assert_close(weights_of(module), ema_of(snapshots.by_step, 0.8), atol=1e-12)
    assert module.net[0].num_batches_tracked == 18


def test_statistics_of_norm_layers_are_taken_anew_where_asked():
    module, ema = Net(norm=True), EMA(0.8, refresh_norm_stats=True)
    fit(module, ema, val_check_interval=0.5)
    x = samples()[0].double()
    assert torch.allclose(module.net[0].running_mean.double(), x.mean(0), rtol=0, atol=1e-6)
    assert torch.allclose(module.net[0].running_var.double(), x.var(0), rtol=0, atol=1e-6)
    assert ema.summary.endswith("normalization statistics from 24 samples")
    for seen in module.seen["validate"]:
        assert torch.equal(seen["net.0.running_mean"], module.net[0].running_mean)


# -- modules -----------------------------------------------------------------------------------


def test_tied_frozen_empty_and_integer_tensors_and_a_module_that_cannot_be_copied():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Odd()
    fit(module, ema, snapshots, precision="64-true")
    expected = ema_of(snapshots.by_step, 0.8)
    names = dict(module.named_parameters()).keys() | {"trace"}
    found = {n: w for n, w in weights_of(module).items() if n in names}
    assert_close(found, {n: expected[n] for n in found}, atol=1e-12)
    assert module.tied.weight is module.net[0].weight
    for name in ("count", "scratch", "mask"):  # the module's own
        assert torch.equal(getattr(module, name), snapshots.at_end[name])
    for name in ("count", "scratch", "mask"):
        for i, seen in enumerate(module.seen["validate"]):
            assert torch.equal(seen[name], snapshots.by_epoch[i][name])


@pytest.mark.parametrize("kind", [MadeInSetup, MadeInConfigureModel])
def test_parameters_made_in_setup_and_configure_model(kind):
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), kind()
    fit(module, ema, snapshots, precision="64-true")
    assert_close(weights_of(module), ema_of(snapshots.by_step, 0.8), atol=1e-12)


def test_a_batch_in_which_two_optimizers_step_counts_once():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), AdversarialNet()
    trainer = fit(module, ema, snapshots, precision="64-true")
    assert trainer.global_step == 36
    assert ema.num_averaged == 18
    assert_close(weights_of(module), ema_of(snapshots.by_step, 0.8), atol=1e-12)


def test_lbfgs_with_its_many_closures_counts_once():
    def lbfgs(module):
        return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Net(optimizer=lbfgs)
    fit(module, ema, snapshots, precision="64-true")
    assert module.num_training_steps > 18
    assert_close(weights_of(module), ema_of(snapshots.by_step, 0.8), atol=1e-12)


class CompiledInside(Net):
    def __init__(self):
        super().__init__(norm=True)
        self.net = torch.compile(self.net, backend="eager")


def test_compiled_code_reads_the_average():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), CompiledInside()
    trainer = fit(module, ema, snapshots, precision="64-true")
    assert_close(weights_of(module), ema_of(snapshots.by_step, 0.8), atol=1e-12)
    plain = fit(Net(norm=True), EMA(0.8, warmup=False), precision="64-true")
    logged, expected = (float(t.callback_metrics["val_loss"]) for t in (trainer, plain))
    assert logged == pytest.approx(expected, rel=1e-12)


class Scores(Net):
    """Keeps its best score in a buffer, as users do."""

    def __init__(self, *, start, assigns):
        super().__init__()
        self.register_buffer("best", torch.tensor(start))
        self.assigns = assigns
        self.found = []

    def on_validation_epoch_end(self):
        if self.trainer.sanity_checking:
            return
        score = torch.tensor([0.5, 0.25, 0.375, 0.75][self.current_epoch])
        best = torch.minimum(self.best, score.to(self.best))
        if self.assigns:
            self.best = best
        else:
            self.best.copy_(best)

    def on_train_epoch_start(self):
        self.found.append(float(self.best))


@pytest.mark.parametrize("start", [9.0, torch.inf])
@pytest.mark.parametrize("assigns", [True, False], ids=["assigned", "in place"])
def test_a_best_score_that_validation_keeps_in_a_buffer_is_the_best(assigns, start):
    """Also the next validation must find it, and not the average of what it was."""
    ema, module = EMA(0.9), Scores(start=start, assigns=assigns)
    fit(module, ema, epochs=4, precision="64-true")
    assert module.found == [start, 0.5, 0.25, 0.25]
    assert float(module.best) == 0.25


# -- not finite --------------------------------------------------------------------------------


class Spoils(pl.Callback):
    """Makes a tensor NaN, wholly or in one place, for the end of one batch."""

    def __init__(self, step, places=slice(None)):
        self.step = step
        self.places = places

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step + 1:
            self.kept = pl_module.net[0].weight.detach().clone()
            pl_module.net[0].weight.data.view(-1)[self.places] = torch.nan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step + 1:
            pl_module.net[0].weight.data.copy_(self.kept)


def test_a_model_that_is_not_finite_is_left_out_with_a_warning():
    ema, snapshots, module = EMA(0.8, warmup=False), Snapshots(), Net()
    with warned("`EMA` leaves out the weights after step 8, which are not finite"):
        fit(module, Spoils(7), ema, snapshots, precision="64-true")
    models = [m for step, m in enumerate(snapshots.by_step) if step != 7]
    assert_close(weights_of(module), ema_of(models, 0.8), atol=1e-12)
    assert ema.summary == ("EMA: average of 17 models, steps 1–18, 1 left out that were not finite")


def test_an_average_that_is_not_finite_is_never_used(tmp_path):
    ema, snapshots, module = EMA(0.8), Snapshots(), Net()
    with warned("The average of `EMA` is not finite, and is not used"):
        trainer = fit(module, Spoils(7, places=-1), ema, snapshots)
    assert_close(weights_of(module), snapshots.at_end, atol=0)
    for seen, raw in zip(module.seen["validate"][1:], snapshots.by_epoch[1:], strict=True):
        assert_close(seen, raw, atol=0)
    path = tmp_path / "end.ckpt"
    trainer.save_checkpoint(path)
    assert_same(snapshots.at_end, dict(torch.load(path, weights_only=True)["state_dict"]))
    with warned("The average of `EMA` is not finite, and is not used"):
        trainer.test(module, data(), ckpt_path=path, verbose=False)
    assert_same(snapshots.at_end, module.seen["test"][-1])


# -- logged ------------------------------------------------------------------------------------


def rows_of(logger):
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_average_is_logged_whenever_the_trainer_logs(tmp_path):
    logger, snapshots = CSVLogger(tmp_path), Snapshots()
    ema = EMA(0.8, warmup=False, start_step=2)
    fit(Net(), ema, snapshots, logger=logger, log_every_n_steps=5, precision="64-true")
    rows = [r for r in rows_of(logger) if r["optkit-averaging/num_averaged"]]
    steps = [int(r["step"]) for r in rows]
    assert steps == [2, 4, 9, 14, 17]
    assert [float(r["optkit-averaging/num_averaged"]) for r in rows] == [1, 3, 8, 13, 16]
    for row, step in zip(rows, steps, strict=True):
        average = ema_of(snapshots.by_step[2 : step + 1], 0.8)
        raw = snapshots.by_step[step]
        square = sum((average[n] - raw[n]).square().sum() for n in average)
        norm = sum(w.square().sum() for w in raw.values())
        expected = (square / norm).sqrt().item()
        assert float(row["optkit-averaging/distance"]) == pytest.approx(expected, abs=1e-6)
    events = [(int(r["step"]), r["optkit-events/averaging"]) for r in rows_of(logger)]
    assert [e for e in events if e[1]] == [(2, "1.0"), (17, "16.0")]


def test_the_summary_is_printed_once_at_the_end(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(Net(), EMA())
    assert caplog.text.count("EMA: average of") == 1
    assert "EMA: average of 18 models, steps 1–18. The module holds the average." in caplog.text


# -- resumed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_name", "options"),
    [
        ("classifier", {}),
        ("classifier", {"precision": "bf16-mixed"}),
        ("classifier", {"accumulate_grad_batches": 2, "limit_train_batches": 6}),
        ("autoencoder", {"precision": "bf16-mixed"}),
        ("autoencoder", {"precision": "bf16-true"}),
        ("autoencoder", {"accumulate_grad_batches": 2, "limit_train_batches": 6}),
        ("gan", {}),
        ("gan", {"precision": "bf16-mixed"}),
        ("compiled", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("start_epoch", [0, 2], ids=["during the average", "before the average"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    module_name, options, start_epoch, tmp_path
):
    ema = assert_resumes(
        lambda: EMA(0.9, start_epoch=start_epoch), module_name, tmp_path, **options
    )
    assert ema.num_averaged


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 3},
        {"half_life": 4, "warmup": False},
        {"start_step": 4, "every_n_steps": 2},
        {"refresh_norm_stats": True},
        {"refresh_norm_stats": "layerwise", "every_n_steps": 2},
        {"use_for": ()},
        {"use_for": ("test",)},
        {"device": "cpu", "name": "slow"},
    ],
    ids=str,
)
def test_a_resumed_run_with_settings_ends_as_one_that_was_not_interrupted(options, tmp_path):
    ema = assert_resumes(lambda: EMA(**options), "classifier", tmp_path)
    assert ema.num_averaged


# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), such as 0.999, got 1.0"),
        ({"decay": -0.1}, r"`decay` must be in \[0, 1\)"),
        ({"half_life": 0}, "`half_life` must be a positive number of steps, such as 500, got 0"),
        (
            {"decay": 0.9, "half_life": 3},
            "At most one of `decay` and `half_life` must be given, got decay=0.9 and half_life=3",
        ),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"every_n_steps": 1.5}, "`every_n_steps` must be an integer"),
        ({"start_step": -1}, "`start_step` must be an integer of at least 0, got -1"),
        ({"start_epoch": 0.5}, "`start_epoch` must be an integer of at least 0, got 0.5"),
        ({"use_for": ("train",)}, "`use_for` must be a tuple of 'validate', 'test', 'predict'"),
        ({"use_for": None}, "`use_for` must be a tuple of 'validate', 'test', 'predict', got None"),
        ({"every_n_steps": True}, "`every_n_steps` must be an integer of at least 1, got True"),
        ({"half_life": float("inf")}, "`half_life` must be a positive number of steps"),
        ({"half_life": "5"}, "`half_life` must be a positive number of steps"),
        (
            {"device": "gpu"},
            "`device` must be one of torch's, such as 'cpu' or 'cuda:0', got 'gpu'",
        ),
        ({"name": "slow-one"}, "`name` must be snake_case"),
        ({"refresh_norm_stats": -1}, "`refresh_norm_stats` must be True, False, a number"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        EMA(**options)


def test_decay_is_the_usual_one_unless_it_is_given():
    assert EMA().decay == 0.999
    assert EMA(0.5).decay == EMA(half_life=1).decay == 0.5


@pytest.mark.parametrize(
    ("own", "options", "text"),
    [
        ({"start_epoch": 3}, {}, "`start_epoch` must lie before the end of training, at 3, got 3"),
        ({"start_step": 9}, {"max_steps": 9}, "`start_step` must lie before the end of"),
    ],
)
def test_a_start_after_the_end_is_refused_before_the_first_step(own, options, text):
    module = Net()
    with pytest.raises(MisconfigurationException, match=text):
        fit(module, EMA(**own), **options)
    assert module.num_training_steps == 0


def test_a_module_without_an_optimizer_is_refused():
    class Frozen(Net):
        def configure_optimizers(self):
            return None

    with (
        warned("`LightningModule.configure_optimizers` returned `None`"),
        pytest.raises(MisconfigurationException, match="`configure_optimizers` must return an"),
    ):
        fit(Frozen(), EMA())


def test_a_layer_that_is_replaced_during_the_average_is_refused():
    class Replaces(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[1] = nn.PReLU()

    with pytest.raises(
        ValueError, match=r"must stay the same while .* got changes in net.1.weight"
    ):
        fit(Net(), EMA(), Replaces())


@pytest.mark.filterwarnings("ignore:.*fast_dev_run")
def test_a_trial_run_of_one_batch_averages_whatever_the_start(tmp_path):
    for callback in (EMA(start_step=500), EMA(start_epoch=50), SWA(start=30), SWA(start="99st")):
        fit(Net(), callback, fast_dev_run=True)
        assert callback.num_averaged == 1


@pytest.mark.parametrize("callback", [EMA(), SWA(start=0.3)], ids=["EMA", "SWA"])
def test_a_run_whose_weights_are_never_finite_is_told_why_nothing_was_averaged(callback):
    with warned("its trained weights: no weights were finite when it was due. Lower the learning"):
        fit(Net(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=float("inf"))), callback)
    assert callback.num_averaged == 0
