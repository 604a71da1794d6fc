"""The Gauss–Newton matrix of a loss, as a symmetric operator beside the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.gradient_graph import (
    GradientGraph,
    LossFn,
    evaluated,
    explained,
    flat,
)
from lightning_optkit.measures.operators import HessianOperator

__all__ = ["GaussNewtonOperator"]


class GaussNewtonOperator(HessianOperator):
    r"""The generalised Gauss–Newton matrix of a loss in its parameters, as a symmetric operator.

    With the outputs :math:`z(\theta)` of a net and their loss :math:`\ell(z)`,

    .. math:: G = J^\top \, \nabla^2_z \ell \; J, \qquad J = \partial z / \partial \theta,

    averaged over batches as the Hessian is. It leaves out the curvature of the net itself,
    :math:`H - G = \sum_i \partial_{z_i} \ell \, \nabla^2 z_i`, is positive semi-definite where
    :math:`\ell` is convex, and for cross entropy and squared error is the Fisher matrix of the
    model's own distribution. ``gradient`` and ``loss`` are those of the whole loss.

    The outputs are the arguments of torch's own loss functions (:data:`OUTPUT_LOSSES`) that need a
    gradient, wherever ``loss_fn`` calls one; of ``nll_loss`` and ``kl_div``, which are linear in
    theirs, the input of the ``log_softmax`` before. Any other ``loss_fn`` returns ``(loss,
    outputs)``. What reaches the loss past the outputs, such as a penalty on the weights, has no
    part in ``G``.

    Args:
        loss_fn: as for :class:`HessianOperator`; may return ``(loss, outputs)``, the outputs a
            tensor or a sequence of tensors.
        params: as for :class:`HessianOperator`, as are the others.

    Raises:
        CurvatureError: at the first product, if no outputs are found or one depends on another.

    Example:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> x, y = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> op = GaussNewtonOperator(lambda p: mse_loss(p["w"] * x, y), {"w": torch.ones(1)})
        >>> op @ torch.ones(1)
        tensor([5.])

    References:
        N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient
        descent", 2002, section 3.
    """

    matrix_name: ClassVar[str] = "Gauss–Newton"

    def _graph(self, loss_fn: LossFn, leaves: dict[str, Tensor]) -> _GaussNewtonGraph:
        return _GaussNewtonGraph(loss_fn, leaves)

    @torch.inference_mode(False)
    def difference_product(self, vector: Tensor, radius: float) -> tuple[Tensor, float]:
        """Return about ``G @ vector``, with ``J v`` by a central difference of the outputs.

        Its rounding error, returned as 0, is far below that of a difference of gradients.
        """
        ahead, behind = self._leaves(radius * vector), self._leaves(-radius * vector)

        def graphs() -> Iterator[_Pushed]:
            for loss_fn in self._loss_fns:
                pairs = zip(_outputs(loss_fn, ahead), _outputs(loss_fn, behind), strict=True)
                pushed = [(a - b).detach() / (2 * radius) for a, b in pairs]
                yield _Pushed(self._graph(loss_fn, self._leaves()), pushed)

        product = self._sum(
            lambda each: each.graph.pulled(each.pushed), shape=self.shape[:1], graphs=graphs()
        )
        return product, 0.0


class _Pushed(NamedTuple):
    """One batch's graph, and a change of its outputs."""

    graph: _GaussNewtonGraph
    pushed: list[Tensor]


class _GaussNewtonGraph(GradientGraph):
    """One batch's loss, gradient and outputs, with the graphs for :math:`J` and its transpose."""

    def __init__(self, loss_fn: LossFn, leaves: dict[str, Tensor]) -> None:
        self._leaves = leaves
        loss, self._outputs = _evaluated(loss_fn, leaves)
        parameters = tuple(leaves.values())
        try:
            self._gradients = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            self._slopes = torch.autograd.grad(loss, self._outputs, create_graph=True)
            # the transposed product is linear in these zeros: its derivative in them is J v
            self._dummies = [torch.zeros_like(z, requires_grad=True) for z in self._outputs]
            self._pulled = torch.autograd.grad(
                self._outputs,
                parameters,
                self._dummies,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            raise explained(error) from error
        self.loss = loss.detach().reshape(())
        self._check_independence()

    @property
    def gradient_tangent(self) -> Tensor:
        """The product with the leaves' tangents, ``J v`` by forward mode."""
        duals = [forward_ad.unpack_dual(z) for z in self._outputs]
        pushed = [torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals]
        return self.pulled(pushed)

    def pulled(self, pushed: Sequence[Tensor]) -> Tensor:
        """Return the product whose ``J v`` is given, shape ``(n,)``."""
        products = self._pull(self._curved(pushed))
        primals = [forward_ad.unpack_dual(p).primal for p in products]
        return flat(primals, self._leaves).detach()

    def _product(
        self, pieces: Sequence[Tensor], *, batched: bool = False, keep: bool = True
    ) -> tuple[Tensor, ...]:
        pushed = _derivative(self._pulled, self._dummies, pieces, batched=batched)
        curved = self._curved(pushed, batched=batched)
        return self._pull(curved, batched=batched)

    def _curved(self, pushed: Sequence[Tensor], *, batched: bool = False) -> tuple[Tensor, ...]:
        """Return the Hessian of the loss in its outputs, applied."""
        return _derivative(self._slopes, self._outputs, pushed, batched=batched)

    def _pull(self, curved: Sequence[Tensor], *, batched: bool = False) -> tuple[Tensor, ...]:
        """Return the transposed Jacobian, applied."""
        return _derivative(self._outputs, tuple(self._leaves.values()), curved, batched=batched)

    def _check_independence(self) -> None:
        for i, first in enumerate(self._outputs):
            others = [z for j, z in enumerate(self._outputs) if j != i]
            found = (
                torch.autograd.grad(
                    others, first, [torch.zeros_like(z) for z in others], True, allow_unused=True
                )
                if others
                else (None,)
            )
            if found[0] is not None:
                raise CurvatureError(
                    "An output of the loss depends on another, so their Jacobian counts it twice. "
                    "Let `loss_fn` return `(loss, outputs)` with independent outputs."
                )


def _derivative(
    of: Sequence[Tensor], by: Sequence[Tensor], vectors: Sequence[Tensor], *, batched: bool
) -> tuple[Tensor, ...]:
    """Return the vector-Jacobian product, zeros where nothing depends on anything."""
    dependent = [i for i, tensor in enumerate(of) if tensor.requires_grad]
    if not dependent:
        lead = vectors[0].shape[:1] if batched else ()
        return tuple(tensor.new_zeros(lead + tensor.shape) for tensor in by)
    try:
        return torch.autograd.grad(
            [of[i] for i in dependent],
            tuple(by),
            [vectors[i] for i in dependent],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )
    except RuntimeError as error:
        raise explained(error) from error


def _outputs(loss_fn: LossFn, leaves: dict[str, Tensor]) -> list[Tensor]:
    return _evaluated(loss_fn, leaves)[1]


def _evaluated(loss_fn: LossFn, leaves: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the outputs, seen or returned, that depend on the leaves."""
    with _OutputsSeen() as seen:
        loss, outputs = evaluated(loss_fn, leaves)
    outputs = seen.outputs if outputs is None else outputs
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    if not isinstance(outputs, (list, tuple)) or not all(isinstance(z, Tensor) for z in outputs):
        raise CurvatureError(
            "`loss_fn` must return `(loss, outputs)` with a tensor or a sequence of tensors, got "
            f"{type(outputs).__name__}. Of a dictionary pass `tuple(outputs.values())`."
        )
    return loss, _checked(list(outputs))


def _checked(outputs: list[Tensor]) -> list[Tensor]:
    found = [z for z in outputs if z.requires_grad]
    if not found:
        raise CurvatureError(
            "The Gauss-Newton matrix needs the net's outputs, got a loss that calls none of "
            f"{', '.join(sorted(f.__name__ for f in OUTPUT_LOSSES))} on them. Let `loss_fn` return "
            "`(loss, outputs)`, or measure the Hessian."
        )
    return found


OUTPUT_LOSSES: tuple[Callable[..., Tensor], ...] = (
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.cross_entropy,
    functional.gaussian_nll_loss,
    functional.huber_loss,
    functional.kl_div,
    functional.mse_loss,
    functional.multilabel_soft_margin_loss,
    functional.nll_loss,
    functional.poisson_nll_loss,
    functional.smooth_l1_loss,
    functional.soft_margin_loss,
)
"""Loss functions of torch whose arguments, where they need a gradient, are the net's outputs."""

_LINEAR = (functional.nll_loss, functional.kl_div)
_SOFTMAXES = (functional.log_softmax, torch.log_softmax, Tensor.log_softmax)


class _OutputsSeen(TorchFunctionMode):
    """Watches the loss functions being called, and keeps what they are called on."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self._logits: list[tuple[Tensor, Tensor]] = []  # log-probabilities, and what they are of

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and look at its first argument."""
        given = dict(kwargs or {})
        result = func(*args, **given)
        tensors = [each for each in (*args, *given.values()) if isinstance(each, Tensor)]
        if func in _SOFTMAXES and tensors:
            self._logits.append((result, tensors[0]))
        elif func in OUTPUT_LOSSES:
            for tensor in tensors:  # a target or a variance may come from the net as well
                if tensor.requires_grad:
                    self._take(self._before_softmax(tensor) if func in _LINEAR else tensor)
        return result

    def _take(self, output: Tensor) -> None:
        if not any(output is known for known in self.outputs):
            self.outputs.append(output)

    def _before_softmax(self, log_probabilities: Tensor) -> Tensor:
        for result, logits in self._logits:
            if result is log_probabilities:
                return logits
        raise CurvatureError(
            "`nll_loss` and `kl_div` are linear in their input, so its curvature is none. Call "
            "them on the result of `log_softmax` itself, use `cross_entropy`, or let `loss_fn` "
            "return `(loss, outputs)` with the logits."
        )
