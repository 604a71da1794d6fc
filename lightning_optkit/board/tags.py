"""Every tag once: what is logged, in which unit, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HESSIAN", "HESSIAN_FIGURE", "HESSIAN_SCALARS", "QUADRATURE", "Tag", "tag"]

HESSIAN = "optkit-hessian"
"""Topic of :class:`~lightning_optkit.HessianSpectrum`."""

QUADRATURE = "quadrature"
"""Array of Ritz values and weights, see :mod:`lightning_optkit.board.schema`."""

HESSIAN_FIGURE = "spectrum"
"""Figure of the last spectrum."""


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
    Tag("num_matvecs", "products", "Hessian-vector products spent on this point"),
    Tag("num_samples", "samples", "training samples held, over all ranks"),
    Tag("seconds", "s", "wall time spent on this point"),
)
"""What a Hessian spectrum logs at each measured step."""


def tag(topic: str, name: str) -> str:
    """Return the full tag of a quantity.

    Example:
        >>> tag(HESSIAN, "lambda_max")
        'optkit-hessian/lambda_max'
    """
    return f"{topic}/{name}"
