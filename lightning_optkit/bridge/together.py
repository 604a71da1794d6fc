"""What all ranks do together: give up, and put their numbers side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning.pytorch as pl
from torch import Tensor

from lightning_optkit.bridge.reduce import sum_over_ranks

__all__ = ["gathered", "together"]

Result = TypeVar("Result")


def together(trainer: pl.Trainer, function: Callable[[], Result]) -> Result:
    """Return what a function returns, unless it fails on a rank: then raise on all of them.

    So none waits, in a sum that comes next, for one that has left. All ranks must call it.

    Args:
        trainer: the Trainer.
        function: called once; other ranks take no part in it.

    Raises:
        Exception: what the function raised here.
        RuntimeError: if it failed on another rank.
    """
    try:
        result = function()
    except Exception:
        trainer.strategy.reduce_boolean_decision(False)
        raise
    if not trainer.strategy.reduce_boolean_decision(True):
        raise RuntimeError("It failed on another rank, whose log says more.")
    return result


def gathered(trainer: pl.Trainer, numbers: Tensor) -> Tensor:
    """Return the numbers of all ranks, on the CPU, with a first dimension of ranks.

    Args:
        trainer: the Trainer.
        numbers: of this rank, on the CPU, with as many on every other.
    """
    reduce = sum_over_ranks(trainer)
    if reduce is None:
        return numbers[None]
    shape = (trainer.world_size, *numbers.shape)
    every = numbers.new_zeros(shape, device=trainer.strategy.root_device)
    every[trainer.global_rank] = numbers
    return reduce(every).cpu()
