"""The loss along a line and on a plane through the parameters."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.loss_surface import LossSurface

__all__ = ["LossLine", "LossPlane", "loss_line", "loss_plane", "plane_passes"]


@dataclass(frozen=True, eq=False)
class LossLine:
    """The loss at points of a line.

    Attributes:
        positions: where, in multiples of the direction, shape ``(points,)``.
        losses: there, shape ``(points,)``, float64; NaN or infinite where the loss is.
    """

    positions: Tensor
    losses: Tensor

    @property
    def num_gaps(self) -> int:
        """Points without a finite loss."""
        return int((~torch.isfinite(self.losses)).sum())


@dataclass(frozen=True, eq=False)
class LossPlane:
    """The loss on a grid in a plane.

    Attributes:
        x: positions along the first direction, shape ``(columns,)``.
        y: positions along the second direction, shape ``(rows,)``.
        losses: shape ``(rows, columns)``, float64; NaN or infinite where the loss is, NaN where it
            is not known yet.
        known: whether the loss was computed, same shape.
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    known: Tensor

    @property
    def num_gaps(self) -> int:
        """Points that were computed and have no finite loss."""
        return int((self.known & ~torch.isfinite(self.losses)).sum())

    def coarse(self) -> tuple[int, LossPlane] | None:
        """Return a picture of what is known so far, whole but coarse, to look at.

        Returns:
            How many points apart, and the plane in which each point has the loss of the nearest in
            the finest grid that is all known, and ``known`` still says which were computed;
            ``None`` where not even the coarsest is.
        """
        for apart in reversed(_strides(len(self.x))):
            if bool(self.known[::apart, ::apart].all()):
                nearest = (torch.arange(len(self.x)) + apart // 2) // apart * apart
                nearest = nearest.clamp(max=(len(self.x) - 1) // apart * apart)
                losses = self.losses[nearest][:, nearest]
                return apart, LossPlane(self.x, self.y, losses, self.known)
        return None


def loss_line(surface: LossSurface, direction: Tensor, positions: Tensor) -> LossLine:
    """Return the loss at ``parameters + position * direction``.

    Args:
        surface: the loss.
        direction: shape ``(n,)``; to another point, the difference of the two.
        positions: shape ``(points,)``; 0 is the parameters.

    Raises:
        ValueError: if the direction has another shape.

    Example:
        >>> import torch
        >>> surface = LossSurface(lambda p: p["w"].square().sum(), {"w": torch.ones(2)})
        >>> there = torch.zeros(2)  # another checkpoint
        >>> line = loss_line(surface, there - torch.ones(2), torch.tensor([0.0, 0.5, 1.0]))
        >>> line.losses.tolist()
        [2.0, 0.5, 0.0]

    References:
        I. J. Goodfellow et al., "Qualitatively characterizing neural network optimization
        problems", 2015, section 3.
    """
    if direction.shape != (surface.num_parameters,):
        raise ValueError(
            f"`direction` must have the shape ({surface.num_parameters},) of all parameters, got "
            f"{tuple(direction.shape)}."
        )
    with surface.along() as losses_along:
        losses = losses_along(direction, positions.tolist())
    return LossLine(positions.double(), losses.double().cpu())


def loss_plane(
    surface: LossSurface,
    directions: Tensor,
    *,
    resolution: int = 25,
    span: float | tuple[float, float, float, float] = 1.0,
) -> LossPlane:
    """Return the loss at ``parameters + x * directions[0] + y * directions[1]``.

    Args:
        surface: the loss.
        directions: shape ``(2, n)``.
        resolution: points along either direction, at least 2; odd, and the parameters are one of
            them.
        span: how far to go either way along both directions; or ``(x0, x1, y0, y1)``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import torch
        >>> surface = LossSurface(lambda p: p["w"].square().sum(), {"w": torch.zeros(2)})
        >>> loss_plane(surface, torch.eye(2), resolution=3).losses.tolist()
        [[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]
    """
    *_, plane = plane_passes(surface, directions, resolution=resolution, span=span)
    return plane


def plane_passes(
    surface: LossSurface,
    directions: Tensor,
    *,
    resolution: int = 25,
    span: float | tuple[float, float, float, float] = 1.0,
    known: LossPlane | None = None,
) -> Generator[LossPlane, None, None]:
    """Yield the plane after each row of points, coarse grids first.

    The first pass looks at every eighth point or so either way, each later one halves the distance,
    and no point is computed twice. What is there after a pass is a picture already. To stop early,
    close the generator (``contextlib.closing``): it holds the losses prepared.

    Args:
        surface: the loss.
        directions: as for :func:`loss_plane`.
        resolution: as for :func:`loss_plane`.
        span: as for :func:`loss_plane`.
        known: an unfinished plane of the same grid to go on with.

    Raises:
        ValueError: if an argument is out of range, or what is known is of another grid.
    """
    x, y = _axes(resolution, span)
    if directions.shape != (2, surface.num_parameters):
        raise ValueError(
            f"`directions` must have the shape (2, {surface.num_parameters}), got "
            f"{tuple(directions.shape)}."
        )
    losses = torch.full((resolution, resolution), math.nan, dtype=torch.float64)
    done = torch.zeros(resolution, resolution, dtype=torch.bool)
    if known is not None:
        if not (torch.equal(known.x, x) and torch.equal(known.y, y)):
            raise ValueError(
                "`known` must be a plane of the same `resolution` and `span`, got one of "
                f"{len(known.x)} points from {float(known.x[0])} to {float(known.x[-1])}."
            )
        losses, done = known.losses.clone(), known.known.clone()
    yield LossPlane(x, y, losses.clone(), done.clone())
    with surface.along() as losses_along:
        for row, columns in _rows(resolution):
            missing = [column for column in columns if not done[row, column]]
            if not missing:
                continue
            start = float(y[row]) * directions[1]
            found = losses_along(directions[0], x[missing].tolist(), start)
            losses[row, missing] = found.double().cpu()
            done[row, missing] = True
            yield LossPlane(x, y, losses.clone(), done.clone())


def _axes(
    resolution: int, span: float | tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    if not isinstance(resolution, int) or isinstance(resolution, bool) or resolution < 2:
        raise ValueError(f"`resolution` must be an integer of at least 2, got {resolution!r}.")
    ends = tuple(span) if isinstance(span, Sequence) else (-span, span, -span, span)
    if (
        len(ends) != 4
        or not all(map(math.isfinite, ends))
        or ends[0] >= ends[1]
        or ends[2] >= ends[3]
    ):
        raise ValueError(
            f"`span` must be a positive number, or `(x0, x1, y0, y1)` in growing order, got {span}."
        )
    x, y = (
        torch.linspace(start, end, resolution, dtype=torch.float64)
        for start, end in (ends[:2], ends[2:])
    )
    return x, y


def _rows(resolution: int) -> Iterator[tuple[int, range]]:
    """Yield rows and their columns, coarse grids first; points come again in finer ones."""
    for stride in _strides(resolution):
        for row in range(0, resolution, stride):
            yield row, range(0, resolution, stride)


def _strides(resolution: int) -> list[int]:
    """Return distances of grids, from a coarse one of some eight points either way to 1."""
    stride = 1
    while 8 * stride < resolution:
        stride *= 2
    return [stride >> i for i in range(stride.bit_length())]
