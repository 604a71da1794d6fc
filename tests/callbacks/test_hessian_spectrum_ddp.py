"""HessianSpectrum on two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optkit import HessianSpectrum, is_probing
from lightning_optkit.board.npz_file import read_npz
from tests.contracts import assert_same, run
from tests.distributed import run_in_two_processes
from tests.modules import DictAutoencoder, images

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2, "limit_train_batches": 3}


def every_step(**options: Any) -> HessianSpectrum:
    defaults = {"every_n_steps": 1, "max_overhead": None, "num_batches": 2}
    return HessianSpectrum(**defaults | {"num_matvecs": 4, "num_probes": 1} | options)


def train_with_and_without(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for i, (name, options) in enumerate(
        [
            ("classifier", {}),
            ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
            ("gan", {"strategy": "ddp_find_unused_parameters_true"}),
        ]
    ):
        without = run(name, [], folder / f"without{i}", **DDP | options)
        observer = every_step(exact_below=0)  # a few products in place of one a parameter
        with_it = run(name, [observer], folder / f"with{i}", **DDP | options)
        pairs.append((without, with_it))
    return pairs


def test_training_is_bit_identical_on_two_processes(tmp_path):
    for pairs in run_in_two_processes(train_with_and_without, tmp_path, tmp_path):
        for without, with_it in pairs:
            assert_same(without, with_it)
    log = (tmp_path / "with0" / "csv" / "version_0" / "metrics.csv").read_text()
    assert "optkit-hessian/lambda_max" in log
    (path,) = (tmp_path / "with0").rglob("optkit.npz")  # rank zero's: one, and beside its logs
    assert path.parent.name == "version_0"
    quadrature = read_npz(path, name="").arrays["optkit-hessian/quadrature"]
    assert quadrature.steps.tolist() == sorted(set(quadrature.steps.tolist()))
    assert not list((tmp_path / "without0").rglob("*.npz"))


def uneven_data() -> list[list[dict[str, torch.Tensor]]]:
    """Return 10 samples in two batches for one rank, 4 in one for the other."""
    x = images(14)[0].double()
    return [[{"image": x[:7]}, {"image": x[7:10]}], [{"image": x[10:]}]]


class Scaled(DictAutoencoder):
    """A step leaves another buffer on each rank, as BatchNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = super().training_step(batch)
        found["loss"] = found["loss"] * self.scale
        if not is_probing():
            self.scale = torch.tensor(2.0 + self.global_rank, dtype=self.scale.dtype)
        return found


def measured(data: list[dict[str, torch.Tensor]], **options: Any) -> dict[str, float]:
    """Return what is measured after a step with a learning rate of zero."""
    pl.seed_everything(3, verbose=False)
    module = Scaled().double()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[every_step(data=data, num_batches=None)],
        max_steps=1,
        precision="64-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def measured_on_this_rank() -> dict[str, float]:
    return measured(uneven_data()[int(os.environ["RANK"])], strategy="ddp", devices=2)


def test_spectrum_is_that_of_all_samples_together(tmp_path):
    alone = measured([*uneven_data()[0], *uneven_data()[1]], devices=1)
    for together in run_in_two_processes(measured_on_this_rank, tmp_path):
        for key in ("lambda_max", "lambda_min", "trace", "loss", "gradient_norm", "minimum_ratio"):
            tag = f"optkit-hessian/{key}"
            assert together[tag] == pytest.approx(alone[tag], rel=1e-10)
        assert together["optkit-hessian/num_samples"] == 14
