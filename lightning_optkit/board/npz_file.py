"""What a run leaves where its logger takes no arrays: one file of NumPy, ``optkit.npz``.

Each tag is an array of its own, one row a step, with ``<tag>:steps`` and ``<tag>:times`` (seconds
since 1970) beside it: ``np.load("optkit.npz")["optkit-hessian/lambda_max"]``. Arrays of several
shapes are padded as in :mod:`lightning_optkit.board.payload`; names by empty ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_optkit.board.payload import padded, text_of
from lightning_optkit.board.runs import ArraySeries, Problem, Run, Series
from lightning_optkit.board.schema import VERSION, check_array

__all__ = ["FILE_NAME", "read_npz", "write_npz"]

FILE_NAME = "optkit.npz"

_FORMAT = "optkit_format"
Numbers = np.ndarray[Any, Any]


def write_npz(path: Path, run: Run) -> None:
    """Write a run in one piece: whoever reads meanwhile, or after a crash, finds a whole file."""
    content: dict[str, Numbers] = {_FORMAT: np.array(int(VERSION))}
    for tag, series in run.scalars.items():
        content |= _entries(tag, series, series.values)
    for tag, arrays in run.arrays.items():
        content |= _entries(tag, arrays, _table(tag, arrays.arrays))
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("wb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]  # names of arrays are any text
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def read_npz(path: Path, *, name: str) -> Run:
    """Return the run of a file. Nothing in it is executed.

    Args:
        path: the file.
        name: for the run.

    Raises:
        ValueError: if the file is of a newer version, or another program's.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
        if _FORMAT not in content:
            raise ValueError("not written by lightning-optkit")
        if int(content[_FORMAT]) != int(VERSION):
            raise ValueError(
                f"made by a newer lightning-optkit (format {content[_FORMAT]}): upgrade to see it"
            )
        scalars, arrays, problems = {}, {}, []
        for tag in content.files:
            if tag == _FORMAT or tag.endswith((":steps", ":times")):
                continue
            try:
                series = _series(content, tag)
            except Exception as error:  # one tag that is broken must not hide the others
                problems.append(Problem(tag, None, str(error)))
                continue
            if isinstance(series, Series):
                scalars[tag] = series
            else:
                arrays[tag] = series
    return Run(name, scalars, arrays, tuple(problems))


def _series(content: Mapping[str, Numbers], tag: str) -> Series | ArraySeries:
    """Return what a file says of a tag, in order of its steps.

    Raises:
        ValueError: if its parts do not fit one another, or its arrays are of a wrong shape.
    """
    steps, times = _column(content, f"{tag}:steps"), _column(content, f"{tag}:times")
    values = content[tag]
    if values.ndim == 0 or not len(steps) == len(times) == len(values) > 0:
        raise ValueError("should have one row for each of its steps and times, and at least one")
    moments = list(zip(steps.astype(np.int64).tolist(), times.tolist(), strict=True))
    if values.ndim == 1 and values.dtype.kind == "f" and not tag.endswith("_names"):
        with np.errstate(over="ignore"):  # infinite in float32
            numbers = values.astype(np.float32).tolist()
        return Series.of(
            [(*moment, number) for moment, number in zip(moments, numbers, strict=True)]
        )
    rows = [_row(row) for row in values]
    wrong = next(filter(None, (check_array(tag.partition("/")[2], row) for row in rows)), None)
    if wrong is not None:
        raise ValueError(wrong)
    return ArraySeries.of([(*moment, row) for moment, row in zip(moments, rows, strict=True)])


def _column(content: Mapping[str, Numbers], name: str) -> Numbers:
    column = content[name] if name in content else np.zeros(())
    if column.ndim != 1 or column.dtype.kind not in "fiu" or not np.isfinite(column).all():
        raise ValueError(f"`{name}` should be one finite number a row")
    return column


def _entries(tag: str, series: Series | ArraySeries, values: Numbers) -> dict[str, Numbers]:
    return {tag: values, f"{tag}:steps": series.steps, f"{tag}:times": series.wall_times}


def _table(tag: str, arrays: tuple[Numbers, ...]) -> Numbers:
    if not any(array.dtype.kind in "OSU" for array in arrays):
        return padded(tag, arrays)
    rows = [[text_of(name) for name in array.reshape(-1)] for array in arrays]
    width = max(map(len, rows))
    return np.array([row + [""] * (width - len(row)) for row in rows], dtype=np.str_)


def _row(row: Numbers) -> Numbers:
    if row.dtype.kind != "U":
        return row
    return np.array([str(name).encode("utf-8", "replace") for name in row if name], dtype=object)
