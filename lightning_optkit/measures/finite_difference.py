"""Hessian products by differences of gradients, for parameters that no process holds whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError

__all__ = ["FiniteDifferenceOperator", "GradientFn"]

GradientFn = Callable[[Tensor], tuple[Tensor, Tensor]]

# Steps to choose from, relative to the norm of the parameters. Truncation grows as the square of
# the step, and faster along steep directions and late in training; rounding as its inverse. Over
# small nets the best were 4e-4 to 1e-4 in float32, 1e-5 to 1e-7 in float64.
_STEPS = {
    torch.float32: [1.6e-3 / 4**i for i in range(5)],
    torch.float64: [1.6e-5 / 4**i for i in range(5)],
}
# Error of an eigenvalue relative to the largest, at best. Four times this, the tolerance of a
# spectrum never falls below 1e-3: kinks that a step has not met yet do not care for the dtype.
_NOISE = 2.5e-4
# Two directions stand for all; the error of an eigenvalue was up to three times theirs.
_NOISE_MULTIPLE = 4
# A difference that changes by more with the step is not that of a smooth loss: in float32 nets with
# Tanh or SiLU settled to 7e-3 at the latest, those with ReLU to 2e-2, and were off by a factor.
_SETTLED = 1e-2


class FiniteDifferenceOperator:
    r"""The Hessian of a loss in its parameters, by central differences of its gradient.

    .. math:: H v \approx \frac{g(\theta + h v) - g(\theta - h v)}{2 h}, \qquad
        h = \epsilon \, \frac{1 + \|\theta\|}{\|v\|}

    An estimate, unlike :class:`~lightning_optkit.measures.operators.HessianOperator`, at two
    gradients a product: for where no graph of the gradient can be had. Each process may hold a
    part of the parameters; vectors are then parts too, and :attr:`inner_sum` completes dot
    products.

    Before the first product, that along a random direction and a steep one is made at five steps.
    The step at which it changes least is kept, and :attr:`noise` tells by how much. Where no step
    settles, as with the kinks of a ReLU in float32, nothing is returned that could be believed.

    Args:
        gradient_fn: a function from an offset, shape ``(m,)``, to the loss, a scalar, and its
            gradient, shape ``(m,)``, at the parameters plus the offset; or one such function for
            each batch. Loss and gradient are those of all processes together; of the gradient it
            gives this process's part.
        parameters: this process's part of the parameters, shape ``(m,)``, float32 or float64.
        weights: one positive weight for each batch, the same on all processes; default equal.
        inner_sum: sums a tensor over the processes, in place of a single-process identity. Every
            process must then make the same products.
        step: :math:`\epsilon`, in place of the one found.

    Raises:
        TypeError: if the parameters are not float32 or float64.
        ValueError: if there is no parameter or no batch, or a weight or the step is not positive.
        CurvatureError: from a product, if a gradient is NaN or infinite, or no step settles.

    Example:
        >>> import torch
        >>> w = torch.ones(2, dtype=torch.float64)
        >>> def cubic(offset):
        ...     moved = w + offset
        ...     return moved.pow(3).sum(), 3 * moved**2
        >>> (FiniteDifferenceOperator(cubic, w) @ torch.tensor([1.0, 2.0])).round(decimals=6)
        tensor([ 6., 12.], dtype=torch.float64)

    References:
        B. A. Pearlmutter, "Fast exact multiplication by the Hessian", 1994, section 1.
    """

    works_in_blocks = False
    """Several vectors at once cost as much as one after another."""

    def __init__(
        self,
        gradient_fn: GradientFn | Sequence[GradientFn],
        parameters: Tensor,
        *,
        weights: Sequence[float] | None = None,
        inner_sum: Callable[[Tensor], Tensor] | None = None,
        step: float | None = None,
    ) -> None:
        self._gradient_fns = [gradient_fn] if callable(gradient_fn) else list(gradient_fn)
        given = [1.0] * len(self._gradient_fns) if weights is None else list(weights)
        if len(given) != len(self._gradient_fns) or not given:
            raise ValueError(
                f"`weights` must have one entry for each of the {len(self._gradient_fns)} batches, "
                f"at least one, got {len(given)}."
            )
        if min(given) <= 0:
            raise ValueError(f"`weights` must be positive, got {min(given)}.")
        if parameters.dtype not in _STEPS:
            raise TypeError(
                f"`parameters` must be float32 or float64, got {parameters.dtype}: a difference of "
                "gradients in less precision is noise."
            )
        if step is not None and not step > 0:
            raise ValueError(f"`step` must be positive, got {step}.")
        self._inner_sum = inner_sum
        self.total_weight = sum(given)
        """Sum of the weights: the number of samples."""
        self._weights = [w / self.total_weight for w in given]
        self._step = step
        self.noise = _NOISE
        """Error of an eigenvalue relative to the largest; the first product may raise it."""
        self._parameters = parameters
        self.num_matvecs = 0
        """Products made so far."""
        own = torch.tensor([len(parameters)], dtype=torch.int64, device=self.device)
        self._size = int(self.inner_sum(own)[0])
        if self._size == 0:
            raise ValueError("`parameters` must hold at least one parameter, got none.")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._parameters.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._parameters.device

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``, where ``n`` is the number of parameters of all processes together."""
        return self._size, self._size

    @property
    def local_size(self) -> int:
        """``m``, the number of entries of a vector that this process holds."""
        return len(self._parameters)

    def inner_sum(self, part: Tensor) -> Tensor:
        """Return the sum of the processes' parts of a dot product; ``part`` may be overwritten."""
        return part if self._inner_sum is None else self._inner_sum(part)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return this process's part of ``H @ vectors``, of shape ``(m,)`` or ``(m, k)``."""
        if vectors.shape[:1] != (self.local_size,) or vectors.ndim > 2:
            m, got = self.local_size, tuple(vectors.shape)
            raise ValueError(f"`vectors` must have the shape ({m},) or ({m}, k), got {got}.")
        if self._step is None:
            self._step, error = self._settled_step()
            self.noise = max(self.noise, _NOISE_MULTIPLE * error)
        rows = (vectors[None] if vectors.ndim == 1 else vectors.T).to(self.device, self.dtype)
        products = torch.stack([self._product(v, self._step) for v in rows])
        return products[0] if vectors.ndim == 1 else products.T

    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """Return this process's part of the gradient of the weighted loss, shape ``(m,)``.

        Args:
            offset: take it at the parameters plus this vector, shape ``(m,)``.
        """
        return self._mean(offset)[1]

    def loss(self, offset: Tensor | None = None) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            offset: take it at the parameters plus this vector, shape ``(m,)``.
        """
        return self._mean(offset)[0]

    def parameter_norm(self) -> float:
        """Return the Euclidean norm of all parameters of all processes together."""
        return float(self._norm(self._parameters))

    def gradient_noise(self) -> Tensor:
        r"""Return the norm of the gradient's standard error, a scalar; NaN for a single batch.

        As of :meth:`lightning_optkit.measures.operators.HessianOperator.gradient_noise`.
        """
        mean = self.gradient()
        zero = torch.zeros_like(self._parameters)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for function, weight in zip(self._gradient_fns, self._weights, strict=True):
            squares += (weight * self._norm(function(zero)[1] - mean)).square()
        unbiased = 1 - sum(w * w for w in self._weights)
        return (squares / unbiased).sqrt() if unbiased > 1e-6 else squares * torch.nan

    def _product(self, vector: Tensor, step: float) -> Tensor:
        norm = float(self._norm(vector))
        # a vector of zero moves nothing, on all processes alike
        h = step * (1 + self.parameter_norm()) / norm if norm > 0 else 1.0
        difference = self.gradient(h * vector).sub_(self.gradient(-h * vector))
        self.num_matvecs += 1
        if not bool(torch.isfinite(self.inner_sum(difference.sum()))):
            raise CurvatureError.not_finite()
        return difference.div_(2 * h)

    def _settled_step(self) -> tuple[float, float]:
        """Return the step that the next shorter one differs least from, and by how much.

        The difference is relative to the largest curvature of the two. Where truncation dominates
        it is the error at the step, where rounding dominates four times that.
        """
        steps = _STEPS[self.dtype]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.local_size, generator=generator, dtype=torch.float64)
        noise = self._unit(noise.to(self.device, self.dtype))
        steep = self._unit(self._unit(self._product(noise, steps[2])) + self._unit(self.gradient()))
        products = [[self._product(v, step) for v in (noise, steep)] for step in steps]
        changes = [self._change(longer, shorter) for longer, shorter in pairwise(products)]
        least = min(changes)
        if least > _SETTLED:
            raise CurvatureError(
                f"Differences of gradients do not settle: over steps from {steps[0]:.0e} to "
                f"{steps[-1]:.0e} they change by {least:.0%} or more. Kinks (ReLU, max pooling), "
                "float32 near convergence or a loss that is random do that. Gather the parameters "
                "and differentiate twice instead, or measure in float64."
            )
        return steps[changes.index(least)], least

    def _change(self, longer: Sequence[Tensor], shorter: Sequence[Tensor]) -> float:
        curvature = max(float(self._norm(product)) for product in (*longer, *shorter))
        change = max(float(self._norm(a - b)) for a, b in zip(longer, shorter, strict=True))
        return change / curvature if curvature > 0 else 0.0

    def _unit(self, part: Tensor) -> Tensor:
        norm = float(self._norm(part))
        return part / norm if norm > 0 else part

    def _mean(self, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of loss and gradient over the batches."""
        at = torch.zeros_like(self._parameters) if offset is None else offset
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        gradient = torch.zeros_like(self._parameters)
        for function, weight in zip(self._gradient_fns, self._weights, strict=True):
            found = function(at)
            loss += weight * found[0].detach().to(loss)
            gradient += weight * found[1].detach()
        return loss, gradient

    def _norm(self, part: Tensor) -> Tensor:
        return self.inner_sum(torch.linalg.vector_norm(part, dtype=torch.float64).square()).sqrt()
