"""Is the step that is about to be made due?"""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lightning_optkit.bridge.arguments import is_count
from lightning_optkit.bridge.cadence import Cadence, logger_step

__all__ = ["DueSteps", "begins_step"]


class DueSteps(Cadence):
    """Due before a step: the first of a run, then once every so many, and one at the end.

    For what has to watch a step from its first batch on. The first step and that at the end are due
    whatever they cost. The latter is the last but one of the last epoch, for the last may be of a
    smaller batch, or the last of ``max_steps``; where training ends earlier than planned, or nobody
    knows when it will, there is none.

    Args:
        every_n_steps: optimizer steps between due ones, at least 1.
        max_overhead: largest share of the wall time of training, in (0, 1]; ``None`` = no limit.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(self, *, every_n_steps: int, max_overhead: float | None = None) -> None:
        if not is_count(every_n_steps, least=1):
            raise ValueError(
                f"`every_n_steps` must be an integer of at least 1, got {every_n_steps!r}. 1 is "
                "every step."
            )
        super().__init__(every_n_steps=every_n_steps, max_overhead=max_overhead)
        self.period = every_n_steps

    def forget(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._spent = self._trained = 0.0
        self._started = self._measured_step = None
        self.num_passed_over = 0

    def before_batch(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Return whether this batch is the first of a step to measure, before the batch runs."""
        if not begins_step(trainer, batch_idx):
            return False
        if self._measured_step is None or _is_at_end(trainer, batch_idx):
            return True
        step = logger_step(trainer, after_batch=True)
        return (step + 1) % self.period == 0 and self._affordable(trainer)


def begins_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether gradients are accumulated from this batch on; all are under manual control."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def _is_at_end(trainer: pl.Trainer, batch_idx: int) -> bool:
    # `global_step` counts the steps of all optimizers
    steps_left = trainer.max_steps - trainer.global_step
    if trainer.max_steps >= 0 and steps_left <= len(trainer.optimizers):
        return True
    if trainer.current_epoch + 1 != trainer.max_epochs or trainer.num_training_batches == math.inf:
        return False
    num_batches = trainer.accumulate_grad_batches
    num_steps = math.ceil(trainer.num_training_batches / num_batches)
    return batch_idx // num_batches == max(num_steps - 2, 0)
