"""Training batches as ``training_step`` receives them: a few to keep, or all one after another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optkit.bridge.probe import Probe
from lightning_optkit.bridge.snapshot import Snapshot
from lightning_optkit.bridge.training_data import (
    MAX_ITEMS,
    Surroundings,
    read_again,
    require_rereadable,
)

__all__ = ["HeldBatch", "draw_batches", "stream_batches"]


_HOOKS = 1_000_003  # added to the seed: hooks draw other numbers than loaders


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
    batches = _stream(
        trainer,
        pl_module,
        _training_loaders(trainer) if data is None else data,
        num_batches if data is not None else _limit(trainer, num_batches),
        seed=seed,
        with_workers=False,
        default_dtype=torch.get_default_dtype(),
    )
    undone = Snapshot.undone(pl_module, max_items=MAX_ITEMS)
    with Probe(trainer, pl_module), undone, closing(batches):
        return list(batches)


def stream_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    num_batches: int | None = None,
    seed: int = 0,
) -> Generator[HeldBatch, None, None]:
    """Yield one pass over the training data, without disturbing training or holding the data.

    Batches come as ``training_step`` would receive them, in the mode in which the Trainer combines
    its loaders. They are fetched with as many workers as the loaders have, by loaders of their own:
    training's may be half-way through an epoch. The same seed gives the same batches at any time of
    a run, whatever the caller draws between them: generators that samplers, datasets and collate
    functions hold are seeded, and samplers are at epoch 0. Other state they have is as training
    left it; an iterable dataset that keeps its place in an attribute is read on from there.

    Call it before a probe is opened, which changes the default dtype; read it inside or outside.
    Under several processes each reads its own part, which need not be equally many batches.

    Args:
        trainer: the Trainer, fitting, its dataloaders made.
        pl_module: its module; its transfer hooks are applied.
        num_batches: how many to read at most; ``None`` takes all that an epoch trains on, and of
            data without an end as many as training has seen so far.
        seed: seeds what is random in the loaders, their workers and the hooks.

    Returns:
        A generator, which does nothing before its first item. Close it to stop early
        (``contextlib.closing``): workers end, samplers and datasets are put back.

    Raises:
        MisconfigurationException: if there is no loader, or one is an iterator; and, once read, if
            it is empty or cannot be copied.
    """
    loaders = _training_loaders(trainer)
    require_rereadable(loaders)
    return _stream(
        trainer,
        pl_module,
        loaders,
        _limit(trainer, num_batches),
        seed=seed,
        with_workers=True,
        default_dtype=torch.get_default_dtype(),
    )


def _training_loaders(trainer: pl.Trainer) -> CombinedLoader:
    loaders = trainer.fit_loop._combined_loader
    if loaders is None:
        raise MisconfigurationException(
            "There must be a training dataloader to draw batches from, got none. Pass one to "
            "`trainer.fit`, or `data=` with a `DataLoader` or a list of batches."
        )
    return loaders


def _limit(trainer: pl.Trainer, num_batches: int | None) -> int:
    """Return how many batches to read: of a run on few no more are read than trained on."""
    limit = min(math.inf if num_batches is None else num_batches, trainer.num_training_batches)
    if limit == math.inf:
        limit = max(1, trainer.fit_loop.epoch_loop.total_batch_idx + 1)
    return int(limit)


def _stream(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    source: Any,
    limit: int | None,
    *,
    seed: int,
    with_workers: bool,
    default_dtype: torch.dtype,
) -> Generator[HeldBatch, None, None]:
    """Read, and take through the hooks of training."""
    hooks = _TransferHooks(trainer, pl_module, Surroundings(seed + _HOOKS, default_dtype))
    read = read_again(
        source, limit, seed=seed, with_workers=with_workers, default_dtype=default_dtype
    )
    undone = Snapshot.undone(getattr(trainer, "datamodule", None), max_items=MAX_ITEMS)
    empty = True
    with undone, closing(read):
        for batch in read:
            if batch is not None:  # which training skips
                empty = False
                yield hooks(batch)
    if empty:
        raise MisconfigurationException(
            "The training dataloader must yield at least one batch, got none. Check the dataset's "
            "length and `drop_last`, or pass `data=`."
        )


class _TransferHooks:
    """The hooks between loader and training step, on the module's state that they left last."""

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, surroundings: Surroundings
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._surroundings = surroundings
        names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        owners = (pl_module, getattr(trainer, "datamodule", None))
        self._are_users = any(is_overridden(name, owner) for name in names for owner in owners)
        self._left: Snapshot | None = None

    def __call__(self, batch: Any) -> HeldBatch:
        if not self._are_users:  # Lightning's own draw nothing and change nothing
            with torch.inference_mode(False), torch.enable_grad():
                return _held(self._trainer, self._module, batch)
        with self._surroundings.installed(), self._module_kept():
            return _held(self._trainer, self._module, batch)

    @contextmanager
    def _module_kept(self) -> Iterator[None]:
        """Undo what the block does to the module, but let the next block go on from there."""
        with Snapshot.undone(self._module, max_items=MAX_ITEMS):
            if self._left is not None:
                self._left.restore()
            yield
            self._left = Snapshot(self._module, max_items=MAX_ITEMS)


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
