"""What can go wrong while measuring curvature."""

from __future__ import annotations

__all__ = ["CurvatureError", "WrongDerivativesError"]


class CurvatureError(RuntimeError):
    """A curvature measurement could not be made, or could not be trusted.

    The message names the cause and the way out. Nothing was changed when it is raised.
    """

    @classmethod
    def not_finite(cls, operator: object = None) -> Exception:
        """Return the error for products that are NaN or infinite: what failed here, if known.

        Args:
            operator: where the products come from; its ``failure``, if it has one, is the cause.
        """
        failure: Exception | None = getattr(operator, "failure", None)
        return failure or cls(
            "Hessian products are NaN or infinite. Is the loss itself finite? Lower the learning "
            "rate, clip gradients, or look for a log or a square root at zero."
        )


class WrongDerivativesError(CurvatureError):
    """A layer computes second derivatives that are wrong, here and at any other parameters."""
