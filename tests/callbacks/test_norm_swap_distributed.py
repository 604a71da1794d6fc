"""NormSwap on two processes: whole parameters (DDP) and shards (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from lightning_optkit import NormSwap, load_swapped
from lightning_optkit.methods import swap_norms
from tests.callbacks.averaging_modules import data, initialised, trainer_of
from tests.contracts import assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

SWAP: dict[str, Any] = {"channels_per_group": 2}


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
        initialised(self).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Sharded(Net):
    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            for part in (self.net[1], self):  # a norm layer by itself, and the rest
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class ShardsWhatItMakes(Sharded):
    def configure_model(self) -> None:
        self.net.append(nn.BatchNorm1d(1).double())
        super().configure_model()


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Train for two epochs of 3 batches on each rank."""
    trainer = trainer_of(*callbacks, epochs=2, devices=2, **options)
    trainer.fit(module, data(dtype=torch.float64))
    return trainer


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in module.state_dict().items()
    }


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    by_hand = Net()
    swap_norms(by_hand, **SWAP)
    fit(by_hand, strategy="ddp")
    found["by hand"] = whole(by_hand)

    module = Net()
    fit(module, NormSwap(**SWAP), strategy="ddp")
    found["ddp"] = whole(module)

    module = Sharded()
    trainer = fit(module, NormSwap(**SWAP), strategy=ModelParallelStrategy(2, 1))
    found["fsdp"] = whole(module)
    found["sharded"] = isinstance(module.net[1].weight, DTensor)
    found["layer"] = str(module.net[1])
    trainer.save_checkpoint(folder / "folder.ckpt")
    trainer.fit(module, data(dtype=torch.float64))  # shards that are there already

    again = Sharded()
    options: dict[str, Any] = {"devices": 2, "strategy": ModelParallelStrategy(2, 1)}
    trainer = trainer_of(NormSwap(**SWAP), epochs=2, **options)
    trainer.fit(again, data(dtype=torch.float64), ckpt_path=folder / "folder.ckpt")
    found["restored"] = whole(again)

    try:
        fit(ShardsWhatItMakes(), NormSwap(**SWAP), strategy=ModelParallelStrategy(2, 1))
    except MisconfigurationException as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("norm_swap")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_in_two_processes(everything, folder, folder)


def test_two_processes_train_the_net_that_was_written_by_hand(ranks):
    for rank in ranks:
        assert_same(rank["ddp"], rank["by hand"])
    assert_same(ranks[0]["ddp"], ranks[1]["ddp"])


def test_layers_are_replaced_before_they_are_sharded(ranks):
    for rank in ranks:
        assert rank["sharded"]
        assert rank["layer"].startswith("FSDPGroupNorm(3, 6")
        assert list(rank["fsdp"]) == list(rank["by hand"])
        for name, value in rank["fsdp"].items():
            torch.testing.assert_close(value, rank["by hand"][name], rtol=1e-10, atol=1e-12)


def test_a_folder_of_shards_is_restored_and_loaded(ranks, folder):
    assert_same(ranks[0]["restored"], ranks[0]["fsdp"])
    module = load_swapped(Sharded, folder / "folder.ckpt")
    assert type(module.net[1]) is nn.GroupNorm
    assert_same(dict(module.state_dict()), ranks[0]["fsdp"])


def test_a_layer_that_is_sharded_where_it_is_made_is_refused(ranks):
    for rank in ranks:
        assert rank["refused"].startswith("`NormSwap` must replace layers before they are sharded,")
