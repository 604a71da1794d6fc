"""Are the products of an operator second derivatives at all?"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError, WrongDerivativesError

if TYPE_CHECKING:
    from lightning_optkit.measures.operators import HessianOperator

__all__ = ["check_products"]

# A wrong second derivative is off by 10 to 100 % (a layer or a loss whose backward is opaque); a
# right one by rounding: 1e-6 in float32, and 0.7 % where a net has converged to a loss of 1e-6 and
# softmax cancels all digits but the last.
_RTOL = {torch.float32: 2e-2, torch.float64: 5e-3}
# The discrepancy of one product stands for the error of an eigenvalue; over nets at losses from 1
# to 1e-6 the error was up to three times as large.
_NOISE_MULTIPLE = 4
# Factors on the parameters at which products that disagree are checked again. Near a loss of zero
# softmax cancels every digit of the curvature; a layer's derivative is as wrong elsewhere.
_ELSEWHERE = (1 / 2, 1 / 8, 1 / 32)
# Curvature of so many roundings of that elsewhere has lost its digits: 2 % of it, which the check
# sees, is a hundred roundings at least.
_LOST = 1e4
# A difference of gradients adds the kinks that its step meets, and in float32 truncation.
_SLOPE_RTOL = 0.1

_SUSPECTS = (
    "Look for a `torch.autograd.Function` whose backward is `once_differentiable`, detached or not "
    "written in torch operations, and for a loss that is random or changes from call to call."
)


def check_products(operator: HessianOperator) -> float:
    r"""Compare a product with its transpose and with an independent second derivative.

    With ``u`` random, symmetry says :math:`u^\top H d = (H u)^\top d`. The direction ``d`` is the
    sum of ``H u``, which keeps the product well above rounding, and the gradient, along which an
    opaque loss function loses its own curvature; both as unit vectors. Then ``H d`` is compared
    with forward over reverse mode, which uses other derivative formulas and does not mind the
    kinks of a ReLU; and where a layer has no forward mode, with a central difference of gradients.
    Costs two products and about six gradients.

    Returns:
        The rounding error of an eigenvalue relative to the largest, as far as this shows it.

    Raises:
        WrongDerivativesError: if they disagree, naming the suspects.
        CurvatureError: if the product is NaN or infinite, or lost in rounding: wrong here, and
            right at smaller parameters.
    """
    try:
        return _noise_found(operator)
    except WrongDerivativesError as error:
        if not _is_lost_in_rounding(operator):
            raise
        raise CurvatureError(
            "The curvature is lost in rounding: products are wrong here, and right at smaller "
            "weights. That happens where a loss is zero to all digits. Measure in float64, or stop "
            "earlier."
        ) from error


@torch.inference_mode(False)
def _noise_found(operator: HessianOperator) -> float:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    u = u.to(operator.device, operator.dtype)
    v = operator @ u
    parts = [part / part.norm() for part in (v, operator.gradient()) if bool(part.norm() > 0)]
    direction = torch.stack(parts).sum(0) if parts else u
    product = operator @ direction
    if not bool(torch.isfinite(product).all()):
        raise CurvatureError.not_finite(operator)

    rounding = 1e-5 * float(u.norm() * product.norm())
    asymmetry = max(0.0, float((u @ product - v @ direction).abs()) - rounding)
    rtol = _RTOL[operator.dtype]
    if asymmetry > rtol * float(v.norm() * direction.norm()):
        raise WrongDerivativesError(
            "Hessian products are not symmetric: a layer computes wrong second derivatives. "
            + _SUSPECTS
        )
    try:
        other = operator.forward_mode_product(direction)
    except torch.OutOfMemoryError:
        raise
    except Exception as unsupported:
        _check_slope(operator, direction, product, custom="autograd.Function" in str(unsupported))
    else:
        error = float((other - product).norm())
        scale = _compare(error, product, other, rtol, "forward-mode products")
        return _NOISE_MULTIPLE * error / scale
    return _NOISE_MULTIPLE * asymmetry / max(float(v.norm() * direction.norm()), 1e-30)


def _is_lost_in_rounding(operator: HessianOperator) -> bool:
    """Return whether curvature is far larger, and products right, at smaller parameters."""
    here = _curvature(operator)
    for factor in _ELSEWHERE:
        other = operator.at({name: p.detach() * factor for name, p in operator.params.items()})
        if here <= _LOST * torch.finfo(operator.dtype).eps * _curvature(other):
            with suppress(CurvatureError):
                _noise_found(other)
                return True
    return False


def _curvature(operator: HessianOperator) -> float:
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    return float((operator @ u.to(operator.device, operator.dtype)).norm())


def _check_slope(
    operator: HessianOperator, direction: Tensor, product: Tensor, *, custom: bool
) -> None:
    """Compare with central differences, the shorter the fewer kinks they meet.

    torch's own operators are left in peace when kinks keep the difference from settling: their
    second derivatives are tested in torch. A custom function's are not.
    """
    eps = torch.finfo(operator.dtype).eps
    results = []
    for step in (1.0, 0.1, 0.01, 0.001):
        # eps^(1/3) balances the truncation of a central difference against its rounding
        radius = step * eps ** (1 / 3) * (operator.parameter_norm() + 1) / float(direction.norm())
        slope, rounding = operator.difference_product(direction, radius)
        error = max(0.0, float((slope - product).norm()) - rounding)
        results.append((error, slope))
        if error <= _SLOPE_RTOL * max(float(product.norm()), float(slope.norm()), 1e-30):
            return
    if custom:
        error, slope = min(results, key=lambda result: result[0])
        _compare(error, product, slope, _SLOPE_RTOL, "a finite difference")


def _compare(error: float, product: Tensor, other: Tensor, rtol: float, what: str) -> float:
    """Return the scale of the two, unless they differ by more than ``rtol`` of it."""
    scale = max(float(product.norm()), float(other.norm()), 1e-30)
    if not error <= rtol * scale:  # NaN disagrees too
        raise WrongDerivativesError(
            f"Hessian products differ from {what} by {error / scale:.1%}: a layer computes wrong "
            f"second derivatives. {_SUSPECTS} `self_check=False` measures all the same."
        )
    return scale
