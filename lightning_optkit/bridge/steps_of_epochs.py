"""How many optimizer steps are made in the first epochs of a run?"""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["accumulated_batches", "steps_of_epochs"]


def steps_of_epochs(trainer: pl.Trainer, epochs: float) -> int | None:
    """Return how many, exactly, from ``on_train_start`` on.

    With what a ``GradientAccumulationScheduler`` in the Trainer will do. An epoch ends in a step,
    also where gradients are then accumulated over fewer batches. A part of an epoch is so many of
    its steps, rounded up. In manual optimization a batch is a step.

    Args:
        trainer: the Trainer, fitting.
        epochs: from the first of the run on; at least 0.

    Returns:
        Steps; ``None`` if the data have no length.
    """
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        return None

    def steps(epoch: int) -> int:
        return math.ceil(batches / accumulated_batches(trainer, epoch))

    whole = int(epochs)
    part = (epochs - whole) * steps(whole)
    return sum(map(steps, range(whole))) + math.ceil(part - 1e-9)  # 0.07 * 100 is above 7


def accumulated_batches(trainer: pl.Trainer, epoch: int) -> int:
    """Return over how many batches gradients are accumulated in an epoch, counted from 0."""
    for callback in vars(trainer)["callbacks"]:  # which the Trainer does not declare
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches
