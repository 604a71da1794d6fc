"""Is the gradient zero here, and if it is, what kind of point is this?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.spectrum import Spectrum

__all__ = ["CriticalPoint", "Kind", "critical_point"]

Kind = Literal["minimum", "maximum", "saddle", "degenerate", "not critical"]

# A gradient counts as zero if a Newton step along any direction that counts as curved, at most
# |g| / tol long, moves the parameters by under this share.
_NEWTON_STEP = 1e-2


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
        relative_gradient: :math:`\|g\| / (\max|\lambda| \, \|\theta\|)`, dimensionless.
        flatness: :math:`\|Hg\| / (\max|\lambda| \, \|g\|)`. Near 0 the gradient lies in the null
            space of ``H``: a minimiser of the gradient's norm stops there, with no critical point
            near. NaN for a zero gradient.

    References:
        C. G. Frye et al., "Critical point-finding methods reveal gradient-flat regions of deep
        network losses", 2021, section 2.
    """

    kind: Kind
    gradient_norm: float
    gradient_noise: float
    relative_gradient: float
    flatness: float


def critical_point(operator: HessianOperator, spectrum: Spectrum) -> CriticalPoint:
    r"""Return the kind of point at which ``spectrum`` was measured. Costs one product.

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
    norm, noise = float(gradient.norm()), float(operator.gradient_noise())
    radius, size = spectrum.spectral_radius, operator.parameter_norm()
    relative = norm / (radius * size) if radius * size > 0 else math.inf if norm > 0 else 0.0
    flatness = math.nan
    if norm > 0 and radius > 0:
        flatness = float((operator @ gradient).norm()) / (radius * norm)
    is_zero = norm <= _NEWTON_STEP * spectrum.tol * size
    kind: Kind = _second_order_test(spectrum) if is_zero else "not critical"
    return CriticalPoint(kind, norm, noise, relative, flatness)


def _second_order_test(spectrum: Spectrum) -> Kind:
    positive = spectrum.lambda_max > spectrum.tol
    negative = spectrum.lambda_min < -spectrum.tol
    if positive and negative:
        return "saddle"
    if spectrum.zero.upper > 0:
        return "degenerate"
    return "minimum" if positive else "maximum"
