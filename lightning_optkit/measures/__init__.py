"""What does the loss surface look like at these parameters? Pure functions of tensors."""

from lightning_optkit.measures.critical_point import CriticalPoint, Descent, critical_point
from lightning_optkit.measures.eigenpairs import Eigenpairs, top_eigenpairs
from lightning_optkit.measures.errors import CurvatureError, WrongDerivativesError
from lightning_optkit.measures.escape import EscapeAttempt, escape_attempt
from lightning_optkit.measures.gauss_newton import GaussNewtonOperator
from lightning_optkit.measures.lanczos import Tridiagonal, lanczos
from lightning_optkit.measures.layers import layer_spectra
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.precision import full_precision
from lightning_optkit.measures.shares import Share
from lightning_optkit.measures.spectrum import Spectrum, hessian_spectrum
from lightning_optkit.measures.stability import (
    PreconditionedHessian,
    StabilityThreshold,
    stability_threshold,
)
from lightning_optkit.measures.step_size import GradientStep, step_along_gradient

__all__ = [
    "CriticalPoint",
    "CurvatureError",
    "Descent",
    "Eigenpairs",
    "EscapeAttempt",
    "GaussNewtonOperator",
    "GradientStep",
    "HessianOperator",
    "PreconditionedHessian",
    "Share",
    "Spectrum",
    "StabilityThreshold",
    "Tridiagonal",
    "WrongDerivativesError",
    "critical_point",
    "escape_attempt",
    "full_precision",
    "hessian_spectrum",
    "lanczos",
    "layer_spectra",
    "stability_threshold",
    "step_along_gradient",
    "top_eigenpairs",
]
