"""Ritz values: which of them are wanted, and how far they are from eigenvalues."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Which", "error_estimates", "settled", "wanted"]

Which = Literal["magnitude", "largest", "smallest", "both"]


def wanted(theta: Tensor, count: int, which: Which) -> Tensor:
    """Return the places of the wanted Ritz values, in the order in which they are returned."""
    ascending = torch.arange(len(theta))
    if which == "magnitude":
        return theta.abs().argsort(descending=True, stable=True)[:count]
    if which == "largest":
        return ascending.flip(0)[:count]
    if which == "smallest":
        return ascending[:count].flip(0)
    lower = min(count // 2, len(theta))
    upper = min(count - lower, len(theta) - lower)
    return torch.cat([ascending[len(theta) - upper :], ascending[:lower]]).sort().values.flip(0)


def error_estimates(theta: Tensor, residuals: Tensor) -> Tensor:
    r"""Return :math:`\min(r, r^2 / \delta)`; the neighbour's own residual is taken off the gap."""
    distances = (theta[:, None] - theta).abs() - residuals
    distances.fill_diagonal_(torch.inf)
    gaps = distances.min(1).values
    refined = residuals.square() / gaps.clamp_min(1e-300)
    # a basis of one vector knows of no neighbour, and its gap is infinite: the residual stands
    return torch.where((gaps > 0) & gaps.isfinite(), torch.minimum(residuals, refined), residuals)


def settled(errors: Tensor, residuals: Tensor, past: list[Tensor]) -> Tensor:
    """Return the errors, none of them less than what the last two products moved the value by.

    One Ritz value may stand for many eigenvalues that are not resolved yet, far from all others:
    its residual squared over that distance is small, and the next products still move it.

    Args:
        errors: estimates, shape ``(k,)``.
        residuals: certified, same shape.
        past: the values after each of the last three products, oldest first.
    """
    if len(past) < 3 or len({len(values) for values in past}) > 1:
        return residuals
    moved = torch.stack(past).diff(dim=0).abs().max(dim=0).values
    return torch.minimum(residuals, torch.maximum(errors, moved))
