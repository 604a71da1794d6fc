"""Callbacks that mix, on two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_optkit import MixedAccuracy, Mixup, MixupOrCutMix
from lightning_optkit.bridge.sharding import whole
from tests.contracts import assert_resumes
from tests.distributed import run_in_two_processes
from tests.modules import images

pytestmark = pytest.mark.distributed


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
        self.accuracy = MixedAccuracy()
        self.right = self.total = 0.0

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any) -> torch.Tensor:
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        return F.cross_entropy(logits, batch[1])

    def on_train_epoch_end(self) -> None:
        self.right, self.total = float(self.accuracy.right), float(self.accuracy.total)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Notes(Mixup):
    def mix(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mixed = super().mix(inputs, *args, **kwargs)
        self.mixes.append((mixed.inputs.clone(), mixed.partners, mixed.mixing))
        return mixed


def batches(rank: int) -> list[list[torch.Tensor]]:
    x, y = images(40, seed=rank)
    return [list(pair) for pair in zip(x.double().split(8), y.split(8), strict=True)]


def trained(*, strategy: Any = "ddp", **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    callback, module = Notes(1.0, **options), Net()
    callback.mixes = []
    initial = {name: value.clone() for name, value in module.net.state_dict().items()}
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=2,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches(int(os.environ["RANK"])), batch_size=None)
    trainer.fit(module, loader)
    return {
        "mixes": callback.mixes,
        "initial": initial,
        "weights": {name: whole(value) for name, value in module.net.state_dict().items()},
        "counted": (module.right, module.total),
        "accuracy": float(trainer.callback_metrics["accuracy"]),
    }


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def everything(folder: Path) -> dict[str, Any]:
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}

    def make() -> Mixup:
        return MixupOrCutMix(1.0, probability=0.8)

    whole = assert_resumes(make, "classifier", folder, at=("mid-epoch",), **options)
    return {
        "proxy": trained(),
        "again": trained(),
        "two passes": trained(targets="two_pass"),
        "half": trained(probability=0.5, seed=1),
        "sharded": [trained(strategy=sharded(), targets=each) for each in ("proxy", "two_pass")],
        "resumed": whole._counted,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing_ddp")
    return run_in_two_processes(everything, folder, folder)


@pytest.mark.parametrize("mode", ["proxy", "two passes"])
def test_weights_are_those_of_the_mean_of_the_ranks_mixed_losses(ranks, mode):
    one, two = (rank[mode] for rank in ranks)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
    net.load_state_dict(one["initial"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        for rank, found in enumerate((one, two)):
            inputs, partners, weight = found["mixes"][step]
            y, logits = batches(rank)[step][1], net(inputs)
            losses = [F.cross_entropy(logits, target) for target in (y, y[partners])]
            ((weight * losses[0] + (1 - weight) * losses[1]) / 2).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(one["weights"][name], value, rtol=1e-12, atol=1e-13)
        assert torch.equal(one["weights"][name], two["weights"][name])


@pytest.mark.parametrize(("mode", "i"), [("proxy", 0), ("two passes", 1)])
def test_shards_train_as_whole_parameters(ranks, mode, i):
    for rank in ranks:
        found, expected = rank["sharded"][i], rank[mode]
        assert found["counted"] == expected["counted"]
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-12, atol=1e-13)


def test_ranks_mix_independently_and_reproducibly(ranks):
    one, two = (rank["proxy"]["mixes"] for rank in ranks)
    assert not {weight for *_, weight in one} & {weight for *_, weight in two}
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    for rank in ranks:
        for first, second in zip(rank["proxy"]["mixes"], rank["again"]["mixes"], strict=True):
            assert first[2] == second[2]
            assert torch.equal(first[1], second[1])


def test_ranks_agree_on_which_batches_are_mixed(ranks):
    one, two = (len(rank["half"]["mixes"]) for rank in ranks)
    assert one == two
    assert 0 < one < 5
    assert ranks[0]["resumed"] == ranks[1]["resumed"]


def test_mixed_accuracy_counts_the_samples_of_both(ranks):
    (right_a, total_a), (right_b, total_b) = (rank["proxy"]["counted"] for rank in ranks)
    assert (total_a, total_b) == (40, 40)
    expected = (right_a + right_b) / 80
    for rank in ranks:
        assert rank["proxy"]["accuracy"] == pytest.approx(expected, abs=1e-7)
