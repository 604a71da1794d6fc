"""Modules of which two processes have half of every parameter each, and runs of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.utils._pytree import tree_map

from tests.contracts import Recorder, rng_state, user_log, user_metrics
from tests.modules import GAN, Classifier, image_loader, images


def fsdp() -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"accelerator": "cpu", "devices": 2, "strategy": strategy}


class ShardedClassifier(Classifier):
    """The convolution is a group of its own; the head is in the outermost group."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self, mesh=mesh)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])  # leaves the outermost group gathered


class ShardedSmoothClassifier(ShardedClassifier):
    """Without kinks, which differences of gradients cannot stand."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.SiLU()


class ShardedGAN(GAN):
    """Two groups, none around both."""

    def configure_model(self) -> None:
        for part in (self.generator, self.critic):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def local(state: Any) -> Any:
    """Return a nested state with this rank's shards in place of DTensors, copied."""
    return tree_map(
        lambda t: t.detach().to_local().clone() if isinstance(t, DTensor) else copy.deepcopy(t),
        state,
    )


def trained(
    module: pl.LightningModule, callbacks: list[pl.Callback], folder: Path, **options: Any
) -> dict[str, Any]:
    """Train for a few steps and return every state that the run leaves on this rank."""
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(
        default_root_dir=folder,
        logger=CSVLogger(folder, name="csv", version=0),
        callbacks=[*callbacks, Recorder()],
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **fsdp() | options,
    )
    trainer.fit(module, image_loader(), image_loader(shuffle=False))
    return {
        "weights": local(module.state_dict()),
        "kinds": {name: type(p).__name__ for name, p in module.named_parameters()},
        "gradients": local({k: p.grad for k, p in module.named_parameters()}),
        "optimizers": [local(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "attributes": [sorted(vars(child)) for child in module.modules()],
        "hooks": [
            [len(child._forward_pre_hooks), len(child._forward_hooks)] for child in module.modules()
        ],
        "diary": copy.deepcopy(module.diary),
        "rng": rng_state(),
        "log": user_log(trainer),
        "metrics": user_metrics(trainer.callback_metrics),
        "by_batch": next(c for c in trainer.callbacks if isinstance(c, Recorder)).seen,
    }


class Head(nn.Linear):
    """A layer that is called through a method of its own."""

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        return self(hidden)


class Regressor(pl.LightningModule):
    """Parameters of 3 rows, and of 1, on two ranks."""

    def __init__(self, dtype: torch.dtype, *, with_norm: bool = False) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(3)] if with_norm else []
        self.body = nn.Sequential(nn.Linear(36, 3), *norm, nn.SiLU())
        self.head = Head(3, 1)
        self.to(dtype)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for part in (self.body, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            register_fsdp_forward_method(self.head, "predict")

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["image"].flatten(1)
        return mse_loss(self.head.predict(self.body(x))[:, 0], x.square().mean(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def uneven_data(dtype: torch.dtype) -> list[list[dict[str, torch.Tensor]]]:
    """Return 10 samples in two batches for one rank, 4 in one for the other."""
    x = images(14)[0].to(dtype)
    return [[{"image": x[:7]}, {"image": x[7:10]}], [{"image": x[10:]}]]
