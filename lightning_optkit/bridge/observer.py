"""What every observer shares: when it looks, what it looks at, and that it never disturbs."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.board.tags import tag
from lightning_optkit.bridge.cadence import Cadence, logger_step
from lightning_optkit.bridge.held_batches import HeldBatch, draw_batches
from lightning_optkit.bridge.probe import (
    Probe,
    StepLossFn,
    require_batch_step,
    select_parameters,
)
from lightning_optkit.bridge.reduce import require_whole_parameters
from lightning_optkit.bridge.report import report

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["Observer"]


Result = TypeVar("Result")
Value = TypeVar("Value")


class Observer(pl.Callback, ABC, Generic[Result]):
    """A callback that measures the training loss and leaves training bit-identical.

    A subclass measures (:meth:`measure`) and names what it found (:meth:`scalars`,
    :meth:`arrays`, :meth:`figures`). This class asks the cadence, holds the batches, opens the
    probe, reports, and turns a measurement that fails into one warning.

    Args:
        topic: first part of all tags.
        name: told apart by this: a second instance logs under ``<topic>-<name>``.
        cadence: when to measure.
        parameters: glob patterns of the parameters to measure in; ``None`` takes all trainable.
        num_batches: training batches to hold; ``None`` takes all of ``data``.
        mode: ``"eval"`` or ``"train"``, how dropout and BatchNorm behave while measuring.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches and all probes.
    """

    def __init__(
        self,
        *,
        topic: str,
        name: str | None = None,
        cadence: Cadence,
        parameters: list[str] | None = None,
        num_batches: int | None = None,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        loss_index: int = 0,
        data: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(parameters, str):
            raise TypeError(
                f"`parameters` must be a list of glob patterns, got the string {parameters!r}. "
                f"Write `parameters=[{parameters!r}]`."
            )
        if num_batches is None and data is None:
            raise ValueError("`num_batches` must be a number unless `data=` is given, got None.")
        if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
            raise ValueError(
                f"`num_batches` must be an integer of at least 1, got {num_batches!r}."
            )
        if mode not in ("eval", "train"):
            raise ValueError(f"`mode` must be 'eval' or 'train', got {mode!r}.")
        if loss_index < 0:
            raise ValueError(f"`loss_index` must be at least 0, got {loss_index}.")
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"`name` must be snake_case, such as 'generator', got {name!r}.")
        self.topic = topic if name is None else f"{topic}-{name}"
        self._cadence = cadence
        self._patterns = parameters
        self._num_batches = num_batches
        self._mode = mode
        self._loss_fn = loss_fn
        self._loss_index = loss_index
        self._data = data
        self._seed = seed
        self._held: list[HeldBatch] = []
        self._latest: tuple[int, Result] | None = None  # for the figure at the end
        self._warned: set[str] = set()

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

    @property
    def state_key(self) -> str:
        """Tells two observers of a Trainer apart in its checkpoints."""
        return f"{type(self).__qualname__}[{self.topic}]"

    def parameter_names(self, pl_module: pl.LightningModule) -> list[str]:
        """Return the names of the parameters to measure in."""
        return list(select_parameters(pl_module, self._patterns))

    @property
    def held_batches(self) -> list[HeldBatch]:
        """The batches to measure on."""
        return self._held

    # -- hooks ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_whole_parameters(trainer.strategy, type(self).__name__)
        self.parameter_names(pl_module)  # a pattern that matches nothing raises here
        if self._loss_fn is None:
            require_batch_step(pl_module)
        self._held = draw_batches(
            trainer, pl_module, num_batches=self._num_batches, data=self._data, seed=self._seed
        )
        self._warned = set()
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
        if self._cadence.at_end(trainer) or self._latest is None:
            self._measure(trainer, pl_module, logger_step(trainer, after_batch=False))
        if self._latest is not None:
            self._draw(trainer, *self._latest)
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._cadence.stop()
        self._held = []
        self._latest = None

    def state_dict(self) -> dict[str, Any]:
        return {"cadence": self._cadence.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cadence.load_state_dict(state_dict["cadence"])

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        started = time.monotonic()
        with self._cadence.measuring(step), self._warning_once(step):
            with self._probe(trainer, pl_module) as probe:
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

    def _probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Probe:
        return Probe(
            trainer,
            pl_module,
            mode=self._mode,
            loss_fn=self._loss_fn,
            loss_index=self._loss_index,
            seed=self._seed,
        )

    def _tagged(self, values: dict[str, Value]) -> dict[str, Value]:
        return {tag(self.topic, name): value for name, value in values.items()}

    @contextmanager
    def _warning_once(self, step: int) -> Iterator[None]:
        """Turn an exception into one warning for each cause: no diagnostic stops training."""
        try:
            yield
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if isinstance(error, torch.OutOfMemoryError):
                cause += " Hold fewer batches (`num_batches`), or measure in fewer `parameters`."
            kind = re.sub(r"\d+", "", cause)  # a message about memory has new numbers each time
            if kind not in self._warned:
                self._warned.add(kind)
                rank_zero_warn(
                    f"{type(self).__name__} measured nothing at step {step}; training goes on "
                    f"untouched. {cause}"
                )
