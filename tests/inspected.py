"""Modules and data as a checkpoint may need them, imported by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def samples(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 64 points of three classes."""
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return inputs.to(dtype), inputs[:, :3].argmax(1)


def loader(batch_size: int = 24) -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size, shuffle=True)


LOADER = loader()
BATCHES = list(LOADER)


class Points(pl.LightningDataModule):
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.data = TensorDataset(*samples())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.hparams["batch_size"], shuffle=True)


class Plain(pl.LightningModule):
    """A net of two layers; the other modules differ from it in one thing each."""

    def __init__(self, width: int = 4, steepness: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.steepness = steepness
        self.make()

    def make(self) -> None:
        width = self.hparams["width"]
        self.net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        loss = cross_entropy(self.steepness * self.net(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class OwnData(Plain):
    def train_dataloader(self) -> DataLoader:
        return loader()


class LayersInSetup(Plain):
    def make(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        super().make()


class LayersInConfigureModel(Plain):
    def make(self) -> None:
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            super().make()


class NoOptimizer(Plain):
    """An optimizer that can only be made in training."""

    def configure_optimizers(self) -> Any:
        if not self.__dict__.get("in_training"):
            raise RuntimeError("the learning rate was never found")
        return super().configure_optimizers()


class Trained(Plain):
    """Two optimizers to choose from, with a schedule."""

    def __init__(self, width: int = 4, optimizer: str = "adamw") -> None:
        super().__init__(width=width)
        self.optimizer = optimizer
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1)
        if self.optimizer == "part":
            return torch.optim.SGD(self.net[0].parameters(), lr=0.1)
        made = (
            torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
            if self.optimizer == "adamw"
            else torch.optim.SGD(self.parameters(), lr=0.4, momentum=0.9)
        )
        return [made], [torch.optim.lr_scheduler.ExponentialLR(made, 0.5)]


class OneWeight(Plain):
    """A single parameter."""

    def make(self) -> None:
        self.scale = nn.Parameter(torch.ones(()))
        self.net = lambda inputs: self.scale * inputs[:, :3]


class WritesWeights(Plain):
    """Hooks that change the weights before the first step."""

    def on_fit_start(self) -> None:
        self._write()

    def on_train_start(self) -> None:
        self._write()

    def _write(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(3.0)


class ForbidsTraining(Plain):
    """Whatever would train, print on stdout or save a file, fails or shows."""

    def configure_callbacks(self) -> Any:
        raise RuntimeError("a callback of training")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("a training step")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        print("printed by the user's code")
        return super().training_step(batch, batch_idx)


@dataclass
class Plan:
    width: int = 4


class TakesObject(Plain):
    """A hyperparameter that is no plain value."""

    def __init__(self, plan: Plan | None = None) -> None:
        super().__init__(width=(plan or Plan()).width)
        self.save_hyperparameters()
