"""Conditions on metrics, for what begins or ends when a run has got somewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AccuracyAbove", "ErrorBelow"]


@dataclass(frozen=True)
class ErrorBelow:
    """Holds where a metric is below a value. A metric that is not a number is not.

    Args:
        metric: its name, as given to ``self.log``.
        value: what it must be below, such as 0.8 for 80 %.

    Raises:
        TypeError: if the metric is no name, or the value no number.
        ValueError: if the value is not finite.

    Example:
        >>> condition = ErrorBelow("train_error", 0.8)
        >>> condition({"train_error": 0.79}), condition({"train_error": 0.8})
        (True, False)

    References:
        K. He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2: ResNet
        with 110 layers trains at a tenth of the rate until its training error is below 80 %.
    """

    metric: str
    value: float

    def __post_init__(self) -> None:
        _check(self.metric, self.value)

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Return whether it holds.

        Raises:
            KeyError: if the metric is not among them.
        """
        return bool(metrics[self.metric] < self.value)

    def __str__(self) -> str:
        return f"{self.metric} < {self.value:g}"


@dataclass(frozen=True)
class AccuracyAbove:
    """Holds where a metric is above a value. A metric that is not a number is not.

    Args:
        metric: its name, as given to ``self.log``.
        value: what it must be above, such as 0.2 for 20 %.

    Raises:
        TypeError: if the metric is no name, or the value no number.
        ValueError: if the value is not finite.

    Example:
        >>> condition = AccuracyAbove("train_acc", 0.2)
        >>> condition({"train_acc": 0.21}), condition({"train_acc": 0.2})
        (True, False)
    """

    metric: str
    value: float

    def __post_init__(self) -> None:
        _check(self.metric, self.value)

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Return whether it holds.

        Raises:
            KeyError: if the metric is not among them.
        """
        return bool(metrics[self.metric] > self.value)

    def __str__(self) -> str:
        return f"{self.metric} > {self.value:g}"


def _check(metric: object, value: object) -> None:
    if not isinstance(metric, str):
        raise TypeError(
            f"`metric` must be a name, such as 'train_error', got {metric!r}. It is the one given "
            "to `self.log`."
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`value` must be a number, such as 0.8 for 80 %, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`value` must be finite, such as 0.8 for 80 %, got {value!r}.")
