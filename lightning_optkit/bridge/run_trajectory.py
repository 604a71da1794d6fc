"""Weights of training, kept on the CPU within a budget of bytes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optkit.bridge.sharding import at_rest, whole
from lightning_optkit.measures.trajectory import Trajectory

__all__ = ["RunTrajectory", "flat_weights"]

_MAX_POINTS = 200  # more than a picture shows


def flat_weights(pl_module: nn.Module, names: list[str]) -> Tensor:
    """Return a copy of the named parameters as one vector on the CPU, shape ``(n,)``.

    In float32, or float64 where a parameter is. Shards are gathered: all ranks must call it.
    """
    with at_rest(pl_module):  # what a validation left gathered has other names for its shards
        params = dict(pl_module.named_parameters())
        pieces = [whole(params[name]).reshape(-1).cpu() for name in names]
    wide = torch.float64 if any(p.dtype == torch.float64 for p in pieces) else torch.float32
    return torch.cat([piece.to(wide) for piece in pieces])


class RunTrajectory:
    """The weights before training and at evenly spaced steps of it.

    Args:
        max_bytes: for all points together; there are at most 200.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._path: Trajectory | None = None

    @property
    def points(self) -> list[Tensor]:
        """The weights, from the first on."""
        return [] if self._path is None else self._path.points

    @property
    def steps(self) -> list[int]:
        """How many steps of training lie behind each of them."""
        return [] if self._path is None else self._path.steps

    def start_anew(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._path = None

    def start(self, pl_module: pl.LightningModule, names: list[str], num_steps: int) -> None:
        """Take the weights before the first step, in ``on_train_start``, so many steps on.

        Raises:
            MisconfigurationException: if fewer than four points fit into the budget, or the path of
                the run that is resumed is of other parameters.
        """
        weights = flat_weights(pl_module, names)
        if self._path is not None:  # of the run that is resumed
            if len(self._path.points[0]) != len(weights):
                raise MisconfigurationException(
                    f"`parameters` must be those of the run that is resumed, whose path has "
                    f"{len(self._path.points[0]):,} coordinates, got {len(weights):,}."
                )
            return
        size = weights.numel() * weights.element_size()
        if 4 * size > self._max_bytes:
            raise MisconfigurationException(
                f"`trajectory_bytes` must hold at least four copies of the parameters, {4 * size:,}"
                f" bytes, got {self._max_bytes:,}. Give more, or choose fewer `parameters`."
            )
        self._path = Trajectory(min(_MAX_POINTS, self._max_bytes // size))
        self._path.take(num_steps, weights)

    def after_step(self, pl_module: pl.LightningModule, names: list[str], num_steps: int) -> None:
        """Take the weights if they are due, with so many steps behind them."""
        if self._path is not None and self._path.is_due(num_steps):
            self._path.take(num_steps, flat_weights(pl_module, names))

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a resumed run needs to go on as if not interrupted."""
        return None if self._path is None else self._path.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over from an interrupted run."""
        if state is not None:
            self._path = Trajectory(4)
            self._path.load_state_dict(state)
