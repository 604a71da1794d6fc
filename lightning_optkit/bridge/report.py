"""Scalars, figures and arrays to every logger of a Trainer, and to its ``callback_metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_optkit.board.schema import array_summary
from lightning_optkit.bridge.plain_board import close_plain_board, plain_board_of
from lightning_optkit.bridge.run_file import close_run_file, run_file_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["close_report", "report"]


def report(
    trainer: pl.Trainer,
    *,
    step: int,
    scalars: Mapping[str, float] | None = None,
    arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> None:
    """Report one measurement. Every rank calls it; rank zero writes.

    Scalars go to all loggers and, on all ranks, to ``trainer.callback_metrics``, where
    ``ModelCheckpoint(monitor=...)`` and ``EarlyStopping`` find them. Arrays go to TensorBoard;
    where that is not among the loggers, scalars and arrays are left in a file, ``optkit.npz``,
    which ``lightning-optkit report`` reads.
    Figures go to TensorBoard, to Weights & Biases and similar loggers, and as PNG files into the
    folder of a ``CSVLogger``. A logger that cannot take something does without.

    Args:
        trainer: the Trainer.
        step: where on the Trainer's own step axis.
        scalars: values by tag.
        arrays: arrays by tag, as :mod:`lightning_optkit.board.schema` describes them.
        figures: figures by tag.
    """
    scalars = scalars or {}
    trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})
    _write(trainer, step, scalars, arrays or {}, figures or {})


def close_report(trainer: pl.Trainer) -> None:
    """Write what is left, in ``teardown`` and after an exception; more may follow.

    To TensorBoard the verdict as text, for those who look without the Optkit tab; else the rest of
    ``optkit.npz``.
    """
    for logger in trainer.loggers:
        close_plain_board(logger)
    close_run_file(trainer)


@rank_zero_only
def _write(
    trainer: pl.Trainer,
    step: int,
    scalars: Mapping[str, float],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    figures: Mapping[str, Figure],
) -> None:
    failures = []
    for logger in trainer.loggers:
        try:
            if scalars:
                logger.log_metrics(dict(scalars), step=step)
                if _array_writer(logger) is not None:
                    plain_board_of(logger).add(step, scalars)
            for tag, array in arrays.items():
                _write_array(logger, tag, array, step)
            for tag, figure in figures.items():
                _write_figure(logger, tag, figure, step)
            logger.save()
        except Exception as error:  # the other loggers still get theirs
            failures.append(error)
    has_no_place = not any(map(_array_writer, trainer.loggers))
    leaves_logs = not getattr(trainer, "fast_dev_run", False)
    if has_no_place and leaves_logs and (scalars or arrays):
        run_file_of(trainer).add(step, scalars, arrays, epoch=trainer.current_epoch)
    if failures:
        raise failures[0]


def _experiment(logger: Logger) -> Any:
    return getattr(logger, "experiment", None)


def _write_array(logger: Logger, tag: str, array: np.ndarray[Any, Any], step: int) -> None:
    """Add the array through the logger's own writer: a second event file could be missed."""
    writer = _array_writer(logger)
    if writer is not None:
        writer.add_summary(array_summary(tag, array), step)


def _array_writer(logger: Logger) -> Any:
    writer = getattr(_experiment(logger), "file_writer", None)
    return writer if hasattr(writer, "add_summary") else None


def _write_figure(logger: Logger, tag: str, figure: Figure, step: int) -> None:
    experiment = _experiment(logger)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(tag, figure, global_step=step)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=tag, images=[figure], step=step)
    elif isinstance(logger, CSVLogger):
        path = Path(logger.log_dir) / f"{tag.replace('/', '-')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
