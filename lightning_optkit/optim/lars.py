"""LARS: SGD whose step of each layer is scaled to the size of the layer's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optkit.measures.trust_ratios import lars_ratios
from lightning_optkit.optim.foreach import Tensors, add_scaled_, number
from lightning_optkit.optim.layerwise import Bucket, LayerwiseOptimizer
from lightning_optkit.optim.settings import check_flags, check_number, check_rate, require

__all__ = ["LARS"]


class LARS(LayerwiseOptimizer):
    r"""Layer-wise adaptive rate scaling: SGD with momentum, each layer by a rate of its own.

    .. math::
        \lambda = \frac{\eta\,\|w\|}{\|g\| + \beta\,\|w\| + \epsilon}, \qquad
        v \leftarrow m\,v + (1 - d)\,\lambda\,(g + \beta w), \qquad
        w \leftarrow w - \gamma\,v

    for each parameter tensor w with gradient g. :math:`\lambda = 1` where :math:`\|w\|` or
    :math:`\|g\|` is zero, and in groups with ``layerwise=False``, where a step is that of
    :class:`torch.optim.SGD` to the bit. Weight decay or not makes no difference to whether a layer
    is scaled. As in torch, the first v is the whole :math:`\lambda\,(g + \beta w)`.

    The paper folds the rate into the velocity: :math:`v \leftarrow m\,v + \gamma\lambda\,(g + \beta
    w)`, :math:`w \leftarrow w - v`. Both agree at a constant rate. When it changes, the folded
    velocity goes on at the old rate for about :math:`1 / (1 - m)` steps, and wants Goyal et al.'s
    momentum correction.

    Args:
        params: parameters, or groups of them, such as :func:`lars_param_groups` makes: without
            groups biases and norm layers are scaled and decayed too.
        lr: :math:`\gamma`, at least 0; a tensor of one element is used where it is, and not waited
            for. With the default ``trust_coefficient`` a usual one is of order 1 to 30.
        momentum: m, in [0, 1).
        dampening: d, in [0, 1).
        weight_decay: :math:`\beta`, at least 0.
        nesterov: step along :math:`\lambda\,(g + \beta w) + m\,v`; needs a momentum, no dampening.
        trust_coefficient: :math:`\eta`, positive.
        eps: :math:`\epsilon`, at least 0. The paper has none; with it a layer whose gradient is
            rounding noise takes no step of full size.
        layerwise: whether to scale; meant to be set in groups.
        fold_lr: whether the rate enters the velocity, as in the paper.
        maximize: go up the gradient.
        foreach: ``False`` moves one tensor at a time, to the same numbers: slower on small ones.

    Raises:
        ValueError: if a setting cannot be.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([w], lr=1.0, trust_coefficient=0.1, eps=0.0)
        >>> w.grad = torch.tensor([0.0, 50.0])
        >>> optimizer.step()
        >>> w.data, optimizer.last_trust_ratios()  # 0.1 * 5 / 50
        (tensor([3.0000, 3.5000]), tensor([0.0100]))

    References:
        Y. You, I. Gitman, B. Ginsburg, *Large Batch Training of Convolutional Networks*, 2017,
        algorithm 1. P. Goyal et al., *Accurate, Large Minibatch SGD*, 2017, section 3.
    """

    _memory = "momentum_buffer"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        layerwise: bool = True,
        fold_lr: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "layerwise": layerwise,
            "fold_lr": fold_lr,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_flags(group, "nesterov", "layerwise", "fold_lr", "maximize")
        check_rate(group["lr"])
        check_number("momentum", group["momentum"], "0.9 is usual, 0 is none.", below=1)
        check_number("dampening", group["dampening"], "0 is none.", below=1)
        check_number("weight_decay", group["weight_decay"], "5e-4 is usual, 0 is none.")
        check_number("eps", group["eps"], "0 is the paper's.")
        trust, name = group["trust_coefficient"], "trust_coefficient"
        check_number(name, trust, "0.001 is usual.")
        require(trust > 0, name, "positive", trust, "0.001 is usual; 0 would stop training.")
        if group["nesterov"]:
            plain = group["momentum"] > 0 and group["dampening"] == 0 and not group["fold_lr"]
            rule = "used with a momentum, no dampening and `fold_lr=False`"
            require(plain, "nesterov", rule, True, "Write `nesterov=False`, or change those.")

    def _begin(self, bucket: Bucket) -> None:
        if bucket.group["momentum"] != 0:
            bucket.make_state(self._memory)

    def _direct(self, bucket: Bucket) -> None:
        grads, decay = bucket.grads, bucket.group["weight_decay"]
        bucket.measured = grads
        bucket.directions = torch._foreach_neg(grads) if bucket.group["maximize"] else grads
        if decay != 0:
            bucket.directions = torch._foreach_add(bucket.directions, bucket.params, alpha=decay)

    def _ratios(self, group: dict[str, Any], weight_norms: Tensor, norms: Tensor) -> Tensor:
        return lars_ratios(
            weight_norms,
            norms,
            trust_coefficient=group["trust_coefficient"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _move(self, bucket: Bucket) -> None:
        group, params = bucket.group, bucket.params
        directions, scales, rate = bucket.directions, bucket.ratios, group["lr"]
        momentum = group["momentum"]
        if momentum == 0:
            add_scaled_(params, directions, scales, share=-rate)
            return
        share, rate = (rate, 1.0) if group["fold_lr"] else (1.0, rate)
        if group["nesterov"] and scales is not None:  # for the velocity and for the step
            directions, scales = torch._foreach_mul(directions, scales.unbind()), None
        velocities: Tensors = bucket.state(self._memory)
        if not bucket.is_new:  # else they are zeros, and what enters is not dampened
            torch._foreach_mul_(velocities, number(momentum, velocities[0]))
            share = share * (1 - group["dampening"])
        add_scaled_(velocities, directions, scales, share=share)
        if group["nesterov"]:
            velocities = torch._foreach_add(directions, velocities, alpha=momentum)
        add_scaled_(params, velocities, None, share=-rate)
