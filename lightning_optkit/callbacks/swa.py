"""Stochastic weight averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.averaging import AveragingCallback, RefreshNormStats, Stage, span
from lightning_optkit.bridge.averaging_rate import AveragingRate
from lightning_optkit.bridge.cadence import Cadence
from lightning_optkit.bridge.start import Start
from lightning_optkit.methods.averaging import polynomial_share, uniform_share

__all__ = ["SWA"]


class SWA(AveragingCallback):
    r"""Averages the weights of the last part of a run, and evaluates and hands over the average.

    **Intervener.** A run that was interrupted and resumed ends with the weights and the average of
    one that was not. Without ``lr=``, training itself is bit-identical to a run without the
    callback.

    .. math:: \bar w \leftarrow \bar w + (w - \bar w) / (n + 1)

    at the end of every epoch from ``start`` on, the last one included, with n models in the
    average. The statistics of norm layers are taken anew from the training data with the average in
    place, before it is used, by forward passes that nothing else notices.

    Args:
        start: a share of the run in [0, 1), a zero-based epoch (as ``trainer.current_epoch``), or
            ``"120ep"`` or ``"5000st"``. The first model is taken at the end of the first epoch (or
            step) that reaches it.
        every_n_epochs: epochs between models; 1, or the length of a ``cycle``, unless
            ``every_n_steps`` is given.
        every_n_steps: optimizer steps between models, in place of ``every_n_epochs``.
        lr: learning rate to go to from ``start`` on, one number or one for each parameter group of
            all optimizers; ``None`` leaves the rate to the user's schedule.
        anneal_epochs: epochs on the way to ``lr``, along half a cosine; 0 = at once.
        cycle: epochs in which the rate falls from the schedule's to ``lr``, again and again; the
            models are those at the ends of cycles.
        refresh_norm_stats: take the statistics of norm layers anew. ``True`` goes over all training
            data, a number over so many batches on each rank; ``"layerwise"`` makes one pass for
            each layer, and gives what one batch of all the data would; ``False`` averages the
            statistics of the models.
        use_for: stages that run on the average. With ``"validate"`` among them, it is also what the
            ``state_dict`` of checkpoints holds, and the module when ``fit`` ends.
        average: ``"uniform"``, or ``"polynomial"``: later models weigh more.
        eta: power with which they do, at least 0.
        device: where the average lives, such as ``"cpu"``; ``None`` = where the weights do.
        name: tells several averages of one Trainer apart.

    Logged keys:
        ``optkit-averaging/{num_averaged, distance}`` at each model, and ``learning_rate`` with
        ``lr=``: see :data:`lightning_optkit.board.tags.AVERAGING_SCALARS`.
        ``optkit-events/averaging`` at the first model, and at the end.

    Cost:
        One forward pass over the training data for each validation, checkpoint or end of training
        whose average is new, where the module has norm layers with running statistics; else nearly
        nothing. Memory for one copy of parameters and float buffers.

    When it misleads:
        The mean of weights is a good model only if they lie in one valley and still move: with a
        rate that has fallen to zero by ``start`` all models are the same, hence ``lr=``. The loss
        that training logs is not that of the average; the validation's is.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=40, callbacks=[SWA(start=0.75, lr=0.01)], logger=False)
    """

    def __init__(
        self,
        start: int | float | str = 0.75,
        every_n_epochs: int | None = None,
        *,
        every_n_steps: int | None = None,
        lr: float | Sequence[float] | None = None,
        anneal_epochs: float = 10,
        cycle: int | None = None,
        refresh_norm_stats: RefreshNormStats = True,
        use_for: Sequence[Stage] = ("validate", "test", "predict"),
        average: Literal["uniform", "polynomial"] = "uniform",
        eta: float = 3.0,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        if average not in ("uniform", "polynomial"):
            raise ValueError(
                f"`average` must be 'uniform' or 'polynomial', got {average!r}. The second gives "
                "later models more weight."
            )
        if not is_number(eta) or not eta >= 0:
            raise ValueError(f"`eta` must be at least 0, got {eta!r}. 0 is the plain mean.")
        self._start = Start(start)
        self._every_n_steps, self._every_n_epochs = _periods(every_n_steps, every_n_epochs, cycle)
        self._cycle = cycle
        if not is_number(anneal_epochs) or not anneal_epochs >= 0:
            raise ValueError(
                f"`anneal_epochs` must be a number of at least 0, got {anneal_epochs!r}. 0 is at "
                "once."
            )
        if lr is None and cycle is not None:
            raise ValueError(
                f"`lr` must be given with `cycle={cycle}`, got None. Write the rate to fall to."
            )
        self._rate = (
            None if lr is None else AveragingRate(lr, anneal_epochs=anneal_epochs, cycle=cycle)
        )
        super().__init__(
            share=uniform_share if average == "uniform" else partial(polynomial_share, eta=eta),
            use_for=use_for,
            refresh_norm_stats=refresh_norm_stats,
            device=device,
            name=name,
            thorough=True,
        )

    def _start_anew(self) -> None:
        super()._start_anew()
        self._began: float | None = None  # in epochs, with the part of the one it began in
        self._num_steps = 0  # since then
        self._last_epoch: int | None = None  # whose end a model was taken at
        self._length: int | None = None  # of an epoch, where the loader does not say it
        if self._rate is not None:
            self._rate.epochs = None

    def _plan(self, trainer: pl.Trainer) -> None:
        self._start.resolve(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._rate is not None:
            self._rate.attach(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        length = self._length or trainer.num_training_batches
        may_begin = batch_idx == 0 or self._cycle is None  # cycles end where epochs do
        if self._began is None and may_begin and self._start.is_reached(trainer):
            self._began = trainer.current_epoch + batch_idx / length
        if self._began is not None and self._rate is not None:
            is_known = math.isfinite(length)
            part = (batch_idx + 1) / length if is_known else 1.0  # in steps of a whole epoch
            self._rate.epochs = trainer.current_epoch + part - self._began

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.num_training_batches == math.inf and trainer.is_last_batch:
            self._length = trainer.fit_loop.epoch_loop.batch_idx + 1

    def _due_after_step(self, trainer: pl.Trainer) -> bool:
        if self._began is None or self._every_n_steps is None:
            return False
        self._num_steps += 1
        return (self._num_steps - 1) % self._every_n_steps == 0

    def _due_after_epoch(self, epoch: int) -> bool:
        if self._began is None or self._every_n_epochs is None:
            return False
        first = int(self._began) + (self._cycle or 1) - 1
        due = epoch >= first and (epoch - first) % self._every_n_epochs == 0
        due = due and epoch != self._last_epoch
        if due:
            self._last_epoch = epoch
        return due

    def _is_logged(self, trainer: pl.Trainer) -> bool:
        return True

    def _scalars(self, trainer: pl.Trainer) -> dict[str, float]:
        rate = None if self._rate is None else self._rate.of_last_step
        return super()._scalars(trainer) | ({} if rate is None else {"learning_rate": rate})

    def _span_of(self, first: tuple[int, int], last: tuple[int, int]) -> str:
        if self._every_n_steps is not None:
            return span("step", first[1] + 1, last[1] + 1)
        return span("epoch", first[0], last[0])

    def _leave_optimizers(self) -> None:
        super()._leave_optimizers()
        if self._rate is not None:
            self._rate.detach()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "began": self._began,
            "num_steps": self._num_steps,
            "last_epoch": self._last_epoch,
            "length": self._length,
        }

    def _load(self, state_dict: dict[str, Any]) -> None:
        super()._load(state_dict)
        self._began = state_dict["began"]
        self._num_steps = state_dict["num_steps"]
        self._last_epoch = state_dict["last_epoch"]
        self._length = state_dict["length"]


def _periods(
    every_n_steps: int | None, every_n_epochs: int | None, cycle: int | None
) -> tuple[int | None, int | None]:
    """Return steps and epochs between models, one of them ``None``."""
    cadence = Cadence(every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
    if cycle is None:
        return cadence.every_n_steps, cadence.every_n_epochs
    if not is_count(cycle, least=1):
        raise ValueError(
            f"`cycle` must be an integer of at least 1, in epochs, got {cycle!r}. `None` goes to "
            "`lr` once and stays."
        )
    period = cycle if every_n_epochs is None else every_n_epochs
    if every_n_steps is not None or period % cycle:
        raise ValueError(
            f"`every_n_epochs` must be a multiple of `cycle={cycle}`, so that models are taken at "
            f"the ends of cycles, got every_n_epochs={every_n_epochs} and "
            f"every_n_steps={every_n_steps}. Leave both out."
        )
    return None, period
