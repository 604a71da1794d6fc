"""What every observer shares: when it looks, what it reports, and that it never disturbs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from lightning_optkit.bridge.cadence import Cadence, logger_step
from lightning_optkit.bridge.measuring import MeasuringCallback, buffers_of_rank_zero
from lightning_optkit.bridge.probe import Probe
from lightning_optkit.bridge.report import report

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["Observer"]


Result = TypeVar("Result")


class Observer(MeasuringCallback, ABC, Generic[Result]):
    """A callback that measures the training loss and leaves training bit-identical.

    A subclass measures (:meth:`measure`) and names what it found (:meth:`scalars`,
    :meth:`arrays`, :meth:`figures`). This class asks the cadence, opens the probe and reports.

    Args:
        topic: first part of all tags.
        cadence: when to measure.
        **settings: as of :class:`~lightning_optkit.bridge.measuring.MeasuringCallback`.
    """

    def __init__(self, *, topic: str, cadence: Cadence, **settings: Any) -> None:
        super().__init__(topic=topic, **settings)
        self._cadence = cadence
        self._latest: tuple[int, Result] | None = None  # for the figure at the end
        self._under_way: tuple[int, list[Logger]] = 0, []  # step and loggers of a measurement

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe) -> Result:
        """Return the measurement; every rank takes part."""

    @abstractmethod
    def scalars(self, result: Result) -> dict[str, float]:
        """Return what to log, by name within the topic."""

    def arrays(self, result: Result) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays to store, by name within the topic."""
        return {}

    def figures(self, result: Result) -> dict[str, Figure]:
        """Return the figures to draw at the end of training, by name within the topic."""
        return {}

    def report_early(self, trainer: pl.Trainer, result: Result, scalars: dict[str, float]) -> None:
        """Report the arrays of a measurement under way, in whose place those of the whole come.

        Args:
            trainer: the Trainer.
            result: what is known.
            scalars: by name, from which to see that it is not the whole.
        """
        step, loggers = self._under_way
        muted, trainer.loggers = trainer.loggers, loggers
        try:
            with self._warning_once(step):  # on rank zero only: others must not wait for it
                arrays = self._tagged(self.arrays(result))
                report(trainer, step=step, scalars=self._tagged(scalars), arrays=arrays)
        finally:
            trainer.loggers = muted

    # -- hooks ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open(trainer, pl_module)
        self._cadence.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._cadence.after_batch(trainer):
            self._measure(trainer, pl_module, logger_step(trainer, after_batch=True))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._cadence.after_epoch(trainer):
            self._measure(trainer, pl_module, logger_step(trainer, after_batch=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        nothing_to_draw = self._latest is None and self._cadence.includes_end
        if self._cadence.at_end(trainer) or nothing_to_draw:
            self._measure(trainer, pl_module, logger_step(trainer, after_batch=False))
        if self._latest is not None:
            self._draw(trainer, *self._latest)
        self._close()

    def _close(self) -> None:
        super()._close()
        self._cadence.stop()
        self._latest = None

    def state_dict(self) -> dict[str, Any]:
        return {"cadence": self._cadence.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cadence.load_state_dict(state_dict["cadence"])

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        started = time.monotonic()
        self._under_way = step, trainer.loggers
        with self._cadence.measuring(step), self._warning_once(step):
            with buffers_of_rank_zero(trainer, pl_module), self._probe(trainer, pl_module) as probe:
                result = self.measure(trainer, pl_module, probe)
            seconds = time.monotonic() - started
            self._latest = step, result  # before the report: a logger may fail on one rank only
            report(
                trainer,
                step=step,
                scalars=self._tagged(self.scalars(result) | {"seconds": seconds}),
                arrays=self._tagged(self.arrays(result)),
            )

    def _draw(self, trainer: pl.Trainer, step: int, result: Result) -> None:
        with self._warning_once(step):
            if trainer.is_global_zero:
                report(trainer, step=step, figures=self._tagged(self.figures(result)))
