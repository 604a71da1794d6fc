"""Where a landscape lies: through which weights, along which directions, how far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.probe import Probe, in_full_precision
from lightning_optkit.bridge.stored_weights import stored_weights
from lightning_optkit.measures import HessianOperator
from lightning_optkit.measures.directions import (
    Normalization,
    TrajectoryPlane,
    random_directions,
    trajectory_plane,
)
from lightning_optkit.measures.eigenpairs import top_eigenpairs
from lightning_optkit.measures.loss_surface import LossSurface

__all__ = ["LandscapeFrame", "Line", "Plane", "carried_along"]

_KINDS = ("line", "plane")
_DIRECTIONS = ("random", "trajectory", "hessian", "init")
_MARGIN = 0.2  # of a path's extent, around it


@dataclass(frozen=True, eq=False)
class Line:
    """Where a line lies.

    Attributes:
        surface: the loss, its parameters at position 0.
        direction: shape ``(n,)``.
        positions: shape ``(points,)``, in multiples of the direction.
    """

    surface: LossSurface
    direction: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Plane:
    """Where a plane lies.

    Attributes:
        directions: shape ``(2, n)``.
        span: ``(x0, x1, y0, y1)``.
        trajectory: the path that it is fitted to, if it is.
    """

    directions: Tensor
    span: tuple[float, float, float, float]
    trajectory: TrajectoryPlane | None


class LandscapeFrame:
    """Finds directions for a line or a plane.

    Args:
        kind: ``"line"`` or ``"plane"``.
        directions: as of :class:`~lightning_optkit.callbacks.loss_landscape.LossLandscape`.
        resolution: points of a line, or along either side of a plane.
        span: how far to go.
        normalization: of random directions.
        seed: of random directions, the same at each picture and on each rank.

    Raises:
        TypeError: if directions are neither a kind nor paths.
        ValueError: if an argument is out of range, or kind and directions do not go together.
    """

    def __init__(
        self,
        kind: str,
        directions: str | Path | Sequence[str | Path],
        *,
        resolution: int,
        span: float,
        normalization: Normalization,
        seed: int,
    ) -> None:
        if kind not in _KINDS:
            raise ValueError(f"`kind` must be 'line' or 'plane', got {kind!r}.")
        self.checkpoints = _paths_of(directions)
        _require_that_they_fit(kind, directions, len(self.checkpoints))
        if not is_count(resolution, least=2):
            raise ValueError(f"`resolution` must be an integer of at least 2, got {resolution!r}.")
        if not is_number(span) or not 0 < span < math.inf:
            raise ValueError(f"`span` must be positive and finite, got {span!r}.")
        if normalization not in ("filter", "layer", "none"):
            raise ValueError(
                f"`normalization` must be 'filter', 'layer' or 'none', got {normalization!r}."
            )
        self.kind = kind
        self.directions = "checkpoints" if self.checkpoints else str(directions)
        self.resolution = resolution
        self._span = float(span)
        self._normalization = normalization
        self._seed = seed

    @property
    def follows_path(self) -> bool:
        """Whether the weights of training are needed."""
        return self.directions in ("trajectory", "init")

    @property
    def num_points(self) -> int:
        """Losses to compute."""
        return self.resolution ** (2 if self.kind == "plane" else 1)

    def line(self, operator: HessianOperator, surface: LossSurface, path: list[Tensor]) -> Line:
        """Return a line.

        Args:
            operator: the loss over the parameters, for its eigenvectors.
            surface: the loss to draw, over the same and perhaps running statistics.
            path: the weights of training so far.
        """
        both_ways = torch.linspace(-self._span, self._span, self.resolution, dtype=torch.float64)
        there = torch.linspace(0, 1, self.resolution, dtype=torch.float64)
        if self.directions == "random":
            return Line(surface, self._random(surface, 1)[0], both_ways)
        if self.directions == "hessian":
            return Line(surface, self._eigenvectors(operator, 1)[0], both_ways)
        if self.directions == "init":
            here = surface.vector()
            return Line(surface, path[0].to(here) - here, there)
        *first, last = self.checkpoints
        if first:
            surface = surface.at(stored_weights(first[0], surface.params))
        return Line(surface, _stored(last, surface) - surface.vector(), there)

    def plane(self, operator: HessianOperator, surface: LossSurface, path: list[Tensor]) -> Plane:
        """Return a plane through the surface's parameters; arguments as of :meth:`line`."""
        square = (-self._span, self._span, -self._span, self._span)
        if self.directions == "random":
            return Plane(self._random(surface, 2), square, None)
        if self.directions == "hessian":
            return Plane(self._eigenvectors(operator, 2), square, None)
        here = surface.vector().cpu()
        points = [point.to(here.dtype) for point in path]
        points += [_stored(path, surface).cpu() for path in self.checkpoints]
        num_weights = operator.num_parameters  # which alone have a say in where the plane lies
        trajectory = trajectory_plane([point[:num_weights] for point in (*points, here)])
        directions = trajectory.directions
        if len(here) > num_weights:
            ways = torch.stack(points).double() - here.double()
            shares = torch.linalg.lstsq(ways[:, :num_weights].T, directions.double().T).solution
            directions = shares.T @ ways
        span = _around(trajectory.path, self._span)
        return Plane(directions.to(surface.vector()), span, trajectory)

    def require_that_it_fits(self, pl_module: nn.Module, names: Sequence[str]) -> None:
        """Refuse what cannot be drawn of a module, before the first step.

        Raises:
            ValueError: if a checkpoint is of another module.
            MisconfigurationException: if all random directions would be zero.
        """
        own = dict(pl_module.named_parameters())
        like = {name: own[name] for name in names} | _others(pl_module)
        for path in self.checkpoints:
            stored_weights(path, like)
        is_normalized = self.directions == "random" and self._normalization != "none"
        if is_normalized and all(own[name].ndim < 2 for name in names):
            raise MisconfigurationException(
                "`normalization` must be 'none' where no parameter is a matrix, got "
                f"{self._normalization!r}, which leaves biases and norm layers where they are: "
                "nothing would move."
            )

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)

    def _random(self, surface: LossSurface, num_directions: int) -> Tensor:
        return random_directions(
            surface.params,
            num_directions,
            normalization=self._normalization,
            generator=self._generator(),
        )

    def _eigenvectors(self, operator: HessianOperator, num_vectors: int) -> Tensor:
        """Return eigenvectors of the largest eigenvalues, as long as the weights."""
        top = top_eigenpairs(
            operator, num_vectors, which="largest", rtol=1e-2, generator=self._generator()
        )
        return top.vectors[:num_vectors] * operator.parameter_norm()


def carried_along(
    pl_module: nn.Module, probe: Probe, names: Sequence[str], checkpoints: Sequence[str]
) -> dict[str, Tensor]:
    """Return what else changes on the way to checkpoints: their nets are more than their weights.

    Frozen parameters, running statistics and other buffers of numbers that are finite at all ends
    and not the same at all. Trainable parameters that were not chosen stay.

    Args:
        pl_module: the module.
        probe: open on it.
        names: of the parameters that the directions are in.
        checkpoints: their paths.
    """
    own = dict(pl_module.named_parameters())
    whole = probe.parameters([name for name in own if not own[name].requires_grad])
    others = {
        name: in_full_precision(whole.get(name, tensor.detach()))
        for name, tensor in _others(pl_module).items()
        if name not in names
    }
    ends = [others, *(stored_weights(path, others) for path in checkpoints)]
    return {
        name: tensor
        for name, tensor in others.items()
        if all(bool(torch.isfinite(end[name]).all()) for end in ends)
        and not all(torch.equal(end[name], tensor) for end in ends)
    }


def _others(pl_module: nn.Module) -> dict[str, Tensor]:
    """Return frozen parameters and buffers of numbers, as far as a checkpoint holds them."""
    stored = pl_module.state_dict().keys()
    found: dict[str, Tensor] = {
        n: p for n, p in pl_module.named_parameters() if not p.requires_grad
    }
    found |= dict(pl_module.named_buffers())
    return {n: t for n, t in found.items() if t.is_floating_point() and n in stored}


def _paths_of(directions: object) -> tuple[str, ...]:
    """Return the checkpoints among directions: none of those that have a name."""
    if isinstance(directions, (str, Path)):
        return () if directions in _DIRECTIONS else (str(directions),)
    if not isinstance(directions, Sequence) or not all(
        isinstance(path, (str, Path)) for path in directions
    ):
        raise TypeError(
            f"`directions` must be one of {', '.join(map(repr, _DIRECTIONS))}, the path of a "
            f"checkpoint or a list of such paths, got {directions!r}."
        )
    if len(directions) < 2:
        raise ValueError(
            f"`directions` must be at least two checkpoints, got {list(directions)}. For the line "
            "from here to one, write its path alone."
        )
    return tuple(map(str, directions))


def _require_that_they_fit(kind: str, directions: object, num_checkpoints: int) -> None:
    if kind == "plane" and (directions == "init" or num_checkpoints == 1):
        raise ValueError(
            f"`kind` must be 'line' where `directions` is {directions!r}: two points span a "
            "line. Write `kind='line'`, or give the paths of two checkpoints, or one of 'random', "
            "'trajectory' and 'hessian'."
        )
    if kind == "line" and num_checkpoints > 2:
        raise ValueError(
            f"`directions` must be one or two checkpoints for a line, got {num_checkpoints}. Write "
            "`kind='plane'` for the plane nearest to them."
        )
    if kind == "line" and directions == "trajectory":
        raise ValueError(
            "`kind` must be 'plane' where `directions` is 'trajectory', got 'line'. For the "
            "line from the first weights write `directions='init'`."
        )


def _stored(path: str, surface: LossSurface) -> Tensor:
    return surface.at(stored_weights(path, surface.params)).vector()


def _around(path: Tensor, span: float) -> tuple[float, float, float, float]:
    """Return the rectangle that holds a path, with a margin, times ``span`` about its middle."""
    low, high = path.min(0).values, path.max(0).values
    middle, half = (low + high) / 2, (high - low) * (0.5 + _MARGIN) * span
    (x0, y0), (x1, y1) = (middle - half).tolist(), (middle + half).tolist()
    return x0, x1, y0, y1
