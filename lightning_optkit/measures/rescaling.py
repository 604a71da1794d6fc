"""Does a measure change where the net does not?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_optkit.measures.layers import layers_of
from lightning_optkit.measures.loss_surface import LossSurface

__all__ = ["Invariance", "rescale_invariance"]

# Both a power of two and its inverse multiply without rounding, so what is left is that of sums.
_FACTOR = 4.0
_ROUNDING = 100  # times the unit roundoff: sums of a net's layers


@dataclass(frozen=True)
class Invariance:
    """What measures do when layers are rescaled and the net's function stays.

    Attributes:
        pairs: layers that were multiplied, and those that were divided.
        before: value of each measure here.
        after: its value at the rescaled parameters, of the same function.
        factor: by which the layers were rescaled.
    """

    pairs: tuple[tuple[str, str], ...]
    before: dict[str, float]
    after: dict[str, float]
    factor: float

    @property
    def changes(self) -> dict[str, float]:
        """By how much each measure moved, relative to what it was; 0 = invariant."""
        return {
            name: after / self.before[name] - 1
            for name, after in self.after.items()
            if self.before[name] and math.isfinite(after / self.before[name])
        }

    def __str__(self) -> str:
        """Return one line a measure, or why there is none."""
        if not self.pairs:
            return (
                "No two layers of this net can be rescaled without changing its function, so "
                "nothing is said about measures."
            )
        through = ", ".join(
            f"{first} × {self.factor:g} and {then} ÷ {self.factor:g}"
            for first, then in self.pairs[:3]
        )
        more = f" and {len(self.pairs) - 3} more pairs" if len(self.pairs) > 3 else ""
        lines = [f"Rescaled without changing the function: {through}{more}."]
        for name, change in self.changes.items():
            verdict = "stays" if abs(change) < 0.01 else f"moves by {change:+.0%}"
            lines.append(f"  {name}: {verdict}")
        return "\n".join(lines)


def rescale_invariance(
    surface: LossSurface, measures: Mapping[str, Callable[[LossSurface], float]]
) -> Invariance:
    r"""Return what measures say of the same function with other parameters.

    .. math:: (W_1, b_1, W_2) \to (\alpha W_1, \alpha b_1, W_2 / \alpha)

    leaves a net alone where a ReLU, or nothing, stands between two layers, and can make the
    absolute sharpness of a minimum arbitrary. Which layers of a net can be rescaled is tried: each
    layer with the next, in the order of the parameters' names. A pair counts if every batch's loss
    stays but for rounding, and does not stay if the first layer alone is multiplied. All pairs that
    share no layer are then rescaled together.

    Args:
        surface: the loss, over all parameters of the net: those that are left out are not rescaled.
        measures: by name, functions of a surface.

    Example:
        >>> import torch
        >>> params = {"a.weight": torch.ones(2, 1), "b.weight": torch.ones(1, 2)}
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> net = lambda p: (torch.relu(x @ p["a.weight"].T) @ p["b.weight"].T - x).square().mean()
        >>> size = lambda surface: float(surface.params["a.weight"].norm())
        >>> print(rescale_invariance(LossSurface(net, params), {"size of a": size}))
        Rescaled without changing the function: a × 4 and b ÷ 4.
          size of a: moves by +300%

    References:
        L. Dinh et al., "Sharp minima can generalize for deep nets", 2017, section 3.
    """
    pairs = []
    used: set[str] = set()
    layers = layers_of(surface.names)
    for first, then in pairwise(layers):
        if first not in used and _can_rescale(surface, layers[first], layers[then]):
            pairs.append((first, then))
            used |= {first, then}
    there = surface.at(
        {
            name: p
            for first, then in pairs
            for name, p in _rescaled(surface, layers[first], layers[then], _FACTOR).items()
        }
    )
    return Invariance(
        tuple(pairs),
        {name: measure(surface) for name, measure in measures.items()},
        {name: measure(there) for name, measure in measures.items()} if pairs else {},
        _FACTOR,
    )


def _can_rescale(surface: LossSurface, first: list[str], then: list[str]) -> bool:
    """Return whether two layers can be rescaled, and the first one not alone."""
    here = surface.loss()
    both = surface.at(_rescaled(surface, first, then, _FACTOR)).loss()
    alone = surface.at(_rescaled(surface, first, [], _FACTOR)).loss()
    noise = _ROUNDING * torch.finfo(surface.dtype).eps * here.abs()
    return bool((both - here).abs() <= noise) and bool((alone - here).abs() > noise)


def _rescaled(
    surface: LossSurface, first: list[str], then: list[str], factor: float
) -> dict[str, Tensor]:
    """Return one layer's parameters times the factor, and the next one's matrices divided by it."""
    params = surface.params
    matrices = [name for name in then if params[name].dim() > 1]
    return {name: params[name].detach() * factor for name in first} | {
        name: params[name].detach() / factor for name in matrices
    }
