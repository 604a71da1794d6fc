"""LARS and LAMB written out, one number after another in float64, and gradients to run them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = [(3, 4), (5,), (), (2, 3, 2), (1,)]
Steps = Sequence[Sequence[Tensor | None]]


def start(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> list[nn.Parameter]:
    """Return parameters of the shapes above; the last is zero, so that it has no ratio at first."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    values[-1].zero_()
    return [nn.Parameter(value.to(dtype)) for value in values]


def random_gradients(num_steps: int, dtype: torch.dtype = torch.float64, *, seed: int = 1) -> Steps:
    """Return gradients of each step. Some are missing, one comes late, and some are zero."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[Tensor | None]] = []
    for step in range(num_steps):
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        grads: list[Tensor | None] = [(10.0 ** (i - 2) * g).to(dtype) for i, g in enumerate(drawn)]
        if step < 3:
            grads[3] = None
        if step % 4 == 1:
            grads[1] = None
        if step % 5 == 2:
            grads[0] = torch.zeros_like(drawn[0], dtype=dtype)
        steps.append(grads)
    return steps


def run(optimizer: torch.optim.Optimizer, steps: Steps) -> list[Tensor]:
    """Step with the gradients, and return the parameters in the end."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for grads in steps:
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def loop(move: Callable[..., Tensor], steps: Steps, **options: Any) -> list[Tensor]:
    """Return where a rule for one parameter leads the parameters of :func:`start`."""
    weights = [parameter.detach().clone() for parameter in start()]
    memories: list[dict[str, Any]] = [{} for _ in weights]
    for grads in steps:
        for i, grad in enumerate(grads):
            if grad is not None:
                weights[i] = move(weights[i], grad, memories[i], **options)
    return weights


def lars(
    w: Tensor,
    g: Tensor,
    memory: dict[str, Any],
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    layerwise: bool = True,
    fold_lr: bool = False,
    maximize: bool = False,
) -> Tensor:
    if maximize:
        g = -g
    w_norm, g_norm = float(w.square().sum()) ** 0.5, float(g.square().sum()) ** 0.5
    ratio = 1.0
    if layerwise and w_norm > 0 and g_norm > 0:
        ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
    direction = ratio * (g + weight_decay * w)
    if momentum == 0:
        return w - lr * direction
    enters = lr * direction if fold_lr else direction
    if "v" not in memory:
        memory["v"] = enters
    else:
        memory["v"] = momentum * memory["v"] + (1 - dampening) * enters
    if fold_lr:
        return w - memory["v"]
    return w - lr * (direction + momentum * memory["v"] if nesterov else memory["v"])


def lamb(
    w: Tensor,
    g: Tensor,
    memory: dict[str, Any],
    *,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    max_weight_norm: float | None = None,
    bias_correction: bool = True,
    layerwise: bool = True,
    maximize: bool = False,
) -> Tensor:
    if maximize:
        g = -g
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    v = memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g * g
    if bias_correction:
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    update = m / (v.sqrt() + eps) + weight_decay * w
    w_norm, u_norm = float(w.square().sum()) ** 0.5, float(update.square().sum()) ** 0.5
    if not layerwise or w_norm == 0 or u_norm == 0:
        return w - lr * update
    phi = w_norm if max_weight_norm is None else min(w_norm, max_weight_norm)
    return w - lr * phi / u_norm * update
