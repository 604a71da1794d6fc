"""What every callback must hold: observers leave no trace, interveners resume exactly."""

from __future__ import annotations

import copy
import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger

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
