"""Sharpness and LossLandscape on two processes, each with half of every parameter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optkit import LossLandscape, Sharpness
from tests.callbacks.sharded_modules import Regressor, ShardedClassifier, fsdp, trained, uneven_data
from tests.contracts import assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed


def observers(directions: str, **options: Any) -> list[pl.Callback]:
    shared = {"max_overhead": None, "num_batches": 2} | options
    return [
        Sharpness(num_samples=4, epsilon=1e-3, invariance_check=False, **shared),
        LossLandscape(resolution=3, directions=directions, **shared),
        LossLandscape("line", resolution=3, norm_statistics="estimated", name="line", **shared),
    ]


def train_with_and_without(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = []
    for name, callbacks in (("without", []), ("with", observers("trajectory", every_n_epochs=1))):
        pl.seed_everything(5, verbose=False)
        found.append(trained(ShardedClassifier(), callbacks, folder / name))
    return found[0], found[1]


def measured(data: list[dict[str, torch.Tensor]], **options: Any) -> dict[str, float]:
    """Return what is measured after a step with a learning rate of zero."""
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        callbacks=observers("random", data=data, num_batches=None),
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(Regressor(torch.float64, with_norm=True), DataLoader(data, batch_size=None))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def on_this_rank(folder: Path) -> tuple[Any, dict[str, float]]:
    data = uneven_data(torch.float64)[int(os.environ["RANK"])]
    return train_with_and_without(folder), measured(data, **fsdp())


def test_training_is_bit_identical_and_numbers_are_those_of_whole_parameters(tmp_path):
    both = [batch for batches in uneven_data(torch.float64) for batch in batches]
    alone = measured(both, accelerator="cpu", devices=1)
    for (without, with_it), together in run_in_two_processes(on_this_rank, tmp_path, tmp_path):
        assert_same(without, with_it)
        assert "DTensor" in str(without["kinds"])
        tags = [tag for tag in alone if tag.startswith("optkit-") and not tag.endswith("seconds")]
        assert {tag.split("/")[0] for tag in tags} == {
            "optkit-sharpness", "optkit-landscape", "optkit-landscape-line"
        }  # fmt: skip
        for tag in tags:
            assert together[tag] == pytest.approx(alone[tag], rel=1e-5, abs=1e-12), tag
    log = (tmp_path / "with" / "csv" / "version_0" / "metrics.csv").read_text()
    assert "optkit-landscape-line/lowest" in log
    assert "optkit-sharpness/epsilon" in log
