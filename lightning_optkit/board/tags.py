"""Every tag once: what is logged, in which unit, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_NAMES",
    "AVERAGING",
    "AVERAGING_EVENT",
    "AVERAGING_SCALARS",
    "BATCH_SCALING_EVENT",
    "BATCH_SCALING_SCALARS",
    "EFFECTIVE",
    "ESCAPE",
    "ESCAPE_EVENT",
    "ESCAPE_SCALARS",
    "EVENTS",
    "FACTOR",
    "GRADIENT",
    "GRADIENT_FIGURE",
    "GRADIENT_SCALARS",
    "HESSIAN",
    "HESSIAN_FIGURE",
    "HESSIAN_SCALARS",
    "LANDSCAPE",
    "LANDSCAPE_AXES",
    "LANDSCAPE_FIGURE",
    "LANDSCAPE_LOSSES",
    "LANDSCAPE_PATH",
    "LANDSCAPE_PATH_STEPS",
    "LANDSCAPE_SCALARS",
    "LAYERS",
    "LAYERS_FIGURE",
    "LAYER_NAMES",
    "LAYER_STEPS",
    "MIXING",
    "MIXING_FIGURE",
    "MIXING_SCALARS",
    "NORM_SWAP_EVENT",
    "QUADRATURE",
    "RATES",
    "RATE_TAGS",
    "SCHEDULE_FIGURE",
    "SHARPNESS",
    "SHARPNESS_FIGURE",
    "SHARPNESS_SCALARS",
    "STABILITY",
    "STABILITY_FIGURE",
    "STABILITY_SCALARS",
    "TOPICS",
    "TRUST",
    "TRUST_RATIOS",
    "TRUST_RATIO_FIGURE",
    "TRUST_SCALARS",
    "WARMUP_EVENT",
    "Tag",
    "Topic",
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

LANDSCAPE = "optkit-landscape"
"""Topic of :class:`~lightning_optkit.LossLandscape`."""

LANDSCAPE_FIGURE = "picture"
"""Figure of the loss along the line or on the plane."""

LANDSCAPE_LOSSES = "losses"
"""Array of losses, see :mod:`lightning_optkit.board.schema`."""

LANDSCAPE_AXES = "axes"
"""Array of the positions at which they were taken."""

LANDSCAPE_PATH = "path"
"""Array of the path of training in the plane."""

LANDSCAPE_PATH_STEPS = "path_steps"
"""Array of the steps of training behind each of its points."""

SHARPNESS = "optkit-sharpness"
"""Topic of :class:`~lightning_optkit.Sharpness`."""

SHARPNESS_FIGURE = "history"
"""Figure of the kinds of sharpness through training, and of what a rescaling does to them."""

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

RATES = "optkit-lr"
"""Topic of learning rates that a callback changes, by the names of ``LearningRateMonitor``."""

EFFECTIVE = "effective"
"""Before a name: the rate of the last step, with all that was done to it."""

FACTOR = "factor"
"""Before a name: what :class:`~lightning_optkit.LRWarmup` multiplied that rate by."""

SCHEDULE_FIGURE = "schedule"
"""Figure of the rates that a run will have, at its start."""

WARMUP_EVENT = "warmup"
"""Event of the end of a warmup; its value is how many steps it took."""

NORM_SWAP_EVENT = "norm_swap"
"""Event of norm layers that are others than the module made; its value is how many."""

BATCH_SCALING_EVENT = "batch_scaling"
"""Event of the end of a warmup to the rate of a large batch; its value is what that multiplies."""

TRUST = "optkit-trust"
"""Topic of :class:`~lightning_optkit.TrustRatio`."""

TRUST_RATIOS = "trust_ratios"
"""Array of the ratios by layer, see :mod:`lightning_optkit.board.schema`."""

MIXING = "optkit-mixing"
"""Topic of :class:`~lightning_optkit.Mixup`, ``CutMix`` and ``MixupOrCutMix``."""

MIXING_FIGURE = "batch"
"""Figure of the first mixed batch, where inputs look like images."""

EVENTS = "optkit-events"
"""Topic of what happened at a step, for every time axis."""

ESCAPE_EVENT = "escape"
"""Event of a step off a saddle; its value is the length of the step."""


GRADIENT = "optkit-gradient"
"""Topic of :class:`~lightning_optkit.GradientMonitor`."""

LAYER_STEPS = "layer_steps"
"""Array of one optimizer step by layer, see :mod:`lightning_optkit.board.schema`."""

ACTIVATIONS = "activations"
"""Array of dead and saturated shares by place, see :mod:`lightning_optkit.board.schema`."""

ACTIVATION_NAMES = "activation_names"
"""Array of the places' names, in the same order."""

GRADIENT_FIGURE = "history"
"""Figure of the loss and the gradient's norm, through training."""

TRUST_RATIO_FIGURE = "trust_ratios"
"""Figure of each layer's trust ratio, through training."""


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

MIXING_SCALARS = (
    Tag("mixing", "share", "λ of the batch: what its own samples weigh; 1 where it is not mixed"),
    Tag("share", "share", "of the epoch's batches so far that were mixed"),
)
"""What a callback that mixes batches logs."""

RATE_TAGS = (
    Tag("effective/<name>", "rate", "of the last step, with all that was done to it"),
    Tag("factor/<name>", "share", "what the warmup multiplied the scheduled rate by in that step"),
)
"""What is logged of learning rates; the name is that of an optimizer or of a parameter group."""

BATCH_SCALING_SCALARS = (
    Tag("batch_size", "samples", "in an optimizer step, over all devices and what is accumulated"),
    Tag("scale", "factor", "what the scheduled rate is multiplied by for it, after any warmup"),
)
"""What :class:`~lightning_optkit.BatchScaling` logs, beside the effective rates."""

TRUST_SCALARS = (
    Tag("mean", "factor", "over the layers, of what each was multiplied by in the last step"),
    Tag("min", "factor", "the smallest of them"),
    Tag("max", "factor", "the largest"),
)
"""What trust ratios log of the last step of each optimizer."""

GRADIENT_SCALARS = (
    Tag("gradient_norm", "loss / parameter", "norm of the gradient that training uses, unclipped"),
    Tag("weight_norm", "parameter", "norm of the weights before the step"),
    Tag("update_norm", "parameter", "norm of what the step changed"),
    Tag("trust_ratio", "parameter² / loss", "weight_norm / gradient_norm"),
    Tag("update_ratio", "share", "update_norm / weight_norm"),
    Tag("effective_learning_rate", "parameter² / loss", "of an adaptive optimizer, eta / sigma"),
    Tag("noise_scale", "samples", "noise of one sample's gradient over signal, tr(S) / |G|²"),
    Tag("noise_scale_standard_error", "samples", "of the noise scale, over the points averaged"),
    Tag("critical_batch_size", "samples", "the noise scale as a batch: beyond it little is won"),
    Tag("noise_source", "code", "0 accumulated batches, 1 ranks, 2 both, 3 halves of a batch"),
    Tag("batch_size", "samples", "in the step, over all ranks and what is accumulated"),
    Tag("dead", "share", "of the units of ReLUs, those that are zero on the whole batch"),
    Tag("saturated", "share", "of the values of sigmoids and tanhs, those near an asymptote"),
    Tag("loss", "loss", "mean of the training step's loss over the batches of the step"),
    Tag("seconds", "s", "wall time spent on this point"),
)
"""What :class:`~lightning_optkit.GradientMonitor` logs at each measured step."""


SHARPNESS_SCALARS = (
    Tag("epsilon", "%", "Keskar's: largest rise of the loss in a small box, of 1 + loss"),
    Tag("epsilon_lower", "%", "the smaller of what its two maximisers found"),
    Tag("ball", "loss", "largest rise of the loss within a radius rho, as found by ascent"),
    Tag("ball_lower", "loss", "the rise after one step of ascent, as SAM takes it"),
    Tag("adaptive", "loss", "as ball, with lengths relative to each parameter"),
    Tag("adaptive_lower", "loss", "the rise after one step of ascent, as ASAM takes it"),
    Tag("average", "loss", "mean rise of the loss under Gaussian perturbations"),
    Tag("average_standard_error", "loss", "its standard error over perturbations"),
    Tag("adaptive_average", "loss", "as average, relative to each parameter"),
    Tag("adaptive_average_standard_error", "loss", "its standard error over perturbations"),
    Tag("lambda_max", "eigenvalue", "largest eigenvalue of the Hessian, algebraically"),
    Tag("lambda_max_lower", "eigenvalue", "lambda_max minus the estimate of its error"),
    Tag("loss", "loss", "loss on the held batches, where sharpness was taken"),
    Tag("num_samples", "samples", "training samples held, over all ranks"),
    Tag("seconds", "s", "wall time spent on this point"),
)
"""What :class:`~lightning_optkit.Sharpness` logs at each measured step.

A second ``epsilon`` adds ``epsilon_0.0005`` and its ``_lower``; ``per_batch_size`` adds
``epsilon_per_batch``, ``ball_per_batch`` and ``adaptive_per_batch``.
"""


LANDSCAPE_SCALARS = (
    Tag("loss", "loss", "loss on the held batches, at the weights of the run"),
    Tag("lowest", "loss", "lowest loss of the picture"),
    Tag("highest", "loss", "highest finite loss of the picture"),
    Tag("num_gaps", "points", "points whose loss is NaN or infinite"),
    Tag("num_losses", "losses", "losses spent, so far in a picture under way"),
    Tag("explained", "share", "share of the path's squared length that its plane explains"),
    Tag("log_radius", "ln parameter", "mean logarithm of the distance to the rim of the basin"),
    Tag("log_radius_standard_error", "ln parameter", "its standard error over directions"),
    Tag("num_samples", "samples", "training samples held, over all ranks"),
    Tag("seconds", "s", "wall time spent on this picture"),
)
"""What :class:`~lightning_optkit.LossLandscape` logs at each picture."""


@dataclass(frozen=True)
class Topic:
    """What one callback, or several of a kind, log.

    Attributes:
        name: first part of the tags; a callback with a ``name`` adds it behind a hyphen.
        callbacks: who logs it.
        scalars: what; for learning rates, with ``<name>`` for that of an optimizer.
        call: how a user makes the first of them.
    """

    name: str
    callbacks: tuple[str, ...]
    scalars: tuple[Tag, ...]
    call: str

    @property
    def example(self) -> tuple[str, str]:
        """The two lines that fill a panel."""
        module = "lightning_optkit"
        return f"from {module} import {self.callbacks[0]}", f"Trainer(callbacks=[{self.call}])"


_EVENT_TAGS = (
    Tag(AVERAGING_EVENT, "models", "first model in an average, or the last; how many there are"),
    Tag(BATCH_SCALING_EVENT, "factor", "end of a warmup to the rate of a large batch"),
    Tag(ESCAPE_EVENT, "parameter", "step off a saddle; its length"),
    Tag(NORM_SWAP_EVENT, "layers", "norm layers replaced; how many"),
    Tag(WARMUP_EVENT, "steps", "end of a warmup; how long it was"),
)

TOPICS = (
    Topic(HESSIAN, ("HessianSpectrum",), HESSIAN_SCALARS, "HessianSpectrum(every_n_epochs=1)"),
    Topic(STABILITY, ("Stability",), STABILITY_SCALARS, "Stability(every_n_epochs=1)"),
    Topic(SHARPNESS, ("Sharpness",), SHARPNESS_SCALARS, "Sharpness(every_n_epochs=5)"),
    Topic(
        LANDSCAPE,
        ("LossLandscape",),
        LANDSCAPE_SCALARS,
        'LossLandscape(directions="trajectory")',
    ),
    Topic(GRADIENT, ("GradientMonitor",), GRADIENT_SCALARS, "GradientMonitor(every_n_steps=50)"),
    Topic(TRUST, ("TrustRatio",), TRUST_SCALARS, "TrustRatio()"),
    Topic(MIXING, ("Mixup", "CutMix", "MixupOrCutMix"), MIXING_SCALARS, "Mixup(alpha=0.2)"),
    Topic(AVERAGING, ("EMA", "SWA"), AVERAGING_SCALARS, "EMA(decay=0.999)"),
    Topic(RATES, ("LRWarmup", "BatchScaling"), RATE_TAGS + BATCH_SCALING_SCALARS, "LRWarmup(500)"),
    Topic(ESCAPE, ("SaddleEscape",), ESCAPE_SCALARS, "SaddleEscape(every_n_epochs=1)"),
    Topic(
        EVENTS,
        ("LRWarmup", "EMA", "SWA", "NormSwap", "BatchScaling", "SaddleEscape"),
        _EVENT_TAGS,
        "LRWarmup(500)",
    ),
)
"""All topics; no name of one begins that of another."""


def tag(topic: str, name: str) -> str:
    """Return the full tag of a quantity.

    Example:
        >>> tag(HESSIAN, "lambda_max")
        'optkit-hessian/lambda_max'
    """
    return f"{topic}/{name}"
