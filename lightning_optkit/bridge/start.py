"""When something begins that is to begin late in a run."""

from __future__ import annotations

import math
import re

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["Start"]


class Start:
    """A point of a run: a share of it, an epoch or a step.

    Args:
        when: a share of the run in [0, 1), a zero-based epoch such as ``trainer.current_epoch``, or
            a string such as ``"120ep"`` or ``"5000st"``, of a zero-based epoch or step.

    Raises:
        TypeError: for another type.
        ValueError: for a value out of range.
    """

    def __init__(self, when: int | float | str) -> None:
        self.when = when
        self._share: float | None = None
        self._epoch: int | None = None
        self._step: int | None = None
        self._at_once = False
        match when:
            case bool():
                raise TypeError(_message(when))
            case int():
                self._epoch = when
            case float():
                self._share = when
            case str() if found := re.fullmatch(r"(\d[\d_]*)(ep|st)", when):
                number = int(found[1])
                self._epoch, self._step = (number, None) if found[2] == "ep" else (None, number)
            case str():
                raise ValueError(_message(when))
            case _:
                raise TypeError(_message(when))
        too_early = self._epoch is not None and self._epoch < 0
        if too_early or (self._share is not None and not 0 <= self._share < 1):
            raise ValueError(_message(when))

    def resolve(self, trainer: pl.Trainer) -> None:
        """Hold it against the length of the run, in ``setup``.

        Raises:
            MisconfigurationException: if the run is over by then, or a share is asked of a run
                without an end.
        """
        self._at_once = bool(
            getattr(trainer, "fast_dev_run", False)
        )  # a trial of all that comes late in a run
        if self._at_once:
            return
        epochs, steps = _known(trainer.max_epochs), _known(trainer.max_steps)
        if self._share is not None:
            if self._share > 0 and epochs is None and steps is None:
                raise MisconfigurationException(
                    f"`start` must be an epoch or a step where training has no end, got the share "
                    f"{self.when}. Write `start='5000st'`, or give the Trainer `max_epochs`."
                )
            # within the epoch in which the share is reached; without the rounding of 0.29 * 100
            self._epoch = None if epochs is None else math.floor(self._share * epochs + 1e-9)
            self._epoch = self._epoch if self._share > 0 else 0
            self._step = None if steps is None else math.floor(self._share * steps + 1e-9)
        for start, end in ((self._epoch, epochs), (self._step, steps)):
            if start is not None and end is not None and start >= end:
                raise MisconfigurationException(
                    f"`start` must lie before the end of training, at {end}, got {self.when!r}. "
                    "Write an earlier one, or a share of the run such as 0.75."
                )

    def is_reached(self, trainer: pl.Trainer) -> bool:
        """Return whether the epoch and step that run now are at it or beyond, before a batch."""
        if self._at_once:
            return True
        epoch, step = trainer.current_epoch, trainer.global_step
        by_epoch = self._epoch is not None and epoch >= self._epoch
        return by_epoch or (self._step is not None and step >= self._step)


def _known(length: int | None) -> int | None:
    return length if length is not None and length >= 0 else None


def _message(when: object) -> str:
    return (
        "`start` must be a share of the run in [0, 1), an epoch, or a string such as '120ep' or "
        f"'5000st', got {when!r}."
    )
