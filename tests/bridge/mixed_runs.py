"""Modules whose batches are mixed, and steps of theirs driven without a Trainer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_optkit import MixedAccuracy

BATCH, FEATURES, CLASSES = 8, 5, 3


def data(n=BATCH, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


class Net(pl.LightningModule):
    """A small net in double precision, whose loss is a function of logits and targets."""

    def __init__(self, loss=F.cross_entropy, *, outputs=CLASSES):
        super().__init__()
        self.net = nn.Linear(FEATURES, outputs).double()
        self.loss = loss
        nn.init.constant_(self.net.bias, 0.1)
        with torch.no_grad():
            self.net.weight.copy_(
                torch.linspace(-1, 1, outputs * FEATURES).view_as(self.net.weight)
            )

    def training_step(self, batch, batch_idx):
        x, y = batch[:2]
        return self.loss(self.net(x), y)


class Busy(Net):
    """Its step touches all that it can reach."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES).double()
        self.dropout = nn.Dropout(0.3)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.collection = MetricCollection(
            {"confusion": MulticlassConfusionMatrix(CLASSES), "mixed": MixedAccuracy()}
        )
        self.generator = torch.Generator().manual_seed(3)
        self.seen = torch.zeros(CLASSES)
        self.losses = []
        self.logged = {}
        self.fed = []

    def log(self, name, value, **options):
        self.logged[name] = value

    def log_dict(self, dictionary, **options):
        self.logged |= dictionary

    def training_step(self, batch, batch_idx):
        x, y = batch
        x += 0.01 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        logits = self.net(self.dropout(self.norm(x)))
        loss = F.cross_entropy(logits, y)
        self.fed.append(y)
        self.accuracy(logits, y)
        self.collection.update(logits, y)
        self.seen += torch.bincount(y, minlength=CLASSES)
        self.losses.append(loss)
        self.last = loss.item()
        self.log("loss", loss)
        self.log_dict({"hits": (logits.argmax(1) == y).double().mean(), "accuracy": self.accuracy})
        return {"loss": loss, "labels": y}


class FakeTrainer(SimpleNamespace):
    """As much of a Trainer as a step asks for."""

    __hash__ = object.__hash__  # reports are kept by Trainer

    def __init__(self, *, epoch=0, batch_idx=0, rank=None):
        super().__init__(
            training=True,
            current_epoch=epoch,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=batch_idx)),
            distributed_sampler_kwargs=None if rank is None else {"rank": rank},
            loggers=[],
            is_global_zero=not rank,
            should_stop=False,
        )


def stepped(callback, module, batch, *, epoch=0, batch_idx=0, rank=None):
    """Run one step with the callback around it; return what it returns, and how it was mixed."""
    module._trainer = FakeTrainer(epoch=epoch, batch_idx=batch_idx, rank=rank)
    seen = []
    mix = callback.mix

    def noting(*args, **kwargs):
        mixed = mix(*args, **kwargs)
        copied = tree_map(torch.clone, mixed.inputs)  # the step may write into the others
        seen.append(replace(mixed, inputs=copied))
        return mixed

    callback.mix = noting
    try:
        if callback._module is not module:
            callback.setup(module._trainer, module, "fit")
        output = module.training_step(batch, batch_idx)
    finally:
        del callback.mix
    return output, seen[0] if seen else None
