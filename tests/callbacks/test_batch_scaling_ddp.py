"""BatchScaling on two processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

from lightning_optkit import BatchScaling
from tests.callbacks.test_batch_scaling import Net, data, growing, rates, times, trainer_of
from tests.contracts import assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

DDP = {"devices": 2, "strategy": "ddp", "precision": "64-true"}


def scaling() -> BatchScaling:
    return BatchScaling(2, warmup_epochs=1.5)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("BatchScaling"):
            self.found.append(record.getMessage())


class Stops(pl.Callback):
    """Stops after an epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def fit(batch_size: int, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
    """Return what a run of 3 epochs over 32 samples leaves on this rank."""
    module, handler = Net(), Lines()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    ckpt_path, path = options.pop("ckpt_path", None), options.pop("path", None)
    loader = data(batch_size)
    if options.get("use_distributed_sampler") is False:  # Lightning's shuffles, this does not
        mine = Subset(loader.dataset, range(int(os.environ["RANK"]), len(loader.dataset), 2))
        loader = DataLoader(mine, batch_size)
    trainer = trainer_of(scaling(), *callbacks, **{"precision": "64-true"} | options)
    try:
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    finally:
        logger.removeHandler(handler)
    if path is not None:
        trainer.save_checkpoint(path)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {
        "rates": rates(trainer),
        "weights": {k: v.detach().clone() for k, v in module.state_dict().items()},
        "lines": handler.found,
        "metrics": metrics,
    }


class Sharded(Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() > 1:
            fully_shard(self.net, mesh=mesh)


def sharded(data_parallel: int) -> dict[str, Any]:
    """Return what a run on a mesh of two devices leaves, which share a model or the data."""
    strategy = ModelParallelStrategy(data_parallel, 2 // data_parallel)
    module = Sharded(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    trainer = trainer_of(scaling(), devices=2, strategy=strategy, log_every_n_steps=1)
    trainer.fit(module, data())
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def unequal() -> str:
    """Return with what message batches of other sizes on other ranks are refused."""
    with pytest.raises(MisconfigurationException) as error:
        fit(3 + int(os.environ["RANK"]), **DDP)
    return str(error.value)


def everything(folder: Path) -> dict[str, Any]:
    return {
        "ddp": fit(4, accumulate_grad_batches=2, use_distributed_sampler=False, **DDP),
        "resumed": fit(4, max_epochs=2, ckpt_path=folder / "one.ckpt", **DDP),
        "sharded": sharded(2),
        "of one model": sharded(1),
        "unequal": unequal(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch_scaling_ddp")
    fit(4, Stops(), max_epochs=2, path=folder / "one.ckpt")
    return run_in_two_processes(everything, folder, folder)


def test_two_devices_train_as_one_on_batches_of_twice_the_size(ranks):
    """Which take the samples in turn, so that a step has the same ones in both runs."""
    alone = fit(8, accumulate_grad_batches=2)
    assert alone["rates"] == times(growing([8.0] * 6, 3), [[0.1, 0.03]] * 6)
    for rank in ranks:
        found = rank["ddp"]
        assert found["rates"] == alone["rates"]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-12, atol=1e-14)
    assert_same(ranks[0]["ddp"]["weights"], ranks[1]["ddp"]["weights"])
    assert [rank["ddp"]["metrics"]["optkit-lr/batch_size"] for rank in ranks] == [16.0] * 2


def test_the_arithmetic_is_printed_once(ranks):
    first, second = (rank["ddp"]["lines"] for rank in ranks)
    assert first == [
        "BatchScaling: 4 a device × 2 accumulated × 2 devices = 16, 8 × 2: rate × 8 (linear), "
        "warmed up over 3 steps"
    ]
    assert second == []


def test_resumed_on_more_devices_the_rate_follows(ranks):
    """After 8 of 12 steps of the warmup on one device, 2 of its 6 are left on two."""
    for rank in ranks:
        factors = [1 + 3 * (4 + t + 1) / 6 for t in range(2)] + [4.0] * 2
        assert rank["resumed"]["rates"] == times(factors, [[0.1, 0.03]] * 4)
    assert ranks[0]["resumed"]["lines"] == [
        "BatchScaling: 4 a device × 1 accumulated × 2 devices = 8, 4 × 2: rate × 4 (linear), "
        "warmed up over 6 steps; 4 before the run was interrupted"
    ]


@pytest.mark.parametrize(("run", "batch_size"), [("sharded", 8.0), ("of one model", 4.0)])
def test_devices_that_share_a_model_share_its_data(run, batch_size, ranks):
    for rank in ranks:
        assert rank[run]["optkit-lr/batch_size"] == batch_size
        assert rank[run]["optkit-lr/scale"] == batch_size / 2
        assert rank[run]["optkit-lr/effective/SGD"] == pytest.approx(0.1 * batch_size / 2)


def test_batches_of_other_sizes_on_other_devices_are_refused_on_all(ranks):
    for rank in ranks:
        assert "batches of different sizes, got 3 to 4. Write `batch_size=`" in rank["unequal"]
