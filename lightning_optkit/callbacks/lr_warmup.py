"""Low learning rates for the first steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optkit.board import tags
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.chosen_optimizers import chosen_optimizers, optimizer_indices
from lightning_optkit.bridge.condition import Condition, MetricsCondition
from lightning_optkit.bridge.effective_rates import (
    EffectiveRates,
    group_names,
    is_logged,
    optimizer_names,
)
from lightning_optkit.bridge.planned_rates import UnknownScheduleError, planned_rates
from lightning_optkit.bridge.report import close_report, report
from lightning_optkit.bridge.warmup import Warmup
from lightning_optkit.bridge.warmup_settings import WarmupSettings
from lightning_optkit.methods.warmup import Shape

__all__ = ["LRWarmup"]

_DRAWN_STEPS = 10_000  # more are not told apart in a picture
_DRAWN_RATES = 200_000  # of all groups: a second or two of schedulers
_UNKNOWN_LENGTH = 1_000  # steps drawn of a run that has no end


class LRWarmup(pl.Callback):
    r"""Keeps the learning rate low in the first steps, whatever schedule follows.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not. The stored rate stays the schedule's.

    .. math:: \eta_{used}(t) = f(t)\,\eta(t)

    inside ``optimizer.step()`` alone, with η what the user's schedule says and t = 0, 1, … the real
    steps of each optimizer, without those that mixed precision skipped. With n the length and s the
    start factor:

    ================= =================================================================
    ``"linear"``      s + (1 − s)(t + 1)/n, then 1: step n − 1 is the first at the full rate
    ``"cosine"``      s + (1 − s)(1 − cos(π(t + 1)/n))/2, then 1
    ``"constant"``    s for n steps, then 1
    ``"exponential"`` s + (1 − s)(1 − exp(−(t + 1)/n)), without an end
    ``"noam"``        d^−½ · min((t + 1)^−½, (t + 1)·n^−1.5), the whole schedule of a Transformer:
                      the rate itself where the optimizer's is 1
    ``"untuned"``     min(1, (t + 1)/τ), τ = 2/(1 − β₂), by each group's β₂
    ``"radam"``       RAdam's rectification by each group's β₂, without an end
    ================= =================================================================

    Args:
        steps: n, in optimizer steps; a list has one for each of ``optimizers``.
        epochs: n, in epochs; parts of one too.
        fraction: n, as a share of the run, in (0, 1].
        shape: one of the above, or ``(step) -> factor``; ``None`` = linear, or constant with
            ``until``. A function, ``"untuned"`` and ``"radam"`` take no length, all others exactly
            one.
        start_factor: s, in [0, 1). ``None`` = 0, or 0.1 where it is held.
        until: a condition ``(metrics) -> bool`` in place of a length, such as
            ``ErrorBelow("train_error", 0.8)``. It is looked at after each batch, validation and
            epoch; when it first holds the rate is released, for good, on all ranks.
        optimizers: which of the module's optimizers, by index; ``None`` = all.
        d_model: d, width of the Transformer; for ``"noam"``.
        name: part of the event's and the picture's tag; by default the indices of ``optimizers``.

    Logged keys:
        ``optkit-lr/effective/<name>`` and ``optkit-lr/factor/<name>`` whenever the Trainer logs
        (``log_every_n_steps``), with the names of ``LearningRateMonitor``: see
        :data:`lightning_optkit.board.tags.RATE_TAGS`. ``optkit-events/warmup`` at the end of the
        warmup: the steps it took. ``optkit-lr/schedule``, a picture of the planned rates, at the
        start. ``LearningRateMonitor`` shows the effective rate too.

    Cost:
        A multiplication for each parameter group in a step. With ``until``, reading a metric after
        each batch, and one small sum over the ranks, until it is released.

    When it misleads:
        A warmup moves the schedule's first steps down, and the schedule does not wait for it. A
        condition on the metric of one batch may hold by chance; log a running mean.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LRWarmup(epochs=5)], logger=False)
    """

    def __init__(
        self,
        steps: int | Sequence[int] | None = None,
        epochs: float | None = None,
        fraction: float | None = None,
        shape: Shape | Callable[[int], float] | None = None,
        start_factor: float | None = None,
        until: MetricsCondition | None = None,
        optimizers: int | Sequence[int] | None = None,
        *,
        d_model: int | None = None,
        name: str | None = None,
    ) -> None:
        self._settings = WarmupSettings(
            steps=steps,
            epochs=epochs,
            fraction=fraction,
            until=until,
            shape=shape,
            start_factor=start_factor,
            d_model=d_model,
        )
        self._indices = optimizer_indices(optimizers)
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", str(name)):
            raise ValueError(
                f"`name` must be snake_case, such as 'critic', got {name!r}. It becomes part of "
                "tags."
            )
        self._suffix = "_".join(map(str, self._indices or ())) if name is None else name
        self._condition = None if until is None else Condition(until)
        self._warmup = Warmup(self._settings)
        self._rates = EffectiveRates(self._warmup.ruling)
        self._start_anew()

    def _start_anew(self) -> None:
        self._warmup.start()
        self._begins = True
        self._has_epoch = False  # that it has seen from start to end
        self._has_warned = False

    # -- training ------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint is restored
            self._leave()
            self._start_anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ruled = [i for i, _ in chosen_optimizers(trainer, self._indices)]
        self._warmup.attach(trainer, ruled)
        self._rates.attach(trainer, ruled)
        if self._begins and not _is_trial(trainer):
            self._announce(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)  # at what the module logged as the epoch ended
        if self._has_epoch and not self._warmup.is_over:
            self._warn_of_missing(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if is_logged(trainer):
            scalars = self._rates.scalars() | self._factors(trainer)
            report(trainer, step=logger_step(trainer, after_batch=True), scalars=scalars)
        if self._condition is not None:
            self._look(trainer, pl_module)
        elif not self._warmup.is_over and self._warmup.has_ended():
            self._end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)
        self._has_epoch = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._condition is not None and not self._warmup.is_over and not _is_trial(trainer):
            self._warn_of_missing(trainer)
            rank_zero_warn(
                f"`LRWarmup` never released the learning rate: {self._settings.condition} did not "
                f"hold, and all steps were made at {self._settings.start_factor:g} times the "
                "scheduled rate. Ask for less in `until=`, or give a length, such as `epochs=5`."
            )
        self._leave()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._leave()
        close_report(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()
        close_report(trainer)

    def _leave(self) -> None:
        self._rates.detach()
        self._warmup.detach()

    def _factors(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the factors of the last steps by tag."""
        names, of_groups = optimizer_names(trainer), group_names(trainer)
        found = {}
        for i, j in self._warmup.groups():
            name = of_groups[i][j] if self._settings.needs_betas else names[i]
            factor = self._warmup.last_factor(i, j)
            if factor is not None:
                found[tags.tag(tags.RATES, f"{tags.FACTOR}/{name}")] = factor
        return found

    # -- its end -------------------------------------------------------------------------------

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Release the rate if the condition holds."""
        if self._condition is None or self._warmup.is_over or not self._warmup.is_attached:
            return
        if self._condition.holds(trainer):
            self._end(trainer, pl_module)
            steps = self._warmup.num_steps
            rank_zero_info(f"LRWarmup: {self._settings.condition} after {steps:,} steps, released.")

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that it is over, and report it."""
        self._warmup.finish()
        event = tags.tag(tags.EVENTS, self._tag(tags.WARMUP_EVENT))
        within_batch = pl_module._current_fx_name in ("on_train_batch_end", "on_validation_end")
        step = logger_step(trainer, after_batch=within_batch)
        report(trainer, step=step, scalars={event: float(self._warmup.num_steps)})

    def _warn_of_missing(self, trainer: pl.Trainer) -> None:
        """Warn once of a condition on a metric that is not there."""
        missing = None if self._condition is None else self._condition.missing
        if missing is None or self._has_warned:
            return
        self._has_warned = True
        there = ", ".join(map(repr, sorted(trainer.callback_metrics))) or "none"
        rank_zero_warn(
            f"`until` must ask for a metric that is logged, got {missing!r} after an epoch that "
            f"logged {there}. Log it with `self.log({missing!r}, ...)`; if it comes later, all is "
            "well."
        )

    def _tag(self, name: str) -> str:
        return f"{name}_{self._suffix}" if self._suffix else name

    # -- checkpoints ---------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self._suffix}]"

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at what the module has logged as the epoch ended: a resumed run cannot."""
        if (pl_module._current_fx_name or "").startswith("on_"):  # not in the midst of a step
            self._look(trainer, pl_module)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"warmup": self._warmup.state_dict(), "has_warned": self._has_warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._warmup.load_state_dict(state_dict["warmup"])
        self._has_warned = state_dict["has_warned"]
        self._begins = False

    # -- the plan ------------------------------------------------------------------------------

    def _announce(self, trainer: pl.Trainer) -> None:
        """Say what is planned, in a line and a picture."""
        lengths = dict.fromkeys(n for n in self._warmup.lengths.values() if n is not None)
        unit = "batches" if self._warmup.counts_batches else "steps"
        over = f" over {' and '.join(f'{n:,}' for n in lengths)} {unit}" if lengths else ""
        names = ", ".join(optimizer_names(trainer)[i] for i in self._warmup.lengths)
        line = f"LRWarmup of {names}: {self._settings}{over}"
        rank_zero_info(line)
        run, end = self._warmup.steps_of_run(), self._warmup.end()
        if run is not None and end is not None and end >= run:
            rank_zero_warn(
                f"A warmup must be shorter than the run of {run:,} {unit}, got one that reaches "
                f"the full rate after {end:,}: no step is made at it. Write fewer."
            )
        if trainer.loggers and trainer.is_global_zero:
            try:
                self._draw(trainer, title=line)
            except Exception as error:  # a picture must never stop training
                rank_zero_warn(f"`LRWarmup` could not draw its schedule: {error!r}")

    def _draw(self, trainer: pl.Trainer, *, title: str) -> None:
        from lightning_optkit.figures.schedule import schedule_figure

        num_steps = self._num_drawn(trainer)
        groups, names = self._warmup.groups(), group_names(trainer)
        used = {names[i][j]: self._warmup.factors(i, j, num_steps) for i, j in groups}
        scheduled = None
        try:
            planned = planned_rates(trainer, num_steps)
            scheduled = {names[i][j]: planned[i][j] for i, j in groups}
            used = {name: factors * scheduled[name] for name, factors in used.items()}
        except UnknownScheduleError as error:
            rank_zero_info(f"LRWarmup: its picture shows the factor alone, for {error}.")
        figure = schedule_figure(
            used, scheduled, title=title, end=self._warmup.end(), unit=self._warmup.unit
        )
        tag = tags.tag(tags.RATES, self._tag(tags.SCHEDULE_FIGURE))
        report(trainer, step=logger_step(trainer, after_batch=False), figures={tag: figure})

    def _num_drawn(self, trainer: pl.Trainer) -> int:
        """Return for how many steps the schedule is drawn."""
        lengths = [n for n in [*self._warmup.lengths.values(), self._warmup.end()] if n is not None]
        run = self._warmup.steps_of_run()
        run = max([_UNKNOWN_LENGTH, *(4 * n for n in lengths)]) if run is None else run
        num_groups = sum(len(optimizer.param_groups) for optimizer in trainer.optimizers)
        return max(min(run, _DRAWN_STEPS, _DRAWN_RATES // num_groups), 1)


def _is_trial(trainer: pl.Trainer) -> bool:
    """Return whether one batch is run to try all that comes late in a run."""
    return bool(getattr(trainer, "fast_dev_run", False))
