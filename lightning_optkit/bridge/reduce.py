"""Sums over the processes of a data-parallel run."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor

__all__ = ["require_whole_parameters", "sum_over_ranks"]


def sum_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over all ranks; ``None`` where there is one.

    All ranks must call it, equally often, and all receive the same bits.
    """
    if trainer.world_size == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        # not `strategy.reduce`, which puts a barrier before each sum
        torch.distributed.all_reduce(tensor)
        return tensor

    return reduce


def require_whole_parameters(strategy: Strategy, name: str) -> None:
    """Refuse strategies under which a process holds only a part of each parameter.

    Raises:
        MisconfigurationException: under FSDP, DeepSpeed and model parallelism.
    """
    whole = isinstance(strategy, (DDPStrategy, SingleDeviceStrategy))
    shards = isinstance(strategy, (DeepSpeedStrategy, XLAStrategy))  # subclasses of DDP's
    if not whole or shards:
        raise MisconfigurationException(
            f"`{name}` needs whole parameters on each device, and `{type(strategy).__name__}` may "
            "shard them. Use `strategy='ddp'` or a single device, or remove the callback."
        )
