"""TrustRatio on two processes, with whole parameters and with half of each, against one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optkit import TrustRatio
from tests.callbacks.averaging_modules import initialised, samples, trainer_of
from tests.contracts import assert_resumes, assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed


class Net(pl.LightningModule):
    """Uneven and empty shards, tied and frozen weights."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh())
        self.tied = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.tied.weight
        self.again.bias.requires_grad_(False)
        self.head = nn.Linear(5, 1)
        self.optimizer = optimizer
        initialised(self).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.tied(self.body(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self)


class Sharded(Net):
    """Validation, of which there is one before training, leaves the outermost group gathered."""

    def configure_model(self) -> None:
        if not isinstance(self, FSDPModule):
            for part in (self.body, [self.tied, self.again], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return one with a group for each layer that has weights."""
    groups = [
        {"params": list(layer.parameters()), "weight_decay": 0.05 * j}
        for j, layer in enumerate([module.body, module.tied, module.head])
    ]
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, eps=1e-3, weight_decay=0.1)


OPTIMIZERS = {"gradient": sgd, "update": adamw}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def batches(rank: int | None = None) -> list[list[Tensor]]:
    """Return 6 batches: of a rank, or of both together."""
    pairs = zip(*(part.double().split(8) for part in samples(48)), strict=True)
    here = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return [[x[here], y[here]] for x, y in pairs]


def trained(module: pl.LightningModule, rank: int | None = None, **options: Any) -> dict[str, Any]:
    """Train for an epoch; return whole weights, ratios, and what the user's gradients are then."""
    ratio = TrustRatio(trust_coefficient=0.1)
    loaders = [DataLoader(batches(rank), batch_size=None) for _ in range(2)]
    trainer = trainer_of(
        ratio, epochs=1, use_distributed_sampler=False, log_every_n_steps=2, **options
    )
    trainer.fit(module, *loaders)
    metrics = trainer.callback_metrics
    return {
        "weights": {name: whole(p) for name, p in module.named_parameters()},
        "ratios": ratio.last_trust_ratios,
        "logged": {name: float(value) for name, value in metrics.items() if "optkit" in name},
        "gradients": {
            name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None
        },
    }


def everything(folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for of, optimizer in OPTIMIZERS.items():
        found["whole", of] = trained(Net(optimizer), rank, strategy="ddp", devices=2)
        strategy = ModelParallelStrategy(2, 1)
        found["shards", of] = trained(Sharded(optimizer), rank, strategy=strategy, devices=2)
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    whole_run = assert_resumes(TrustRatio, "classifier", folder, at=("mid-epoch",), **options)
    found["resumed"] = whole_run.last_trust_ratios
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust_ratio_ddp")
    return run_in_two_processes(everything, folder, folder)


@pytest.mark.parametrize("of", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_two_processes_make_the_steps_of_one_with_all_samples(ranks, kind, of):
    one, two = (rank[kind, of] for rank in ranks)
    assert_same(one, two)
    expected = trained(Net(OPTIMIZERS[of]))
    layers = ["body.0.weight", "tied.weight", "head.weight"]
    assert list(one["ratios"]) == list(expected["ratios"]) == layers
    assert list(one["ratios"].values()) == pytest.approx(
        list(expected["ratios"].values()), rel=1e-9
    )
    assert one["logged"] == pytest.approx(expected["logged"], rel=1e-6)
    assert len(one["logged"]) == 3
    for key in ("weights", "gradients"):
        assert list(one[key]) == list(expected[key])
        for name, value in one[key].items():
            torch.testing.assert_close(
                value, expected[key][name], rtol=1e-9, atol=1e-11, msg=f"{key} {name}"
            )


def test_a_resumed_run_ends_as_one_that_was_not_interrupted_on_both_ranks(ranks):
    assert list(ranks[0]["resumed"]) == ["net.0.weight", "head.weight"]
    assert ranks[0]["resumed"] == ranks[1]["resumed"]
