"""Sums over the processes of a data-parallel run."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

__all__ = ["require_whole_parameters", "sum_over_ranks"]


def sum_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over all ranks; ``None`` where there is one.

    All ranks must call it, equally often, and all receive the same bits.
    """
    if trainer.world_size == 1:
        return None
    strategy = trainer.strategy

    def reduce(tensor: Tensor) -> Tensor:
        return cast(Tensor, strategy.reduce(tensor, reduce_op="sum"))

    return reduce


def require_whole_parameters(strategy: Strategy, name: str) -> None:
    """Refuse strategies under which a process holds only a part of each parameter.

    Raises:
        MisconfigurationException: under FSDP, DeepSpeed and model parallelism.
    """
    if not isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)):
        raise MisconfigurationException(
            f"`{name}` needs whole parameters on each device, and `{type(strategy).__name__}` may "
            "shard them. Use `strategy='ddp'` or a single device, or remove the callback."
        )
