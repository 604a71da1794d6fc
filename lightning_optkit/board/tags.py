"""Every tag once: what is logged, in which unit, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "AVERAGING",
    "AVERAGING_EVENT",
    "AVERAGING_SCALARS",
    "ESCAPE",
    "ESCAPE_EVENT",
    "ESCAPE_SCALARS",
    "EVENTS",
    "HESSIAN",
    "HESSIAN_FIGURE",
    "HESSIAN_SCALARS",
    "LAYERS",
    "LAYERS_FIGURE",
    "LAYER_NAMES",
    "QUADRATURE",
    "STABILITY",
    "STABILITY_FIGURE",
    "STABILITY_SCALARS",
    "Tag",
    "tag",
]

HESSIAN = "optkit-hessian"
"""Topic of :class:`~lightning_optkit.HessianSpectrum`."""

QUADRATURE = "quadrature"
"""Array of Ritz values and weights, see :mod:`lightning_optkit.board.schema`."""

HESSIAN_FIGURE = "spectrum"
"""Figure of the last spectrum."""

LAYERS = "layers"
"""Array of values by layer, see :mod:`lightning_optkit.board.schema`."""

LAYER_NAMES = "layer_names"
"""Array of the layers' names, in the same order."""

LAYERS_FIGURE = "by_layer"
"""Figure of the last values by layer."""

STABILITY = "optkit-stability"
"""Topic of :class:`~lightning_optkit.Stability`."""

STABILITY_FIGURE = "history"
"""Figure of the largest eigenvalue against the threshold, through training."""

AVERAGING = "optkit-averaging"
"""Topic of :class:`~lightning_optkit.SWA` and :class:`~lightning_optkit.EMA`."""

AVERAGING_EVENT = "averaging"
"""Event of the first model in an average, and of the last; its value is how many there are."""

ESCAPE = "optkit-escape"
"""Topic of :class:`~lightning_optkit.SaddleEscape`."""

EVENTS = "optkit-events"
"""Topic of what happened at a step, for every time axis."""

ESCAPE_EVENT = "escape"
"""Event of a step off a saddle; its value is the length of the step."""


@dataclass(frozen=True)
class Tag:
    """A logged quantity: its name within the topic, its unit, and what it says."""

    name: str
    unit: str
    meaning: str


HESSIAN_SCALARS = (
    Tag("minimum_ratio", "share", "share of positive eigenvalues; 1 at a minimum"),
    Tag("minimum_ratio_lower", "share", "lower end of its certified interval"),
    Tag("minimum_ratio_upper", "share", "upper end of its certified interval"),
    Tag("negative_ratio", "share", "share of negative eigenvalues"),
    Tag("negative_ratio_lower", "share", "lower end of its certified interval"),
    Tag("negative_ratio_upper", "share", "upper end of its certified interval"),
    Tag("zero_ratio", "share", "share of eigenvalues within the tolerance of zero"),
    Tag("zero_ratio_lower", "share", "lower end of its certified interval"),
    Tag("zero_ratio_upper", "share", "upper end of its certified interval"),
    Tag("tol", "eigenvalue", "the tolerance: smaller eigenvalues count as zero"),
    Tag("lambda_max", "eigenvalue", "largest eigenvalue, algebraically: the sharpness"),
    Tag("lambda_min", "eigenvalue", "smallest eigenvalue, algebraically"),
    Tag("trace", "eigenvalue", "sum of all eigenvalues"),
    Tag("trace_standard_error", "eigenvalue", "standard error of the trace; 0 if exact"),
    Tag("loss", "loss", "loss on the held batches, where the spectrum was taken"),
    Tag("gradient_norm", "loss / parameter", "norm of the gradient on the held batches"),
    Tag("gradient_noise", "loss / parameter", "norm of its standard error over the batches"),
    Tag("flatness", "share", "|Hg| / (max|lambda| |g|); near 0 the gradient lies in flat space"),
    Tag("kind", "code", "0 not critical, 1 minimum, 2 saddle, 3 maximum, 4 degenerate point"),
    Tag("method", "code", "0 exact, 1 Lanczos, 2 Lanczos on finite differences, 3 PyHessian"),
    Tag("predicted_change", "loss", "of the loss along the lowest eigenvector, by curvature"),
    Tag("actual_change", "loss", "of the loss there; both only where an eigenvalue is negative"),
    Tag("num_matvecs", "products", "Hessian-vector products spent on this point"),
    Tag("num_samples", "samples", "training samples held, over all ranks"),
    Tag("seconds", "s", "wall time spent on this point"),
)
"""What a Hessian spectrum logs at each measured step."""

STABILITY_SCALARS = (
    Tag("threshold", "eigenvalue", "largest eigenvalue at which the optimizer is stable"),
    Tag("ratio", "share", "lambda_max over the threshold; above 1 the sharpest direction grows"),
    Tag("lambda_max", "eigenvalue", "largest eigenvalue of the preconditioned Hessian"),
    Tag("lambda_max_error", "eigenvalue", "estimate of its error"),
    Tag("step_along_gradient", "parameter² / loss", "learning rate of the minimum along -gradient"),
    Tag("learning_rate", "parameter² / loss", "of the step just made, first parameter group"),
    Tag("num_matvecs", "products", "Hessian-vector products spent on this point"),
    Tag("seconds", "s", "wall time spent on this point"),
)
"""What :class:`~lightning_optkit.Stability` logs at each measured step."""

ESCAPE_SCALARS = (
    Tag("gradient_norm", "loss / parameter", "norm of the gradient on the held batches"),
    Tag("relative_gradient", "share", "what a gradient step brings, of what the escape brings"),
    Tag("spectral_radius", "eigenvalue", "largest absolute eigenvalue"),
    Tag("lambda_min", "eigenvalue", "curvature along the direction: the smallest eigenvalue found"),
    Tag("lambda_min_error", "eigenvalue", "an eigenvalue lies within this of lambda_min"),
    Tag("certified", "0 or 1", "1 where lambda_min is negative beyond rounding"),
    Tag("step", "parameter", "length of the best step down, taken or not; 0 if there is none"),
    Tag("predicted", "loss", "change of the loss that the curvature predicts for this step"),
    Tag("actual", "loss", "change of the loss at this step, taken or not"),
    Tag("escaped", "0 or 1", "1 where the step was taken"),
    Tag("num_escapes", "steps", "steps taken so far in this run"),
    Tag("loss_before", "loss", "loss on the held batches before the attempt"),
    Tag("loss_after", "loss", "and after it: lower where the step was taken, else the same"),
    Tag("num_matvecs", "products", "Hessian-vector products spent on this attempt"),
    Tag("num_samples", "samples", "training samples held, over all ranks"),
    Tag("seconds", "s", "wall time spent on this attempt"),
)
"""What an attempt to escape logs; relative_gradient only where there is a step down."""

AVERAGING_SCALARS = (
    Tag("num_averaged", "models", "models in the average"),
    Tag("distance", "share", "norm of average minus weights, relative to that of the weights"),
    Tag("learning_rate", "rate", "of the last step, first parameter group; where `lr=` is given"),
)
"""What an average logs."""


def tag(topic: str, name: str) -> str:
    """Return the full tag of a quantity.

    Example:
        >>> tag(HESSIAN, "lambda_max")
        'optkit-hessian/lambda_max'
    """
    return f"{topic}/{name}"
