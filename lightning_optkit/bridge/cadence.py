"""Is this callback due?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_optkit.bridge.arguments import is_count

__all__ = ["Cadence", "logger_step"]


def logger_step(trainer: pl.Trainer, *, after_batch: bool) -> int:
    """Return the step at which the Trainer itself logs what happened last.

    It counts the batches that ended in an optimizer step, once however many optimizers there are.

    Args:
        trainer: the Trainer, fitting.
        after_batch: called from ``on_train_batch_end``, where the batch is not counted yet; later
            hooks look back at it.
    """
    counted = trainer.fit_loop.epoch_loop._batches_that_stepped
    return counted if after_batch else max(counted - 1, 0)


class Cadence:
    """Due once every so many optimizer steps or epochs, within a share of the training time.

    The counters are the Trainer's own, so they are exact under accumulation, several optimizers,
    resume and a second ``fit``. A due point is passed over while the time spent exceeds
    ``max_overhead`` times the time trained; rank zero decides for all. The end of training is due
    however much time was spent, unless that very step was measured already.

    Args:
        every_n_steps: optimizer steps between due points, at least 1.
        every_n_epochs: epochs between due points, at least 1; 1 unless ``every_n_steps`` is given.
        max_overhead: largest share of the wall time of training, in (0, 1]; ``None`` = no limit.
        at_end: whether the end of training is due; ``"alone"`` = nothing else is, unless a period
            is given.

    Raises:
        ValueError: if both periods are given, or a value is out of range.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        max_overhead: float | None = None,
        at_end: bool | Literal["alone"] = True,
    ) -> None:
        if every_n_steps is not None and every_n_epochs is not None:
            raise ValueError(
                "At most one of `every_n_steps` and `every_n_epochs` must be given, got "
                f"every_n_steps={every_n_steps} and every_n_epochs={every_n_epochs}. "
                "Leave one of them out."
            )
        if every_n_steps is None and every_n_epochs is None and at_end != "alone":
            every_n_epochs = 1
        for name, period in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if period is not None and not is_count(period, least=1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {period!r}.")
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(
                f"`max_overhead` must be a share in (0, 1], such as 0.05, got {max_overhead}. "
                "`None` sets no limit."
            )
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self._max_overhead = max_overhead
        self.includes_end = bool(at_end)
        """Whether the end of training is due."""
        self._spent = 0.0  # seconds
        self._trained = 0.0
        self._started: float | None = None
        self._measured_step: int | None = None
        self.num_passed_over = 0
        """Due points that were passed over to stay within ``max_overhead``."""

    def start(self) -> None:
        """Start the clock, in ``on_train_start``."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """Stop the clock, at the end of training or on an exception."""
        self._trained = self._elapsed()
        self._started = None

    def after_batch(self, trainer: pl.Trainer) -> bool:
        """Return whether to measure now, in ``on_train_batch_end``."""
        if self.every_n_steps is None or trainer.fit_loop._should_accumulate():
            return False
        step = logger_step(trainer, after_batch=True)
        return (step + 1) % self.every_n_steps == 0 and self._affordable(trainer)

    def after_epoch(self, trainer: pl.Trainer) -> bool:
        """Return whether to measure now, in ``on_train_epoch_end``."""
        if self.every_n_epochs is None:
            return False
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self._affordable(trainer)

    def at_end(self, trainer: pl.Trainer) -> bool:
        """Return whether the last step still has to be measured, in ``on_train_end``."""
        return self.includes_end and self._measured_step != logger_step(trainer, after_batch=False)

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Book the time of the block on the diagnostic."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - began
            self._measured_step = step

    @property
    def overhead(self) -> float:
        """Share of the wall time so far that went into measuring."""
        elapsed = self._elapsed()
        return self._spent / elapsed if elapsed > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {
            "spent": self._spent,
            "trained": self._elapsed(),
            "measured_step": self._measured_step,
            "num_passed_over": self.num_passed_over,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run."""
        self._spent = state["spent"]
        self._trained = state["trained"]
        self._measured_step = state["measured_step"]
        self.num_passed_over = state["num_passed_over"]

    def _elapsed(self) -> float:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self._trained + running

    def _affordable(self, trainer: pl.Trainer) -> bool:
        if self._max_overhead is None:
            return True
        affordable = bool(trainer.strategy.broadcast(self.overhead <= self._max_overhead))
        self.num_passed_over += not affordable
        return affordable
