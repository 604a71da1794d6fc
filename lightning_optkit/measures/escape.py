"""Is there a way down from here that the gradient does not show?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.critical_point import size_of_parameters
from lightning_optkit.measures.eigenpairs import top_eigenpairs
from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.lanczos import rounding_noise
from lightning_optkit.measures.operators import HessianOperator

__all__ = ["EscapeAttempt", "check_escape_settings", "escape_attempt"]

# The direction needs no digits: how far it leads down is measured by the line search.
_DIRECTION_RTOL = 1e-2
# Steps of the line search, halved from the longest: the shortest is 1/32,768 of it.
_NUM_STEPS = 16
# Share of the predicted decrease that must come true; under a quarter the model has left the
# region where it holds (Nocedal and Wright, algorithm 4.1).
_SUFFICIENT = 0.25


@dataclass(frozen=True, eq=False)  # a tensor has no single truth value
class EscapeAttempt:
    r"""The best step down along the direction of most negative curvature, and what speaks for it.

    Along the unit direction :math:`u`, with :math:`g^\top u \le 0`, a step :math:`t` changes the
    loss by about :math:`t \, g^\top u + t^2 \, u^\top H u / 2`.

    Attributes:
        gradient_norm: :math:`\|g\|`, in units of loss per unit of parameter.
        gradient_tol: the gradient is small where ``relative_gradient`` is at most this.
        spectral_radius: :math:`\max|\lambda|`, as the products show it.
        lambda_min: :math:`u^\top H u`: no less than the smallest eigenvalue.
        lambda_min_error: an eigenvalue lies within this of ``lambda_min``.
        certified: whether ``lambda_min`` is negative beyond rounding; the smallest eigenvalue is
            then negative too.
        direction: :math:`u`, shape ``(n,)``, of the operator's dtype and device.
        step: the best length, in units of parameters; 0 where no step lowers the loss enough.
        predicted: change of the loss at ``step`` by the quadratic model.
        loss_before: the loss here.
        loss_after: the loss at ``step``.
        num_matvecs: products spent.
    """

    gradient_norm: float
    gradient_tol: float
    spectral_radius: float
    lambda_min: float
    lambda_min_error: float
    certified: bool
    direction: Tensor
    step: float
    predicted: float
    loss_before: float
    loss_after: float
    num_matvecs: int

    @property
    def actual(self) -> float:
        """Change of the loss at ``step``: negative, or 0 where there is none."""
        return self.loss_after - self.loss_before

    @property
    def relative_gradient(self) -> float:
        r"""What a step along the gradient brings, as a share of what ``step`` brings.

        :math:`\|g\|^2 / (2 \max|\lambda|)` is the decrease that a gradient step of size
        :math:`1 / \max|\lambda|` is sure of. NaN where ``step`` is 0.
        """
        if self.step == 0:
            return math.nan
        return self.gradient_norm**2 / (2 * self.spectral_radius) / -self.actual

    @property
    def accepted(self) -> bool:
        """Whether to take the step: there is one, and the gradient is small beside it."""
        return self.step > 0 and self.relative_gradient <= self.gradient_tol

    @property
    def displacement(self) -> Tensor:
        """The step as a vector to add to the parameters, shape ``(n,)``."""
        return self.direction * self.step


def escape_attempt(
    operator: HessianOperator,
    *,
    gradient_tol: float = 0.1,
    max_matvecs: int = 100,
    max_radius: float = 0.5,
    generator: torch.Generator | None = None,
) -> EscapeAttempt:
    r"""Return the best step down along the direction of most negative curvature.

    The direction :math:`u` is the eigenvector of the smallest eigenvalue, as well as
    ``max_matvecs`` products find it, with the sign that does not climb. A Rayleigh quotient is no
    less than the smallest eigenvalue, so :math:`u^\top H u < 0` beyond rounding certifies negative
    curvature, converged or not; the quotient is taken from a product of its own.

    Then 16 steps are tried, halved from ``max_radius`` times :math:`\|\theta\|`, or times
    :math:`0.01 \sqrt n` where that is more: at the origin the net has no size. A step is sufficient
    if the loss falls by more than rounding, and by a quarter of what the quadratic model predicts;
    of those the one with the lowest loss is kept. Each costs one loss. Nothing is changed.

    A gradient is small if a step along it would bring little beside this one: at most
    ``gradient_tol`` of the decrease. Both are losses, so that no scale of the parameters or of the
    loss enters, and the origin is a point like any other.

    Args:
        operator: the Hessian.
        gradient_tol: largest share, at least 0. Through the training of a small net from a random
            start it was 0.9 to 11; on the plateau of one that started from zeros 0.004 to 0.02.
        max_matvecs: products to find the direction, at least 1.
        max_radius: longest step, as a share of the parameters' norm; positive.
        generator: source of the start vector, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range.
        CurvatureError: if the loss or products are NaN, missing or wrong.

    Example:
        >>> import torch
        >>> op = HessianOperator(lambda p: (1 - p["w"][0] * p["w"][1]) ** 2, {"w": torch.zeros(2)})
        >>> attempt = escape_attempt(op, max_radius=100.0)
        >>> attempt.accepted, round(attempt.lambda_min, 4), round(attempt.loss_after, 4)
        (True, -2.0, 0.0)

    References:
        J. J. Moré, D. C. Sorensen, "On the use of directions of negative curvature in a modified
        Newton method", 1979, section 2. F. E. Curtis, D. P. Robinson, "Exploiting negative
        curvature in deterministic and stochastic optimization", 2019, section 2. J. Nocedal, S. J.
        Wright, "Numerical Optimization", 2006, algorithm 4.1.
    """
    check_escape_settings(gradient_tol=gradient_tol, max_matvecs=max_matvecs, max_radius=max_radius)
    spent = operator.num_matvecs
    before = float(operator.loss())
    if not math.isfinite(before):
        raise CurvatureError.not_finite(operator)
    u, radius = _lowest(operator, max_matvecs, generator)
    gradient = operator.gradient()
    product = operator @ u
    curvature, slope = _dot(u, product), _dot(u, gradient)
    if slope > 0:
        u, product, slope = -u, -product, -slope
    noise = operator.noise * radius
    certified = curvature + noise < 0
    step, after = 0.0, before
    if certified:
        longest = max_radius * size_of_parameters(operator)
        step, after = _line_search(operator, u, slope, curvature, before, longest)
    return EscapeAttempt(
        gradient_norm=math.sqrt(_dot(gradient, gradient)),
        gradient_tol=gradient_tol,
        spectral_radius=radius,
        lambda_min=curvature,
        lambda_min_error=math.sqrt(_dot(*[product - curvature * u] * 2)) + noise,
        certified=certified,
        direction=u,
        step=step,
        predicted=_model(slope, curvature, step),
        loss_before=before,
        loss_after=after,
        num_matvecs=operator.num_matvecs - spent,
    )


def check_escape_settings(*, gradient_tol: float, max_matvecs: int, max_radius: float) -> None:
    """Refuse arguments of :func:`escape_attempt` that are out of range.

    Raises:
        ValueError: naming the argument and its rule.
    """
    if not gradient_tol >= 0:  # NaN neither
        raise ValueError(f"`gradient_tol` must be at least 0, got {gradient_tol}.")
    if max_matvecs < 1:
        raise ValueError(f"`max_matvecs` must be at least 1, got {max_matvecs}.")
    if not 0 < max_radius < math.inf:
        raise ValueError(f"`max_radius` must be positive and finite, got {max_radius}.")


def _lowest(
    operator: HessianOperator, max_matvecs: int, generator: torch.Generator | None
) -> tuple[Tensor, float]:
    r"""Return the unit eigenvector of the smallest eigenvalue, and :math:`\max|\lambda|`."""
    ends = top_eigenpairs(
        operator,
        1,
        which="both",
        rtol=_DIRECTION_RTOL,
        max_matvecs=max_matvecs,
        generator=generator,
    )
    return ends.vectors[-1], float(ends.values.abs().max())


def _line_search(
    operator: HessianOperator,
    u: Tensor,
    slope: float,
    curvature: float,
    before: float,
    longest: float,
) -> tuple[float, float]:
    """Return the sufficient step with the lowest loss, and that loss; 0 if none is."""
    best, lowest = 0.0, before
    noise = rounding_noise(operator.dtype) * abs(before)
    for k in range(_NUM_STEPS):
        step = longest * 0.5**k
        needed = max(-_SUFFICIENT * _model(slope, curvature, step), noise)
        loss = _loss_at(operator, u * step)
        if loss < lowest and before - loss >= needed:
            best, lowest = step, loss
    return best, lowest


def _model(slope: float, curvature: float, step: float) -> float:
    return slope * step + curvature * step**2 / 2


def _loss_at(operator: HessianOperator, offset: Tensor) -> float:
    """Return the loss away from here; infinite where it cannot be computed, on all ranks alike."""
    try:
        loss = float(operator.loss(offset))
    except Exception:  # the failing rank has its own error, the others learn of it as another
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
