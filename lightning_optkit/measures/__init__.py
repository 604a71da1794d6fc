"""What does the loss surface look like at these parameters? Pure functions of tensors."""

from lightning_optkit.measures.critical_point import CriticalPoint, critical_point
from lightning_optkit.measures.errors import CurvatureError, WrongDerivativesError
from lightning_optkit.measures.lanczos import Tridiagonal, lanczos
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.precision import full_precision
from lightning_optkit.measures.shares import Share
from lightning_optkit.measures.spectrum import Spectrum, hessian_spectrum

__all__ = [
    "CriticalPoint",
    "CurvatureError",
    "HessianOperator",
    "Share",
    "Spectrum",
    "Tridiagonal",
    "WrongDerivativesError",
    "critical_point",
    "full_precision",
    "hessian_spectrum",
    "lanczos",
]
