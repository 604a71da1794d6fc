"""A loss as a function of parameters, over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.gradient_graph import (
    Forward,
    GradientGraph,
    LossFn,
    flat,
    split,
)
from lightning_optkit.measures.losses_along import LossesAlong, Reduce
from lightning_optkit.measures.precision import full_precision

__all__ = ["LossSurface", "Reduce"]


class LossSurface:
    r"""The loss over some parameters: the weighted mean of the losses of batches.

    .. math:: L(\theta) = \sum_b w_b L_b(\theta) / \sum_b w_b

    Loss and gradient, at the parameters or away from them. What measures it never changes the
    parameters.

    Args:
        loss_fn: a function from ``{name: parameter}`` to a scalar loss, or one such function for
            each batch. It must be deterministic and free of side effects.
        params: the parameters by name; float32 or float64, real, dense. They are not modified.
        weights: one positive weight for each batch, usually its number of samples; default equal.
        reduce: sums a tensor over processes, in place of a single-process identity. Every process
            must then ask the same questions.

    Raises:
        TypeError: if a parameter is complex, half precision, sparse or not a tensor.
        ValueError: if there is no parameter, no batch, or a weight that is not positive.

    Example:
        >>> import torch
        >>> surface = LossSurface(lambda p: p["w"].square().sum(), {"w": torch.ones(2)})
        >>> float(surface.loss()), float(surface.loss(torch.tensor([1.0, 0.0])))
        (2.0, 5.0)
    """

    def __init__(
        self,
        loss_fn: LossFn | Sequence[LossFn],
        params: Mapping[str, Tensor],
        *,
        weights: Sequence[float] | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self._loss_fns: list[LossFn] = [loss_fn] if callable(loss_fn) else list(loss_fn)
        self._params = dict(params)
        _check_params(self._params)
        self._reduce = reduce
        given = self._checked_weights(weights)
        self.total_weight = sum(given)
        """Sum of the weights of all batches of all processes: the number of samples."""
        if reduce is not None:
            own = torch.tensor([sum(given)], dtype=torch.float64, device=self.device)
            self.total_weight = float(reduce(own)[0])
        self._weights = [w / self.total_weight for w in given]
        self._given_weights = given
        self.failure: Exception | None = None
        """What made products NaN on this process, where ``reduce`` kept it from being raised."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors: the widest among the parameters."""
        dtypes = {p.dtype for p in self._params.values()}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the vectors: the first parameter's."""
        return next(iter(self._params.values())).device

    @property
    def num_parameters(self) -> int:
        """Length of a vector of all parameters."""
        return sum(p.numel() for p in self._params.values())

    @property
    def loss_fns(self) -> list[LossFn]:
        """The loss of each batch."""
        return list(self._loss_fns)

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return dict(self._params)

    @property
    def weights(self) -> list[float]:
        """The weight of each batch, as it was given."""
        return list(self._given_weights)

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in the order of the vectors."""
        return list(self._params)

    @torch.inference_mode(False)
    def loss(self, offset: Tensor | None = None) -> Tensor:
        """Return the weighted loss, a scalar, by the kernels of its derivatives.

        Args:
            offset: take it at the parameters plus this vector, shape ``(n,)``.
        """
        return self._sum(
            lambda graph: graph.loss.to(self.device, self.dtype, copy=True),
            shape=(),
            graphs=self._losses() if offset is None else self._forwards(offset),
        )

    def value(self, offset: Tensor | None = None) -> Tensor:
        """Return the weighted loss, a scalar, by the layers' fastest kernels.

        A loss that is NaN or infinite is returned as it is.

        Args:
            offset: take it at the parameters plus this vector, shape ``(n,)``.
        """
        direction = torch.zeros_like(self.vector()) if offset is None else offset
        with self.along() as losses:
            return losses(direction, [1.0])[0]

    def along(self) -> LossesAlong:
        """Return a context of :meth:`value` at many points, as of a line or a plane.

        Example:
            >>> import torch
            >>> surface = LossSurface(lambda p: p["w"].square().sum(), {"w": torch.ones(2)})
            >>> with surface.along() as losses:
            ...     losses(torch.tensor([1.0, 0.0]), [0.0, 1.0, 2.0])
            tensor([ 2.,  5., 10.])
        """
        return LossesAlong(self._loss_fns, self._params, weights=self._weights, reduce=self._reduce)

    @torch.inference_mode(False)
    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """Return the gradient of the weighted loss, shape ``(n,)``.

        Args:
            offset: take it at the parameters plus this vector, shape ``(n,)``.
        """
        return self._sum(
            lambda graph: graph.gradient,
            shape=(self.num_parameters,),
            graphs=None if offset is None else self._gradients(offset),
        )

    @torch.inference_mode(False)
    def loss_and_gradient(self, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return loss and gradient at once, a scalar and shape ``(n,)``.

        Args:
            offset: take them at the parameters plus this vector, shape ``(n,)``.
        """
        both = self._sum(
            lambda graph: torch.cat(
                [graph.loss.to(self.device, self.dtype).reshape(1), graph.gradient]
            ),
            shape=(1 + self.num_parameters,),
            graphs=None if offset is None else self._gradients(offset),
        )
        return both[0], both[1:]

    def vector(self) -> Tensor:
        """Return a copy of all parameters, shape ``(n,)``."""
        return flat([p.detach() for p in self._params.values()], self._params)

    def parameter_norm(self) -> float:
        """Return the Euclidean norm of all parameters together."""
        norms = [torch.linalg.vector_norm(p.detach()).cpu() for p in self._params.values()]
        return float(torch.stack(norms).norm())

    def gradient_noise(self) -> Tensor:
        r"""Return the norm of the gradient's standard error, a scalar; NaN for a single batch.

        The batches are taken as independent draws: the squared standard error of the weighted mean
        is :math:`\sum_b w_b^2 \|g_b - g\|^2 / (1 - \sum_b w_b^2)` with normalised weights.
        """
        mean = self.gradient()
        squares = self._sum(
            lambda graph: (graph.gradient - mean).square().sum(),
            shape=(),
            weights=[w * w for w in self._weights],
        )
        own = torch.tensor([sum(w * w for w in self._weights)], dtype=self.dtype)
        concentration = self._reduced(own.to(self.device))[0]
        unbiased = 1 - concentration
        return torch.where(unbiased > 1e-6, (squares / unbiased).sqrt(), torch.nan)

    def at(self, params: Mapping[str, Tensor]) -> LossSurface:
        """Return the same loss with some of the parameters replaced."""
        return LossSurface(
            self._loss_fns,
            self._params | dict(params),
            weights=self._given_weights,
            reduce=self._reduce,
        )

    def mean_over_batches(self, measure: Callable[[LossSurface], float]) -> float:
        """Return the weighted mean, over all processes, of a measure of each batch's own loss.

        With batches of m samples and a maximum for a measure this is m-sharpness (Foret et al.,
        2021, section 4.1). It is at least the measure of all batches together: a maximum of a mean
        is at most the mean of maxima.

        Args:
            measure: of a loss of one batch, which asks nothing of other processes.
        """
        alone = (LossSurface(f, self._params) for f in self._loss_fns)
        mean = self._sum(
            lambda each: torch.tensor(measure(each), dtype=self.dtype, device=self.device),
            shape=(),
            graphs=alone,
        )
        return float(mean)

    # -- batches ------------------------------------------------------------------------------

    def _checked_weights(self, weights: Sequence[float] | None) -> list[float]:
        given = [1.0] * len(self._loss_fns) if weights is None else [float(w) for w in weights]
        if len(given) != len(self._loss_fns) or not given:
            raise ValueError(
                f"`weights` must have one entry for each of the {len(self._loss_fns)} batches, "
                f"at least one, got {len(given)}."
            )
        for weight in given:
            if not 0 < weight < math.inf:
                raise ValueError(f"`weights` must be positive and finite, got {weight}.")
        return given

    def _leaves(self, offset: Tensor | None = None) -> dict[str, Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in self._params.items()}
        if offset is not None:
            for leaf, piece in zip(leaves.values(), split(offset, leaves), strict=True):
                leaf.data = leaf.data + piece
        return leaves

    def _losses(self) -> Iterable[Forward | GradientGraph]:
        """Yield each batch's loss at the parameters."""
        return self._forwards()

    def _forwards(self, offset: Tensor | None = None) -> Iterable[Forward]:
        leaves = self._leaves(offset)
        return (Forward(f, leaves) for f in self._loss_fns)

    def _gradients(self, offset: Tensor | None = None) -> Iterable[GradientGraph]:
        leaves = self._leaves(offset)
        return (GradientGraph(f, leaves, create_graph=False) for f in self._loss_fns)

    def _graphs(self) -> Iterable[GradientGraph]:
        """Yield each batch's loss and gradient at the parameters."""
        return self._gradients()

    def _sum(
        self,
        term: Callable[[Any], Tensor],
        *,
        shape: tuple[int, ...],
        graphs: Iterable[Any] | None = None,
        weights: Sequence[float] | None = None,
        waits: bool = True,
    ) -> Tensor:
        """Return the weighted sum of ``term`` over all batches of all processes.

        A process on which a term fails contributes NaN, so that no other waits for it. If the sum
        ``waits`` for its value, all processes then raise, each its own error. A product does not
        wait: this process goes on with NaN, all find it where they first look, and ``failure``
        tells why.
        """
        total: Tensor | None = None
        failure = self.failure
        try:
            if failure is None:
                total = self._own_sum(term, graphs or self._graphs(), weights or self._weights)
        except Exception as error:
            if self._reduce is None:
                raise
            failure = error
        if total is None:
            total = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        total = self._reduced(total)
        if not waits:
            self.failure = failure
        elif failure is not None:
            raise failure
        elif self._reduce is not None and not bool(torch.isfinite(total).all()):
            raise CurvatureError.not_finite()
        return total

    def _own_sum(
        self,
        term: Callable[[Any], Tensor],
        graphs: Iterable[Any],
        weights: Sequence[float],
    ) -> Tensor:
        """Return the weighted sum over the batches of this process."""
        total: Tensor | None = None
        with full_precision(self.device.type), torch.inference_mode(False), torch.enable_grad():
            for graph, weight in zip(graphs, weights, strict=True):
                value = term(graph).mul_(weight)  # each term is a fresh tensor
                total = value if total is None else total.add_(value)
        assert total is not None  # there is at least one batch
        return total

    def _reduced(self, total: Tensor) -> Tensor:
        return total if self._reduce is None else self._reduce(total)


def _check_params(params: Mapping[str, Tensor]) -> None:
    if not params:
        raise ValueError("`params` must hold at least one parameter, got none.")
    for name, p in params.items():
        if not isinstance(p, Tensor):
            raise TypeError(f"`params[{name!r}]` must be a tensor, got {type(p).__name__}.")
        if p.is_complex():
            raise TypeError(f"`params[{name!r}]` must be real, got {p.dtype}: leave it out.")
        if p.layout != torch.strided:
            raise TypeError(f"`params[{name!r}]` must be dense, got {p.layout}: leave it out.")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"`params[{name!r}]` must be float32 or float64, got {p.dtype}. The noise of "
                f"half-precision products hides most eigenvalues: cast with `.float()` first."
            )
