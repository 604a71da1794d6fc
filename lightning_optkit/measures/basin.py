"""How far from here does the loss stay low?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.directions import Normalization, random_directions
from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.measures.losses_along import LossesAlong

__all__ = ["BasinRadius", "basin_radius"]

_BISECTIONS = 12  # to 1/4,000 of an octave: 0.02 %, less than directions differ by
_OCTAVES = 40  # up and down from the first guess


@dataclass(frozen=True, eq=False)
class BasinRadius:
    r"""Distances to the rim of a basin along random directions.

    Attributes:
        radii: along each direction, in units of parameters, shape ``(directions,)``, float64;
            infinite where no rim was found.
        cutoff: the loss at the rim.
        loss: at the parameters.
        num_losses: spent.
        num_parameters: n.
    """

    radii: Tensor
    cutoff: float
    loss: float
    num_losses: int
    num_parameters: int

    @property
    def mean_log_radius(self) -> float:
        """Mean of the natural logarithm of the radius."""
        return float(self.radii.log().mean())

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`mean_log_radius`, over directions."""
        return float(self.radii.log().std()) / math.sqrt(len(self.radii))

    @property
    def log_volume(self) -> float:
        r"""``n`` times :attr:`mean_log_radius`: a proxy for the logarithm of the basin's volume.

        The volume goes with the mean of :math:`r^n`, which a few rare directions dominate and no
        sample shows; this is below its logarithm, and basins are compared by it. Its standard error
        is ``n`` times that of :attr:`mean_log_radius`.
        """
        return self.num_parameters * self.mean_log_radius


def basin_radius(
    surface: LossSurface,
    *,
    rise: float = 0.1,
    num_directions: int = 20,
    normalization: Normalization = "none",
    generator: torch.Generator | None = None,
) -> BasinRadius:
    r"""Return the distances at which the loss first exceeds its value here by ``rise``.

    Along each random direction the distance is doubled or halved until the rim lies between two
    tries, and then bisected. A ridge that is thinner than an octave can be missed.

    Args:
        surface: the loss.
        rise: of the loss at the rim, positive.
        num_directions: at least 2.
        normalization: of the directions, see
            :func:`~lightning_optkit.measures.directions.normalized_direction`.
        generator: source of the directions, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range.
        CurvatureError: if the loss is not finite.

    Example:
        >>> import torch
        >>> params = {"w": torch.zeros(3, dtype=torch.float64)}
        >>> found = basin_radius(LossSurface(lambda p: p["w"].square().sum(), params), rise=0.25)
        >>> round(found.mean_log_radius / math.log(0.5), 3)  # a ball of radius 1/2
        1.0

    References:
        W. R. Huang et al., "Understanding generalization through visualizations", 2019, section 4.
    """
    if isinstance(rise, bool) or not 0 < rise < math.inf:
        raise ValueError(f"`rise` must be positive and finite, got {rise!r}.")
    if isinstance(num_directions, bool) or num_directions < 2:
        raise ValueError(
            f"`num_directions` must be an integer of at least 2, got {num_directions!r}: one has "
            "no error."
        )
    generator = generator or torch.Generator().manual_seed(0)
    radii = []
    guess = 1.0
    loss = float(surface.value())
    if not math.isfinite(loss):
        raise CurvatureError(f"The loss at the parameters must be finite, got {loss}.")
    with surface.along() as losses_along:
        search = _RimSearch(losses_along, loss + rise)
        for _ in range(num_directions):
            (direction,) = random_directions(
                surface.params, 1, normalization=normalization, generator=generator
            )
            length = float(torch.linalg.vector_norm(direction, dtype=torch.float64))
            radii.append(search.radius(direction / length, guess))
            guess = radii[-1] if math.isfinite(radii[-1]) else guess  # radii are alike
    return BasinRadius(
        torch.tensor(radii, dtype=torch.float64),
        loss + rise,
        loss,
        search.num_losses + 1,
        surface.num_parameters,
    )


class _RimSearch:
    def __init__(self, losses_along: LossesAlong, cutoff: float) -> None:
        self._losses_along = losses_along
        self._cutoff = cutoff
        self.num_losses = 0

    def radius(self, direction: Tensor, guess: float) -> float:
        """Return where the loss exceeds the cutoff along a unit direction."""
        inside, outside = self._octave(direction, guess)
        if not math.isfinite(outside):
            return math.inf
        for _ in range(_BISECTIONS):
            middle = math.sqrt(inside * outside)
            if self._is_beyond(direction, middle):
                outside = middle
            else:
                inside = middle
        return math.sqrt(inside * outside)

    def _octave(self, direction: Tensor, guess: float) -> tuple[float, float]:
        """Return two radii, one double the other, with the rim between them."""
        outside = guess
        if self._is_beyond(direction, guess):
            for _ in range(_OCTAVES):
                if not self._is_beyond(direction, outside / 2):
                    return outside / 2, outside
                outside /= 2
            return outside / 2, outside
        for _ in range(_OCTAVES):
            outside *= 2
            if self._is_beyond(direction, outside):
                return outside / 2, outside
        return outside, math.inf

    def _is_beyond(self, direction: Tensor, radius: float) -> bool:
        self.num_losses += 1
        return not float(self._losses_along(direction, [radius])) <= self._cutoff  # NaN is beyond
