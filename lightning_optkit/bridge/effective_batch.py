"""How many samples make an optimizer step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.arguments import is_count

__all__ = ["EffectiveBatch", "batch_per_device", "effective_batch"]


@dataclass(frozen=True)
class EffectiveBatch:
    """The samples of one optimizer step.

    Attributes:
        per_device: samples in a batch of one device.
        accumulated: batches whose gradients are accumulated for a step.
        replicas: devices that each take other data. Those that share a model share its data.

    Example:
        >>> print(EffectiveBatch(per_device=8, accumulated=4, replicas=2))
        8 a device × 4 accumulated × 2 devices = 64
    """

    per_device: int
    accumulated: int
    replicas: int

    @property
    def size(self) -> int:
        """Their product."""
        return self.per_device * self.accumulated * self.replicas

    def __str__(self) -> str:
        devices = "device" if self.replicas == 1 else "devices"
        return (
            f"{self.per_device:,} a device × {self.accumulated:,} accumulated × "
            f"{self.replicas:,} {devices} = {self.size:,}"
        )


def effective_batch(trainer: pl.Trainer, per_device: int) -> EffectiveBatch:
    """Return it as the Trainer accumulates now, on the devices of all nodes."""
    sharing = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return EffectiveBatch(
        per_device=per_device,
        accumulated=trainer.accumulate_grad_batches,
        replicas=sharing.get("num_replicas", 1),
    )


def batch_per_device(trainer: pl.Trainer) -> int:
    """Return the samples in a batch of the training dataloader, on one device.

    All ranks call it together. That the last batch of an epoch may be smaller is ignored, but a
    dataset that is smaller than a batch is one.

    Raises:
        MisconfigurationException: if the dataloader does not say it, if there are several, or if it
            is not the same on all devices.
    """
    loader = _only_loader(trainer)
    size = getattr(loader, "batch_size", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if size is None:
        size = getattr(batch_sampler, "batch_size", None)
    if not is_count(size, least=1):
        made_by = "its dataset" if batch_sampler is None else type(batch_sampler).__qualname__
        if not isinstance(loader, torch.utils.data.DataLoader):
            made_by = type(loader).__qualname__
        raise MisconfigurationException(
            "`batch_size` must be given where the training dataloader does not say how many "
            f"samples it puts into a batch, got batches made by {made_by}. Write "
            "`batch_size=` with the samples in a batch of one device."
        )
    available = _length(getattr(batch_sampler, "sampler", None))
    size = size if available is None else min(size, available)
    if trainer.world_size > 1:
        _require_equal(size, trainer.strategy.root_device)
    return size


def _only_loader(trainer: pl.Trainer) -> Any:
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    if len(loaders) != 1:
        raise MisconfigurationException(
            "`batch_size` must be given where there is not one training dataloader, got "
            f"{len(loaders)}: what a step is made of is not known. Write `batch_size=` with the "
            "samples that count in a batch of one device."
        )
    return loaders[0]


def _length(sampler: Any) -> int | None:
    """Return how many samples a sampler yields in an epoch, if it says so."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _require_equal(size: int, device: torch.device) -> None:
    """Raise, on all ranks, unless the size is the same on all: or each had a rate of its own."""
    extremes = torch.tensor([size, -size], device=device)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest != smallest:
        raise MisconfigurationException(
            "`batch_size` must be given where devices have batches of different sizes, got "
            f"{smallest} to {largest}. Write `batch_size=` with their mean."
        )
