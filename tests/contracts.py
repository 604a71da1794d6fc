"""What every callback must hold: observers leave no trace, interveners resume exactly."""

from __future__ import annotations

import copy
import csv
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Sampler

from tests.modules import MODULES


def run(
    module_name: str, callbacks: list[pl.Callback], folder: Path, **trainer_options: Any
) -> dict[str, Any]:
    """Train one of the test modules for a few steps and return every state that it leaves."""
    pl.seed_everything(7, verbose=False)
    module, data = MODULES[module_name]()
    trainer = pl.Trainer(
        default_root_dir=folder,
        logger=CSVLogger(folder, name="csv", version=0),
        callbacks=[*callbacks, Recorder()],
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 5,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | trainer_options,
    )
    trainer.fit(module, data)
    return trace_of(trainer, module)


class Recorder(pl.Callback):
    """Records what a user sees during training: losses, metrics and random states by batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(
            {
                "outputs": copy.deepcopy(outputs),
                "metrics": user_metrics(trainer.callback_metrics),
                "attributes": copy.deepcopy(pl_module.__dict__.get("diary")),
                "training": [m.training for m in pl_module.modules()],
                "rng": rng_state(),
                "global_step": trainer.global_step,
            }
        )


def trace_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Return all that a run leaves behind, copied."""
    recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "buffers": {k: v.clone() for k, v in module.named_buffers()},
        "gradients": {
            k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None
        },
        "requires_grad": {k: p.requires_grad for k, p in module.named_parameters()},
        "optimizers": [copy.deepcopy(o.state_dict()) for o in trainer.optimizers],
        "scaler": getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None),
        "rng": rng_state(),
        "log": user_log(trainer),
        "metrics": user_metrics(trainer.callback_metrics),
        "by_batch": recorder.seen,
        "attributes": public_state(module),
        "loggers": [type(logger).__name__ for logger in trainer.loggers],
        "should_stop": trainer.should_stop,
        "default_dtype": torch.get_default_dtype(),
        "grad_enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def public_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module and its children, by name."""
    skipped = {"_trainer", "_parameters", "_buffers", "_modules", "_compiler_ctx"}
    skipped |= {"_flat_weight_refs", "_torchdynamo_wrapper_id"}  # addresses
    return {
        f"{name}.{key}": copy.deepcopy(value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if key not in skipped and not callable(value)
    }


def rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global stream is what is compared
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def user_metrics(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in metrics.items() if not k.startswith("optkit-")}


def user_log(trainer: pl.Trainer) -> list[dict[str, str]]:
    """Return the CSV log without our own columns, and without the rows that only we wrote."""
    path = Path(trainer.loggers[0].log_dir) / "metrics.csv"
    if not trainer.is_global_zero or not path.exists():
        return []
    with path.open() as file:
        rows = [
            {k: v for k, v in row.items() if not k.startswith("optkit-") and v != ""}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if set(row) - {"step"}]


def assert_same(left: Any, right: Any, where: str = "trace") -> None:
    """Fail, naming the place, unless two nested states are equal bit for bit."""
    assert type(left) is type(right), f"{where}: {type(left)} against {type(right)}"
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        same = torch.equal(left.nan_to_num(), right.nan_to_num())
        assert same, f"{where}: differs by {(left - right).abs().max()}"
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right), where
    elif isinstance(left, dict):
        assert list(left) == list(right), f"{where}: {set(left) ^ set(right)}"
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), f"{where}: {len(left)} against {len(right)} items"
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif type(left).__eq__ is not object.__eq__:
        assert left == right, f"{where}: {left!r} against {right!r}"


def assert_observer(
    callback: Callable[[], pl.Callback], module_name: str, folder: Path, **trainer_options: Any
) -> None:
    """Fail unless training is bit-identical with and without the callback, and it measured."""
    without = run(module_name, [], folder / "without", **trainer_options)
    observer = callback()
    with_it = run(module_name, [observer], folder / "with", **trainer_options)
    assert_same(without, with_it)
    log = (folder / "with" / "csv" / "version_0" / "metrics.csv").read_text()
    assert "optkit-" in log.splitlines()[0], "the observer logged nothing"


# -- interveners -------------------------------------------------------------------------------


def assert_resumes(
    callback: Callable[[], pl.Callback],
    module_name: str,
    folder: Path,
    *,
    at: tuple[str, ...] = ("epoch end", "mid-epoch"),
    **trainer_options: Any,
) -> pl.Callback:
    """Fail unless training that was interrupted and resumed ends bit-identical to one that was not.

    Compared are weights, buffers, optimizers, schedulers, the scaler and the callback's own state.
    The run is cut after its second epoch, or within it on a step: what Lightning itself resumes
    exactly. The checkpoints are those that the whole run writes there, as if it were cut; the later
    one, which the run that goes on from the earlier never writes, must change nothing. Returns the
    callback of the whole run, to see what it did.
    """
    whole = callback()
    savers = [Saver(moment, folder / f"{moment}.ckpt") for moment in ("mid-epoch", "epoch end")]
    uninterrupted = run_resumable(module_name, [whole, *savers], folder, **trainer_options)
    for saver in savers:
        if saver.moment not in at:
            continue
        assert saver.has_saved, f"the run did not come to: {saver.moment}"
        resumed = run_resumable(
            module_name, [callback()], folder, ckpt_path=saver.path, seed=8, **trainer_options
        )
        assert_same(uninterrupted, resumed, f"resumed at {saver.moment}")
    return whole


def run_resumable(
    module_name: str,
    callbacks: list[pl.Callback],
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    seed: int = 7,
    **trainer_options: Any,
) -> dict[str, Any]:
    """Train for three epochs with data and random streams that depend on epoch and batch alone."""
    pl.seed_everything(seed, verbose=False)
    module, loader = MODULES[module_name]()
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[Reseeder(), *callbacks],
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "limit_train_batches": 5,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, Saver) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | trainer_options,
    )
    trainer.fit(module, ResumableLoader(loader), ckpt_path=ckpt_path)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "global_step": trainer.global_step,
        "weights and buffers": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizers": [copy.deepcopy(o.state_dict()) for o in trainer.optimizers],
        "schedulers": [
            copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
        ],
        "scaler": None if scaler is None else scaler.state_dict(),
        "callbacks": [copy.deepcopy(c.state_dict()) for c in callbacks if not _saves(c)],
    }


def _saves(callback: pl.Callback) -> bool:
    return isinstance(callback, Saver)


class Saver(pl.callbacks.Checkpoint):
    """Writes a checkpoint when `ModelCheckpoint` would, after all other callbacks."""

    def __init__(self, moment: str, path: Path) -> None:
        self.moment = moment
        self.path = path
        self.has_saved = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.moment == "mid-epoch" and (trainer.current_epoch, batch_idx) == (1, 3):
            self._save(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.moment == "epoch end" and trainer.current_epoch == 1:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.has_saved = True


class Interruption(Exception):
    """A machine is gone."""


class Interrupter(Saver):
    """Fails once the checkpoint is written."""

    def _save(self, trainer: pl.Trainer) -> None:
        super()._save(trainer)
        raise Interruption


class Reseeder(pl.Callback):
    """Seeds all random streams before each batch: no checkpoint holds them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seed = 1000 * trainer.current_epoch + batch_idx
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global stream is what a step draws from
        torch.manual_seed(seed)
        for name, generator in list(vars(pl_module).items()):
            if isinstance(generator, random.Random):
                generator.seed(seed)
            elif isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                setattr(pl_module, name, np.random.default_rng(seed))


class ResumableSampler(Sampler[int]):
    """A new order each epoch, from the epoch alone, that can be taken up where it was left."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = self.position = 0
        self.left_at = (0, 0)

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = 1000 * self.epoch + int(os.environ.get("RANK", "0"))  # other data on other ranks
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        epoch, position = self.left_at
        for i in range(position if epoch == self.epoch else 0, self.size):
            self.position = i + 1
            yield int(order[i])


class ResumableLoader(DataLoader):
    """The data of another loader, resumable within an epoch by Lightning's protocol."""

    def __init__(self, loader: DataLoader) -> None:
        sampler = ResumableSampler(len(loader.dataset))
        super().__init__(loader.dataset, batch_size=loader.batch_size, sampler=sampler)

    def state_dict(self) -> dict[str, Any]:
        return {"left_at": (self.sampler.epoch, self.sampler.position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sampler.left_at = tuple(state_dict["left_at"])


SURVIVED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "one batch": {"limit_train_batches": 1},
    "unlimited": {"limit_train_batches": None},
}
"""Options under which a callback has to work; Lightning refuses accumulation and clipping of manual
optimization."""


def assert_survives_trainer_options(
    callback: Callable[[], pl.Callback], module_name: str, folder: Path, **trainer_options: Any
) -> pl.Callback:
    """Fail unless training makes all its steps to finite weights; return the callback."""
    without = run(module_name, [], folder / "without", **trainer_options)
    survivor = callback()
    with_it = run(module_name, [survivor], folder / "with", **trainer_options)
    for key in ("loggers", "should_stop", "default_dtype", "grad_enabled", "autocast"):
        assert with_it[key] == without[key], key
    steps = [[each["global_step"] for each in trace["by_batch"]] for trace in (with_it, without)]
    assert steps[0] == steps[1]
    for name, weight in with_it["weights"].items():
        assert weight.dtype == without["weights"][name].dtype
        assert bool(torch.isfinite(weight).all()), name
    return survivor
