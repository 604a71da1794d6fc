"""The way that training has come, in as many points as memory allows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Trajectory"]


class Trajectory:
    """Weights at steps of a run, evenly spaced however long it gets.

    Every step is kept until the points are as many as may be; then every other one is dropped, and
    half as many are taken from there on.

    Args:
        max_points: at least 4.

    Example:
        >>> import torch
        >>> path = Trajectory(max_points=4)
        >>> for step in range(10):
        ...     if path.is_due(step):
        ...         path.take(step, torch.tensor([float(step)]))
        >>> path.steps
        [0, 4, 8]
    """

    def __init__(self, max_points: int) -> None:
        if isinstance(max_points, bool) or max_points < 4:
            raise ValueError(f"`max_points` must be an integer of at least 4, got {max_points!r}.")
        self._max_points = max_points
        self._every = 1
        self.steps: list[int] = []
        """Where each point was taken, growing."""
        self.points: list[Tensor] = []
        """The weights there, shape ``(n,)`` each."""

    def is_due(self, step: int) -> bool:
        """Return whether to take the weights at a step; the first that is asked for is."""
        if not self.steps:
            return True
        return step > self.steps[-1] and (step - self.steps[0]) % self._every == 0

    def take(self, step: int, weights: Tensor) -> None:
        """Keep these weights, which must be a copy."""
        if len(self.points) == self._max_points:
            self._thin()
            if not self.is_due(step):
                return
        self.steps.append(step)
        self.points.append(weights)

    def _thin(self) -> None:
        self._every *= 2
        first = self.steps[0]
        kept = [i for i, step in enumerate(self.steps) if (step - first) % self._every == 0]
        self.steps = [self.steps[i] for i in kept]
        self.points = [self.points[i] for i in kept]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {
            "max_points": self._max_points,
            "every": self._every,
            "steps": list(self.steps),
            "points": list(self.points),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run."""
        self._max_points, self._every = state["max_points"], state["every"]
        self.steps, self.points = list(state["steps"]), list(state["points"])
