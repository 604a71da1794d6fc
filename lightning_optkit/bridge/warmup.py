"""The factors that a warmup has for the optimizers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_optkit.bridge.attended_step import torch_optimizers
from lightning_optkit.bridge.optimizer_steps import Rate, RateInStep, StepWatch
from lightning_optkit.bridge.run_length import steps_of_run
from lightning_optkit.bridge.warmup_settings import WarmupSettings

__all__ = ["Warmup"]


class Warmup:
    """Multiplies the rates of optimizers by the factors of their own steps.

    Steps are real ones. Where the length is in epochs or a share of the run, and the module steps
    its optimizers itself, batches are counted in their place, for how often an optimizer steps is
    not known: all steps of a batch have one factor then.

    Args:
        settings: what the factors are.
    """

    def __init__(self, settings: WarmupSettings) -> None:
        self._settings = settings
        self._watch = StepWatch()
        self._trainer: pl.Trainer | None = None  # while it trains
        self._optimizers: list[Optimizer] = []
        self.ruling = RateInStep(self._rate, role="warmup", without="leave out `LRWarmup`")
        """Who changes the rates."""
        self.start()

    def start(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._watch.start()
        self._asked: list[float | None] | None = None  # what the lengths were computed from
        self._first_batch: int | None = None  # of the run, where batches are counted
        self.lengths: dict[int, int | None] = {}
        """By index of the optimizers that are warmed up."""
        self._full_from: dict[int, int] | None = None  # first steps at the full rate, once over

    def attach(self, trainer: pl.Trainer, optimizers: Sequence[int]) -> None:
        """Rule the steps of these optimizers, in ``on_train_start``.

        Raises:
            MisconfigurationException: if the length cannot be known, for an optimizer without the
                betas that the shape needs, or if another warms up too.
        """
        is_known = self._asked == self._settings.asked and list(self.lengths) == list(optimizers)
        if not is_known or self._asked == [None, None]:  # else a prolonged run would begin again
            lengths = self._settings.lengths(trainer, len(optimizers))
            self.lengths = dict(zip(optimizers, lengths, strict=True))
        self._asked = self._settings.asked
        self._trainer = trainer
        self._optimizers = torch_optimizers(trainer)
        if self._first_batch is None:
            self._first_batch = self._completed_batches
        self._watch.attach(trainer)
        for i, j in self.groups():  # what cannot work raises here
            self.factor(i, j, self._position(i))
        self.ruling.attach(trainer, optimizers)

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception."""
        self.ruling.detach()
        self._watch.detach()
        self._trainer, self._optimizers = None, []

    @property
    def is_attached(self) -> bool:
        """Whether it rules a run now."""
        return self._trainer is not None

    @property
    def is_over(self) -> bool:
        """Whether all later steps have the factor 1."""
        return self._full_from is not None

    def finish(self) -> None:
        """Make all later steps at the full rate, in ``on_train_batch_end`` or later."""
        self._full_from = {i: self._position(i) + self.counts_batches for i in self.lengths}

    def groups(self) -> list[tuple[int, int]]:
        """Return index of the optimizer and of the group, for all groups that are warmed up."""
        return [(i, j) for i in self.lengths for j in range(len(self._optimizers[i].param_groups))]

    def factor(self, optimizer: int, group: int, step: int) -> float:
        """Return the factor of a step, counted from 0, or of a batch."""
        if self._full_from is not None and step >= self._full_from[optimizer]:
            return 1.0
        length, beta2 = self.lengths[optimizer], self._beta2(optimizer, group)
        return self._settings.factor(step, length=length, beta2=beta2)

    def factors(self, optimizer: int, group: int, num_steps: int) -> np.ndarray[Any, Any]:
        """Return those of the first steps, of shape ``(num_steps,)``."""
        return np.array([self.factor(optimizer, group, step) for step in range(num_steps)])

    def last_factor(self, optimizer: int, group: int) -> float | None:
        """Return that of the last step, in ``on_train_batch_end``; ``None`` before the first."""
        if self._watch.num_steps[optimizer] == 0:
            return None
        is_counted = not self.counts_batches  # a batch is counted when all are done with it
        return self.factor(optimizer, group, self._position(optimizer) - is_counted)

    def end(self) -> int | None:
        """Return the first step that all optimizers make at the full rate, if it is known."""
        ends = [self._end(i) for i in self.lengths]
        known = [end for end in ends if end is not None]
        return max(known) if len(known) == len(ends) else None

    def has_ended(self) -> bool:
        """Return whether all later steps are at the full rate, in ``on_train_batch_end``."""
        for i in self.lengths:
            end = self._end(i)
            if end is None or self._position(i) + self.counts_batches < end:
                return False
        return True

    @property
    def num_steps(self) -> int:
        """Real steps so far, of the optimizer that made most."""
        return max(self._watch.num_steps[i] for i in self.lengths)

    @property
    def counts_batches(self) -> bool:
        """Whether a batch is counted as a step."""
        assert self._trainer is not None  # while it trains
        is_manual = not self._trainer.lightning_module.automatic_optimization
        return is_manual and self._settings.asked != [None, None]

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return "batch" if self.counts_batches else "optimizer step"

    def steps_of_run(self) -> int | None:
        """Return how many there are to come, as they are counted here; ``None`` if not known."""
        assert self._trainer is not None  # while it trains
        is_automatic = self._trainer.lightning_module.automatic_optimization
        return steps_of_run(self._trainer) if is_automatic or self.counts_batches else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {
            "watch": self._watch.state_dict(),
            "asked": self._asked,
            "first_batch": self._first_batch,
            "lengths": dict(self.lengths),
            "full_from": self._full_from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run, before ``attach``."""
        self._watch.load_state_dict(state["watch"])
        self._asked = state["asked"]
        self._first_batch = state["first_batch"]
        self.lengths = dict(state["lengths"])
        self._full_from = state["full_from"]

    def _rate(self, optimizer: int, group: int, scheduled: Rate) -> Rate:
        if self.is_over:  # and no step is counted any more: that may wait for the device
            return scheduled
        factor = self.factor(optimizer, group, self._position(optimizer))
        return scheduled if factor == 1 else scheduled * factor

    def _position(self, optimizer: int) -> int:
        """Return the number of the step that it makes next, counted from 0, or of the batch."""
        if self.counts_batches:
            return self._completed_batches - (self._first_batch or 0)
        return self._watch.num_steps[optimizer]

    @property
    def _completed_batches(self) -> int:
        """Batches done, from the end of one to the end of the next."""
        assert self._trainer is not None  # while it trains
        return self._trainer.fit_loop.epoch_loop.batch_progress.total.completed

    def _end(self, i: int) -> int | None:
        """Return the first step that this optimizer makes at the full rate with all its groups."""
        ends = [
            self._settings.end(length=self.lengths[i], beta2=self._beta2(i, j))
            for j in range(len(self._optimizers[i].param_groups))
        ]
        known = [end for end in ends if end is not None]
        return max(known) if known and len(known) == len(ends) else None

    def _beta2(self, i: int, j: int) -> float | None:
        if not self._settings.needs_betas:
            return None
        group = self._optimizers[i].param_groups[j]
        if "betas" not in group:
            raise MisconfigurationException(
                f"`shape={self._settings.shape!r}` must be that of an optimizer with `betas`, such "
                f"as Adam, got {type(self._optimizers[i]).__qualname__} (optimizer {i}): β₂ says "
                "how long it warms up. Write `steps=`, or leave it out of `optimizers`."
            )
        return float(group["betas"][1])
