"""LossLandscape in a real Trainer."""

from __future__ import annotations

import gc
import math
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optkit import LossLandscape, is_probing
from lightning_optkit.board.tags import LANDSCAPE_SCALARS
from tests.contracts import (
    Interrupter,
    Interruption,
    assert_observer,
    assert_same,
    run_resumable,
)
from tests.modules import MODULES, DictAutoencoder, images


def small(kind="plane", directions="random", **options: Any) -> LossLandscape:
    return LossLandscape(
        kind, directions, **{"max_overhead": None, "num_batches": 2, "resolution": 3} | options
    )


class Keeps(pl.Callback):
    """Keeps the weights before each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})


class Measures(LossLandscape):
    """Keeps its last picture."""

    def measure(self, *args):
        self.report = super().measure(*args)
        return self.report


def train(module, data, *callbacks, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 2} | options,
    )
    trainer.fit(module, data)
    return trainer


def logged(trainer: pl.Trainer, topic: str = "optkit-landscape") -> dict[str, float]:
    found = trainer.callback_metrics.items()
    return {k.split("/")[1]: float(v) for k, v in found if k.startswith(f"{topic}/")}


def autoencoder(n: int = 12, **options: Any) -> tuple[pl.LightningModule, DataLoader]:
    pl.seed_everything(3, verbose=False)
    return DictAutoencoder().double(), DataLoader([{"image": x} for x in images(n)[0].double()], 6)


def loss_at(module: pl.LightningModule, weights: dict[str, torch.Tensor], loader: Any) -> float:
    """Return the mean loss over all samples with these weights, in eval mode."""
    module.load_state_dict(weights)
    module.eval()
    with torch.no_grad():
        losses = [float(module.training_step(batch)["loss"]) for batch in loader]
    return sum(losses) / len(losses)


def keep(kind: str, directions: str, **options: Any) -> Measures:
    return Measures(kind, directions, max_overhead=None, num_batches=2, **options)


# -- the observer's contract -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_name", "kind", "directions", "options"),
    [
        ("classifier", "plane", "trajectory", {"accumulate_grad_batches": 2}),
        ("gan", "line", "init", {}),
        ("autoencoder", "plane", "hessian", {"precision": "bf16-mixed"}),
        ("transformer", "plane", "random", {}),
    ],
    ids=str,
)
def test_training_is_bit_identical(module_name, kind, directions, options, tmp_path):
    assert_observer(
        lambda: small(kind, directions, every_n_epochs=1), module_name, tmp_path,
        **{"limit_train_batches": 4} | options,
    )  # fmt: skip


def test_training_is_bit_identical_with_fresh_statistics_and_early_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_optkit.callbacks.loss_landscape._EARLY_SECONDS", 0.0)
    options = {"every_n_epochs": 1, "norm_statistics": "estimated", "resolution": 9}
    assert_observer(lambda: small(**options), "classifier", tmp_path, limit_train_batches=2)


def test_a_resumed_run_has_the_whole_path(tmp_path):
    def run(callback, **options):
        pl.seed_everything(1, verbose=False)
        run_resumable("autoencoder", [callback], tmp_path, **options)
        return callback

    whole, cut, resumed = (keep("plane", "trajectory", resolution=3) for _ in range(3))
    run(whole)
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Interruption):
        run_resumable("autoencoder", [cut, Interrupter("mid-epoch", path)], tmp_path)
    run(resumed, ckpt_path=path)
    taken, again = (each.state_dict()["path"] for each in (whole, resumed))
    assert_same(taken, again)
    assert taken["steps"] == list(range(16))
    assert torch.equal(whole.report.picture.losses, resumed.report.picture.losses)


# -- the picture -----------------------------------------------------------------------------------


def test_the_middle_is_the_loss_and_a_line_goes_to_the_weights_before_training():
    module, loader = autoencoder()
    line = keep("line", "init", resolution=5)
    kept = Keeps()
    trainer = train(module, loader, line, kept)
    here = {k: v.clone() for k, v in module.state_dict().items()}
    first = kept.weights[0]
    for t, loss in zip(line.report.picture.positions, line.report.picture.losses, strict=True):
        between = {k: here[k] + float(t) * (first[k] - here[k]) for k in here}
        assert float(loss) == pytest.approx(loss_at(module, between, loader), rel=1e-12)
    found = logged(trainer)
    assert found["loss"] == pytest.approx(loss_at(module, here, loader), rel=1e-6)
    assert (found["num_losses"], found["num_samples"]) == (5, 12)
    assert set(found) <= {tag.name for tag in LANDSCAPE_SCALARS}


def test_the_plane_of_a_path_holds_its_points():
    module, loader = autoencoder()
    plane = keep("plane", "trajectory", resolution=5)
    kept = Keeps()
    trainer = train(module, loader, plane, kept, max_epochs=1, limit_train_batches=2)
    report = plane.report
    assert logged(trainer)["explained"] == pytest.approx(1.0)  # three points lie in a plane
    names = [name for name, _ in module.named_parameters()]
    here = torch.cat([module.state_dict()[n].flatten() for n in names])
    for weights, place in zip(kept.weights, report.trajectory.path, strict=False):
        there = here + place @ report.trajectory.directions
        truth = torch.cat([weights[name].flatten() for name in names])
        torch.testing.assert_close(there, truth, rtol=1e-10, atol=1e-12)
    path, picture = report.trajectory.path, report.picture
    assert float(picture.x[0]) < float(path[:, 0].min())
    assert float(path[:, 1].max()) < float(picture.y[-1])


def test_a_line_ends_at_the_loss_of_a_checkpoint_with_its_running_statistics(tmp_path):
    module, loader = MODULES["classifier"]()
    trainer = train(module, loader, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    stored = {k: v.clone() for k, v in module.state_dict().items()}
    line = Measures(
        "line", str(tmp_path / "first.ckpt"), num_batches=None, data=(data := list(loader)),
        max_overhead=None, loss_fn=cross_entropy_of, resolution=3,
    )  # fmt: skip
    train(module, loader, line, max_epochs=2)
    here = {k: v.clone() for k, v in module.state_dict().items()}
    ends = []
    for weights in (here, stored):
        module.load_state_dict(weights)
        module.eval()
        with torch.no_grad():
            losses = torch.stack([cross_entropy_of(module, batch) for batch in data])
            ends.append(float(losses.mean()))
    assert line.report.picture.losses[[0, -1]].tolist() == pytest.approx(ends, rel=1e-6)
    assert not torch.equal(here["net.1.running_mean"], stored["net.1.running_mean"])


def test_statistics_are_estimated_anew_at_every_point_if_asked():
    module, loader = MODULES["classifier"]()
    line = Measures(
        "line", "init", num_batches=None, data=(data := list(loader)), max_overhead=None,
        loss_fn=cross_entropy_of, resolution=3, norm_statistics="estimated",
    )  # fmt: skip
    kept = Keeps()
    trainer = train(module, loader, line, kept)
    here = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.cat([batch[0] for batch in data])
    truth = []
    for t in (0, 0.5, 1):
        weights = {k: torch.lerp(here[k], kept.weights[0][k], t) if here[k].is_floating_point()
                   else here[k] for k in here}  # fmt: skip
        module.load_state_dict(weights)
        module.eval()
        with torch.no_grad():
            convolution, norm = module.net[0], module.net[1]
            inputs = convolution(x).double().transpose(0, 1).flatten(1)
            norm.running_mean.copy_(inputs.mean(1))
            norm.running_var.copy_(inputs.var(1))
            losses = torch.stack([cross_entropy_of(module, batch) for batch in data])
            truth.append(float(losses.mean()))
    assert line.report.picture.losses.tolist() == pytest.approx(truth, rel=1e-5)
    assert logged(trainer)["loss"] == pytest.approx(truth[0], rel=1e-5)


def test_statistics_that_are_not_finite_are_gaps():
    module, loader = MODULES["classifier"]()
    options = {"span": 1e30, "resolution": 5, "loss_fn": cross_entropy_of}
    found = logged(train(module, loader, small("line", norm_statistics="estimated", **options)))
    assert found["num_gaps"] == 4
    assert math.isfinite(found["loss"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(*autoencoder(), small("line", norm_statistics="estimated"))
    told = [str(warning.message) for warning in caught]
    assert any("found no layer with running statistics" in message for message in told)


def test_a_coarse_picture_is_reported_early_where_the_whole_takes_long(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_optkit.callbacks.loss_landscape.time.monotonic", lambda: now[0])

    class Slow(DictAutoencoder):
        def training_step(self, batch):
            now[0] += is_probing() * 0.1  # 81 points of two batches take 16 seconds
            return super().training_step(batch)

    module, loader = Slow().double(), autoencoder()[1]
    plane = Measures(resolution=9, max_overhead=None, num_batches=2)
    logger = TensorBoardLogger(tmp_path)
    before = list(Path("optkit_logs").glob("*"))
    train(module, loader, plane, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload().Tensors("optkit-landscape/losses")
    coarse, whole = (make_ndarray(event.tensor_proto) for event in events)
    spent = EventAccumulator(logger.log_dir).Reload().Scalars("optkit-landscape/num_losses")
    assert [event.value for event in spent] == [51, 81]
    assert events[0].step == events[1].step
    assert torch.equal(torch.tensor(whole), plane.report.picture.losses.float())
    nearest = [0, 2, 2, 4, 4, 6, 6, 8, 8]  # the grid of every second point is known by then
    assert (coarse == whole[nearest][:, nearest]).all()
    assert len(set(whole.flatten().tolist())) == 81
    assert list(Path("optkit_logs").glob("*")) == before  # in the logger's folder alone


def test_between_two_checkpoints_and_on_the_plane_through_them(tmp_path, monkeypatch):
    module, loader = MODULES["classifier"]()
    data, paths, stored = list(loader), [], []
    for epoch in range(2):
        trainer = train(module, loader, max_epochs=1)
        paths.append(str(tmp_path / f"{epoch}.ckpt"))
        trainer.save_checkpoint(paths[-1])
        stored.append({k: v.clone() for k, v in module.state_dict().items()})
    options = {
        "num_batches": None, "data": data, "max_overhead": None, "loss_fn": cross_entropy_of
    }  # fmt: skip
    line = Measures("line", paths, resolution=3, name="line", **options)
    plane = Measures("plane", paths, resolution=5, **options)
    planes, find = [], plane._frame.plane
    monkeypatch.setattr(
        plane._frame, "plane", lambda *args: planes.append(find(*args)) or planes[0]
    )
    logger = CSVLogger(tmp_path)
    train(module, loader, line, plane, max_epochs=1, logger=logger)
    here = {k: v.clone() for k, v in module.state_dict().items()}
    ends = []
    for weights in stored:
        module.load_state_dict(weights)
        module.eval()
        with torch.no_grad():
            losses = torch.stack([cross_entropy_of(module, batch) for batch in data])
            ends.append(float(losses.mean()))
    assert line.report.picture.losses[[0, -1]].tolist() == pytest.approx(ends, rel=1e-6)
    assert line.report.picture.positions.tolist() == [0, 0.5, 1]
    found = plane.report.trajectory
    assert float(found.explained.sum()) == pytest.approx(1.0)  # three points lie in a plane
    names = [name for name, _ in module.named_parameters()]
    names += [n for n, b in module.named_buffers() if b.is_floating_point() and n in here]
    middle = torch.cat([here[name].flatten() for name in names])
    (drawn,) = planes
    for weights, place in zip([*stored, here], found.path, strict=True):
        there = middle + place.float() @ drawn.directions  # running statistics go along
        truth = torch.cat([weights[name].flatten() for name in names])
        torch.testing.assert_close(there, truth, rtol=1e-4, atol=1e-5)
    assert plane.report.path_steps == ()
    pictures = {path.name for path in Path(logger.log_dir).glob("*.png")}
    assert pictures == {"optkit-landscape-picture.png", "optkit-landscape-line-picture.png"}


@pytest.mark.parametrize(
    ("kind", "directions", "error", "message"),
    [
        ("plane", "a.ckpt", ValueError, "or give the paths of two checkpoints"),
        ("line", ["a", "b", "c"], ValueError, "must be one or two checkpoints for a line, got 3"),
        ("line", ["a"], ValueError, "must be at least two checkpoints"),
        ("plane", ["a", 1], TypeError, "or a list of such paths"),
    ],
)
def test_checkpoints_that_make_no_picture_are_refused(kind, directions, error, message):
    with pytest.raises(error, match=message):
        LossLandscape(kind, directions)


def cross_entropy_of(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


class Masked(pl.LightningModule):
    """With a frozen layer, an infinite mask, a counter and BatchNorm, none of them trained."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.frozen = torch.nn.Linear(36, 4).requires_grad_(False)
        self.norm, self.head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("count", torch.tensor(1e6 * scale))
        self.frozen.weight.mul_(scale)

    def training_step(self, batch):
        hidden = self.norm(self.frozen(batch[0].flatten(1)))
        weights = self.mask.softmax(1)
        return cross_entropy_with(self.head(hidden @ weights), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def cross_entropy_with(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels)


def test_frozen_weights_and_buffers_go_along_to_checkpoints(tmp_path):
    loader = MODULES["classifier"]()[1]
    data, paths, losses = list(loader), [], []
    for i, scale in enumerate((1.0, 3.0)):
        module = Masked(scale)
        trainer = train(module, loader, max_epochs=1)
        paths.append(tmp_path / f"{i}.ckpt")
        trainer.save_checkpoint(paths[-1])
        module.eval()
        with torch.no_grad():
            losses.append(float(torch.stack([module.training_step(b) for b in data]).mean()))
    shared = {"num_batches": None, "data": data, "max_overhead": None, "resolution": 3}
    line, plane = Measures("line", paths, name="line", **shared), Measures("plane", paths, **shared)
    train(Masked(0.5), loader, line, plane, max_epochs=1)
    assert line.report.picture.losses[[0, -1]].tolist() == pytest.approx(losses, rel=1e-5)
    assert float(plane.report.trajectory.path.abs().max()) < 100  # the counter has no say in it


def test_statistics_are_estimated_of_half_precision_modules():
    module, loader = MODULES["classifier"]()
    options = {"loss_fn": cross_entropy_of, "norm_statistics": "estimated"}
    found = logged(train(module, loader, small("line", **options), precision="bf16-true"))
    assert math.isfinite(found["highest"])


def test_a_path_that_begins_late_says_so_and_other_parameters_are_refused(tmp_path):
    module, loader = autoencoder()
    train(module, loader, max_epochs=2, enable_checkpointing=False).save_checkpoint(
        tmp_path / "a.ckpt"
    )
    plane = keep("plane", "trajectory", resolution=3)
    trainer = train_from(tmp_path / "a.ckpt", autoencoder(), plane)
    assert plane.report.path_steps[:3] == (4, 5, 6)  # two epochs of two steps lie behind it
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    other = keep("plane", "trajectory", resolution=3, parameters=["*weight"])
    with pytest.raises(MisconfigurationException, match="`parameters` must be those of the run"):
        train_from(tmp_path / "b.ckpt", autoencoder(), other, max_epochs=6)


def train_from(path, pair, *callbacks, max_epochs=4):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=max_epochs, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(*pair, ckpt_path=path)
    return trainer


def test_a_plane_that_is_interrupted_between_points_leaves_the_module_alone_for_good(monkeypatch):
    @contextmanager
    def breaks(*args):
        def tell(done):
            if done > 0:
                raise RuntimeError("the bar broke")

        yield tell

    kept = []  # as a notebook does, which keeps the last traceback

    class Keeping(LossLandscape):
        def measure(self, *args):
            try:
                return super().measure(*args)
            except RuntimeError as error:
                kept.append(error)
                raise

    monkeypatch.setattr("lightning_optkit.callbacks.loss_landscape.shown_progress", breaks)
    module, loader = autoencoder()
    module.marker = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(module, loader, Keeping(max_overhead=None, num_batches=2, resolution=3))
    assert len(kept) == 1
    module.marker = 1
    weight = module.net[0].weight
    kept.clear()
    gc.collect()
    assert module.marker == 1
    assert module.net[0].weight is weight
    assert isinstance(weight, torch.nn.Parameter)


def test_directions_that_are_all_zero_are_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match="nothing would move"):
        train(*autoencoder(), small("line", parameters=["*bias"]))
    biases = small("line", parameters=["*bias"], normalization="none")
    found = logged(train(*autoencoder(), biases))
    assert found["lowest"] < found["highest"]


def test_eigenvectors_and_the_rim_of_the_basin():
    module, loader = autoencoder()
    line = keep("line", "hessian", resolution=3, span=1e-3, basin_rise=0.05)
    found = logged(train(module, loader, line))
    (below, here, above), length = line.report.picture.losses.tolist(), 1e-3
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))
    curvature = (below - 2 * here + above) / (length * norm) ** 2
    dense = dense_hessian(module, loader)
    assert curvature == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=2e-2)
    assert found["log_radius"] == pytest.approx(line.report.basin.mean_log_radius, rel=1e-6)
    assert found["log_radius_standard_error"] > 0
    assert found["num_losses"] == 3 + line.report.basin.num_losses


def dense_hessian(module, loader):
    from lightning_optkit.measures import HessianOperator

    def loss(batch):
        x = batch["image"].flatten(1)
        return lambda p: mse_loss(torch.func.functional_call(module.net, p, (x,)), x)

    return HessianOperator([loss(b) for b in loader], dict(module.net.named_parameters())).dense()


def test_arrays_and_the_picture_are_written(tmp_path):
    module, loader = autoencoder()
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    train(module, loader, small(directions="trajectory"), logger=loggers)
    assert (Path(loggers[1].log_dir) / "optkit-landscape-picture.png").stat().st_size > 5_000
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert "optkit-landscape/picture" in events.Tags()["images"]
    tensors = {tag: events.Tensors(tag)[-1].tensor_proto for tag in events.Tags()["tensors"]}
    shapes = {tag: [d.size for d in proto.tensor_shape.dim] for tag, proto in tensors.items()}
    assert shapes["optkit-landscape/losses"] == [3, 3]
    assert shapes["optkit-landscape/axes"] == [2, 3]
    assert shapes["optkit-landscape/path"] == [6, 2]
    steps = make_ndarray(tensors["optkit-landscape/path_steps"]).tolist()
    assert steps[:2] == [0, 1]  # before the first step, behind it
    assert len(steps) == 6
    assert steps[-1] == steps[-2]  # the weights of the end, once more


def test_progress_is_shown_by_the_trainers_own_bar(capsys):
    train(*autoencoder(), small(), TQDMProgressBar())
    printed = capsys.readouterr()
    assert "LossLandscape: 100%" in printed.out + printed.err
    trainer = train(*autoencoder(), small(), RichProgressBar())
    tasks = trainer.progress_bar_callback.progress.tasks
    (task,) = [task for task in tasks if task.description == "LossLandscape"]
    assert (task.completed, task.total, task.visible) == (9, 9, False)


def test_gaps_are_counted_and_training_goes_on():
    class Breaks(DictAutoencoder):
        def training_step(self, batch):
            x = batch["image"].flatten(1)
            far = self.net[0].weight.norm() > 1.2 * self.size
            return mse_loss(self.net(x), x) + torch.where(far, torch.nan, 0.0)

    module, loader = Breaks().double(), autoencoder()[1]
    module.size = float(module.net[0].weight.detach().norm())
    found = logged(train(module, loader, small("line", resolution=9, span=2.0)))
    assert 0 < found["num_gaps"] < 9
    assert math.isfinite(found["highest"])


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("surface",), {}, "`kind` must be 'line' or 'plane', got 'surface'"),
        (("plane", "init"), {}, "`kind` must be 'line' where `directions` is 'init'"),
        (("plane", "a.ckpt"), {}, "`kind` must be 'line' where `directions` is 'a.ckpt'"),
        (("line", "trajectory"), {}, "`kind` must be 'plane' where `directions` is 'trajectory'"),
        ((), {"resolution": 1}, "`resolution` must be an integer of at least 2, got 1"),
        ((), {"span": 0}, "`span` must be positive and finite, got 0"),
        ((), {"normalization": "row"}, "`normalization` must be 'filter', 'layer' or 'none'"),
        ((), {"basin_rise": -1.0}, "`basin_rise` must be positive and finite or None, got -1.0"),
        ((), {"trajectory_bytes": 0}, "`trajectory_bytes` must be an integer of at least 1"),
        ((), {"norm_statistics": "new"}, "`norm_statistics` must be 'kept' or 'estimated', got"),
        (
            (),
            {"norm_statistics": "estimated", "mode": "train"},
            "`norm_statistics` must be 'kept' where `mode` is 'train'",
        ),
        ((), {"at_end": False}, "`every_n_epochs` must be given where `at_end` is False"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(args, options, message):
    with pytest.raises(ValueError, match=message):
        LossLandscape(*args, **options)


def test_what_cannot_be_drawn_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(TypeError, match="`directions` must be one of 'random'"):
        LossLandscape("line", None)
    with pytest.raises(ValueError, match="where there is no file"):
        train(*autoencoder(), small("line", str(tmp_path / "none.ckpt")))
    torch.save({"state_dict": {"net.0.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="a checkpoint of the same net, got"):
        train(*autoencoder(), small("line", str(tmp_path / "other.ckpt")))
    with pytest.raises(MisconfigurationException, match="at least four copies of the parameters"):
        train(*autoencoder(), small(directions="trajectory", trajectory_bytes=100))
