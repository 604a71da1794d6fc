"""What is reported where no logger takes arrays, kept in a file: ``optkit.npz``."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.board.npz_file import FILE_NAME, read_npz, write_npz
from lightning_optkit.board.runs import ArraySeries, Run, Series

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RunFile", "close_run_file", "run_file_of"]

_SECONDS = 10.0  # between two writes
_SHARE = 0.02  # of the time, at most, for writing: a long run's file takes longer each time


class RunFile:
    """Points of one run, in memory and, now and then and at the end, in the file.

    Nobody asked for the file: where it cannot be written, one warning says so, and training goes
    on. It is tried again each time it is due.

    Args:
        path: of the file. What is there already is continued: steps that are made again replace
            what they left before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scalars: dict[str, list[tuple[int, float, float]]] = {}
        self._arrays: dict[str, list[tuple[int, float, np.ndarray[Any, Any]]]] = {}
        self._is_new = True
        self._is_written = True
        self._has_warned = False
        self._due = 0.0

    def add(
        self,
        step: int,
        scalars: Mapping[str, float],
        arrays: Mapping[str, np.ndarray[Any, Any]],
        *,
        epoch: int = 0,
    ) -> None:
        """Keep what was reported at a step, and write if it is time.

        The epoch is kept as ``epoch``, which Lightning's own loggers have. The first report of a
        step tells it: at the end of training it is one more.
        """
        if self._is_new:
            self._is_new = False
            if self.path.exists():
                self._continue(step)
        now = time.time()
        epochs = self._scalars.setdefault("epoch", [])
        if not epochs or epochs[-1][0] != step:
            epochs.append((step, now, float(epoch)))
        for tag, value in scalars.items():
            self._scalars.setdefault(tag, []).append((step, now, float(value)))
        for tag, array in arrays.items():
            points = self._arrays.setdefault(tag, [])
            if points and points[-1][2].ndim != array.ndim:  # a line was resumed as a plane
                points.clear()
            points.append((step, now, array.copy()))
        self._is_written = False
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write all that is not in the file yet."""
        if self._is_written:
            return
        began = time.monotonic()
        scalars = {tag: Series.of(points) for tag, points in self._scalars.items()}
        arrays = {tag: ArraySeries.of(points) for tag, points in self._arrays.items()}
        try:
            write_npz(self.path, Run("", scalars, arrays))
            self._is_written = True
        except OSError as error:
            self._warn(f"{self.path} cannot be written: {error}. Training goes on without it.")
        ended = time.monotonic()
        self._due = ended + max(_SECONDS, (ended - began) / _SHARE)

    def _continue(self, step: int) -> None:
        """Take over what an interrupted run left, up to the step that this one begins at."""
        try:
            run = read_npz(self.path, name="")
        except Exception as error:  # cut short, or of a newer version: its data are left alone
            aside = self.path.with_name(f"{self.path.name}.{time.time_ns()}")
            self._warn(f"{self.path} cannot be continued: {error}. It is moved to {aside.name}.")
            with contextlib.suppress(OSError):
                self.path.replace(aside)
            return
        for tag, series in run.scalars.items():
            points = zip(series.steps, series.wall_times, series.values, strict=True)
            self._scalars[tag] = [(int(s), float(t), float(v)) for s, t, v in points if s < step]
        for tag, kept in run.arrays.items():
            rows = zip(kept.steps, kept.wall_times, kept.arrays, strict=True)
            self._arrays[tag] = [(int(s), float(t), array) for s, t, array in rows if s < step]

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(message)


_files: weakref.WeakKeyDictionary[pl.Trainer, RunFile] = weakref.WeakKeyDictionary()


def run_file_of(trainer: pl.Trainer) -> RunFile:
    """Return the file of a Trainer's run: all callbacks share it.

    It lies in the folder of the first logger that has one; without, in a new folder
    ``optkit_logs/version_<n>`` below ``default_root_dir``. It is written to the end when the
    Trainer or the process goes, if no callback has closed it before.
    """
    if trainer not in _files:
        file = RunFile(_folder(trainer) / FILE_NAME)
        _files[trainer] = file
        weakref.finalize(trainer, file.write)
    return _files[trainer]


def close_run_file(trainer: pl.Trainer) -> None:
    """Write what is left, in ``teardown`` and after an exception; more may follow."""
    if trainer in _files:
        _files[trainer].write()


def _folder(trainer: pl.Trainer) -> Path:
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    found = next(filter(None, folders), None)
    if found is not None:
        return Path(found)
    root = Path(trainer.default_root_dir) / "optkit_logs"
    for n in itertools.count():
        folder = root / f"version_{n}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # writing will say why
            pass
        return folder
    raise AssertionError  # `count` does not end
