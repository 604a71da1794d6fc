"""What an optimizer in its present state does to a parameter on a quadratic loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["KNOWN_OPTIMIZERS", "UpdateRule", "is_known", "update_rule"]

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class UpdateRule:
    r"""One optimizer step of one parameter, as a linear recurrence.

    With the gradient :math:`g` of the loss, the running mean :math:`m` and the preconditioner
    :math:`D` held still,

    .. math::
        m \leftarrow \mu m + (g + w \theta), \qquad
        \theta \leftarrow (1 - \delta) \theta - D \, (a \, (g + w \theta) + b \, m).

    Attributes:
        learning_rate: as the optimizer has it, schedule included.
        momentum: :math:`\mu`, in [0, 1).
        on_gradient: :math:`a`, what the step takes of the gradient itself.
        on_momentum: :math:`b`, what it takes of the running sum.
        coupled_decay: :math:`w`, weight decay that is added to the gradient.
        decoupled_decay: :math:`\delta`, the share of the parameter that a step takes away.
        preconditioner: :math:`D`, of the parameter's shape; ``None`` is the identity.
    """

    learning_rate: float
    momentum: float = 0.0
    on_gradient: float = 0.0
    on_momentum: float = 0.0
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0
    preconditioner: Tensor | None = None

    @property
    def gain(self) -> float:
        r"""Step that a gradient alternating in sign gets: :math:`a + b / (1 + \mu)`.

        The running sum of :math:`\pm g` is :math:`\pm g / (1 + \mu)`.
        """
        return self.on_gradient + self.on_momentum / (1 + self.momentum)

    @property
    def threshold(self) -> float:
        r"""Largest stable curvature of :math:`D H`: :math:`(2 - \delta) / (a + b / (1 + \mu))`.

        Above it a quadratic alternates in sign and grows. Infinite for a learning rate of zero.
        """
        return (2 - self.decoupled_decay) / self.gain if self.gain > 0 else float("inf")


def update_rule(optimizer: Optimizer, group: Group, state: State) -> UpdateRule | None:
    """Return what a step does to a parameter; ``None`` where no step was made yet.

    Args:
        optimizer: tells which rule holds.
        group: the hyperparameters, one of ``optimizer.param_groups`` or a copy of one.
        state: the parameter's entry of ``optimizer.state``, empty before its first step. Running
            means and bias corrections are taken as they are: those of the last step.

    Raises:
        TypeError: if the optimizer is not known, see :func:`is_known`.
        ValueError: if it maximizes, or diverges whatever the curvature.
    """
    if not is_known(optimizer):
        raise TypeError(
            f"`optimizer` must be one whose stability threshold is known ({KNOWN_OPTIMIZERS}), got "
            f"{type(optimizer).__name__}. A subclass may not override `step`."
        )
    if group.get("maximize"):
        raise ValueError(
            "`optimizer` must minimize, got `maximize=True`. Negate the loss in place of it."
        )
    bare = _RULES[_base(optimizer)](group, state)
    if bare is None:
        return None
    coupled, decoupled = _decays(optimizer, group)
    found = replace(bare, coupled_decay=coupled, decoupled_decay=decoupled)
    if not (found.momentum < 1 and decoupled < 2 and found.gain >= 0):
        raise ValueError(
            "`optimizer` must have a momentum below 1, a dampening of at most 1 and a learning "
            f"rate times decoupled weight decay below 2, got a momentum of {found.momentum}, a "
            f"gain of {found.gain} and a product of {decoupled}. It diverges on any loss."
        )
    return found


def is_known(optimizer: Optimizer) -> bool:
    """Return whether the stability threshold of this optimizer is known.

    Example:
        >>> is_known(torch.optim.Adam([torch.zeros(2)]))
        True
        >>> is_known(torch.optim.LBFGS([torch.zeros(2)]))
        False
    """
    base = _base(optimizer)
    return base is not None and _own_step(type(optimizer)) is _own_step(base)


def _base(optimizer: Optimizer) -> Any:
    return next((kind for kind in type(optimizer).__mro__ if kind in _RULES), None)


def _own_step(kind: Any) -> Any:
    """Return the function behind ``step``, below the wrapper that torch lays around it."""
    return inspect.unwrap(kind.step)


def _decays(optimizer: Optimizer, group: Group) -> tuple[float, float]:
    """Return the weight decay that is added to the gradient, and the share taken of a parameter."""
    decay = float(group["weight_decay"])
    # before torch 2.7 AdamW was a class of its own, without the flag
    if isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
        return 0.0, float(group["lr"]) * decay
    return decay, 0.0


# -- one function a family; each reads like the loop in torch --------------------------------------


def _sgd(group: Group, state: State) -> UpdateRule:
    rate, momentum = float(group["lr"]), float(group["momentum"])
    if momentum == 0:
        return UpdateRule(rate, on_gradient=rate)
    if group["nesterov"]:
        return UpdateRule(rate, momentum, on_gradient=rate, on_momentum=rate * momentum)
    # a buffer that takes (1 - dampening) g is (1 - dampening) times one that takes g
    return UpdateRule(rate, momentum, on_momentum=rate * (1 - float(group["dampening"])))


def _adam(group: Group, state: State) -> UpdateRule | None:
    if not state:
        return None
    step, rate, beta1, beta2 = _adam_numbers(group, state)
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return UpdateRule(
        rate,
        beta1,
        on_momentum=rate * (1 - beta1) / (1 - beta1**step),
        preconditioner=_inverse_root(square, group, scale=1 / (1 - beta2**step)),
    )


def _nadam(group: Group, state: State) -> UpdateRule | None:
    if not state:
        return None
    step, rate, beta1, beta2 = _adam_numbers(group, state)
    now, following = (
        beta1 * (1 - 0.5 * 0.96 ** (k * float(group["momentum_decay"]))) for k in (step, step + 1)
    )
    product = float(state["mu_product"])
    return UpdateRule(
        rate,
        beta1,
        on_gradient=rate * (1 - now) / (1 - product),
        on_momentum=rate * (1 - beta1) * following / (1 - product * following),
        preconditioner=_inverse_root(state["exp_avg_sq"], group, scale=1 / (1 - beta2**step)),
    )


def _radam(group: Group, state: State) -> UpdateRule | None:
    if not state:
        return None
    step, rate, beta1, beta2 = _adam_numbers(group, state)
    corrected = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / corrected
    on_momentum = rate * (1 - beta1) / (1 - beta1**step)
    preconditioner = None
    if length > 5:  # else the variance is too uncertain to be divided by
        shorter = (length - 4) * (length - 2) * longest
        rectified = (shorter / ((longest - 4) * (longest - 2) * length)) ** 0.5
        on_momentum *= rectified * corrected**0.5
        preconditioner = _inverse_root(state["exp_avg_sq"], group)
    return UpdateRule(rate, beta1, on_momentum=on_momentum, preconditioner=preconditioner)


def _adamax(group: Group, state: State) -> UpdateRule | None:
    if not state:
        return None
    step, rate, beta1, _ = _adam_numbers(group, state)
    return UpdateRule(
        rate,
        beta1,
        on_momentum=rate * (1 - beta1) / (1 - beta1**step),
        preconditioner=_at_least_single(state["exp_inf"]).reciprocal(),
    )


def _rmsprop(group: Group, state: State) -> UpdateRule | None:
    if not state:
        return None
    rate, momentum = float(group["lr"]), float(group["momentum"])
    square = _at_least_single(state["square_avg"])
    if group["centered"]:
        square = (square - _at_least_single(state["grad_avg"]).square()).clamp(min=0)
    preconditioner = _inverse_root(square, group)
    if momentum == 0:
        return UpdateRule(rate, on_gradient=rate, preconditioner=preconditioner)
    return UpdateRule(rate, momentum, on_momentum=rate, preconditioner=preconditioner)


def _adagrad(group: Group, state: State) -> UpdateRule | None:
    if not state or float(state["step"]) == 0:  # its state is made with the optimizer
        return None
    rate = float(group["lr"])
    slowed = rate / (1 + (float(state["step"]) - 1) * float(group["lr_decay"]))
    return UpdateRule(
        rate,
        on_gradient=slowed,
        preconditioner=_inverse_root(state["sum"], group),
    )


def _adam_numbers(group: Group, state: State) -> tuple[float, float, float, float]:
    """Return the step, the learning rate and the two betas: each may be a tensor."""
    beta1, beta2 = group["betas"]
    return float(state["step"]), float(group["lr"]), float(beta1), float(beta2)


def _inverse_root(square: Tensor, group: Group, *, scale: float = 1.0) -> Tensor:
    return 1 / ((_at_least_single(square) * scale).sqrt() + float(group["eps"]))


def _at_least_single(tensor: Tensor) -> Tensor:
    """Return the whole of a state to calculate with: half precision would round ``eps`` away."""
    if isinstance(tensor, DTensor):  # FSDP2's shards: every rank comes here
        tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


_RULES: dict[type[Optimizer], Callable[[Group, State], UpdateRule | None]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}

KNOWN_OPTIMIZERS = ", ".join(kind.__name__ for kind in _RULES)
"""Names of the optimizers whose rule is known, for messages."""
