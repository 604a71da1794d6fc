"""LRWarmup on two processes, with whole weights (DDP) and with shards (FSDP2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from lightning_optkit import ErrorBelow, LRWarmup
from tests.callbacks.warmup_modules import BATCHES, Net, fit, rates_of
from tests.contracts import assert_resumes, assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2}
STEPS = BATCHES // 2
"""Steps of an epoch: each rank has every other sample."""

ERRORS = ((1.0, 0.7, 0.7, 0.7, 0.9, 0.1, 0.1, 0.1), (0.7, 1.0, 0.95, 0.95, 0.5, 1.9, 1.9, 1.9))
"""Of each rank. Alone, one would be released after two steps and the other after one; their mean is
below 0.8 in the fifth."""


def rank() -> int:
    return int(os.environ["RANK"])


class Apart(Net):
    """Logs an error of its own on each rank, which the second begins with later."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if rank() == 0 or self.num_batches >= 2:
            self.log("train_error", ERRORS[rank()][self.num_batches])
        self.num_batches += 1
        return mse_loss(self.net(batch[0]), batch[1])


class Sharded(Net):
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in (self.net[0], self.net[2], self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def everything(folder: Path) -> dict[str, Any]:
    until = ErrorBelow("train_error", 0.8)
    module, callback = Apart(), LRWarmup(until=until)
    nn.init.constant_(module.net[0].weight, 1.0 + rank())  # DDP takes those of rank zero
    trainer = fit(module, callback, **DDP)
    found = {"released": rates_of(trainer), "weights": module.state_dict()}

    trainer = fit(Net(), LRWarmup(epochs=1.5), **DDP)
    found["epochs"] = rates_of(trainer)

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    sharded = Sharded()
    trainer = fit(sharded, LRWarmup(fraction=0.5), strategy=strategy, devices=2)
    found["sharded"] = rates_of(trainer)

    def resumed() -> LRWarmup:
        return LRWarmup(until=ErrorBelow("loss_step", 1.39))  # of a rank's own samples

    options = DDP | {"use_distributed_sampler": False}  # it has other data on each rank already
    callback = assert_resumes(resumed, "classifier", folder, **options)
    return found | {"state": callback.state_dict()}


def test_all_ranks_warm_up_alike(tmp_path):
    first, second = run_in_two_processes(everything, tmp_path, tmp_path)
    assert_same(first, second)
    assert first["released"] == [0.1] * 5 + [1.0] * 3
    assert first["epochs"] == pytest.approx([k / 6 for k in range(1, 6)] + [1.0] * 3)
    assert first["sharded"] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 5)
    assert len(first["released"]) == 2 * STEPS
    full_from = first["state"]["warmup"]["full_from"][0]
    assert 1 < full_from < 15  # released within the run, and found so when it was resumed
