"""What does the loss surface look like at these parameters? Pure functions of tensors."""

from lightning_optkit.measures.activations import ActivationRecorder, Activations
from lightning_optkit.measures.adaptive_rates import effective_rate
from lightning_optkit.measures.basin import BasinRadius, basin_radius
from lightning_optkit.measures.critical_point import CriticalPoint, Descent, critical_point
from lightning_optkit.measures.directions import (
    TrajectoryPlane,
    random_directions,
    trajectory_plane,
)
from lightning_optkit.measures.eigenpairs import Eigenpairs, top_eigenpairs
from lightning_optkit.measures.errors import CurvatureError, WrongDerivativesError
from lightning_optkit.measures.escape import EscapeAttempt, escape_attempt
from lightning_optkit.measures.gauss_newton import GaussNewtonOperator
from lightning_optkit.measures.gradient_noise import (
    NoisePoint,
    NoiseScale,
    noise_point,
    noise_scale,
)
from lightning_optkit.measures.gradients import StepTable, tensor_norms
from lightning_optkit.measures.lanczos import Tridiagonal, lanczos
from lightning_optkit.measures.landscape import LossLine, LossPlane, loss_line, loss_plane
from lightning_optkit.measures.layers import layer_spectra
from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.measures.module_loss import ModuleLoss
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.precision import full_precision
from lightning_optkit.measures.rescaling import Invariance, rescale_invariance
from lightning_optkit.measures.shares import Share
from lightning_optkit.measures.sharpness import (
    AverageSharpness,
    BallSharpness,
    EpsilonSharpness,
    average_sharpness,
    ball_sharpness,
    epsilon_sharpness,
)
from lightning_optkit.measures.spectrum import Spectrum, hessian_spectrum
from lightning_optkit.measures.stability import (
    PreconditionedHessian,
    StabilityThreshold,
    stability_threshold,
)
from lightning_optkit.measures.step_size import GradientStep, step_along_gradient
from lightning_optkit.measures.trust_ratios import lamb_ratios, lars_ratios

__all__ = [
    "ActivationRecorder",
    "Activations",
    "AverageSharpness",
    "BallSharpness",
    "BasinRadius",
    "CriticalPoint",
    "CurvatureError",
    "Descent",
    "Eigenpairs",
    "EpsilonSharpness",
    "EscapeAttempt",
    "GaussNewtonOperator",
    "GradientStep",
    "HessianOperator",
    "Invariance",
    "LossLine",
    "LossPlane",
    "LossSurface",
    "ModuleLoss",
    "NoisePoint",
    "NoiseScale",
    "PreconditionedHessian",
    "Share",
    "Spectrum",
    "StabilityThreshold",
    "StepTable",
    "TrajectoryPlane",
    "Tridiagonal",
    "WrongDerivativesError",
    "average_sharpness",
    "ball_sharpness",
    "basin_radius",
    "critical_point",
    "effective_rate",
    "epsilon_sharpness",
    "escape_attempt",
    "full_precision",
    "hessian_spectrum",
    "lamb_ratios",
    "lanczos",
    "lars_ratios",
    "layer_spectra",
    "loss_line",
    "loss_plane",
    "noise_point",
    "noise_scale",
    "random_directions",
    "rescale_invariance",
    "stability_threshold",
    "step_along_gradient",
    "tensor_norms",
    "top_eigenpairs",
    "trajectory_plane",
]
