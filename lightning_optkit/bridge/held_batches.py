"""A few training batches, drawn once and kept: every measurement of a run is of the same loss."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.bridge.probe import Probe, seed_global_generators
from lightning_optkit.bridge.snapshot import Snapshot

__all__ = ["HeldBatch", "draw_batches"]


# Datasets and datamodules are put back after the draw, but for tensors and containers of more
# items: those are the data.
_MAX_ITEMS = 10_000


@dataclass(frozen=True)
class HeldBatch:
    """A batch on the module's device, and the number of samples in it."""

    batch: Any
    num_samples: int


def draw_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    num_batches: int | None,
    data: Iterable[Any] | None = None,
    seed: int = 0,
) -> list[HeldBatch]:
    """Return batches as ``training_step`` would receive them, without disturbing training.

    From a ``DataLoader`` the sampler is asked for indices and its state put back; the items are
    fetched in this process, with no worker started. An iterable dataset is copied and the copy
    read. Random generators are isolated and seeded, so a resumed run holds the same batches.

    Args:
        trainer: the Trainer, fitting, its dataloaders made.
        pl_module: its module; its transfer hooks are applied.
        num_batches: how many to draw at most; ``None`` takes all of ``data``.
        data: a ``DataLoader`` or any iterable of batches in place of the training dataloader.
        seed: seeds what is random in the loader.

    Raises:
        MisconfigurationException: if the loader is empty or can only be read once.
    """
    source = trainer.train_dataloader if data is None else data
    if source is None:
        raise MisconfigurationException(
            "There must be a training dataloader to draw batches from, got none. Pass `data=` with "
            "a `DataLoader` or a list of batches."
        )
    if data is None and num_batches is not None:  # of a run on few batches no more are trained on
        num_batches = int(min(num_batches, trainer.num_training_batches))
    undone = Snapshot.undone(pl_module, getattr(trainer, "datamodule", None), max_items=_MAX_ITEMS)
    with Probe(trainer, pl_module), undone:
        seed_global_generators(seed)
        drawn = _combined(source, num_batches) if data is None else _draw(source, num_batches)
        held = [_held(trainer, pl_module, batch) for batch in drawn]
    if not held:
        raise MisconfigurationException(
            "The training dataloader must yield at least one batch, got none. Check the dataset's "
            "length and `drop_last`, or pass `data=`."
        )
    return held


def _combined(loaders: Any, num_batches: int | None) -> list[Any]:
    """Draw from each loader of a collection; a shorter one is cycled, as Lightning does."""
    leaves, structure = tree_flatten(loaders, is_leaf=_is_loader)
    if len(leaves) == 1 and leaves[0] is loaders:
        return _draw(loaders, num_batches)
    drawn = [_draw(leaf, num_batches) for leaf in leaves]
    if not all(drawn):
        return []
    longest = max(len(batches) for batches in drawn)
    return [
        tree_unflatten([batches[i % len(batches)] for batches in drawn], structure)
        for i in range(longest)
    ]


def _is_loader(node: Any) -> bool:
    return hasattr(node, "__iter__") and not isinstance(node, (dict, list, tuple))


def _draw(loader: Any, num_batches: int | None) -> list[Any]:
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return list(itertools.islice(_copied(loader), num_batches))
    if isinstance(loader.dataset, IterableDataset):
        again = DataLoader(
            _copied(loader.dataset),
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
        )
        return list(itertools.islice(again, num_batches))
    return list(itertools.islice(_fetched(loader), num_batches))


def _fetched(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield batches of a map-style loader; its samplers are as before once this is closed."""
    batches: Iterable[Any] = (
        loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    )
    if isinstance(batches, Iterator):
        raise _read_once(batches, "is an iterator")
    samplers = (loader.batch_sampler, loader.sampler, loader.generator)
    with Snapshot.undone(*samplers, loader.dataset, max_items=_MAX_ITEMS):
        for owner in (loader, loader.sampler):  # the same draw in a resumed run
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(torch.initial_seed())
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(0)
        for index in batches:
            if loader.batch_sampler is None:
                yield loader.collate_fn(loader.dataset[index])
            elif hasattr(loader.dataset, "__getitems__"):
                yield loader.collate_fn(loader.dataset.__getitems__(list(index)))
            else:
                yield loader.collate_fn([loader.dataset[i] for i in index])


def _copied(source: Iterable[Any]) -> Any:
    """Return a copy to read from, so that the original stays where it is."""
    if isinstance(source, Sequence):
        return source
    try:
        return copy.deepcopy(source)
    except Exception as error:
        raise _read_once(source, f"cannot be copied ({error})") from error


def _read_once(source: object, why: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"The data to measure on must be readable twice, got {type(source).__name__}, which "
        f"{why}. Pass `data=` with a `DataLoader` or a list of batches."
    )


def _held(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> HeldBatch:
    """Take the batch through the same hooks as Lightning's training loop does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an ambiguous size is as good as any
        try:
            return HeldBatch(batch, extract_batch_size(batch))
        except MisconfigurationException:  # no tensor in it: all batches weigh the same
            return HeldBatch(batch, 1)
