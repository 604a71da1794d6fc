"""Steps of the first epochs, against those that a Trainer makes."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.bridge.steps_of_epochs import steps_of_epochs

BATCHES = 7
LENGTHS = (0, 0.1, 0.5, 1, 1.5, 2, 3, 3.75)


class Net(pl.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.weight.sum()
        self.optimizers().step()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.made = [0]  # at the end of each epoch
        self.found = {epochs: steps_of_epochs(trainer, epochs) for epochs in LENGTHS}

    def on_train_epoch_end(self, trainer, pl_module):
        self.made.append(trainer.global_step)


def counted(*callbacks, manual=False, data=None, **options):
    counts = Counts()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=[counts, *callbacks], logger=False,
        barebones=True, **options,
    )  # fmt: skip
    trainer.fit(Net(manual), DataLoader(torch.zeros(BATCHES, 2)) if data is None else data)
    return counts


RUNS = {
    "plain": {},
    "manual": {"manual": True},
    "accumulated": {"accumulate_grad_batches": 3},
    "limited": {"limit_train_batches": 5, "accumulate_grad_batches": 2},
    "scheduled": {"scheduling": {0: 2, 2: 7, 3: 3}},
    "scheduled later": {"scheduling": {1: 4}},
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_that_the_trainer_makes(name):
    options = dict(RUNS[name])
    scheduling = options.pop("scheduling", None)
    scheduler = [] if scheduling is None else [GradientAccumulationScheduler(scheduling)]
    counts = counted(*scheduler, **options)
    for epochs, found in counts.found.items():
        whole = int(epochs)
        rest = (epochs - whole) * (counts.made[whole + 1] - counts.made[whole])
        assert found == counts.made[whole] + math.ceil(rest)
    assert len(counts.made) == 5


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(BATCHES, 2))


def test_data_without_a_length_have_none():
    assert set(counted(data=DataLoader(Stream())).found.values()) == {None}


def test_a_part_is_not_rounded_up_by_rounding():
    trainer = pl.Trainer(barebones=True, accelerator="cpu")
    trainer.fit_loop.max_batches = 100
    assert [steps_of_epochs(trainer, part / 100) for part in range(101)] == list(range(101))
