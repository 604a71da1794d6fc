"""LAMB: Adam whose step of each layer has the size of the layer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optkit.measures.trust_ratios import lamb_ratios
from lightning_optkit.optim.foreach import (
    add_quotients_,
    add_scaled_,
    beside,
    number,
    working_dtype,
)
from lightning_optkit.optim.layerwise import Bucket, LayerwiseOptimizer
from lightning_optkit.optim.settings import check_flags, check_number, check_rate, require

__all__ = ["LAMB"]


class LAMB(LayerwiseOptimizer):
    r"""Layer-wise adaptive moments: Adam, each layer by a step of the size of its weights.

    .. math::
        r = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}, \qquad
        w \leftarrow w - \gamma\,\frac{\phi(\|w\|)}{\|r + \lambda w\|}\,(r + \lambda w)

    for each parameter tensor w, with Adam's running means m of its gradient and v of the gradient
    squared, and t steps of its own: a parameter that gets its first gradient late starts at 1. A
    step thus has norm :math:`\gamma\,\phi(\|w\|)`. The quotient is 1 where a norm is zero, and in
    groups with ``layerwise=False``, where a step is that of :class:`torch.optim.AdamW`. Weight
    decay or not makes no difference to whether a layer is scaled.

    Args:
        params: parameters, or groups of them, such as :func:`lars_param_groups` makes: without
            groups biases and norm layers are scaled and decayed too.
        lr: :math:`\gamma`, at least 0: the share of a layer's norm that a step moves. A tensor of
            one element is used where it is, and not waited for.
        betas: :math:`\beta_1` and :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, at least 0, outside the root as in torch.
        weight_decay: :math:`\lambda`, at least 0. Where ``layerwise`` it turns the step, and does
            not lengthen it.
        max_weight_norm: :math:`\phi` is the smaller of the norm and this; ``None``: the norm.
        bias_correction: whether to divide by :math:`1 - \beta^t`, as the paper's algorithm does.
        layerwise: whether to scale; meant to be set in groups.
        maximize: go up the gradient.
        capturable: count steps on the device, so that CUDA graphs and compiled steps go on
            counting.
        foreach: ``False`` moves one tensor at a time, to the same numbers: slower on small ones.

    Raises:
        ValueError: if a setting cannot be.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([w], lr=0.1)
        >>> w.grad = torch.tensor([0.0, 50.0])
        >>> optimizer.step()
        >>> w.data, optimizer.last_trust_ratios()  # a tenth of 5
        (tensor([3.0000, 3.5000]), tensor([5.]))

    References:
        Y. You et al., *Large Batch Optimization for Deep Learning: Training BERT in 76 minutes*,
        ICLR 2020, algorithm 2.
    """

    _memory = "exp_avg"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_weight_norm: float | None = None,
        bias_correction: bool = True,
        layerwise: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_weight_norm": max_weight_norm,
            "bias_correction": bias_correction,
            "layerwise": layerwise,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # checkpoints count where their writer did
            for parameter in group["params"]:
                if "step" in (known := self.state.get(parameter, {})):
                    device = parameter.device if group["capturable"] else None
                    known["step"] = _counter(int(known["step"]), device)

    def _check(self, group: dict[str, Any]) -> None:
        check_flags(group, "bias_correction", "layerwise", "maximize", "capturable")
        check_rate(group["lr"])
        betas = group["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        require(pair, "betas", "two numbers in [0, 1)", betas, "Write `betas=(0.9, 0.999)`.")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, "Write `betas=(0.9, 0.999)`.", below=1)
        check_number("eps", group["eps"], "1e-6 is usual.")
        check_number("weight_decay", group["weight_decay"], "0.01 is usual, 0 is none.")
        if (most := group["max_weight_norm"]) is not None:
            name, advice = "max_weight_norm", "None is no limit."
            check_number(name, most, advice)
            require(most > 0, name, "positive", most, advice)

    def _begin(self, bucket: Bucket) -> None:
        bucket.make_state("exp_avg")
        bucket.make_state("exp_avg_sq")
        for state in bucket.states:
            device = bucket.params[0].device if bucket.group["capturable"] else None
            state["step"] = _counter(0, device)

    def _direct(self, bucket: Bucket) -> None:
        group, like = bucket.group, bucket.params[0]
        (beta1, beta2), decay, is_scaled = group["betas"], group["weight_decay"], group["layerwise"]
        lists = bucket.params, bucket.grads, bucket.state("exp_avg"), bucket.state("exp_avg_sq")
        floors, factors = _corrections(bucket)
        forget = number(beta2, like)
        shrink = number(decay if is_scaled else 1 - group["lr"] * decay, like)
        directions: list[Tensor] = []
        for part in bucket.parts():
            params, grads, m, v = (each[part] for each in lists)
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, forget)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            sizes = torch._foreach_sqrt(v)
            torch._foreach_add_(sizes, floors[part])
            if is_scaled:
                params = torch._foreach_mul(params, shrink)  # the directions, to be scaled
                directions += params
            elif decay != 0:
                torch._foreach_mul_(params, shrink)
            add_quotients_(params, m, sizes, factors[part])
        bucket.directions = bucket.measured = directions

    def _ratios(self, group: dict[str, Any], weight_norms: Tensor, norms: Tensor) -> Tensor:
        return lamb_ratios(weight_norms, norms, max_weight_norm=group["max_weight_norm"])

    def _move(self, bucket: Bucket) -> None:
        if bucket.group["layerwise"]:
            rate = bucket.group["lr"]
            add_scaled_(bucket.params, bucket.directions, bucket.ratios, share=-rate)


def _corrections(bucket: Bucket) -> tuple[Sequence[Any], Sequence[Any]]:
    r"""Count a step, and return what makes Adam's step of each mean m and mean square v.

    .. math:: \frac{f\,m}{\sqrt{v} + e}, \qquad
        e = \epsilon \sqrt{1 - \beta_2^t}, \qquad f = c\,\sqrt{1 - \beta_2^t} / (1 - \beta_1^t),

    which spares a pass over all numbers. The factor c is 1 for a direction that will be scaled, and
    minus the learning rate for a step that will not.

    Returns:
        e and f of each parameter, calculated in float64: in float32 1 - 0.999 has four digits.
    """
    group, like = bucket.group, bucket.params[0]
    share: Any = 1.0 if group["layerwise"] else -group["lr"]
    if isinstance(share, Tensor):
        share = beside(share, like)
    betas, eps, counts = group["betas"], group["eps"], _counted(bucket)
    if not group["bias_correction"]:
        return [number(eps, like)] * len(counts), [share] * len(counts)
    if isinstance(counts, Tensor):
        root, factor = _correction(counts.double(), *betas)
        dtype = working_dtype(like)
        return (eps * root).to(dtype).unbind(), (share * factor).to(dtype).unbind()
    known = {count: _correction(count, *betas) for count in set(counts)}
    floors = {count: number(eps * root, like) for count, (root, _) in known.items()}
    factors = {count: share * factor for count, (_, factor) in known.items()}
    return [floors[count] for count in counts], [factors[count] for count in counts]


def _correction(count: Any, beta1: float, beta2: float) -> tuple[Any, Any]:
    root = (1 - beta2**count) ** 0.5
    return root, root / (1 - beta1**count)


def _counted(bucket: Bucket) -> list[int] | Tensor:
    """Count a step of each parameter, and return the counts: on the device where they are there."""
    steps = [state["step"] for state in bucket.states]
    if isinstance(steps[0], Tensor):
        torch._foreach_add_(steps, 1)
        return torch.stack(steps)
    if bucket.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "`capturable` must be True in a CUDA graph, got False. Else each replay would correct "
            "the means as on the step that was captured."
        )
    for state in bucket.states:
        state["step"] += 1
    return [step + 1 for step in steps]


def _counter(count: int, device: torch.device | None) -> int | Tensor:
    """Return a count of steps: a tensor on the device, or a number."""
    if device is None:
        return count
    return torch.full((), float(count), dtype=torch.float32, device=device)
