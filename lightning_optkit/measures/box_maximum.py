"""The largest value of a function in a box, by two ways that check one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["BoxMaximum", "box_maximum"]

ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class BoxMaximum:
    """The largest value found, and what each way found alone.

    Attributes:
        value: the largest of all, where L-BFGS-B went on from the better of the two.
        corners: the best corner, by the signs of gradients.
        quasi_newton: L-BFGS-B from the centre.
        num_evaluations: values with gradients.
        num_not_finite: how many of them, or of their gradients, were infinite or NaN.
    """

    value: float
    corners: float
    quasi_newton: float
    num_evaluations: int
    num_not_finite: int


def box_maximum(
    function: ValueAndGradient,
    size: int,
    *,
    num_iterations: int = 10,
    generator: torch.Generator,
) -> BoxMaximum:
    r"""Return the largest value of ``function`` that is found in :math:`[-1, 1]^n`.

    Each way gives a lower bound of the maximum; where the two agree, both are likely near it.

    * Corners: :math:`z \leftarrow \mathrm{sign}\,\nabla f(z)`. A convex function has its maximum at
      a corner, and does not fall from one of these to the next. Where the gradient is zero, as
      everywhere at a stationary start, a random sign is drawn.
    * L-BFGS-B from the centre, on :math:`f / \|\nabla f\|_\infty`: unscaled, its first step at a
      flat minimum is as short as the gradient. Random signs of a thousandth take the place of a
      centre at which the gradient vanishes.

    Args:
        function: value and gradient at a point of shape ``(n,)``, in float64 on the CPU. A value
            that is not finite counts as none.
        size: n.
        num_iterations: of each way.
        generator: source of the signs, on the CPU.
    """
    counted = _Counted(function)
    signs, others = (torch.randint(0, 2, (2, size), generator=generator).double() * 2 - 1).unbind()
    centre_value, centre_gradient = counted(torch.zeros(size, dtype=torch.float64))
    corner, best_corner = _best_corner(counted, centre_gradient, signs, num_iterations)
    start = torch.zeros(size, dtype=torch.float64)
    start[centre_gradient == 0] = 1e-3 * others[centre_gradient == 0]
    found, best_found = _quasi_newton(counted, start, centre_value, num_iterations)
    better = corner if best_corner >= best_found else found
    _, polished = _quasi_newton(counted, better, max(best_corner, best_found), num_iterations)
    return BoxMaximum(
        max(best_corner, best_found, polished, centre_value),
        best_corner,
        best_found,
        counted.num_evaluations,
        counted.num_not_finite,
    )


class _Counted:
    """The function, with a count, and minus infinity where it is not finite."""

    def __init__(self, function: ValueAndGradient) -> None:
        self._function = function
        self.num_evaluations = 0
        self.num_not_finite = 0

    def __call__(self, point: Tensor) -> tuple[float, Tensor]:
        self.num_evaluations += 1
        value, gradient = self._function(point)
        is_finite = np.isfinite(value) and bool(torch.isfinite(gradient).all())
        if is_finite:
            return value, gradient
        self.num_not_finite += 1
        return -np.inf, torch.zeros_like(gradient)


def _best_corner(
    function: _Counted, gradient: Tensor, signs: Tensor, num_iterations: int
) -> tuple[Tensor, float]:
    best, best_value, corner = signs, -np.inf, None
    for _ in range(num_iterations):
        following = torch.where(gradient == 0, signs, gradient.sign())
        if corner is not None and torch.equal(following, corner):
            break
        corner = following
        value, gradient = function(corner)
        if value > best_value:
            best, best_value = corner, value
    return best, best_value


def _quasi_newton(
    function: _Counted, start: Tensor, value: float, num_iterations: int
) -> tuple[Tensor, float]:
    """Return the best point of L-BFGS-B and its value; the start's if that is better."""
    best, best_value = start, value
    _, gradient = function(start)
    scale = float(gradient.abs().max())
    if scale == 0:
        return best, best_value

    def negative(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, best_value
        at = torch.from_numpy(point.copy())
        value, gradient = function(at)
        if value > best_value:
            best, best_value = at, value
        return -value / scale, -gradient.numpy() / scale

    minimize(
        negative,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-1.0, 1.0)] * len(start),
        options={"maxiter": num_iterations, "ftol": 0.0, "gtol": 0.0},
    )
    return best, best_value
