"""Sharpness and LossLandscape on two processes: the loss of all samples, and training untouched."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optkit import LossLandscape, Sharpness
from tests.contracts import assert_same, run
from tests.distributed import run_in_two_processes
from tests.modules import DictAutoencoder, images

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2, "limit_train_batches": 3}


def observers(**options: Any) -> list[pl.Callback]:
    options = {"every_n_epochs": 2, "max_overhead": None, "num_batches": 2} | options
    return [
        Sharpness(num_samples=4, subspace_dim=5, epsilon=1e-3, **options),
        LossLandscape(resolution=3, directions="trajectory", **options),
        LossLandscape("line", "hessian", resolution=3, name="line", **options),
    ]


def train_with_and_without(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for i, (name, options) in enumerate(
        [
            ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
            ("gan", {"strategy": "ddp_find_unused_parameters_true"}),
        ]
    ):
        without = run(name, [], folder / f"without{i}", **DDP | options)
        with_it = run(name, observers(), folder / f"with{i}", **DDP | options)
        pairs.append((without, with_it))
    return pairs


def test_training_is_bit_identical_on_two_processes(tmp_path):
    for pairs in run_in_two_processes(train_with_and_without, tmp_path, tmp_path):
        for without, with_it in pairs:
            assert_same(without, with_it)
    for i in range(2):
        log = (tmp_path / f"with{i}" / "csv" / "version_0" / "metrics.csv").read_text()
        for tag in ("sharpness/epsilon", "landscape/lowest", "landscape-line/lowest"):
            assert f"optkit-{tag}" in log


def uneven_data() -> list[list[dict[str, torch.Tensor]]]:
    """Return 10 samples in two batches for one rank, 4 in one for the other."""
    x = images(14)[0].double()
    return [[{"image": x[:7]}, {"image": x[7:10]}], [{"image": x[10:]}]]


class Still(DictAutoencoder):
    """Its learning rate moves nothing: ranks measure at the same weights."""

    def __init__(self, *, with_norm: bool = False) -> None:
        super().__init__()
        if with_norm:
            self.net.insert(1, torch.nn.BatchNorm1d(self.net[0].out_features))
        self.double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Keeps(LossLandscape):
    """Keeps its losses."""

    losses: torch.Tensor

    def scalars(self, result: Any) -> dict[str, float]:
        self.losses = result.picture.losses
        return super().scalars(result)


def measured(data: list[dict[str, torch.Tensor]], **options: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    shared = {"data": data, "num_batches": None, "max_overhead": None}
    landscape = Keeps(resolution=5, basin_rise=0.1, **shared)
    trainer = fitted(
        Still(),
        [
            Sharpness(num_samples=4, epsilon=1e-3, invariance_check=False, **shared),
            Sharpness(("epsilon",), epsilon=1e-3, subspace_dim=7, name="plane", **shared),
            landscape,
        ],
        **options,
    )
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return values | {"losses": landscape.losses}


def fitted(module: pl.LightningModule, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    loader = DataLoader([{"image": images(6)[0].double()}], batch_size=None)
    trainer.fit(module, loader)
    return trainer


def refreshed(data: list[dict[str, torch.Tensor]], **options: Any) -> torch.Tensor:
    pl.seed_everything(3, verbose=False)
    line = Keeps(
        "line", resolution=3, norm_statistics="estimated", data=data, num_batches=None,
        max_overhead=None,
    )  # fmt: skip
    fitted(Still(with_norm=True), [line], **options)
    return line.losses


class Breaks(Still):
    """Its step fails on the second rank, away from its own weights."""

    def training_step(self, batch: Any) -> Any:
        first = self.net[0].weight
        self.first = first.detach().clone() if not hasattr(self, "first") else self.first
        if os.environ["RANK"] == "1" and not torch.equal(first, self.first):
            raise KeyError("broken step")
        return super().training_step(batch)


def on_this_rank() -> tuple[dict[str, Any], torch.Tensor, list[str]]:
    data = uneven_data()[int(os.environ["RANK"])]
    two = {"strategy": "ddp", "devices": 2}
    found = measured(data, **two), refreshed(data, **two)
    line = Keeps("line", resolution=3, norm_statistics="estimated", data=data, num_batches=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(Breaks(with_norm=True), [line], **two)
    told = [str(w.message) for w in caught if "measured nothing" in str(w.message)]
    return *found, told


def test_it_is_that_of_all_samples_together(tmp_path):
    alone = measured([*uneven_data()[0], *uneven_data()[1]], devices=1)
    with_fresh_statistics = refreshed([*uneven_data()[0], *uneven_data()[1]], devices=1)
    assert len(set(with_fresh_statistics.tolist())) == 3
    ranks = run_in_two_processes(on_this_rank, tmp_path)
    assert "another process" in ranks[0][2][0]  # and none waits for the one that failed
    for together, fresh, _ in ranks:
        torch.testing.assert_close(fresh, with_fresh_statistics, rtol=1e-9, atol=0)
        torch.testing.assert_close(together["losses"], alone["losses"], rtol=1e-9, atol=0)
        for tag, value in alone.items():
            if tag.startswith("optkit-") and not tag.endswith("/seconds"):
                assert value != 0 or tag.endswith("num_gaps"), tag
                assert together[tag] == pytest.approx(value, rel=1e-5), tag  # logged as float32
