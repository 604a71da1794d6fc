"""The learning rate of an averaging phase, beside the user's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.arguments import is_number
from lightning_optkit.bridge.optimizer_steps import Rate, RateInStep
from lightning_optkit.methods.averaging_rates import annealed_share, cyclic_share

__all__ = ["AveragingRate"]


class AveragingRate:
    """Goes from the schedule's rate to another, once or in every cycle, inside steps alone.

    Args:
        lr: where to, one number or one for each parameter group of all optimizers. Groups that are
            added later have the one number, or else keep the schedule's rate.
        anneal_epochs: length of the way.
        cycle: length of a cycle, in epochs; ``None`` = go there once and stay.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self, lr: float | Sequence[float], *, anneal_epochs: float, cycle: int | None
    ) -> None:
        self._lrs = [lr] if not isinstance(lr, Sequence) else list(lr)
        if not self._lrs or not all(is_number(each) and each >= 0 for each in self._lrs):
            raise ValueError(
                "`lr` must be a number of at least 0, or a list of one for each parameter group, "
                f"got {lr!r}. Write `lr=0.01`, or `None` to leave the rate to your schedule."
            )
        if cycle is None:
            self._share = partial(annealed_share, anneal_epochs=anneal_epochs)
        else:
            self._share = partial(cyclic_share, cycle=cycle)
        self._by_group: dict[tuple[int, int], float] = {}
        self._rule = RateInStep(self._rate)
        self.epochs: float | None = None
        """Since the phase began, at the end of the step that is made; ``None`` = not yet."""

    def attach(self, trainer: pl.Trainer) -> None:
        """Rule the steps of all optimizers, in ``on_train_start``.

        Raises:
            MisconfigurationException: if there is another number of parameter groups.
        """
        groups = [
            (i, j)
            for i, optimizer in enumerate(trainer.optimizers)
            for j in range(len(optimizer.param_groups))
        ]
        if len(self._lrs) not in (1, len(groups)):
            raise MisconfigurationException(
                f"`lr` must be one number or one for each of the {len(groups)} parameter groups, "
                f"got {len(self._lrs)}. Count the groups of all optimizers in their order."
            )
        if len(self._lrs) > 1:
            self._by_group = dict(zip(groups, self._lrs, strict=True))
        self._rule.attach(trainer)

    def detach(self) -> None:
        """Leave the optimizers."""
        self._rule.detach()

    @property
    def of_last_step(self) -> float | None:
        """What the first parameter group stepped with; ``None`` before a step."""
        return next((rate for groups in self._rule.effective for rate in groups), None)

    def _rate(self, optimizer: int, group: int, scheduled: Rate) -> Rate:
        lr = self._lrs[0] if len(self._lrs) == 1 else self._by_group.get((optimizer, group))
        if self.epochs is None or lr is None:
            return scheduled
        share = self._share(self.epochs)
        return (1 - share) * scheduled + share * lr  # without rounding at both ends
