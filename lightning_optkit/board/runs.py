"""What was logged in a run, wherever it was read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["ArraySeries", "Problem", "Run", "Series"]

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Series:
    """A number over time.

    Attributes:
        steps: shape ``(n,)``, int64, growing.
        wall_times: shape ``(n,)``, float64, seconds since 1970.
        values: shape ``(n,)``, float32.
    """

    steps: Numbers
    wall_times: Numbers
    values: Numbers

    @classmethod
    def of(cls, points: Sequence[tuple[int, float, float]]) -> Series:
        """Return points ``(step, wall time, value)`` in order; a step written again counts once.

        A run that is resumed in its folder makes some steps again: what was written last holds.

        Example:
            >>> Series.of([(0, 1.0, 3.0), (2, 2.0, 5.0), (2, 9.0, 4.0)]).values.tolist()
            [3.0, 4.0]
        """
        kept = _last_of_each_step(points)
        return cls(*_times(kept), np.array([point[2] for point in kept], np.float32))


@dataclass(frozen=True, eq=False)
class ArraySeries:
    """An array over time.

    Attributes:
        steps: shape ``(n,)``, int64, growing.
        wall_times: shape ``(n,)``, float64, seconds since 1970.
        arrays: one a step, float32, or of text in UTF-8.
    """

    steps: Numbers
    wall_times: Numbers
    arrays: tuple[Numbers, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[int, float, Numbers]]) -> ArraySeries:
        """Return points ``(step, wall time, array)`` in order, as :meth:`Series.of` does."""
        kept = _last_of_each_step(points)
        return cls(*_times(kept), tuple(point[2] for point in kept))


@dataclass(frozen=True)
class Problem:
    """What is wrong with the data of a tag, for whoever looks at its panel.

    Attributes:
        tag: what it is about; empty where it is about the whole run.
        step: where; ``None`` where it is everywhere.
        message: one sentence.
    """

    tag: str
    step: int | None
    message: str


@dataclass(frozen=True, eq=False)
class Run:
    """All of a run that the board shows.

    Attributes:
        name: its folder, relative to the log folder, as TensorBoard names it.
        scalars: by tag.
        arrays: by tag.
        problems: with what was read.
        listed: tags of arrays that are there, and were not read.
    """

    name: str
    scalars: Mapping[str, Series] = field(default_factory=dict)
    arrays: Mapping[str, ArraySeries] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    listed: tuple[str, ...] = ()


def _last_of_each_step(points: Sequence[tuple[int, float, Any]]) -> list[tuple[int, float, Any]]:
    written = sorted(points, key=lambda point: point[1])  # stable: the order of the file at a tie
    last = {point[0]: point for point in written}
    return [last[step] for step in sorted(last)]


def _times(points: Sequence[tuple[int, float, Any]]) -> tuple[Numbers, Numbers]:
    return (
        np.array([point[0] for point in points], np.int64),
        np.array([point[1] for point in points], np.float64),
    )
