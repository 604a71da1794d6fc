"""Sums over the processes of a data-parallel run."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor

from lightning_optkit.bridge.sharding import foreign_shard

__all__ = ["require_data_parallel", "require_whole_parameters", "sum_over_ranks"]


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
    """Refuse strategies under which a rank can neither hold nor gather whole parameters.

    Raises:
        MisconfigurationException: under FSDP1, DeepSpeed and tensor parallelism.
    """
    whole = isinstance(strategy, (DDPStrategy, SingleDeviceStrategy))
    shards = isinstance(strategy, (DeepSpeedStrategy, XLAStrategy))  # subclasses of DDP's
    if isinstance(strategy, ModelParallelStrategy):
        require_data_parallel(strategy, name)
    elif not whole or shards:
        raise MisconfigurationException(
            f"`{name}` needs whole parameters on each device, or FSDP2's shards to gather, and "
            f"`{type(strategy).__name__}` may shard them in another way. Use `strategy='ddp'`, a "
            "single device or `ModelParallelStrategy` with `fully_shard`, or remove the callback."
        )


def require_data_parallel(strategy: ModelParallelStrategy, name: str) -> None:
    """Refuse modules that are split over ranks in another way than by FSDP2.

    Raises:
        MisconfigurationException: under tensor parallelism.
    """
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise MisconfigurationException(
            f"`{name}` needs `tensor_parallel_size` to be 1, got {size}: each rank must compute "
            "the loss of its own samples. Set `ModelParallelStrategy(data_parallel_size=..., "
            "tensor_parallel_size=1)`, or remove the callback."
        )
    assert strategy.model is not None  # fitting
    foreign = foreign_shard(strategy.model)
    if foreign is not None:
        raise MisconfigurationException(
            f"`{name}` needs parameters that are whole or sharded by `fully_shard` alone, and "
            f"`{foreign}` is a DTensor of another kind. Leave out `parallelize_module`, or remove "
            "the callback."
        )
