"""Whether a condition on the metrics holds, decided alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_optkit.bridge.reduce import sum_over_ranks

__all__ = ["Condition", "MetricsCondition"]

MetricsCondition = Callable[[Mapping[str, float]], bool]
"""From metrics by name, as in ``trainer.callback_metrics``, to whether it holds."""


class Condition:
    """A condition on ``trainer.callback_metrics``.

    On several processes each metric that it reads is the mean over ranks: a rank logs what it sees,
    its part of the batch, and the condition speaks of all. A metric that is the same on all ranks
    already stays as it is. So all ranks decide alike, if the condition depends on metrics alone.

    Args:
        condition: ``(metrics) -> bool``.
    """

    def __init__(self, condition: MetricsCondition) -> None:
        self._condition = condition
        self.missing: str | None = None
        """Name of a metric that was asked for when it was last looked at, and was not there."""

    def holds(self, trainer: pl.Trainer) -> bool:
        """Return whether it does now; not while a metric is missing. All ranks ask together."""
        try:
            holds = bool(self._condition(_MeanOverRanks(trainer)))
        except _MissingMetricError as error:
            self.missing = str(error.args[0])
            return False
        self.missing = None
        return holds


class _MissingMetricError(KeyError):
    """Tells a metric that is not there from a mistake in the condition."""


class _MeanOverRanks(Mapping[str, float]):
    """Metrics, of which those that are read are averaged."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._metrics: Mapping[str, Any] = trainer.callback_metrics
        self._reduce = sum_over_ranks(trainer)
        self._device = trainer.strategy.root_device

    def __getitem__(self, name: str) -> float:
        is_there = name in self._metrics
        value = float(self._metrics[name]) if is_there else 0.0
        if self._reduce is not None:  # a rank without it takes part, lest the others wait
            sums = torch.tensor([value, is_there, 1], dtype=torch.float64, device=self._device)
            total, present, ranks = self._reduce(sums).tolist()
            is_there, value = present == ranks, total / ranks
        if not is_there:
            raise _MissingMetricError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)
