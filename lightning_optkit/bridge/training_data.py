"""The training data, read once more beside training: its own pass over them is not disturbed."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.bridge.probe import seed_global_generators
from lightning_optkit.bridge.snapshot import Snapshot

__all__ = ["MAX_ITEMS", "Surroundings", "read_again", "require_rereadable"]

MAX_ITEMS = 10_000
"""Datasets and datamodules are put back after reading, but for tensors and containers of more items
than this: those are the data."""


def read_again(
    source: Any,
    limit: int | None,
    *,
    seed: int,
    with_workers: bool,
    default_dtype: torch.dtype,
) -> Generator[Any, None, None]:
    """Yield batches of a loader, or of several in the mode that combines them.

    The loaders' own iterators are not touched, so that training's may be half-way through an epoch.
    Samplers and datasets are as before once the last batch is out or this is closed. Between two
    batches the global generators are the caller's.

    Args:
        source: a ``DataLoader``, any iterable of batches, or a ``CombinedLoader`` of such.
        limit: batches to yield at most; ``None`` takes all.
        seed: seeds what is random in samplers, datasets and workers.
        with_workers: fetch with as many workers as each loader has, not in this process.
        default_dtype: in which datasets make tensors.

    Raises:
        MisconfigurationException: if a loader can only be read once.
    """
    loaders = source.flattened if isinstance(source, CombinedLoader) else [source]
    passes = [
        _Pass(loader, seed + i, with_workers=with_workers, default_dtype=default_dtype)
        for i, loader in enumerate(loaders)
    ]
    if isinstance(source, CombinedLoader):
        again = copy.copy(source)  # its mode and limits; the iterator of the original stays
        again.flattened = passes
    else:
        again = CombinedLoader(passes[0])
    owners = [owner for each in passes for owner in each.owners]
    with Snapshot.undone(*owners, max_items=MAX_ITEMS), ExitStack() as closing:
        for each in passes:
            closing.callback(each.close)
        for batch, _, _ in itertools.islice(again, limit):
            yield batch


class Surroundings:
    """What surrounds a piece of training's work on data: global generators and modes.

    The generators of torch, NumPy and Python go on where the last block left them.

    Args:
        seed: where they start.
        default_dtype: training's; a probe has another.
    """

    def __init__(self, seed: int, default_dtype: torch.dtype) -> None:
        self._seed = seed
        self._default_dtype = default_dtype
        self._states: dict[str, Any] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Give them to the block, and the caller its own back afterwards."""
        before, dtype = _collect_rng_states(), torch.get_default_dtype()
        try:
            torch.set_default_dtype(self._default_dtype)
            if self._states is None:
                seed_global_generators(self._seed)
            else:
                _set_rng_states(self._states)
            with torch.inference_mode(False), torch.enable_grad():
                yield
            self._states = _collect_rng_states()
        finally:
            torch.set_default_dtype(dtype)
            _set_rng_states(before)


class _Pass:
    """Passes over one loader, one at a time, each with the same random numbers."""

    def __init__(
        self, loader: Any, seed: int, *, with_workers: bool, default_dtype: torch.dtype
    ) -> None:
        self._loader = loader
        self._seed = seed
        self._with_workers = with_workers
        self._default_dtype = default_dtype
        self._batches: Generator[Any, None, None] | None = None

    @property
    def owners(self) -> list[Any]:
        """What reading may change."""
        if not isinstance(self._loader, DataLoader):
            return []  # it is copied
        return [self._loader, *_samplers(self._loader), *_random_parts(self._loader)]

    def __iter__(self) -> Iterator[Any]:
        self._batches = self._read()
        return self._batches

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def _read(self) -> Generator[Any, None, None]:
        surroundings, end = Surroundings(self._seed, self._default_dtype), object()
        with surroundings.installed():
            batches = iter(self._reopened())
        try:
            while True:
                with surroundings.installed():
                    batch = next(batches, end)
                if batch is end:
                    return
                yield batch
        finally:
            _stop(batches)

    def _reopened(self) -> Iterable[Any]:
        """Return what yields the loader's batches and shares no iterator with it."""
        if not isinstance(self._loader, DataLoader):
            return _copied(self._loader)
        if not isinstance(self._loader.dataset, IterableDataset):
            _require_rereadable_samplers(self._loader)
        for owner in self.owners:
            _seed_generators(owner, self._seed)
        for sampler in _samplers(self._loader):
            set_epoch = getattr(sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(0)
        return _fresh(self._loader, self._seed, with_workers=self._with_workers)


def _fresh(loader: DataLoader[Any], seed: int, *, with_workers: bool) -> DataLoader[Any]:
    """Return a loader of the same samplers, data and options, with an iterator of its own."""
    again = _twin(loader)
    options: dict[str, Any] = {
        "persistent_workers": False,  # those are training's
        "generator": torch.Generator().manual_seed(seed),  # seeds the workers
    }
    if loader.num_workers == 0 or not with_workers:
        options |= {"num_workers": 0, "timeout": 0, "pin_memory": False}  # to wait for nobody
        if isinstance(loader.dataset, IterableDataset):
            options["dataset"] = _copied(loader.dataset)  # a worker's is a copy anyway
    vars(again).update(options)  # a loader refuses to have some of them set
    return again


def _twin(loader: DataLoader[Any]) -> DataLoader[Any]:
    if type(loader).__iter__ is DataLoader.__iter__:
        return copy.copy(loader)
    # Its own iteration may keep its place in attributes of its own: copied, all but what is known.
    shared = (loader.dataset, *_samplers(loader), *_random_parts(loader), loader.worker_init_fn)
    memo: dict[int, Any] = {id(part): part for part in (*shared, loader.multiprocessing_context)}
    return _copied(loader, memo | {id(loader._iterator): None})


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    batch_sampler = loader.batch_sampler
    samplers = [loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [sampler for sampler in samplers if sampler is not None]


def _random_parts(loader: DataLoader[Any]) -> list[Any]:
    return [loader.generator, loader.dataset, loader.collate_fn]


def _seed_generators(owner: object, seed: int) -> None:
    """Seed the generators among an object's attributes: training has drawn from them meanwhile."""
    for generator in list(getattr(owner, "__dict__", {}).values()):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, random.Random):
            generator.seed(seed)
        elif isinstance(generator, np.random.RandomState):
            generator.seed(seed % 2**32)
        elif isinstance(generator, np.random.Generator):
            kind: Any = type(generator.bit_generator)
            generator.bit_generator.state = kind(seed % 2**32).state


def require_rereadable(loaders: CombinedLoader) -> None:
    """Refuse data that is used up by the time an epoch ends, although it can be copied before.

    Raises:
        MisconfigurationException: for an iterator among the loaders.
    """
    for loader in loaders.flattened:
        if isinstance(loader, Iterator):
            raise _read_once(loader, "is an iterator")


def _require_rereadable_samplers(loader: DataLoader[Any]) -> None:
    for sampler in _samplers(loader):
        if isinstance(sampler, Iterator):
            raise _read_once(sampler, "is an iterator")


def _copied(source: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy to read from, so that the original stays where it is."""
    if isinstance(source, Sequence):
        return source
    try:
        return copy.deepcopy(source, memo)
    except Exception as error:
        raise _read_once(source, f"cannot be copied ({error})") from error


def _read_once(source: object, why: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"The training data must be readable twice, got {type(source).__name__}, which {why}. "
        "Train on a `DataLoader` or a list of batches. Or do without: Pass `data=` to a callback "
        "that measures, `refresh_norm_stats=False` to one that averages."
    )


def _stop(batches: Iterator[Any]) -> None:
    """End workers now, not when nobody refers to them any more: a traceback may."""
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
