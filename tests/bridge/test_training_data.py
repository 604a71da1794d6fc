"""Streams of training batches: what they hold, and that training goes on as if there were none."""

import copy
import gc
import itertools
import multiprocessing
import random
from contextlib import closing

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    get_worker_info,
)

from lightning_optkit.bridge.held_batches import draw_batches, stream_batches
from lightning_optkit.bridge.probe import Probe
from tests.bridge.test_held_batches import Doubling, Numbers, NumbersByList, OneShot, OwnNoise
from tests.contracts import ResumableLoader, assert_same, public_state, rng_state
from tests.distributed import run_in_two_processes


class Reader(pl.LightningModule):
    """Records the batches that training sees, and draws between them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.norm = torch.nn.BatchNorm1d(1, affine=False)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch, torch.rand(1), random.random(), np.random.rand()))  # noqa: NPY002
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def batches(self):
        return [each[0] for each in self.seen]


class Validated(Reader):
    def validation_step(self, batch, batch_idx):
        pass


class Streamer(pl.Callback):
    """Streams at chosen (epoch, batch) moments, as roughly as a caller can."""

    def __init__(self, *moments, stop_after=None, probe=False, **options):
        self.moments = moments
        self.stop_after = stop_after
        self.probe = probe
        self.options = options
        self.streams = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) in self.moments:
            self.stream(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        if "validation" in self.moments:
            self.stream(trainer, pl_module)

    def stream(self, trainer, pl_module):
        before = rng_state(), public_state(pl_module), owned_state(trainer.train_dataloader)
        stream = stream_batches(trainer, pl_module, **self.options)
        held = []
        if self.probe:
            with Probe(trainer, pl_module) as probe, closing(stream):
                dtype = torch.get_default_dtype()
                for item in itertools.islice(stream, self.stop_after):
                    assert torch.get_default_dtype() == dtype
                    probe.loss_fn(item.batch)(probe.parameters(["weight"]))
                    held.append(item)
        else:
            with closing(stream):
                held.extend(itertools.islice(stream, self.stop_after))
        after = rng_state(), public_state(pl_module), owned_state(trainer.train_dataloader)
        assert_same(before, after)
        self.streams.append([item.batch for item in held])
        self.num_samples = [item.num_samples for item in held]


def owned_state(loaders):
    """Return what samplers, batch samplers and datasets hold, copied; whatever the collection."""
    found = []
    for loader in CombinedLoader(loaders).flattened:
        if not isinstance(loader, DataLoader):
            continue
        inner = getattr(loader.batch_sampler, "sampler", None)
        for owner in (loader.dataset, loader.sampler, loader.batch_sampler, inner):
            for key, value in getattr(owner, "__dict__", {}).items():
                if isinstance(value, torch.Generator):
                    found.append((key, value.get_state()))
                elif isinstance(value, random.Random):
                    found.append((key, value.getstate()))
                elif isinstance(value, (int, float, list, torch.Tensor)):
                    found.append((key, copy.deepcopy(value)))
    return found


def fit(loader, *callbacks, module=None, validate=None, ckpt_path=None, seed=3, **options):
    pl.seed_everything(seed, verbose=False)
    module = module or (Reader() if validate is None else Validated())
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        | options,
    )
    trainer.fit(module, loader, validate, ckpt_path=ckpt_path)
    return module


class Counted(IterableDataset):
    """The numbers from 0, shared among workers; without a length."""

    def __init__(self, stop=24):
        self.stop = stop

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = itertools.count(first, step) if self.stop is None else range(first, 24, step)
        return (torch.tensor([float(i)]) for i in numbers)


class Named(Numbers):
    def __getitem__(self, i):
        return {"x": torch.tensor([float(i)]), "name": str(i)}


class Backwards(Sampler):
    def __len__(self):
        return 24

    def __iter__(self):
        return iter(range(23, -1, -1))


class Pairs(Sampler):
    def __len__(self):
        return 12

    def __iter__(self):
        return ([i, 23 - i] for i in range(12))


def floats(*values):
    return [torch.tensor([float(value)]) for value in values]


class FromFile:
    """Not a `DataLoader`, iterable as often as wanted."""

    def __iter__(self):
        return iter(floats(4, 5, 6))

    def __len__(self):
        return 3


def two_loaders(mode):
    return CombinedLoader(
        {"a": DataLoader(Numbers(), 4), "b": DataLoader(Numbers(), 8, num_workers=1)}, mode
    )


ORDERED = {
    "plain": lambda: DataLoader(Numbers(), 5),
    "drop last": lambda: DataLoader(Numbers(), 5, drop_last=True),
    "by list": lambda: DataLoader(NumbersByList(), 5),
    "workers": lambda: DataLoader(Numbers(), 5, num_workers=2),
    "persistent": lambda: DataLoader(Numbers(), 5, num_workers=2, persistent_workers=True),
    "dict batches": lambda: DataLoader(Named(), 5, num_workers=1),
    "own collate": lambda: DataLoader(Numbers(), 5, collate_fn=torch.stack, num_workers=1),
    "sampler": lambda: DataLoader(Numbers(), 5, sampler=Backwards()),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=Pairs(), num_workers=1),
    "unbatched": lambda: DataLoader(Numbers(), batch_size=None),
    "unbatched by sampler": lambda: DataLoader(
        torch.arange(24.0), batch_size=None, sampler=Pairs()
    ),
    "iterable": lambda: DataLoader(Counted(), 5),
    "iterable, workers": lambda: DataLoader(Counted(), 5, num_workers=2),
    "iterable, unbatched": lambda: DataLoader(Counted(), batch_size=None),
    "own iteration": lambda: Doubling(Numbers(), 5),
    "own iteration, workers": lambda: Doubling(
        Numbers(), 5, num_workers=1, persistent_workers=True
    ),
    "no DataLoader": FromFile,
    "list of lists": lambda: [["one", "two", "three"], [1.0, 2.0]],
    "primitives": lambda: [1.0, 2.0, 3.0],
    "collection": lambda: {
        "a": DataLoader(Numbers(), 4),
        "b": (DataLoader(Numbers(), 9), FromFile()),
    },
    "min_size": lambda: two_loaders("min_size"),
    "max_size": lambda: two_loaders("max_size"),
    "max_size_cycle": lambda: two_loaders("max_size_cycle"),
}  # fmt: skip


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("name", ORDERED)
def test_a_stream_is_an_epoch_of_training(name, limit):
    streamer = Streamer((0, 0))
    trained = fit(ORDERED[name](), streamer, max_epochs=1, limit_train_batches=limit).batches
    if name.startswith("iterable") and limit is None:  # of unknown length: what has been seen
        assert_same(streamer.streams[0], trained[:1])
        streamer = Streamer((0, len(trained) - 1))
        fit(ORDERED[name](), streamer, max_epochs=1)
    assert len(trained) > 1
    assert_same(streamer.streams[0], trained)


SHUFFLED = {
    "shuffled": lambda **k: DataLoader(Numbers(), 4, shuffle=True, **k),
    "loader's generator": lambda **k: DataLoader(
        Numbers(), 4, shuffle=True, generator=torch.Generator().manual_seed(2), **k
    ),
    "sampler's generator": lambda **k: DataLoader(
        Numbers(), 4, sampler=RandomSampler(range(24), generator=torch.Generator()), **k
    ),
    "batch sampler's": lambda **k: DataLoader(
        Numbers(),
        batch_sampler=BatchSampler(
            RandomSampler(range(24), generator=torch.Generator()), 4, drop_last=False
        ),
        **k,
    ),
    "subset": lambda **k: DataLoader(Numbers(), 4, sampler=SubsetRandomSampler(range(24)), **k),
    "Python's": lambda **k: DataLoader(Numbers(), 4, sampler=ByPython(), **k),
    "unbatched": lambda **k: DataLoader(Numbers(), batch_size=None, sampler=ByPython(), **k),
    "NumPy's": lambda **k: DataLoader(Numbers(), 4, sampler=ByNumPy(), **k),
    "NumPy's old": lambda **k: DataLoader(Numbers(), 4, sampler=ByOldNumPy(), **k),
    "by epoch": lambda **k: ResumableLoader(DataLoader(Numbers(), 4, **k)),
    "augmented": lambda **k: DataLoader(Augmented(), 4, shuffle=True, **k),
    "noisy": lambda **k: DataLoader(Noisy(), 4, shuffle=True, **k),
    "noisy collate": lambda **k: DataLoader(Numbers(), 4, collate_fn=NoisyCollate(), **k),
}


class ByPython(Sampler):
    def __init__(self):
        self.generator = random.Random(5)
        self.position = 0

    def __len__(self):
        return 24

    def __iter__(self):
        for i in self.order():
            self.position += 1
            yield int(i)

    def order(self):
        return self.generator.sample(range(24), 24)


class ByNumPy(ByPython):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(5)

    def order(self):
        return self.generator.permutation(24)


class ByOldNumPy(ByNumPy):
    def __init__(self):
        super().__init__()
        self.generator = np.random.RandomState(5)


class Augmented(Numbers):
    """Draws from the global generators."""

    def __getitem__(self, i):
        noise = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
        return torch.tensor([i + noise / 3])


class Noisy(Numbers):
    """Draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __getitem__(self, i):
        return i + torch.rand(1, generator=self.generator)


class NoisyCollate:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, items):
        return torch.stack(items) + torch.rand(len(items), 1, generator=self.generator)


def numbers_in(batches):
    """Return the samples' numbers, sorted; noise is below 1."""
    return sorted(int(value) for value in torch.cat(batches).flatten())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", SHUFFLED)
def test_a_seed_gives_the_same_batches_at_any_time(name, workers):
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    if name == "by epoch":  # has no such options
        options = {}
    alone, probed = Streamer((0, 1), (1, 3)), Streamer((0, 2), (1, 5), probe=True)
    fit(SHUFFLED[name](**options), alone, probed)
    first, *others = alone.streams + probed.streams
    assert len(others) == 3
    for other in others:
        assert_same(first, other)
    assert numbers_in(first) == list(range(24))
    reseeded = Streamer((0, 1), seed=1)
    fit(SHUFFLED[name](**options), reseeded)
    same = all(torch.equal(a, b) for a, b in zip(first, reseeded.streams[0], strict=True))
    assert same == (name == "by epoch")  # whose order is of the epoch alone


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sampler_draws_first_after_seeding(workers):
    streamer = Streamer((0, 0), seed=5)
    fit(SHUFFLED["shuffled"](num_workers=workers), streamer, max_epochs=1)
    torch.manual_seed(5)
    assert torch.cat(streamer.streams[0]).flatten().tolist() == list(RandomSampler(range(24)))


def test_loaders_of_a_collection_are_shuffled_apart():
    streamer = Streamer((0, 0))
    fit([SHUFFLED["shuffled"](), SHUFFLED["shuffled"]()], streamer, max_epochs=1)
    first, second = (torch.cat(batches) for batches in zip(*streamer.streams[0], strict=True))
    assert not torch.equal(first, second)
    assert numbers_in([first]) == numbers_in([second])


def test_noise_differs_from_sample_to_sample():
    streamer = Streamer((0, 0))
    for name in ("augmented", "noisy", "noisy collate"):
        fit(SHUFFLED[name](), streamer, max_epochs=1)
        noise = torch.cat(streamer.streams.pop()) % 1
        assert noise.unique().numel() == 24


def test_a_resumed_run_streams_the_same(tmp_path):
    loader = SHUFFLED["augmented"]
    whole = Streamer((1, 2))
    fit(loader(), whole)
    interrupted = fit(loader(), max_epochs=1)
    interrupted.trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = Streamer((1, 2))
    fit(loader(), resumed, seed=99, ckpt_path=tmp_path / "first.ckpt")
    assert_same(whole.streams, resumed.streams)
    assert len(resumed.streams) == 1


class Place(IterableDataset):
    """Keeps its place in an attribute."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position % 24 < 23:
            self.position += 1
            yield torch.tensor([float(self.position)])
        self.position += 1


class Persistent(DataLoader):
    """Counts its epochs in a list."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.epochs = []

    def __iter__(self):
        self.epochs.append(len(self.epochs))
        return (batch + 100 * self.epochs[-1] for batch in super().__iter__())


def shared_dataset():
    dataset = OwnNoise()
    return [DataLoader(dataset, 4, shuffle=True), DataLoader(dataset, 12)]


UNDISTURBED = {
    **SHUFFLED,
    **{name: ORDERED[name] for name in ("collection", "max_size", "no DataLoader")},
    "persistent workers": lambda: DataLoader(
        Augmented(), 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "workers": lambda: DataLoader(Augmented(), 4, shuffle=True, num_workers=2),
    "workers' generator": lambda: DataLoader(
        Augmented(),
        4,
        sampler=Backwards(),
        num_workers=1,
        generator=torch.Generator().manual_seed(2),
    ),
    "own place": lambda: DataLoader(Place(), 4),
    "own iteration": lambda: Persistent(
        Augmented(), 4, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "own noise": lambda: DataLoader(OwnNoise(), 4, shuffle=True),
    "own noise, shared": shared_dataset,
}


@pytest.mark.parametrize("stop_after", [None, 2])
@pytest.mark.parametrize("name", UNDISTURBED)
def test_training_goes_on_as_if_there_were_no_stream(name, stop_after):
    options = {"validate": [torch.zeros(1)], "val_check_interval": 2, "num_sanity_val_steps": 0}
    untouched = fit(UNDISTURBED[name](), **options)
    streamer = Streamer((0, 0), (0, 1), "validation", (1, 2), (1, 5), stop_after=stop_after)
    assert_same(untouched.seen, fit(UNDISTURBED[name](), streamer, **options).seen)
    assert len(streamer.streams) > 3


# -- its end -----------------------------------------------------------------------------------


class Stopper(pl.Callback):
    """Lets `act` loose on a stream, in the middle of an epoch."""

    def __init__(self, act):
        self.act = act
        self.acted = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.act(trainer, stream_batches(trainer, pl_module))
            self.acted = True


def during_training(loader, act, module=None, **options):
    stopper = Stopper(act)
    fit(loader, stopper, module=module, **{"max_epochs": 1} | options)
    assert stopper.acted


def test_closing_ends_workers_and_puts_samplers_back():
    def act(trainer, stream):
        sampler = trainer.train_dataloader.sampler

        def workers():
            return {child.pid for child in multiprocessing.active_children()}

        before, state = workers(), sampler.generator.getstate()
        assert len(before) == 2  # training's
        next(stream)
        assert len(workers() - before) == 2
        assert sampler.generator.getstate() != state
        stream.close()
        assert workers() == before
        assert sampler.generator.getstate() == state

    during_training(DataLoader(Numbers(), 4, sampler=ByPython(), num_workers=2), act)


@pytest.mark.parametrize(
    ("method", "process"), [("fork", "ForkProcess"), ("forkserver", "ForkServerProcess")]
)
def test_workers_are_started_as_the_loader_starts_them(method, process):
    def act(trainer, stream):
        before = set(multiprocessing.active_children())
        batches = [next(stream).batch for _ in range(4)]
        ours = set(multiprocessing.active_children()) - before
        assert [type(worker).__name__ for worker in ours] == [process]
        stream.close()
        if method == "fork":
            assert_same(trainer.lightning_module.batches, batches[:2])
            torch.manual_seed(0)
            assert_same(batches, [torch.rand_like(number) for number in torch.arange(24.0)[:4]])

    loader = DataLoader(
        torch.arange(24.0), batch_size=None, num_workers=1, persistent_workers=True,
        multiprocessing_context=method, collate_fn=torch.rand_like, prefetch_factor=1, timeout=200,
        worker_init_fn=torch.manual_seed if method == "fork" else None,
    )  # fmt: skip
    during_training(loader, act, limit_train_batches=4)


class Failing(Numbers):
    """Fails for one sample, while it is told to."""

    fails = False

    def __init__(self):
        self.calls = 0

    def __getitem__(self, i):
        self.calls += 1
        if Failing.fails and i == 9:
            torch.rand(1)
            raise KeyError("sample 9")
        return super().__getitem__(i)


def test_a_dataset_that_fails_leaves_nothing_behind(monkeypatch):
    def act(trainer, stream):
        dataset = trainer.train_dataloader.dataset
        before = rng_state(), dataset.calls
        with monkeypatch.context() as patch:
            patch.setattr(Failing, "fails", True)
            next(stream)
            with pytest.raises(KeyError, match="sample 9"):
                list(stream)
        assert_same(before, (rng_state(), dataset.calls))
        assert torch.is_grad_enabled()

    during_training(DataLoader(Failing(), 4), act)


def test_workers_end_with_a_failure_that_is_still_looked_at(monkeypatch):
    def act(trainer, stream):
        before = set(multiprocessing.active_children())
        monkeypatch.setattr(Failing, "fails", True)  # in workers started from here on
        with pytest.raises(KeyError, match="sample 9") as caught:
            list(stream)
        assert set(multiprocessing.active_children()) == before
        assert caught.tb is not None

    during_training(DataLoader(Failing(), 4, num_workers=1), act)


def test_a_caller_that_fails_leaves_nothing_behind():
    def act(trainer, stream):
        dataset = trainer.train_dataloader.dataset
        before = dataset.calls
        with pytest.raises(RuntimeError, match="caller"), closing(stream):  # noqa: PT012
            for _ in stream:
                assert dataset.calls > before
                raise RuntimeError("the caller failed")
        assert dataset.calls == before

    during_training(DataLoader(Failing(), 4), act)


# -- how much is read --------------------------------------------------------------------------


class Fetched(Numbers):
    """Keeps account of what it handed out and what is still alive."""

    def __init__(self):
        self.handed_out = 0

    def __getitem__(self, i):
        self.handed_out += 1
        return super().__getitem__(i)


@pytest.mark.parametrize("both", [False, True])
def test_batches_are_fetched_one_by_one(both):
    def act(trainer, stream):
        gc.collect()
        before = dataset.handed_out
        for i in range(4):
            assert dataset.handed_out == before + i * (12 if both else 4)
            next(stream)
        stream.close()

    dataset = Fetched()
    loader = DataLoader(dataset, 4)
    during_training([loader, DataLoader(dataset, 8)] if both else loader, act)


def test_nothing_is_copied_but_iterable_data_in_this_process():
    class Heavy(Numbers):
        def __deepcopy__(self, memo):
            raise AssertionError("the data were copied")

    class HeavyStream(Counted):
        __deepcopy__ = Heavy.__deepcopy__

    class HeavyList(list):
        __deepcopy__ = Heavy.__deepcopy__

    streamer = Streamer((0, 3))
    fit(HeavyList(floats(*range(5))), streamer, max_epochs=1)
    fit(DataLoader(Heavy(), 4), streamer, max_epochs=1)
    fit(Doubling(Heavy(), 4), streamer, max_epochs=1)
    fit(DataLoader(HeavyStream(), 4, num_workers=1), streamer, max_epochs=1)
    assert [len(stream) for stream in streamer.streams] == [5, 6, 6, 4]
    with pytest.raises(MisconfigurationException, match="readable twice, got HeavyStream"):
        fit(DataLoader(HeavyStream(), 4), streamer, max_epochs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_of_endless_data_no_more_is_read_than_training_has_seen(workers):
    streamer = Streamer((0, 0), (0, 4), (0, 6))
    endless = DataLoader(Counted(stop=None), 4, num_workers=workers)
    trained = fit(endless, streamer, max_steps=8, max_epochs=-1).batches
    assert [len(stream) for stream in streamer.streams] == [1, 5, 7]
    assert_same(streamer.streams[-1], trained[:7])


def test_of_endless_data_past_epochs_count_and_one_batch_is_read_before_any_step():
    class Early(Streamer):
        def on_train_start(self, trainer, pl_module):
            self.stream(trainer, pl_module)

    streamer = Early((1, 1))
    fit(DataLoader(Counted(), 4), streamer)
    assert [len(stream) for stream in streamer.streams] == [1, 6]  # an epoch has six


def test_as_many_as_asked_for_but_no_more_than_are_trained_on():
    three, ten, endless = (
        Streamer((0, 0), num_batches=n) for n in (3, 10, 5)
    )  # fmt: skip
    fit(DataLoader(Numbers(), 4), three, ten, max_epochs=1, limit_train_batches=4)
    fit(DataLoader(Counted(stop=None), 4), endless, max_steps=1)
    assert [len(each.streams[0]) for each in (three, ten, endless)] == [3, 4, 5]


def test_batches_count_their_samples():
    streamer = Streamer((0, 0))
    fit(DataLoader(Numbers(), 10), streamer)
    assert streamer.num_samples == [10, 10, 4]


# -- what is refused ---------------------------------------------------------------------------


class WithGenerator(DataLoader):
    def __init__(self, *args):
        super().__init__(*args)
        self.items = (torch.ones(1) for _ in range(9))

    def __iter__(self):
        return self.items


ONE_SHOT = {
    "OneShot": OneShot,
    "WithGenerator": lambda: WithGenerator(Numbers(), 4),
    "generator": lambda: DataLoader(Numbers(), batch_sampler=([i] for i in range(8))),
    "range_iterator": lambda: DataLoader(Numbers(), 4, sampler=iter(range(24))),
}


@pytest.mark.parametrize("name", ONE_SHOT)
def test_data_that_can_be_read_once_are_refused_and_not_touched(name):
    def act(trainer, stream):
        with pytest.raises(
            MisconfigurationException,
            match=rf"readable twice, got {name}.*`refresh_norm_stats=False`",
        ):
            next(stream)

    module, untouched = Reader(), Reader()
    options = {"max_steps": 3, "limit_train_batches": 3}
    during_training(ONE_SHOT[name](), act, module, **options)
    fit(ONE_SHOT[name](), module=untouched, **options)
    assert_same(module.batches, untouched.batches)


class Gaps:
    """Yields some batches, and `None` between them, which training skips."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return itertools.chain.from_iterable((None, batch) for batch in self.batches)

    def __len__(self):
        return 2 * len(self.batches)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_without_a_batch_or_a_loader_it_says_so():
    def act(trainer, stream):
        assert [held.batch for held in stream] == [1.0, 2.0]

    def act_on_none(trainer, stream):
        with pytest.raises(MisconfigurationException, match="at least one batch, got none"):
            next(stream)

    during_training(Gaps(1.0, 2.0), act)
    during_training(Gaps(None, None), act_on_none)
    with pytest.raises(MisconfigurationException, match="must be a training dataloader"):
        stream_batches(pl.Trainer(accelerator="cpu", logger=False), Reader())


# -- as training receives them -----------------------------------------------------------------


class Hooked(Reader):
    """Mixes noise of its own and of the global generator into batches, and counts."""

    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)
        self.counts = [0]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.counts.append(len(self.counts))
        own = torch.rand(1, generator=self.noise)
        return torch.stack([batch, batch * 0 + own, batch * 0 + torch.rand(1)])


def test_hooks_of_transfer_go_on_from_batch_to_batch_and_leave_no_trace():
    def act(trainer, stream):
        module = trainer.lightning_module
        before = public_state(module), module.noise.get_state(), rng_state()
        found = []
        for held in stream:
            assert_same(before, (public_state(module), module.noise.get_state(), rng_state()))
            found.append(held.batch)
        noise = torch.stack(found)[:, 1:, 0]
        assert noise.unique().numel() == 12  # two kinds in six batches
        assert_same([batch[0] for batch in found], list(DataLoader(Numbers(), 4)))

    during_training(DataLoader(Numbers(), 4), act, Hooked())


def test_hooks_of_a_datamodule_leave_no_trace():
    class Data(pl.LightningDataModule):
        counts = ()

        def train_dataloader(self):
            return DataLoader(Numbers(), 4)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.counts = (*self.counts, torch.rand(1).item())
            return batch + len(self.counts)

    def act(trainer, stream):
        before = trainer.datamodule.counts, rng_state()
        assert len({held.batch[0].item() for held in stream}) == 6
        assert_same(before, (trainer.datamodule.counts, rng_state()))

    during_training(Data(), act)


def test_what_the_caller_changes_in_the_module_meanwhile_stays():
    def act(trainer, stream):
        module = trainer.lightning_module
        for i, _ in enumerate(stream):
            assert module.norm.running_mean.item() == i
            module.norm.running_mean += 1
        assert module.norm.running_mean.item() == 6

    during_training(DataLoader(Numbers(), 4), act, Hooked())


def test_hooks_and_loaders_draw_other_numbers():
    def act(trainer, stream):
        batch = next(stream).batch
        assert batch[0, 0] % 1 != batch[2, 0] % 1

    class Uniform(Numbers):
        def __getitem__(self, i):
            return torch.rand(1)

    during_training(DataLoader(Uniform(), 4), act, Hooked())


def test_modes_are_those_of_training():
    class Modes(Numbers):
        def __getitem__(self, i):
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return torch.tensor([0.1 + i])

    class Late(Streamer):
        def on_validation_end(self, trainer, pl_module):
            with torch.inference_mode():
                super().on_validation_end(trainer, pl_module)
                assert torch.is_inference_mode_enabled()
            assert not any(batch.is_inference() for batch in self.streams[-1])

    modes = []
    late, probed = Late("validation"), Streamer((0, 5), probe=True)
    module = Validated().double()
    fit(
        DataLoader(Modes(), 4), late, probed,
        module=module, validate=[torch.zeros(1)], num_sanity_val_steps=0, precision="64-true",
    )  # fmt: skip
    assert set(modes) == {(True, False)}
    trained = module.batches[:6]  # made in float32, as training's are
    assert_same(trained, late.streams[0])
    assert_same(trained, probed.streams[0])


def test_workers_start_from_the_seed_each_their_own():
    streamer = Streamer((0, 0), (0, 3))
    fit(DataLoader(Augmented(), 4, num_workers=2), streamer, max_epochs=1)
    first, second = streamer.streams
    assert_same(first, second)
    noise = torch.cat(first) - torch.arange(24.0)[:, None]
    assert noise.unique().numel() > 20  # workers with one seed would repeat each other's


def test_a_draw_starts_no_worker():
    class Drawer(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            fetched.clear()
            draw_batches(trainer, pl_module, num_batches=2)
            self.fetched = list(fetched)  # here, not in a worker

    class Noted(Numbers):
        def __getitem__(self, i):
            fetched.append(i)
            return super().__getitem__(i)

    fetched, drawer = [], Drawer()
    fit(DataLoader(Noted(), 4, num_workers=1), drawer, max_steps=1)
    assert drawer.fetched == list(range(8))


def test_a_draw_takes_a_combination_as_its_data():
    class Drawer(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.held = draw_batches(trainer, pl_module, num_batches=None, data=data)

    data, drawer = two_loaders("sequential"), Drawer()
    fit(DataLoader(Numbers(), 4), drawer, max_steps=1)
    expected = [batch for n in (4, 8) for batch in DataLoader(Numbers(), n)]
    assert_same([held.batch for held in drawer.held], expected)


def streams_of_this_rank():
    """Return streams of different epochs, in order and shuffled."""
    streams = []
    for shuffle in (False, True):
        streamer = Streamer((0, 0), (1, 1))
        loader = DataLoader(Numbers(), 4, shuffle=shuffle)
        fit(loader, streamer, strategy="ddp", devices=2)
        streams.append(streamer.streams)
    return streams


@pytest.mark.distributed
def test_ranks_share_the_samples(tmp_path):
    ranks = run_in_two_processes(streams_of_this_rank, tmp_path)
    for first, second in zip(*ranks, strict=True):
        assert_same(first[0], first[1])
        assert_same(second[0], second[1])
        assert [len(first[0]), len(second[0])] == [3, 3]
        assert numbers_in(first[0] + second[0]) == list(range(24))
