"""An exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.averaging import AveragingCallback, RefreshNormStats, Stage, span
from lightning_optkit.methods.averaging import decay_of_half_life, exponential_share

__all__ = ["EMA"]


class EMA(AveragingCallback):
    r"""Keeps an exponential moving average of the weights, and evaluates and hands over that.

    **Intervener.** Training itself goes on with its own weights, bit-identical to a run without the
    callback; what is validated, tested and stored is the average. A run that was interrupted and
    resumed ends with the weights and the average of one that was not.

    .. math:: \bar w \leftarrow d_t\,\bar w + (1 - d_t)\,w, \qquad
        d_t = \min(d, (1 + t) / (10 + t)),

    after optimizer steps, with t models in the average. The first model is the first average:
    nothing from before enters. Buffers such as BatchNorm's statistics are averaged too; those of
    integers are the module's own.

    Args:
        decay: d, in [0, 1), an update; 0.999 unless ``half_life`` is given.
        half_life: optimizer steps after which a model weighs half, in place of ``decay``.
        every_n_steps: optimizer steps between updates. Steps that mixed precision skipped do not
            count; a batch in which several optimizers step counts once.
        start_step: zero-based step, as ``trainer.global_step``, whose result is the first model.
        start_epoch: zero-based epoch in which that may happen.
        warmup: whether the decay grows to d as above, or is d from the start.
        refresh_norm_stats: take the statistics of norm layers from the training data, before each
            use of an average that has changed; see :class:`~lightning_optkit.SWA`.
        use_for: stages that run on the average. With ``"validate"`` among them, it is also what the
            ``state_dict`` of checkpoints holds, and the module when ``fit`` ends.
        device: where the average lives, such as ``"cpu"``; ``None`` = where the weights do.
        name: tells several averages of one Trainer apart.

    Logged keys:
        ``optkit-averaging/{num_averaged, distance}`` whenever the Trainer logs
        (``log_every_n_steps``): see :data:`lightning_optkit.board.tags.AVERAGING_SCALARS`.
        ``optkit-events/averaging`` at the first model, and at the end.

    Cost:
        One pass over the parameters a step: reading two copies of them, writing one. Memory for one
        copy of parameters and float buffers, in float32 where they are half precision.

    When it misleads:
        An average of weights is a good model where they move around in one valley: late in
        training, at a rate that does not fall to zero too early. Early on, or with a half-life that
        is longer than what is left of training, it lags behind. Averaged BatchNorm statistics are
        those of the models, not of the average; see ``refresh_norm_stats``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMA(half_life=500)], logger=False)
    """

    def __init__(
        self,
        decay: float | None = None,
        half_life: float | None = None,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        start_epoch: int = 0,
        warmup: bool = True,
        refresh_norm_stats: RefreshNormStats = False,
        use_for: Sequence[Stage] = ("validate", "test", "predict"),
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        if not is_count(every_n_steps, least=1):
            raise ValueError(
                f"`every_n_steps` must be an integer of at least 1, got {every_n_steps!r}. 1 is "
                "every step."
            )
        self.decay = _decay(decay, half_life, every_n_steps)
        super().__init__(
            share=partial(exponential_share, decay=self.decay, warmup=warmup),
            use_for=use_for,
            refresh_norm_stats=refresh_norm_stats,
            device=device,
            name=name,
            thorough=False,
        )
        for key, value in (("start_step", start_step), ("start_epoch", start_epoch)):
            if not is_count(value, least=0):
                raise ValueError(
                    f"`{key}` must be an integer of at least 0, got {value!r}. 0 is at once."
                )
        self._every_n_steps = every_n_steps
        self._start_step = start_step
        self._start_epoch = start_epoch

    def _start_anew(self) -> None:
        super()._start_anew()
        self._num_steps = 0  # since it began

    def _plan(self, trainer: pl.Trainer) -> None:
        for name, start, end in (
            ("start_step", self._start_step, trainer.max_steps),
            ("start_epoch", self._start_epoch, trainer.max_epochs),
        ):
            if not _is_trial(trainer) and end is not None and 0 <= end <= start:
                raise MisconfigurationException(
                    f"`{name}` must lie before the end of training, at {end}, got {start}. Let the "
                    "average begin earlier."
                )

    def _due_after_step(self, trainer: pl.Trainer) -> bool:
        by_step = trainer.global_step <= self._start_step
        is_early = by_step or trainer.current_epoch < self._start_epoch
        if is_early and not _is_trial(trainer):
            return False
        self._num_steps += 1
        return (self._num_steps - 1) % self._every_n_steps == 0

    def _is_logged(self, trainer: pl.Trainer) -> bool:
        return trainer._logger_connector.should_update_logs

    def _span_of(self, first: tuple[int, int], last: tuple[int, int]) -> str:
        return span("step", first[1] + 1, last[1] + 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"num_steps": self._num_steps}

    def _load(self, state_dict: dict[str, Any]) -> None:
        super()._load(state_dict)
        self._num_steps = state_dict["num_steps"]


def _is_trial(trainer: pl.Trainer) -> bool:
    """Return whether one batch is run to try all that comes late in a run."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _decay(decay: float | None, half_life: float | None, every_n_steps: int) -> float:
    if half_life is None:
        decay = 0.999 if decay is None else decay
        if not is_number(decay) or not 0 <= decay < 1:
            raise ValueError(
                f"`decay` must be in [0, 1), such as 0.999, got {decay!r}. The higher, the slower "
                "it forgets."
            )
        return float(decay)
    if decay is not None:
        raise ValueError(
            f"At most one of `decay` and `half_life` must be given, got decay={decay} and "
            f"half_life={half_life}. Leave one of them out."
        )
    if not is_number(half_life) or not 0 < half_life < math.inf:
        raise ValueError(
            f"`half_life` must be a positive number of steps, such as 500, got {half_life!r}. Near "
            "0 it forgets at once."
        )
    return decay_of_half_life(half_life, every=every_n_steps)
