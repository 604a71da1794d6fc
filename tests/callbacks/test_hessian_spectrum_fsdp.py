"""HessianSpectrum on two processes, each with half of every parameter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optkit import HessianSpectrum
from tests.callbacks.sharded_modules import (
    Regressor,
    ShardedClassifier,
    ShardedGAN,
    ShardedSmoothClassifier,
    fsdp,
    trained,
    uneven_data,
)
from tests.contracts import assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed


def every_step(**options: Any) -> HessianSpectrum:
    defaults = {"every_n_steps": 1, "max_overhead": None, "num_batches": 2}
    return HessianSpectrum(**defaults | {"num_matvecs": 4, "num_probes": 1} | options)


def train_with_and_without(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for i, (make, callback, options) in enumerate(
        [
            (ShardedClassifier, {}, {}),
            (  # measured after a validation, which leaves the outermost group gathered
                ShardedClassifier,
                {"mode": "train", "every_n_steps": None, "every_n_epochs": 1},
                {"accumulate_grad_batches": 2},
            ),
            (ShardedGAN, {}, {}),
            (ShardedSmoothClassifier, {"sharded": "fd"}, {}),
        ]
    ):
        pl.seed_everything(5, verbose=False)
        without = trained(make(), [], folder / f"without{i}", **options)
        pl.seed_everything(5, verbose=False)
        observer = every_step(exact_below=0, **callback)  # not one product a parameter
        with_it = trained(make(), [observer], folder / f"with{i}", **options)
        pairs.append((without, with_it))
    return pairs


def test_training_is_bit_identical_under_fsdp(tmp_path):
    for pairs in run_in_two_processes(train_with_and_without, tmp_path, tmp_path):
        for without, with_it in pairs:
            assert_same(without, with_it)
            assert "DTensor" in str(without["kinds"])
    for i in range(4):
        log = (tmp_path / f"with{i}" / "csv" / "version_0" / "metrics.csv").read_text()
        assert "optkit-hessian/lambda_max" in log


def measured(
    data: list[dict[str, torch.Tensor]],
    dtype: torch.dtype,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return what is measured after a step with a learning rate of zero."""
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        callbacks=[every_step(data=data, num_batches=None, **settings or {})],
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(Regressor(dtype), DataLoader(data, batch_size=None))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def measured_on_this_rank() -> list[dict[str, float]]:
    rank = int(os.environ["RANK"])
    gathered = [measured(uneven_data(dtype)[rank], dtype, **fsdp()) for dtype in TOLERANCES]
    data = uneven_data(torch.float64)[rank]
    return [*gathered, measured(data, torch.float64, DIFFERENCES, **fsdp())]


DIFFERENCES = {"sharded": "fd", "num_matvecs": 60, "num_probes": 2, "seed": 1}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def test_spectrum_is_that_of_all_samples_and_whole_parameters(tmp_path):
    ranks = run_in_two_processes(measured_on_this_rank, tmp_path)
    for i, (dtype, tolerance) in enumerate(TOLERANCES.items()):
        both = [batch for batches in uneven_data(dtype) for batch in batches]
        alone = measured(both, dtype, accelerator="cpu", devices=1)
        scale = alone["optkit-hessian/lambda_max"]
        for together in (ranks[0][i], ranks[1][i]):
            for key in ("lambda_max", "lambda_min", "trace"):
                tag = f"optkit-hessian/{key}"
                assert together[tag] == pytest.approx(alone[tag], abs=tolerance * scale)
            for key in ("loss", "gradient_norm", "minimum_ratio"):
                tag = f"optkit-hessian/{key}"
                assert together[tag] == pytest.approx(alone[tag], rel=tolerance)
            assert together["optkit-hessian/num_samples"] == 14
            assert together["optkit-hessian/num_matvecs"] == alone["optkit-hessian/num_matvecs"]
    assert without_time(ranks[0][2]) == without_time(ranks[1][2])
    together = ranks[0][2]  # by differences of sharded gradients
    both = [batch for batches in uneven_data(torch.float64) for batch in batches]
    tol_rel = together["optkit-hessian/tol"] / together["optkit-hessian/lambda_max"]
    assert tol_rel >= 1e-3 * (1 - 1e-6)
    one = {"accelerator": "cpu", "devices": 1}
    alone = measured(both, torch.float64, {"tol_rel": tol_rel}, **one)
    scale = alone["optkit-hessian/lambda_max"]
    for key in ("lambda_max", "lambda_min"):
        tag = f"optkit-hessian/{key}"
        assert together[tag] == pytest.approx(alone[tag], abs=2.5e-4 * scale)  # its noise
    for key in ("loss", "gradient_norm", "num_samples"):
        tag = f"optkit-hessian/{key}"
        assert together[tag] == pytest.approx(alone[tag], rel=1e-6)
    ends = [together[f"optkit-hessian/minimum_ratio_{end}"] for end in ("lower", "upper")]
    assert ends[0] <= alone["optkit-hessian/minimum_ratio"] <= ends[1]


def without_time(logged: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in logged.items() if not key.endswith("/seconds")}
