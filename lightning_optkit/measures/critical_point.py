"""Is the gradient zero here, and if it is, what kind of point is this?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_optkit.measures.lanczos import dot, inner_sum
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.shares import Share
from lightning_optkit.measures.spectrum import Spectrum

__all__ = ["CriticalPoint", "Descent", "Kind", "critical_point", "size_of_parameters"]

Kind = Literal["minimum", "maximum", "saddle", "degenerate", "not critical"]

# A gradient counts as zero if a Newton step along any direction that counts as curved, at most
# |g| / tol long, moves the parameters by under this share.
_NEWTON_STEP = 1e-2
# Root mean square of the weights below which steps no longer shrink with them: a net of zeros has
# no size of its own. Standard initialisation stays above it in layers up to 3,000 wide.
_SMALLEST_WEIGHT = 1e-2
# The model's change of the loss along the descent is at least so many roundings of the loss.
_VISIBLE = 1e3


@dataclass(frozen=True)
class CriticalPoint:
    r"""The kind of a point, with the evidence for it.

    Attributes:
        kind: ``"not critical"`` where the gradient is not small against the smallest curvature
            that counts, ``tol``; else ``"saddle"`` with eigenvalues of both signs, ``"minimum"`` or
            ``"maximum"`` with one sign only, ``"degenerate"`` where zero eigenvalues leave the
            second-order test open.
        gradient_norm: :math:`\|g\|`, in units of loss per unit of parameter.
        gradient_noise: standard error of the gradient over the batches; NaN for a single batch.
        relative_gradient: :math:`\|g\| / (\max|\lambda| \, \|\theta\|)`, dimensionless; with the
            size of :func:`size_of_parameters` for :math:`\|\theta\|`.
        flatness: :math:`\|Hg\| / (\max|\lambda| \, \|g\|)`. Near 0 the gradient lies in the null
            space of ``H``: a minimiser of the gradient's norm stops there, with no critical point
            near. NaN for a zero gradient.
        positive: share of eigenvalues above the tolerance, with its interval.
        negative: share below minus the tolerance, with its interval.
        descent: what a step along the most negative curvature does to the loss; ``None`` where no
            eigenvalue is certified negative.

    References:
        C. G. Frye et al., "Critical point-finding methods reveal gradient-flat regions of deep
        network losses", 2021, section 2.
    """

    kind: Kind
    gradient_norm: float
    gradient_noise: float
    relative_gradient: float
    flatness: float
    positive: Share
    negative: Share
    descent: Descent | None

    def __str__(self) -> str:
        """Return the kind and its evidence in one line."""
        noise = "" if math.isnan(self.gradient_noise) else f" (noise {self.gradient_noise:.2g})"
        text = (
            f"{self.kind}: gradient {self.gradient_norm:.2g}{noise}, "
            f"positive {self.positive}, negative {self.negative}"
        )
        return text if self.descent is None else f"{text}; {self.descent}"


@dataclass(frozen=True)
class Descent:
    r"""The quadratic model against the loss, along the eigenvector ``u`` of the lowest eigenvalue.

    The model says :math:`\Delta(\pm s) = \pm s\, g^\top u + s^2 \lambda / 2`; the sign of ``u`` is
    such that :math:`g^\top u \le 0`, so that the positive side descends.

    Attributes:
        step: :math:`s`, the length of the step.
        predicted: the model's changes of the loss at :math:`+s` and :math:`-s`.
        actual: the changes of the loss there.
    """

    step: float
    predicted: tuple[float, float]
    actual: tuple[float, float]

    @property
    def side(self) -> int:
        """0 or 1: the side on which the loss falls further, or rises less."""
        return 0 if self.actual[0] <= self.actual[1] else 1

    @property
    def is_real(self) -> bool:
        """Whether the loss falls on at least one side, as the curvature says."""
        return min(self.actual) < 0

    def __str__(self) -> str:
        """Return the predicted and the actual change on the side that falls further."""
        return (
            f"a step of {self.step:.2g} along the most negative curvature changes the loss by "
            f"{self.actual[self.side]:.2g}, predicted {self.predicted[self.side]:.2g}"
        )


def critical_point(operator: HessianOperator, spectrum: Spectrum) -> CriticalPoint:
    r"""Return the kind of point at which ``spectrum`` was measured.

    Costs one product, and two losses where an eigenvalue is negative.

    Args:
        operator: the Hessian that the spectrum belongs to.
        spectrum: its spectrum; its ``tol`` separates zero from non-zero eigenvalues.

    Example:
        >>> import torch
        >>> from lightning_optkit.measures import hessian_spectrum
        >>> op = HessianOperator(lambda p: (1 - p["w"][0] * p["w"][1]) ** 2, {"w": torch.zeros(2)})
        >>> critical_point(op, hessian_spectrum(op)).kind
        'saddle'
    """
    gradient = operator.gradient()
    norm, noise = math.sqrt(_inner(operator, gradient, gradient)), float(operator.gradient_noise())
    radius, size = spectrum.spectral_radius, size_of_parameters(operator)
    relative = norm / (radius * size) if radius > 0 else math.inf if norm > 0 else 0.0
    flatness = math.nan
    if norm > 0 and radius > 0:
        product = operator @ gradient
        flatness = math.sqrt(_inner(operator, product, product)) / (radius * norm)
    is_zero = norm <= _NEWTON_STEP * spectrum.tol * size
    kind: Kind = _second_order_test(spectrum) if is_zero else "not critical"
    descent = None
    known = not bool(spectrum.lambda_min_vector.isnan().any())
    if known and spectrum.lambda_min < -spectrum.tol:
        descent = _descent(operator, spectrum, gradient)
    return CriticalPoint(
        kind, norm, noise, relative, flatness, spectrum.positive, spectrum.negative, descent
    )


def size_of_parameters(operator: HessianOperator) -> float:
    r"""Return :math:`\max(\|\theta\|, 0.01 \sqrt n)`, against which a step is long or short."""
    return max(operator.parameter_norm(), _SMALLEST_WEIGHT * math.sqrt(operator.shape[0]))


def _descent(operator: HessianOperator, spectrum: Spectrum, gradient: Tensor) -> Descent:
    direction = spectrum.lambda_min_vector
    slope = _inner(operator, gradient, direction)
    if slope > 0:
        direction, slope = -direction, -slope
    loss = float(operator.loss())
    rounding = torch.finfo(operator.dtype).eps * abs(loss)
    visible = math.sqrt(2 * _VISIBLE * rounding / abs(spectrum.lambda_min))
    step = max(_NEWTON_STEP * size_of_parameters(operator), visible)
    curvature = step**2 * spectrum.lambda_min / 2
    changes = [float(operator.loss(sign * step * direction)) - loss for sign in (1, -1)]
    return Descent(
        step,
        (step * slope + curvature, -step * slope + curvature),
        (changes[0], changes[1]),
    )


def _inner(operator: HessianOperator, left: Tensor, right: Tensor) -> float:
    return float(inner_sum(operator)(dot(left[None], right[None])))


def _second_order_test(spectrum: Spectrum) -> Kind:
    positive = spectrum.lambda_max > spectrum.tol
    negative = spectrum.lambda_min < -spectrum.tol
    if positive and negative:
        return "saddle"
    if spectrum.zero.upper > 0:
        return "degenerate"
    return "minimum" if positive else "maximum"
