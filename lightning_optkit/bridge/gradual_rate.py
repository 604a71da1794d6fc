"""The first epochs of a run whose rate is scaled for a large batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.bridge.optimizer_steps import Rate, RateInStep, StepWatch
from lightning_optkit.bridge.steps_of_epochs import steps_of_epochs
from lightning_optkit.methods.batch_scaling import gradual_factor

__all__ = ["GradualRate"]


class GradualRate:
    """Holds a scaled rate back, and lets it grow from the one that is not scaled.

    Each optimizer grows with its own steps; in manual optimization, where they may be rarer than
    batches, with the batches. Resumed where epochs have another number of either, as on other
    devices, what was done of the warmup stays done.

    Args:
        epochs: length; 0 = none.
        factor: returns what the rate is scaled by now.
        watch: attached before this is, with all optimizers.
        without: what to write to do without it.
    """

    def __init__(
        self, epochs: float, factor: Callable[[], float], watch: StepWatch, *, without: str
    ) -> None:
        self._epochs = epochs
        self._factor = factor
        self._watch = watch
        self._without = without
        self._rule = RateInStep(self._rate, role="warmup", without=f"write `{without}`")
        self._optimizers: Sequence[int] = ()
        self.start()

    def start(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self.num_steps = 0
        """Length, in steps of an optimizer or in batches."""
        self._ahead: list[int] = []  # of them, for each optimizer, that need not be made
        self._first_epoch: int | None = None  # of the run
        self._first_batch = 0
        self._is_over = True
        self._trainer: pl.Trainer | None = None  # while it trains

    def attach(self, trainer: pl.Trainer, optimizers: Sequence[int]) -> None:
        """Rule the steps of these optimizers, in ``on_train_start``, after the scaling does.

        Raises:
            MisconfigurationException: if the length is not known, or another warms up too.
        """
        if self._epochs == 0:
            return
        if self._first_epoch is None:
            self._first_epoch = trainer.current_epoch
            self._first_batch = _completed_batches(trainer)
        before, length = self.num_steps, self._length(trainer, self._first_epoch)
        if length is None:
            raise MisconfigurationException(
                f"`warmup_epochs` must be 0 where the data have no length, got {self._epochs}: the "
                f"steps of an epoch are not known. Write `{self._without}`, and warm up with "
                "`LRWarmup(steps=...)`."
            )
        self.num_steps, self._optimizers, self._trainer = length, optimizers, trainer
        self._ahead = self._ahead or [0] * len(self._watch.num_steps)
        if before not in (0, length):
            done = map(self._position, range(len(self._ahead)))
            more = [round(each * length / before) - each for each in done]
            self._ahead = [a + m for a, m in zip(self._ahead, more, strict=True)]
        self._rule.attach(trainer, optimizers)
        self._is_over = self._is_complete()
        if self.is_going_on:
            self._warn_if_longer_than_run(trainer)

    @property
    def is_going_on(self) -> bool:
        """Whether it holds a rate back now."""
        return not self._is_over and self._factor() > 1

    def has_ended(self) -> bool:
        """Return whether it has, with this batch, in ``on_train_batch_end``."""
        was_going_on = self.is_going_on
        self._is_over = self._is_over or self._is_complete(after_batch=True)
        return was_going_on and self._is_over

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception."""
        self._rule.detach()
        self._trainer = None

    def __str__(self) -> str:
        return f"{self.num_steps:,} {'steps' if self._counts_steps else 'batches'}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {
            "num_steps": self.num_steps,
            "ahead": list(self._ahead),
            "first_epoch": self._first_epoch,
            "first_batch": self._first_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run."""
        self.num_steps = state["num_steps"]
        self._ahead = list(state["ahead"])
        self._first_epoch = state["first_epoch"]
        self._first_batch = state["first_batch"]

    def _length(self, trainer: pl.Trainer, first_epoch: int) -> int | None:
        end = steps_of_epochs(trainer, first_epoch + self._epochs)
        return None if end is None else end - (steps_of_epochs(trainer, first_epoch) or 0)

    def _rate(self, optimizer: int, group: int, scaled: Rate) -> Rate:
        if self._is_over:  # and no step is counted any more: that may wait for the device
            return scaled
        factor = self._factor()
        growing = gradual_factor(self._position(optimizer), factor, num_steps=self.num_steps)
        return scaled if growing == factor else scaled * (growing / factor)

    @property
    def _counts_steps(self) -> bool:
        assert self._trainer is not None  # while it trains
        return self._trainer.lightning_module.automatic_optimization

    def _position(self, i: int) -> int:
        """Return how many steps, or batches, come before the one that this optimizer makes."""
        if self._counts_steps:
            return self._watch.num_steps[i] + self._ahead[i]
        assert self._trainer is not None
        return _completed_batches(self._trainer) - self._first_batch + self._ahead[i]

    def _is_complete(self, *, after_batch: bool = False) -> bool:
        more = after_batch and not self._counts_steps  # a batch is counted after its hooks
        return all(self._position(i) + more >= self.num_steps for i in self._optimizers)

    def _warn_if_longer_than_run(self, trainer: pl.Trainer) -> None:
        max_epochs, max_steps = trainer.max_epochs or -1, trainer.max_steps
        end = self._epochs + (self._first_epoch or 0)
        is_longer = 0 < max_epochs < end or 0 < max_steps < self.num_steps
        if is_longer and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"`warmup_epochs` should be less than the run, got {self._epochs}, which are "
                f"{self}: it will end before its full rate. Write fewer."
            )


def _completed_batches(trainer: pl.Trainer) -> int:
    """Return how many are done, from the end of one to the end of the next."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed
