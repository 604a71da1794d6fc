"""Stability on two processes, with whole parameters and with sharded ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optkit import Stability
from tests.contracts import assert_same, run
from tests.distributed import run_in_two_processes
from tests.modules import DictAutoencoder, images

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2, "limit_train_batches": 3}


def every_step(**options: Any) -> Stability:
    return Stability(**{"every_n_steps": 1, "max_overhead": None, "num_batches": 2} | options)


def train_with_and_without(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for i, (name, options) in enumerate(
        [
            ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
            ("gan", {"strategy": "ddp_find_unused_parameters_true"}),
        ]
    ):
        without = run(name, [], folder / f"without{i}", **DDP | options)
        with_it = run(name, [every_step()], folder / f"with{i}", **DDP | options)
        pairs.append((without, with_it))
    return pairs


def test_training_is_bit_identical_on_two_processes(tmp_path):
    for pairs in run_in_two_processes(train_with_and_without, tmp_path, tmp_path):
        for without, with_it in pairs:
            assert_same(without, with_it)
    for i in range(2):
        log = (tmp_path / f"with{i}" / "csv" / "version_0" / "metrics.csv").read_text()
        assert "optkit-stability/ratio" in log


def uneven_data() -> list[list[dict[str, torch.Tensor]]]:
    """Return 10 samples in two batches for one rank, 4 in one for the other."""
    x = images(14)[0].double()
    return [[{"image": x[:7]}, {"image": x[7:10]}], [{"image": x[10:]}]]


class Still(DictAutoencoder):
    """Its learning rate moves nothing; the step fills the state of the optimizer."""

    def __init__(self, *, sharded: bool) -> None:
        super().__init__()
        self.double()
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["image"].flatten(1)
        return mse_loss(self(x), x)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Leave the sharded module gathered, as FSDP2 does after a validation."""
        self(batch["image"].flatten(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-30)


def measured(
    data: list[dict[str, torch.Tensor]], *, sharded: bool = False, **options: Any
) -> dict[str, float]:
    pl.seed_everything(3, verbose=False)
    module = Still(sharded=sharded)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[every_step(data=data, num_batches=None, rtol=1e-10)],
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    # the same on all ranks: the optimizer's state must not depend on their number
    loader = DataLoader([{"image": images(6)[0].double()}], batch_size=None)
    trainer.fit(module, loader, loader)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def measured_on_this_rank() -> list[dict[str, float]]:
    data = uneven_data()[int(os.environ["RANK"])]
    sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return [
        measured(data, strategy="ddp", devices=2),
        measured(data, strategy=sharding, devices=2, sharded=True),
    ]


def test_it_is_that_of_all_samples_together(tmp_path):
    alone = measured([*uneven_data()[0], *uneven_data()[1]], devices=1)
    assert alone["optkit-stability/ratio"] > 0
    for rank in run_in_two_processes(measured_on_this_rank, tmp_path):
        for together in rank:
            for key in ("lambda_max", "threshold", "ratio", "step_along_gradient"):
                tag = f"optkit-stability/{key}"
                assert together[tag] == pytest.approx(alone[tag], rel=1e-6)  # logged as float32
