"""The largest value of a function in a ball."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ball_maximum"]


def ball_maximum(
    value_and_gradient: Callable[[Tensor], tuple[float, Tensor]],
    value: Callable[[Tensor], float],
    centre: Tensor,
    *,
    radius: float,
    num_steps: int,
    generator: torch.Generator,
) -> float:
    r"""Return the largest value that ``num_steps`` steps of ascent find within ``radius``.

    .. math:: \delta \leftarrow \rho\, \nabla f(\delta) / \|\nabla f(\delta)\|

    from :math:`\delta = 0`: with one step that of sharpness-aware minimization. Where f is convex
    its value does not fall from one step to the next, and on a quadratic they are the power method.
    A stationary start is left in a random direction. Each step gives a lower bound of the maximum;
    the largest is returned, or infinity where a value on the way is infinite or NaN.

    Args:
        value_and_gradient: f and its gradient at an offset of shape ``(n,)``.
        value: f alone, which is all that the last step needs.
        centre: zeros, shape ``(n,)``: tells dtype and device.
        radius: ρ, positive.
        num_steps: at least 1.
        generator: source of the direction, on the CPU.
    """
    best, gradient = value_and_gradient(centre)
    for step in range(1, num_steps + 1):
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        if norm == 0 or not math.isfinite(norm):
            gradient = torch.randn(len(centre), generator=generator, dtype=torch.float64).to(centre)
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        offset = gradient * (radius / norm)
        if step == num_steps:
            found = value(offset)
        else:
            found, gradient = value_and_gradient(offset)
        best = max(best, found) if math.isfinite(found) else math.inf
    return best
