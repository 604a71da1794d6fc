"""How far along the gradient does the loss fall?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.operators import HessianOperator

__all__ = ["GradientStep", "step_along_gradient"]


@dataclass(frozen=True)
class GradientStep:
    r"""The loss along the negative gradient, to second order.

    Attributes:
        step: :math:`\eta = g^\top g / g^\top H g`, the learning rate that minimises the quadratic
            model along :math:`-g`. Infinite where the model has no minimum there: the curvature is
            negative, or zero up to rounding. NaN where the gradient is zero.
        curvature: :math:`g^\top H g / g^\top g`, whose reciprocal is the step where it is positive.
        gradient_norm: :math:`\|g\|`, in units of loss per unit of parameter.
        decrease: :math:`\eta \|g\|^2 / 2`, how far the loss falls at that step by the model;
            infinite where the step is, 0 where the gradient is zero.
    """

    step: float
    curvature: float
    gradient_norm: float
    decrease: float


def step_along_gradient(operator: HessianOperator) -> GradientStep:
    r"""Return the step to the minimum of the quadratic model along :math:`-g`. Costs one product.

    .. math:: L(\theta - \eta g) \approx L - \eta \, g^\top g + \tfrac12 \eta^2 \, g^\top H g

    Exact for a quadratic loss. Twice the step is where the model is back at the loss it began at.

    Args:
        operator: the Hessian of the loss, where the gradient is taken too.

    Raises:
        CurvatureError: if the product is NaN or infinite.

    Example:
        >>> import torch
        >>> op = HessianOperator(lambda p: 2 * p["w"].square().sum(), {"w": torch.ones(3)})
        >>> round(step_along_gradient(op).step, 6)
        0.25

    References:
        Y. A. LeCun et al., "Efficient backprop", 1998, section 6.
    """
    gradient = operator.gradient()
    norm = float(gradient.double().norm())
    if norm == 0:
        return GradientStep(math.nan, math.nan, 0.0, 0.0)
    # of the unit vector: the square of a small gradient would underflow in float32
    direction = gradient / norm
    product = operator @ direction
    curvature = float(direction.double() @ product.double())
    if not math.isfinite(curvature):
        raise CurvatureError.not_finite(operator)
    # rounding is a share of the largest eigenvalue, which |Hg| / |g| bounds from below
    rounding = operator.noise * float(product.double().norm())
    step = 1 / curvature if curvature > rounding else math.inf
    return GradientStep(step, curvature, norm, step * norm**2 / 2)
