"""The learning rate for the batch that a run really has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Adadelta, Adagrad, Optimizer, RMSprop

from lightning_optkit.board import tags
from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.chosen_optimizers import chosen_optimizers, optimizer_indices
from lightning_optkit.bridge.effective_batch import (
    EffectiveBatch,
    batch_per_device,
    effective_batch,
)
from lightning_optkit.bridge.effective_rates import EffectiveRates, is_logged
from lightning_optkit.bridge.gradual_rate import GradualRate
from lightning_optkit.bridge.momentum_correction import MomentumCorrection
from lightning_optkit.bridge.optimizer_steps import Rate, RateInStep, StepWatch
from lightning_optkit.bridge.report import close_report, report
from lightning_optkit.methods.batch_scaling import ScalingRule, scaling_factor

__all__ = ["BatchScaling"]


class BatchScaling(pl.Callback):
    r"""Scales the learning rate for the batch that an optimizer step really has.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not, and its rate is not scaled twice: the scheduled rate stays what is stored.

    .. math:: \eta_{used} = s\,\eta, \qquad k = \frac{B}{B_{reference}}, \qquad
        s = k, \sqrt{k} \text{ or } 1,

    inside ``optimizer.step()`` alone, for all parameter groups, with η what the user's schedule
    says. B is the batch of the training dataloader on one device × accumulated batches × devices
    that take other data, on all nodes. It is followed through training, as a
    ``GradientAccumulationScheduler`` changes it. If s > 1 the rate grows to it over the first
    epochs, by a constant amount a step: :math:`1 + (s - 1)(t + 1)/n` for the steps t = 0 to n − 1
    of the warmup.

    Args:
        reference_batch_size: samples in a step for which the rate was found; positive.
        rule: ``"linear"`` (SGD), ``"sqrt"`` (Adam and its like), or ``"none"``: the rate is left
            alone, and the batch is told and logged.
        warmup_epochs: length of the warmup, at least 0; parts of an epoch too. 0 = none.
        batch_size: samples in a batch of one device, where the dataloader does not say it, or in
            place of what it says.
        momentum_correction: multiply the momentum of a step by :math:`\eta_t / \eta_{t-1}`, for
            optimizers that fold the rate into their velocity. ``None`` = in groups that say so
            (``fold_lr=True``), ``True`` = in all that have a momentum, ``False`` = never.
        optimizers: which of the module's optimizers, by index; ``None`` = all.

    Logged keys:
        ``optkit-lr/{batch_size, scale}`` before the first step and at each change, and whenever the
        Trainer logs (``log_every_n_steps``), then with ``optkit-lr/effective/<optimizer>``: see
        :data:`lightning_optkit.board.tags.BATCH_SCALING_SCALARS`. ``optkit-events/batch_scaling``
        at the end of the warmup: s. ``LearningRateMonitor`` shows the effective rate too.

    Cost:
        Nothing that can be measured: a multiplication for each parameter group in a step.

    When it misleads:
        The linear rule is no law. It holds while k steps would hardly move the gradient, and fails
        beyond a batch size that depends on model and data. Accumulation that the module does
        itself, in manual optimization, is not seen; pass ``batch_size=``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BatchScaling(256, warmup_epochs=5)], logger=False)
    """

    def __init__(
        self,
        reference_batch_size: int = 256,
        rule: ScalingRule = "linear",
        warmup_epochs: float = 5,
        *,
        batch_size: int | None = None,
        momentum_correction: bool | None = None,
        optimizers: int | Sequence[int] | None = None,
    ) -> None:
        if not is_count(reference_batch_size, least=1):
            raise ValueError(
                "`reference_batch_size` must be an integer of at least 1, got "
                f"{reference_batch_size!r}. Write the batch for which the rate was found."
            )
        scaling_factor(1, 1, rule=rule)  # refuses another
        if not is_number(warmup_epochs) or not 0 <= warmup_epochs < math.inf:
            raise ValueError(
                f"`warmup_epochs` must be a number of at least 0, got {warmup_epochs!r}. 0 is no "
                "warmup."
            )
        if batch_size is not None and not is_count(batch_size, least=1):
            raise ValueError(
                f"`batch_size` must be an integer of at least 1, got {batch_size!r}. `None` takes "
                "the training dataloader's."
            )
        if momentum_correction is not None and not isinstance(momentum_correction, bool):
            raise TypeError(
                f"`momentum_correction` must be True, False or None, got {momentum_correction!r}. "
                "`None` corrects where an optimizer says `fold_lr`."
            )
        self._reference = reference_batch_size
        self._rule: ScalingRule = rule
        self._given = batch_size
        self._optimizers = optimizer_indices(optimizers)
        self._watch = StepWatch()
        self._scaling = RateInStep(self._scaled, role="batch scaling")
        self._warmup = GradualRate(
            0 if rule == "none" else warmup_epochs,
            lambda: self._factor,
            self._watch,
            without="BatchScaling(warmup_epochs=0)",
        )
        self._momentum = MomentumCorrection(momentum_correction)
        self._rates = EffectiveRates(self._scaling)
        self._start_anew()

    def _start_anew(self) -> None:
        self._watch.start()
        self._warmup.start()
        self._momentum.start()
        self._batch = EffectiveBatch(self._reference, 1, 1)  # until training starts
        self._told: EffectiveBatch | None = None
        self._before: int | None = None  # batch of the interrupted run
        self._has_warned = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(optimizers=self._optimizers)

    @property
    def _factor(self) -> float:
        return scaling_factor(self._batch.size, self._reference, rule=self._rule)

    def _scaled(self, optimizer: int, group: int, rate: Rate) -> Rate:
        return rate * self._factor

    # -- training ------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint is restored
            self._leave()
            self._start_anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ruled = [i for i, _ in chosen_optimizers(trainer, self._optimizers)]
        self._look(trainer)
        self._watch.attach(trainer)
        self._scaling.attach(trainer, ruled)
        self._warmup.attach(trainer, ruled)
        self._momentum.attach(trainer, ruled)
        self._rates.attach(trainer, ruled)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)  # dataloaders may be new

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._follow(trainer)  # what others changed since

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        scalars = self._scalars() | self._rates.scalars() if is_logged(trainer) else {}
        if self._warmup.has_ended():
            scalars[tags.tag(tags.EVENTS, tags.BATCH_SCALING_EVENT)] = self._factor
        if scalars:
            report(trainer, step=logger_step(trainer, after_batch=True), scalars=scalars)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._leave()
        close_report(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()
        close_report(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self._watch.state_dict(),
            "warmup": self._warmup.state_dict(),
            "momentum": self._momentum.state_dict(),
            "batch_size": None if self._told is None else self._told.size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._watch.load_state_dict(state_dict["watch"])
        self._warmup.load_state_dict(state_dict["warmup"])
        self._momentum.load_state_dict(state_dict["momentum"])
        self._before = state_dict["batch_size"]

    def _leave(self) -> None:
        for each in (self._watch, self._rates, self._momentum, self._warmup, self._scaling):
            each.detach()

    # -- the batch -----------------------------------------------------------------------------

    def _look(self, trainer: pl.Trainer) -> None:
        """See what the dataloader's batches are."""
        per_device = batch_per_device(trainer) if self._given is None else self._given
        self._batch = effective_batch(trainer, per_device)

    def _follow(self, trainer: pl.Trainer) -> None:
        """See what is accumulated, and tell what has changed."""
        self._batch = effective_batch(trainer, self._batch.per_device)
        if self._batch == self._told:
            return
        self._told = self._batch
        rank_zero_info(self._line())
        self._before = None
        self._warn_of_adaptive(trainer)
        step = logger_step(trainer, after_batch=True)  # of the batch that runs
        report(trainer, step=step, scalars=self._scalars())

    def _line(self) -> str:
        """Return the arithmetic in a line."""
        factor = "as it is" if self._rule == "none" else f"× {self._factor:.4g}"
        line = (
            f"BatchScaling: {self._batch}, {self._batch.size / self._reference:.4g} × "
            f"{self._reference:,}: rate {factor} ({self._rule})"
        )
        if self._warmup.is_going_on:
            line += f", warmed up over {self._warmup}"
        if self._before not in (None, self._batch.size):
            line += f"; {self._before:,} before the run was interrupted"
        return line

    def _scalars(self) -> dict[str, float]:
        found = {"batch_size": float(self._batch.size), "scale": self._factor}
        return {tags.tag(tags.RATES, name): value for name, value in found.items()}

    def _warn_of_adaptive(self, trainer: pl.Trainer) -> None:
        if self._rule != "linear" or self._factor == 1 or self._has_warned:
            return
        ruled = [optimizer for _, optimizer in chosen_optimizers(trainer, self._optimizers)]
        names = [type(optimizer).__name__ for optimizer in ruled if _is_adaptive(optimizer)]
        if names:
            self._has_warned = True
            rank_zero_warn(
                f"`rule` should be 'sqrt' for {', '.join(dict.fromkeys(names))}, got 'linear', "
                "which is SGD's: an adaptive step does not grow with the gradient. Write "
                "`BatchScaling(rule='sqrt')`."
            )


def _is_adaptive(optimizer: Optimizer) -> bool:
    """Return whether it divides the gradient by its own size, as Adam and its like do."""
    is_known = isinstance(optimizer, (Adadelta, Adagrad, RMSprop))
    return is_known or any("betas" in group for group in optimizer.param_groups)
