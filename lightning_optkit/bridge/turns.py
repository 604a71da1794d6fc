"""Is it this intervener's turn?"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_optkit.bridge.cadence import Cadence

__all__ = ["Turns"]


class Turns(Cadence):
    """Due before a batch: the first of training, and then once every so many steps or epochs.

    Checkpoints are written after batches, epochs and validation, by whichever callback comes first
    or last. Whoever acts before a batch finds in each of them the weights that it has yet to act
    on, so a resumed run acts as one that was not interrupted. No clock has a say. The first batch
    of a resumed run is due only where the interrupted run had yet to act.

    Args:
        every_n_steps: optimizer steps between turns, at least 1.
        every_n_epochs: epochs between turns, at least 1; 1 unless ``every_n_steps`` is given.

    Raises:
        ValueError: if both periods are given, or a value is out of range.
    """

    def __init__(
        self, *, every_n_steps: int | None = None, every_n_epochs: int | None = None
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        self._last: int | None = None

    def start(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._last = None

    def before_batch(self, trainer: pl.Trainer) -> bool:
        """Return whether to act now, in ``on_train_batch_start``; once for each due point."""
        if self.every_n_steps is not None:  # a batch that stepped is counted before the next
            now, period = trainer.fit_loop.epoch_loop._batches_that_stepped, self.every_n_steps
        else:
            now, period = trainer.current_epoch, self.every_n_epochs or 1
        due = now % period == 0 and now != self._last
        if due:
            self._last = now
        return due

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run."""
        self._last = state["last"]
