"""What a step is made of, in a real Trainer."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from lightning_optkit.bridge.effective_batch import (
    EffectiveBatch,
    batch_per_device,
    effective_batch,
)

DATA = TensorDataset(torch.zeros(20, 2))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Looks(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.found = batch_per_device(trainer)


def found(loader, **options):
    """Return the batch that is found as training starts."""
    looks = Looks()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[looks], logger=False, barebones=True, **options
    )
    trainer.fit(Net(), loader)
    return looks.found


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Batches:
    """A loader of another kind."""

    def __init__(self, batch_size=None):
        if batch_size is not None:
            self.batch_size = batch_size

    def __iter__(self):
        return iter([torch.zeros(3, 2)])


class Groups(BatchSampler):
    """Batches of different sizes."""

    def __init__(self):
        pass

    def __iter__(self):
        return iter([[0, 1], [2, 3, 4]])

    def __len__(self):
        return 2


KNOWN = {
    "plain": (lambda: DataLoader(DATA, 8), 8),
    "last one left out": (lambda: DataLoader(DATA, 8, drop_last=True), 8),
    "shuffled": (lambda: DataLoader(DATA, 20, shuffle=True), 20),
    "more than there is": (lambda: DataLoader(DATA, 64), 20),
    "a sampler with less": (lambda: DataLoader(DATA, 8, sampler=range(5)), 5),
    "with replacement": (
        lambda: DataLoader(DATA, 64, sampler=RandomSampler(DATA, num_samples=50, replacement=True)),
        50,
    ),
    "batch sampler": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(range(20), 6, False)), 6),
    "stream": (lambda: DataLoader(Stream(torch.zeros(5, 2)), 4), 4),
    "one in a dict": (lambda: {"only": DataLoader(DATA, 8)}, 8),
    "another kind that says it": (lambda: Batches(3), 3),
}


@pytest.mark.parametrize("name", KNOWN)
def test_batch_of_the_training_dataloader(name):
    loader, size = KNOWN[name]
    assert found(loader()) == size


REFUSED = {
    "batches of the dataset": (
        lambda: DataLoader(Stream([torch.zeros(3, 2)]), batch_size=None),
        "got batches made by its dataset",
    ),
    "batches of many sizes": (
        lambda: DataLoader(DATA, batch_sampler=Groups()),
        "got batches made by Groups",
    ),
    "another kind": (Batches, "got batches made by Batches"),
    "another kind with no number": (lambda: Batches("many"), "got batches made by Batches"),
    "two": (lambda: [DataLoader(DATA, 8), DataLoader(DATA, 4)], "not one .*, got 2: what a step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_that_is_not_known_is_asked_for(name):
    loader, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=f"`batch_size` must be given.*{message}"):
        found(loader())


def trainer_of(accumulated, **strategy):
    return SimpleNamespace(
        accumulate_grad_batches=accumulated, strategy=SimpleNamespace(**strategy)
    )


@pytest.mark.parametrize(
    ("strategy", "replicas"),
    [({}, 1), ({"distributed_sampler_kwargs": {"num_replicas": 6, "rank": 1}}, 6)],
)
def test_it_is_the_product_of_all_three(strategy, replicas):
    batch = effective_batch(trainer_of(5, **strategy), 7)
    assert batch == EffectiveBatch(7, 5, replicas)
    assert batch.size == 35 * replicas


def test_it_reads_as_the_arithmetic():
    assert str(EffectiveBatch(1024, 1, 1)) == "1,024 a device × 1 accumulated × 1 device = 1,024"
