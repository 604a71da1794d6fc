import random

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_optkit.bridge.held_batches import draw_batches
from tests.contracts import assert_same, rng_state


class Reader(pl.LightningModule):
    """Records the batches that training sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Drawer(pl.Callback):
    def __init__(self, **options):
        self.options = {"num_batches": 2} | options

    def on_train_start(self, trainer, pl_module):
        before = rng_state()
        self.held = draw_batches(trainer, pl_module, **self.options)
        assert_same(before, rng_state())


def fit(loader, *callbacks, **options):
    pl.seed_everything(3, verbose=False)
    module = Reader()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, loader)
    return module.seen


class Stream(IterableDataset):
    """Keeps its place in an attribute, as readers of files do."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position % 24 < 23:
            self.position += 1
            yield torch.tensor([float(self.position)])
        self.position += 1


class OneShot:
    def __init__(self):
        self.items = (torch.ones(1) for _ in range(2))

    def __iter__(self):
        return self.items


class Numbers(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.tensor([float(i)])


class NumbersByList(Numbers):
    def __getitems__(self, indices):
        return [torch.tensor([float(i)]) for i in indices]


def sampler_with_generator():
    dataset = Numbers()
    generator = torch.Generator().manual_seed(5)
    return DataLoader(dataset, 4, sampler=RandomSampler(dataset, generator=generator))


LOADERS = {
    "shuffled": lambda: DataLoader(Numbers(), 4, shuffle=True),
    "by_list": lambda: DataLoader(NumbersByList(), 4, shuffle=True),
    "own_generator": sampler_with_generator,
    "loader_generator": lambda: DataLoader(
        Numbers(), 4, shuffle=True, generator=torch.Generator().manual_seed(2)
    ),
    "subset": lambda: DataLoader(Numbers(), 4, sampler=SubsetRandomSampler(range(12))),
    "unbatched": lambda: DataLoader(Numbers(), batch_size=None),
    "workers": lambda: DataLoader(Numbers(), 4, shuffle=True, num_workers=1),
    "timeout": lambda: DataLoader(Numbers(), 4, num_workers=1, timeout=100),
    "stream": lambda: DataLoader(Stream(), 4),
    "dict": lambda: {
        "a": DataLoader(Numbers(), 4, shuffle=True),
        "b": DataLoader(Numbers(), 24, shuffle=True),
    },
    "list": lambda: [DataLoader(Numbers(), 4), DataLoader(Numbers(), 3, shuffle=True)],
    "combined": lambda: CombinedLoader(
        {"a": DataLoader(Numbers(), 4, shuffle=True), "b": DataLoader(Numbers(), 2)}, "min_size"
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_drawing_does_not_disturb_training(name):
    untouched = fit(LOADERS[name]())
    drawer = Drawer()
    assert_same(untouched, fit(LOADERS[name](), drawer))
    assert len(drawer.held) == 2
    assert type(drawer.held[0].batch) is type(untouched[0])


@pytest.mark.parametrize("name", LOADERS)
def test_the_draw_is_reproducible(name):
    first, second = Drawer(), Drawer()
    fit(LOADERS[name](), first)
    fit(LOADERS[name](), second)
    assert_same([h.batch for h in first.held], [h.batch for h in second.held])


def test_another_seed_draws_other_batches():
    first, second = Drawer(seed=0), Drawer(seed=1)
    fit(LOADERS["shuffled"](), first)
    fit(LOADERS["shuffled"](), second)
    assert not torch.equal(first.held[0].batch, second.held[0].batch)


def test_only_what_the_sampler_offers_is_drawn():
    drawer = Drawer(num_batches=3)
    fit(LOADERS["subset"](), drawer)
    drawn = torch.cat([h.batch for h in drawer.held]).flatten()
    assert sorted(drawn.tolist()) == [float(i) for i in range(12)]


def test_shorter_loaders_are_cycled_and_batches_count_their_samples():
    drawer = Drawer(num_batches=2)
    fit(LOADERS["dict"](), drawer)
    assert torch.equal(drawer.held[0].batch["b"], drawer.held[1].batch["b"])
    drawer = Drawer(num_batches=None, data=DataLoader(Numbers(), 10))
    fit(LOADERS["shuffled"](), drawer)
    assert [h.num_samples for h in drawer.held] == [10, 10, 4]


def test_own_data_as_a_list():
    data = [torch.full((3, 1), 7.0), torch.full((2, 1), 8.0)]
    drawer = Drawer(num_batches=None, data=data)
    fit(LOADERS["shuffled"](), drawer)
    assert_same([h.batch for h in drawer.held], data)


def test_transfer_hooks_are_applied():
    class Hooked(Reader):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 100

    module, drawer = Hooked(), Drawer()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, callbacks=[drawer],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Numbers(), 4))
    assert drawer.held[0].batch[0] == 100


def test_data_that_can_be_read_once_is_refused_before_the_first_step():
    with pytest.raises(
        MisconfigurationException, match=r"readable twice, got OneShot.*Pass `data="
    ):
        fit(OneShot(), Drawer())


def test_data_without_a_batch_is_refused():
    empty = DataLoader(TensorDataset(torch.zeros(3, 1)), 4, drop_last=True)
    with pytest.raises(MisconfigurationException, match="at least one batch"):
        fit(LOADERS["shuffled"](), Drawer(data=empty))


class OwnNoise(Numbers):
    """Draws from its own stream, and counts."""

    def __init__(self):
        self.stream = random.Random(3)
        self.generator = torch.Generator().manual_seed(3)
        self.calls = 0

    def __getitem__(self, i):
        self.calls += 1
        noise = self.stream.random() + torch.rand((), generator=self.generator).item()
        return torch.tensor([i + noise + self.calls])


@pytest.mark.parametrize("sampler", [None, SubsetRandomSampler(range(24))])
def test_datasets_with_a_state_are_put_back(sampler):
    def loader():
        return DataLoader(OwnNoise(), 4, sampler=sampler)

    untouched = fit(loader())
    drawer = Drawer()
    assert_same(untouched, fit(loader(), drawer))
    assert len(drawer.held) == 2


class Doubling(DataLoader):
    def __iter__(self):
        return (2 * batch for batch in super().__iter__())


def test_a_loader_with_its_own_iteration_is_iterated():
    drawer = Drawer(num_batches=1)
    fit(Doubling(Numbers(), 4), drawer)
    assert drawer.held[0].batch.flatten().tolist() == [0, 2, 4, 6]


def test_no_more_batches_are_held_than_are_trained_on():
    drawer = Drawer(num_batches=5)
    fit(DataLoader(Numbers(), 4), drawer, limit_train_batches=3)
    assert len(drawer.held) == 3


def test_batches_that_can_be_drawn_once_are_refused():
    once = DataLoader(Numbers(), batch_sampler=([i] for i in range(8)))
    with pytest.raises(MisconfigurationException, match=r"readable twice.*Pass `data="):
        fit(LOADERS["shuffled"](), Drawer(data=once))
