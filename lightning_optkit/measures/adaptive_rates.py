"""The learning rate that an adaptive optimizer gives to each number, and to all of a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.measures.update_rules import is_known, update_rule

__all__ = ["effective_rate", "mean_rate"]


def effective_rate(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor | None:
    r"""Return how far a step goes for each unit of a gradient that has stood still so far.

    .. math:: \frac{\eta}{\sigma} = D \Big(a + b\,\frac{1 - \mu^t}{1 - \mu}\Big)

    after t steps, with the letters of
    :class:`~lightning_optkit.measures.update_rules.UpdateRule`. For Adam and AdamW that is
    :math:`\eta / (\sqrt{\hat v} + \epsilon)` exactly; momentum of RMSprop adds its
    :math:`1 / (1 - \mu)`, and RAdam its rectification.

    Args:
        optimizer: Adam, AdamW, NAdam, RAdam, Adamax, RMSprop or Adagrad.
        group: the hyperparameters, one of ``optimizer.param_groups`` or a copy of one.
        state: the parameter's entry of ``optimizer.state``, after a step.

    Returns:
        A tensor of the parameter's shape, or of one number where all have the same; ``None`` for
        another optimizer, and before the first step.

    Example:
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = torch.optim.Adam([w], lr=0.1, eps=0.0)
        >>> w.grad = torch.tensor([2.0, 4.0])
        >>> optimizer.step()
        >>> effective_rate(optimizer, optimizer.param_groups[0], optimizer.state[w]).tolist()
        [0.05..., 0.025...]
    """
    if "step" not in state or not is_known(optimizer):  # SGD counts no steps
        return None
    try:
        rule = update_rule(optimizer, {**group, "maximize": False}, state)  # the same both ways
    except ValueError:  # a momentum of 1 or more: there is no such rate
        return None
    if rule is None:
        return None
    steps = float(state["step"])
    on_momentum = rule.on_momentum * (1 - rule.momentum**steps) / (1 - rule.momentum)
    rate = rule.on_gradient + on_momentum
    if rule.preconditioner is None:
        return torch.tensor(rate, dtype=torch.float64)
    return rate * rule.preconditioner


def mean_rate(rates: Sequence[float] | Tensor, sizes: Sequence[int] | None = None) -> float:
    r"""Return :math:`\eta / \sigma` of many numbers, with the root mean square :math:`\sigma`.

    .. math:: \Big(\frac{1}{n} \sum_i r_i^{-2}\Big)^{-1/2}

    For Adam that is :math:`\eta` over the root mean square gradient. A number that never has a
    gradient counts for nothing: its own rate is 1 / eps, and any other mean would be lost to it.

    Args:
        rates: of each; NaN for one without is passed over.
        sizes: how many numbers have this rate; by default one.

    Example:
        >>> mean_rate([0.1, 0.1]), mean_rate([0.1, 1e7], [99, 1]) < 0.101, mean_rate([])
        (0.1, True, nan)
    """
    if isinstance(rates, Tensor):
        return float(math.sqrt(rates.numel()) / torch.linalg.vector_norm(1 / rates))
    weights = [1] * len(rates) if sizes is None else sizes
    known = [(r, n) for r, n in zip(rates, weights, strict=True) if not math.isnan(r)]
    if not known or any(rate == 0 for rate, _ in known):
        return 0.0 if known else math.nan
    sigma = math.hypot(*(math.sqrt(n) / rate for rate, n in known))
    return math.sqrt(sum(n for _, n in known)) / sigma
