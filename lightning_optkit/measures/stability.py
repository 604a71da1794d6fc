"""How curved may a loss be before the optimizer in use diverges on it?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.measures.lanczos import SymmetricOperator, rounding_noise
from lightning_optkit.measures.update_rules import UpdateRule, update_rule

__all__ = ["PreconditionedHessian", "StabilityThreshold", "stability_threshold"]


class PreconditionedHessian:
    r"""A Hessian as an adaptive optimizer sees it: :math:`D^{1/2} (H + W) D^{1/2}`.

    Symmetric, with the eigenvalues of :math:`D (H + W)`. An eigenvector ``u`` of it stands for the
    direction :math:`D^{1/2} u` in parameter space.

    Args:
        operator: the Hessian ``H``.
        preconditioner: the diagonal of ``D``, shape ``(n,)``, not negative.
        decay: the diagonal of ``W``, shape ``(n,)``: weight decay that is added to the gradient.

    Raises:
        ValueError: if a shape is wrong, or the preconditioner negative or not finite.

    Example:
        >>> import torch
        >>> scaled = PreconditionedHessian(torch.eye(2), torch.tensor([4.0, 0.25]))
        >>> scaled @ torch.ones(2)
        tensor([4.0000, 0.2500])
    """

    def __init__(
        self, operator: SymmetricOperator, preconditioner: Tensor, decay: Tensor | None = None
    ) -> None:
        decay = torch.zeros_like(preconditioner) if decay is None else decay
        for name, diagonal in (("preconditioner", preconditioner), ("decay", decay)):
            if diagonal.shape != operator.shape[:1]:
                raise ValueError(
                    f"`{name}` must have the shape ({operator.shape[0]},), got "
                    f"{tuple(diagonal.shape)}. The parameters must be those of the operator."
                )
        lowest, highest = (float(end) for end in preconditioner.aminmax())
        if not 0 <= lowest <= highest < math.inf:  # NaN is refused too
            raise ValueError(
                f"`preconditioner` must lie in [0, inf), got values from {lowest} to {highest}."
            )
        self._operator = operator
        self._root = preconditioner.to(operator.device, operator.dtype).sqrt()
        self._decay = decay.to(operator.device, operator.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self._operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors: the Hessian's."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors: the Hessian's."""
        return self._operator.device

    @property
    def works_in_blocks(self) -> bool:
        """Whether several vectors at once are cheaper than one after another."""
        return bool(getattr(self._operator, "works_in_blocks", False))

    @property
    def noise(self) -> float:
        """Rounding error of an eigenvalue relative to the largest: taken to be the Hessian's."""
        return float(getattr(self._operator, "noise", rounding_noise(self.dtype)))

    @property
    def failure(self) -> Exception | None:
        """What made the Hessian's products NaN on this process, if known."""
        failure: Exception | None = getattr(self._operator, "failure", None)
        return failure

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the products for ``vectors`` of shape ``(n,)`` or ``(n, k)``."""
        n = self.shape[0]
        if vectors.shape[:1] != (n,) or vectors.ndim > 2:
            got = tuple(vectors.shape)
            raise ValueError(f"`vectors` must have the shape ({n},) or ({n}, k), got {got}.")
        one = vectors.ndim == 1
        root, decay = (d if one else d[:, None] for d in (self._root, self._decay))
        scaled = root * vectors.to(self.device, self.dtype)
        return root * (self._operator @ scaled + decay * scaled)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class StabilityThreshold:
    r"""The largest curvature that an optimizer in its present state is stable at.

    On a quadratic loss with the Hessian :math:`H`, the optimizer's preconditioner and bias
    corrections held still, the parameters alternate in sign and grow without end exactly where
    :math:`\lambda_{max}(D^{1/2} (H + W) D^{1/2})` exceeds the threshold. Negative eigenvalues
    repel at any learning rate, and have no part in it.

    Attributes:
        threshold: the limit; infinite for a learning rate of zero.
        learning_rate: of the parameter group that the threshold is stated for: the first one among
            the parameters whose learning rate is not zero.
        preconditioner: the diagonal of ``D``, shape ``(n,)``: the optimizer's own, which is 1 for
            SGD. A group with another learning rate, momentum or decoupled decay is rescaled so that
            one threshold holds for all. Zero where a parameter has not been moved yet.
        decay: the diagonal of ``W``, shape ``(n,)``: weight decay that is added to the gradient.
        optimizer: name of its class.
    """

    threshold: float
    learning_rate: float
    preconditioner: Tensor
    decay: Tensor
    optimizer: str

    def precondition(self, operator: SymmetricOperator) -> PreconditionedHessian:
        """Return the operator whose largest eigenvalue is to be compared with the threshold.

        Args:
            operator: the Hessian, in the same parameters in the same order.
        """
        return PreconditionedHessian(operator, self.preconditioner, self.decay)


def stability_threshold(
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> StabilityThreshold:
    r"""Return the largest curvature that ``optimizer`` is stable at, in its present state.

    =====================  ==================================================  =================
    optimizer              threshold                                           preconditioner
    =====================  ==================================================  =================
    SGD                    :math:`2 / \eta`                                    1
    heavy ball             :math:`(2 + 2 \mu) / (\eta (1 - \tau))`             1
    Nesterov               :math:`(2 + 2 \mu) / (\eta (1 + 2 \mu))`            1
    RMSprop, Adagrad       :math:`2 / \eta`, with momentum                     1 / (root + eps)
                           :math:`(2 + 2 \mu) / \eta`
    Adam, AdamW, Adamax    :math:`(2 + 2 \beta_1) c_1 / (\eta (1 - \beta_1))`  1 / (root + eps)
    =====================  ==================================================  =================

    with the learning rate :math:`\eta`, the dampening :math:`\tau` and the bias correction
    :math:`c_1 = 1 - \beta_1^t`; the root of Adam's second moment is bias-corrected too. NAdam and
    RAdam follow from the same recurrence. Decoupled weight decay replaces 2 by
    :math:`2 - \eta \cdot` decay; coupled decay adds to ``H``.

    Exact for a quadratic and a preconditioner that stands still, for any mixture of parameter
    groups: a mode that alternates in sign has :math:`m = \pm g / (1 + \mu)` in each of them.

    Args:
        optimizer: after a step at least, where it is adaptive.
        params: parameters that the optimizer owns, by name, in the order of the operator.
        groups: hyperparameters in place of ``optimizer.param_groups``, in the same order: those of
            an earlier step, before a scheduler moved on.

    Raises:
        TypeError: if the threshold of this optimizer is not known; the message names those that
            are.
        ValueError: if it does not own a parameter, has made no step yet, maximizes, or diverges
            whatever the curvature.

    Example:
        >>> import torch
        >>> w = torch.zeros(2, requires_grad=True)
        >>> stability_threshold(torch.optim.SGD([w], lr=0.1), {"w": w}).threshold
        20.0

    References:
        J. M. Cohen et al., "Gradient descent on neural networks typically occurs at the edge of
        stability", 2021, appendix B. J. M. Cohen et al., "Adaptive gradient methods at the edge of
        stability", 2022, section 2.
    """
    rules = _rules(optimizer, params, groups or optimizer.param_groups)
    found = [rule for rule in rules if rule is not None]
    if not found:
        raise ValueError(
            f"`optimizer` must have made a step, got {type(optimizer).__name__} without a state: "
            "its preconditioner is not defined yet."
        )
    stated = next((rule for rule in found if rule.gain > 0), found[0])
    pairs = list(zip(rules, params.values(), strict=True))
    return StabilityThreshold(
        threshold=stated.threshold,
        learning_rate=stated.learning_rate,
        preconditioner=torch.cat([_diagonal(rule, p, stated) for rule, p in pairs]),
        decay=torch.cat([_constant(p, rule.coupled_decay if rule else 0.0) for rule, p in pairs]),
        optimizer=type(optimizer).__name__,
    )


def _rules(
    optimizer: Optimizer, params: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
) -> list[UpdateRule | None]:
    """Return each parameter's rule; ``None`` where it was not moved yet."""
    owner = {
        id(p): group
        for owned, group in zip(optimizer.param_groups, groups, strict=True)
        for p in owned["params"]
    }
    strangers = [name for name, p in params.items() if id(p) not in owner]
    if strangers or not params:
        raise ValueError(
            "`params` must be parameters that the optimizer owns, got "
            f"{', '.join(strangers[:5]) or 'none'}. Pass the module's own parameters, not copies, "
            "and only those of this optimizer."
        )
    # `optimizer.state` would make an entry for a parameter that it does not hold
    return [
        update_rule(optimizer, owner[id(p)], optimizer.state.get(p, {})) for p in params.values()
    ]


def _diagonal(rule: UpdateRule | None, parameter: Tensor, stated: UpdateRule) -> Tensor:
    """Return the parameter's part of ``D``, scaled to the threshold that is stated."""
    if rule is None:
        return _constant(parameter, 0.0)
    factor = stated.threshold / rule.threshold if stated.gain > 0 else 1.0
    if rule.preconditioner is None:
        return _constant(parameter, factor)
    return factor * rule.preconditioner.reshape(-1).to(parameter.device)


def _constant(parameter: Tensor, value: float) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.full((parameter.numel(),), value, dtype=dtype, device=parameter.device)
