"""Small nets that note the rates they are trained at, for the tests of warmups."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

BATCHES = 8
"""Batches in an epoch of `data()`."""


def noting(kind):
    """Return a class of optimizers that note the rates of each step."""

    class Noting(kind):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []

        def step(self, closure=None):
            with torch.enable_grad():
                loss = None if closure is None else closure()
            self.seen.append([float(group["lr"]) for group in self.param_groups])
            super().step()
            return loss

    Noting.__name__ = Noting.__qualname__ = kind.__name__
    return Noting


SGD, Adam = noting(torch.optim.SGD), noting(torch.optim.Adam)


def sgd(module, **options):
    return SGD(module.parameters(), **{"lr": 1.0} | options)


class Net(pl.LightningModule):
    """A regression with automatic optimization.

    Args:
        optimizer: makes one of the module.
        scheduler: makes one of the optimizer.
        interval: when it is stepped.
        log: `(module) -> values` to log in each step.
    """

    def __init__(self, optimizer=sgd, scheduler=None, interval="step", log=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.interval = interval
        self.to_log = log
        self.found = []  # rates that the step finds
        self.num_batches = 0

    def training_step(self, batch, batch_idx):
        self.num_batches += 1
        self.found.append([float(g["lr"]) for o in self.trainer.optimizers for g in o.param_groups])
        if self.to_log is not None:
            self.log_dict(self.to_log(self), on_step=True)
        batch = batch["a"] if isinstance(batch, dict) else batch
        return 1e-6 * mse_loss(self.net(batch[0]), batch[1])  # at any rate it stays finite

    def configure_optimizers(self):
        optimizer = self.optimizer(self)
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler | {"monitor": "level"}}


class Manual(Net):
    """Manual optimization: the first optimizer steps thrice in a batch, the second in every other.

    Args:
        schedulers: whether the module has some, and steps them when both have stepped.
    """

    def __init__(self, schedulers=False):
        super().__init__()
        self.automatic_optimization = False
        self.schedulers = schedulers

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(3):
            self.backward_of(batch)
            first.step()
        if batch_idx % 2:
            self.backward_of(batch)
            second.step()
            for scheduler in self.lr_schedulers() or []:
                scheduler.step()

    def backward_of(self, batch):
        self.zero_grad()
        self.manual_backward(1e-6 * mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizers = [SGD(self.net[layer].parameters(), lr=1.0) for layer in (0, 2)]
        if not self.schedulers:
            return optimizers
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]


def samples(n=4 * BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, k, generator=generator) for k in (3, 1)]


def data(batch_size=4):
    """Return a loader of 8 batches."""
    return DataLoader(TensorDataset(*samples()), batch_size)


class Stream(IterableDataset):
    """The same without a length."""

    def __iter__(self):
        return iter(zip(*samples(), strict=True))


def stream():
    return DataLoader(Stream(), 4)


def trainer_of(*callbacks, **options):
    """Return a Trainer of two epochs without any output."""
    return pl.Trainer(
        callbacks=list(callbacks),
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | options,
    )


def fit(module, *callbacks, loader=None, **options):
    """Train for two epochs of 8 batches; return the Trainer."""
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, data() if loader is None else loader)
    return trainer


def rates_of(trainer, i=0):
    """Return the rates of each step of an optimizer, that of its first group alone."""
    return [rates[0] for rates in trainer.optimizers[i].seen]
