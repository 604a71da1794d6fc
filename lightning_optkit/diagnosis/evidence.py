"""The numbers of a run as rules ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lightning_optkit.board import tags
from lightning_optkit.board.runs import ArraySeries, Run, Series

__all__ = ["ARRAYS", "Evidence", "is_of"]

ARRAYS = (tags.tag(tags.GRADIENT, tags.LAYER_STEPS),)
"""Arrays that rules look at: a reader need not read others."""

_METRIC_WORDS = ("train_loss", "loss_step", "train/loss", "loss")


class Evidence:
    """What was logged in a run, by topic and name.

    A callback with a name of its own logs under a longer topic; the first that there is counts.

    Args:
        run: what was logged.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def series(self, topic: str, name: str) -> Series | None:
        """Return a quantity over time, or ``None`` where it was not logged."""
        found = next(self._tags(topic, name, self.run.scalars), None)
        return None if found is None else self.run.scalars[found]

    def array(self, topic: str, name: str) -> ArraySeries | None:
        """Return an array over time, or ``None`` where it was not logged."""
        found = next(self._tags(topic, name, self.run.arrays), None)
        return None if found is None else self.run.arrays[found]

    def names(self, topic: str, name: str) -> list[str]:
        """Return the last names that were logged, or none."""
        series = self.array(topic, name)
        if series is None:
            return []
        return [n.decode("utf-8", "replace") for n in series.arrays[-1].reshape(-1).tolist()]

    def last(self, topic: str, name: str) -> tuple[int, float] | None:
        """Return step and value of the last point that is a finite number."""
        series = self.series(topic, name)
        if series is None or not np.isfinite(series.values).any():
            return None
        i = int(np.flatnonzero(np.isfinite(series.values))[-1])
        return int(series.steps[i]), float(series.values[i])

    def loss(self) -> tuple[str, Series] | None:
        """Return tag and values of the training loss, the less noisy the better."""
        for topic in (tags.HESSIAN, tags.GRADIENT):
            tag = next(self._tags(topic, "loss", self.run.scalars), None)
            if tag is not None:
                return tag, self.run.scalars[tag]
        for word in _METRIC_WORDS:
            for tag, series in self.run.scalars.items():
                if word in tag and "val" not in tag and not tag.startswith("optkit-"):
                    return tag, series
        return None

    def seconds(self) -> float:
        """Return the time that all diagnostics took together."""
        spent = [s.values for tag, s in self.run.scalars.items() if tag.endswith("/seconds")]
        return float(sum(np.nansum(values) for values in spent))

    def elapsed(self) -> float:
        """Return the seconds from the first point to the last."""
        times = [s.wall_times for s in self.run.scalars.values() if len(s.steps)]
        return float(max(t[-1] for t in times) - min(t[0] for t in times)) if times else 0.0

    def topics(self) -> list[str]:
        """Return the topics that something was logged of, in the order of the table."""
        logged = {tag.partition("/")[0] for tag in (*self.run.scalars, *self.run.arrays)}
        return [t.name for t in tags.TOPICS if any(is_of(one, t.name) for one in logged)]

    @staticmethod
    def _tags(topic: str, name: str, logged: Any) -> Iterator[str]:
        plain = tags.tag(topic, name)
        if plain in logged:
            yield plain
        for tag in logged:
            first, _, rest = tag.partition("/")
            if rest == name and first != topic and is_of(first, topic):
                yield tag


def is_of(first: str, topic: str) -> bool:
    """Return whether the first part of a tag is that topic, with a name of the callback or not."""
    return first == topic or first.startswith(f"{topic}-")
