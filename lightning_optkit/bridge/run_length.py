"""How many optimizer steps are there in what is left of a run?"""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_optkit.bridge.steps_of_epochs import steps_of_epochs

__all__ = ["steps_of_next_epochs", "steps_of_run"]


def steps_of_next_epochs(trainer: pl.Trainer, epochs: float) -> int | None:
    """Return how many there are in so many epochs from the current one on.

    See :func:`~lightning_optkit.bridge.steps_of_epochs.steps_of_epochs`: in manual optimization,
    where an optimizer steps when the module says so, batches are counted in their place.

    Args:
        trainer: the Trainer, from ``on_train_start`` on.
        epochs: at least 0.

    Returns:
        Steps; ``None`` if the data have no length.
    """
    done = steps_of_epochs(trainer, trainer.current_epoch)
    all_of_them = steps_of_epochs(trainer, trainer.current_epoch + epochs)
    return None if done is None or all_of_them is None else all_of_them - done


def steps_of_run(trainer: pl.Trainer) -> int | None:
    """Return how many are to come in this run, or batches in manual optimization.

    Those that gradient scaling will skip are among them; early stopping is not foreseen.

    Returns:
        Steps; ``None`` if the run has no end that is known.
    """
    found = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = max(trainer.max_epochs - trainer.current_epoch, 0)
        found.append(steps_of_next_epochs(trainer, left))
    is_automatic = trainer.lightning_module.automatic_optimization
    if trainer.max_steps >= 0 and is_automatic:
        found.append(max(trainer.max_steps - trainer.global_step, 0))
    return min((steps for steps in found if steps is not None), default=None)
