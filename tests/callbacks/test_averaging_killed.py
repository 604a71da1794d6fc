"""SWA and EMA in a process that is killed: what the last checkpoint held goes on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optkit import EMA, SWA
from lightning_optkit.bridge.averaged_checkpoint import load_averaged, load_raw
from tests.callbacks.averaging_modules import Net, Snapshots, assert_close, data, fit, weights_of
from tests.contracts import ResumableLoader, assert_same
from tests.distributed import FORKS

CALLBACKS: dict[str, Callable[[], SWA | EMA]] = {
    "ema": lambda: EMA(0.8),
    "swa": lambda: SWA(start=1, lr=0.01, anneal_epochs=2),
}
KILLED = [("ema", "training"), ("swa", "validation")]
PARAMETERS = [name for name, _ in Net(norm=True).named_parameters()]
LAST_STEP = 15
"""Of the last checkpoint: in epoch 2, which ends with step 18."""


class Killer(pl.Callback):
    """Ends the process at once, as a machine that is taken away does."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.moment == "training" and trainer.global_step == LAST_STEP + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_batch_end(self, trainer, *_):
        if self.moment == "validation" and trainer.global_step > LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)


class Averages(pl.Callback):
    """Notes the average after every batch, where there is one."""

    def __init__(self, callback: SWA | EMA) -> None:
        self._callback = callback
        self.by_step: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        average = {}
        if self._callback.num_averaged:
            with self._callback.averaged(pl_module):
                average = weights_of(pl_module)
        self.by_step.append(average)


def train(
    kind: str, *callbacks: pl.Callback, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Any]:
    """Train for four epochs of 6 batches, and return all that is left.

    Args:
        dtype: of the module before Lightning makes it float64, which it does after it has restored
            a checkpoint.
    """
    average, snapshots, module = CALLBACKS[kind](), Snapshots(), Net(norm=True).to(dtype)
    averages = Averages(average)
    loader = ResumableLoader(data(dtype=torch.float64))
    trainer = fit(
        module, average, snapshots, averages, *callbacks,
        loader=loader, epochs=4, precision="64-true", **options,
    )  # fmt: skip
    return {
        "raw": snapshots.by_step,
        "averages": averages.by_step,
        "seen": module.seen["validate"],
        "in the end": weights_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "summary": [average.summary, average.num_averaged, trainer.global_step],
    }


def files_in(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)


def train_until_killed(folder: Path, kind: str, moment: str) -> None:
    torch.set_num_threads(1)
    train(kind, Killer(moment), files_in(folder), enable_checkpointing=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return the last checkpoints of runs that were killed, which those who resume leave alone."""
    folders = [tmp_path_factory.mktemp("_".join(run)) for run in KILLED]
    processes = [
        FORKS.Process(target=train_until_killed, args=(folder, *run))
        for folder, run in zip(folders, KILLED, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * len(KILLED)
    return {
        run: shutil.copy(folder / "last.ckpt", folder / "killed.ckpt")
        for run, folder in zip(KILLED, folders, strict=True)
    }


@pytest.fixture(scope="module")
def uninterrupted():
    return {kind: train(kind) for kind in CALLBACKS}


@pytest.mark.parametrize("killed", KILLED, ids=" ".join)
def test_the_last_checkpoint_holds_the_average_and_the_weights_of_training(
    killed, checkpoints, uninterrupted
):
    path, whole = checkpoints[killed], uninterrupted[killed[0]]
    expected = whole["averages"][LAST_STEP - 1], whole["raw"][LAST_STEP - 1]
    for state_dict, weights in zip((load_averaged(path), load_raw(path)), expected, strict=True):
        assert weights.keys() == state_dict.keys()
        assert_same({name: state_dict[name] for name in weights}, weights)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("killed", KILLED, ids=" ".join)
def test_a_run_that_goes_on_ends_as_one_that_was_not_killed(killed, checkpoints, uninterrupted):
    whole, path = uninterrupted[killed[0]], checkpoints[killed]
    options = {"enable_checkpointing": True, "ckpt_path": path, "initialise": False}
    resumed = train(killed[0], files_in(path.parent), **options)
    assert len(resumed["raw"]) == 24 - LAST_STEP
    for key in ("raw", "averages", "seen"):  # all that came after the checkpoint
        assert_same(resumed[key], whole[key][-len(resumed[key]) :])
    for key in ("in the end", "optimizer", "summary"):
        assert_same(resumed[key], whole[key])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_average_goes_on_in_the_precision_of_training(checkpoints):
    path = checkpoints[KILLED[0]]
    options = {"enable_checkpointing": True, "ckpt_path": path, "initialise": False}
    found = train("ema", files_in(path.parent), dtype=torch.float32, **options)
    before, after, model = found["averages"][0], found["averages"][1], found["raw"][1]
    num_averaged = LAST_STEP + 1
    decay = (1 + num_averaged) / (10 + num_averaged)
    expected = {name: decay * before[name] + (1 - decay) * model[name] for name in PARAMETERS}
    assert_close({name: after[name] for name in PARAMETERS}, expected, atol=1e-14)
