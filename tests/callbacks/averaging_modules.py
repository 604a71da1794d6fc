"""Small nets, runs and records for the tests of SWA and EMA."""

from __future__ import annotations

import itertools
import re
import threading
import warnings
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

BATCHES = 6
"""Batches in an epoch of `data()`."""


def samples(n=4 * BATCHES, *, seed=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, generator=generator).to(dtype) for k in (3, 1)]


def data(*, seed=3, dtype=torch.float32, **options):
    """Return a loader of 6 batches of 4."""
    return DataLoader(TensorDataset(*samples(seed=seed, dtype=dtype)), 4, **options)


def held_out(*, seed=4, dtype=torch.float32):
    """Return a loader of 2 batches of 4, to validate, test and predict on."""
    return DataLoader(TensorDataset(*samples(8, seed=seed, dtype=dtype)), 4)


class Net(pl.LightningModule):
    """A regression that validates, tests and predicts, and notes the weights that it does it on.

    Args:
        norm: with a BatchNorm layer as the first layer.
        optimizer: makes one of the module; by default SGD with momentum.
        scheduler: makes one of the optimizer, stepped once a batch.
    """

    def __init__(self, *, norm=False, optimizer=None, scheduler=None, width=4):
        super().__init__()
        first = [nn.BatchNorm1d(3)] if norm else []
        self.net = nn.Sequential(*first, nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.seen = {"train": [], "validate": [], "test": [], "predict": []}
        self.num_training_steps = 0

    def forward(self, x):
        return self.net(x)

    def note(self, stage):
        self.seen[stage].append(weights_of(self))

    def loss(self, batch):
        return mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.note("validate")
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.note("test")
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.note("predict")
        return self(batch[0])

    def configure_optimizers(self):
        if self.optimizer is None:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        else:
            optimizer = self.optimizer(self)
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class AdversarialNet(pl.LightningModule):
    """Manual optimization of two nets with BatchNorm by two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.critic = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        first, second = self.optimizers()
        x = batch[0]
        first.zero_grad()
        self.manual_backward(-self.critic(self.maker(x)).mean())
        first.step()
        second.zero_grad()
        loss = self.critic(self.maker(x).detach()).mean() - self.critic(x).mean()
        self.manual_backward(loss.square())
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.maker, self.critic)]


class Odd(Net):
    """All that a module may hold beside plain parameters, and what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.counter = (i for i in itertools.count())
        self.net[-1].bias.requires_grad_(False)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.net[0].weight
        self.empty = nn.Parameter(torch.zeros(0))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("trace", torch.zeros(2))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def loss(self, batch):
        return super().loss(batch) + self.tied(batch[0]).square().mean()

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.scratch += 1.0
        self.trace = self.trace + self.count  # another tensor
        return super().training_step(batch, batch_idx)


class MadeInSetup(Net):
    def __init__(self):
        super().__init__()
        del self.net

    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


class MadeInConfigureModel(Net):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, num_batches=BATCHES):
        x, y = samples(4 * num_batches)
        self.batches = list(zip(x.split(4), y.split(4), strict=True))

    def __iter__(self):
        return iter(self.batches)


def weights_of(module):
    """Return copies of parameters and buffers; a shared one once."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


class Snapshots(pl.Callback):
    """Notes the weights of training after every batch and epoch, and at the end."""

    def __init__(self):
        self.by_step = []
        self.by_epoch = []
        self.rates = []
        self.at_end = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.by_step.append(weights_of(pl_module))
        self.rates.append([g["lr"] for o in trainer.optimizers for g in o.param_groups])

    def on_train_epoch_end(self, trainer, pl_module):
        self.by_epoch.append(weights_of(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.at_end = weights_of(pl_module)


class StopsAfter(pl.Callback):
    """Stops as EarlyStopping does, after so many epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


class Raises(pl.Callback):
    """Raises in a hook."""

    def __init__(self, hook, error, *, epoch=1):
        self.error = error
        self.epoch = epoch
        setattr(self, hook, self._raise)

    def _raise(self, trainer, *_):
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            raise self.error


def trainer_of(*callbacks, epochs=3, **options):
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": epochs} | options,
    )


def initialised(module, *, seed=5):
    """Draw the weights from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
    return module


def fit(module, *callbacks, loader=None, val=True, ckpt_path=None, initialise=True, **options):
    """Train for three epochs of 6 batches, validating after each; return the Trainer."""
    if initialise:
        initialised(module)
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    trainer = trainer_of(*callbacks, **options | ({} if val else {"limit_val_batches": 0}))
    loader = data(dtype=dtype) if loader is None else loader
    validates = is_overridden("validation_step", getattr(module, "_orig_mod", module))
    val_loader = held_out(dtype=dtype) if validates else None
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
    return trainer


def mean_of(snapshots, weights=None):
    """Return the weighted mean of snapshots, in float64, by name; integers are the last ones."""
    weights = [1.0] * len(snapshots) if weights is None else weights
    total = sum(weights)
    return {
        name: sum(w * s[name].double() for w, s in zip(weights, snapshots, strict=True)) / total
        if last.is_floating_point()
        else last
        for name, last in snapshots[-1].items()
    }


def assert_close(left, right, *, atol):
    assert list(left) == list(right)
    for name in left:
        difference = (left[name].double() - right[name].double()).abs()
        assert difference.numel() == 0 or difference.max() <= atol, f"{name}: {difference.max()}"


def differs(left, right):
    """Return whether any tensor differs."""
    return any(not torch.equal(left[name], right[name]) for name in left)


@contextmanager
def warned(text):
    """Fail unless the block warns so. Of others, `pytest.warns` would not know the module."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert any(re.search(text, message) for message in messages), messages
