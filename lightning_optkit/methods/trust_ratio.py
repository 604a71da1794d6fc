"""Layer-wise scaling of what any optimizer does: of its gradients before it, or of its updates.

Either is a block around ``optimizer.step()``. What multiplies a layer is injected: LARS and LAMB
are two formulas among others.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = [
    "Group",
    "LayerRatios",
    "Layers",
    "Norms",
    "Ratios",
    "scaled_gradients",
    "scaled_updates",
]

Group = dict[str, Any]
"""Parameters and their settings, as torch keeps them."""

Norms = Callable[[list[Tensor]], Tensor]
"""``(k tensors) -> their norms``, shape (k,): of this rank's shards, where they are cut."""


@dataclass(frozen=True, eq=False)
class Layers:
    """Parameters with a gradient, on one device, of one dtype, cut over ranks in one way.

    Attributes:
        parameters: k of them.
        settings: of each, its group's as they were before the update; the same object for members
            of one group, which follow one another.
    """

    parameters: list[Tensor]
    settings: list[Group]

    def by_group(self) -> Iterator[tuple[Group, slice]]:
        """Yield the settings of each group, and where its parameters are."""
        end = 0
        for _, members in groupby(self.settings, key=id):
            same = list(members)
            start, end = end, end + len(same)
            yield same[0], slice(start, end)


Ratios = Callable[[Layers, Tensor, Tensor], Tensor]
"""``(layers, norms of weights, norms of gradients or updates) -> ratios``, of shape (k,) each."""

LayerRatios = list[tuple[list[Tensor], Tensor]]
"""Parameters, and what the gradient or the update of each was multiplied by."""


@contextmanager
@torch.no_grad()
def scaled_gradients(
    optimizer: Optimizer, scaled: Container[Tensor], *, norms: Norms, ratios: Ratios
) -> Iterator[LayerRatios]:
    r"""Have each layer's gradient, weight decay included, multiplied by its ratio for the block.

    .. math:: g \leftarrow \lambda\,(g + \beta w), \qquad \beta \leftarrow 0

    with :math:`\lambda = 1` for parameters that are not to be scaled. Around an optimizer that is
    linear in its gradients that is LARS. Other tensors take the place of ``grad``, which the
    optimizer may write into. Afterwards the user's own are back, unchanged, and so is the groups'
    ``weight_decay``; what someone else put there in the meantime is kept.

    Args:
        optimizer: adds ``weight_decay``, where its groups have it, to the gradient.
        scaled: those of its parameters to scale. Without a gradient they are left alone.
        norms: :math:`\|\cdot\|` of tensors.
        ratios: :math:`\lambda` of layers; their settings hold :math:`\beta`.

    Yields:
        What gradients are multiplied by.

    Raises:
        ValueError: if a gradient to scale is sparse, or is one that the optimizer unscales itself.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> p.grad = torch.tensor([0.0, 2.0])
        >>> sgd = torch.optim.SGD([p], lr=1.0)
        >>> with scaled_gradients(
        ...     sgd,
        ...     {p},
        ...     norms=lambda tensors: torch.stack([tensor.norm() for tensor in tensors]),
        ...     ratios=lambda layers, of_weights, of_gradients: of_weights / of_gradients,
        ... ) as found:
        ...     sgd.step()
        >>> found[0][1].tolist(), p.tolist(), p.grad.tolist()
        ([2.5], [3.0, -1.0], [0.0, 2.0])
    """
    if getattr(optimizer, "grad_scale", None) is not None:
        raise ValueError(
            f"The gradients of {type(optimizer).__name__} must be unscaled before trust ratios "
            "multiply them, got those of a gradient scaler, which a fused optimizer unscales "
            "itself. Build it with `fused=False`."
        )
    found: LayerRatios = []
    stand_ins: list[tuple[Tensor, Tensor | None, Tensor]] = []
    decays: list[tuple[Group, Any]] = []
    for layers in _alike(optimizer, scaled):
        gradients, factors = _scaled(layers, norms, ratios)
        stand_ins += _stand_ins(layers.parameters, gradients)
        found.append((layers.parameters, factors))
    replaced = {p for p, _, _ in stand_ins}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and not replaced.isdisjoint(group["params"]):
            decays.append((group, group["weight_decay"]))
            rest = [p for p in group["params"] if p.grad is not None and p not in replaced]
            stand_ins += _stand_ins(rest, _decayed(rest, group))
    try:
        for p, _, stand_in in stand_ins:
            p.grad = stand_in
        for group, _ in decays:
            group["weight_decay"] = _NO_DECAY
        yield found
    finally:
        for p, gradient, stand_in in stand_ins:
            if p.grad is stand_in:
                p.grad = gradient
        for group, decay in decays:
            if group.get("weight_decay") is _NO_DECAY:
                group["weight_decay"] = decay


@contextmanager
@torch.no_grad()
def scaled_updates(
    optimizer: Optimizer, scaled: Container[Tensor], *, norms: Norms, ratios: Ratios
) -> Iterator[LayerRatios]:
    r"""Have what each layer's weights move in the block multiplied by its ratio, at its end.

    .. math:: w \leftarrow w_{old} - r\,u, \qquad u = w_{old} - w_{new}

    Around an optimizer that scales its gradients element by element that is LAMB. It is computed
    as :math:`w_{new} + (1 - r)\,u`, which leaves every bit where :math:`r = 1`. After a block that
    raised, weights are as it left them.

    Args:
        optimizer: moves the parameters in the block.
        scaled: those of its parameters to scale. Without a gradient they are left alone.
        norms: :math:`\|\cdot\|` of tensors.
        ratios: :math:`r` of layers; their settings hold the learning rate.

    Yields:
        What updates were multiplied by: empty until the block has ended.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> p.grad = torch.tensor([0.0, 2.0])
        >>> sgd = torch.optim.SGD([p], lr=1.0)
        >>> with scaled_updates(
        ...     sgd,
        ...     {p},
        ...     norms=lambda tensors: torch.stack([tensor.norm() for tensor in tensors]),
        ...     ratios=lambda layers, of_weights, of_updates: of_weights / of_updates,
        ... ) as found:
        ...     sgd.step()
        >>> found[0][1].tolist(), p.tolist()
        ([2.5], [3.0, -1.0])
    """
    found: LayerRatios = []
    begun = []
    for layers in _alike(optimizer, scaled):
        before = [_local(p).clone() for p in layers.parameters]
        begun.append((layers, before, norms(before)))
    yield found
    for layers, before, of_weights in begun:
        torch._foreach_sub_(before, [_local(p) for p in layers.parameters])  # now the updates
        found.append((layers.parameters, ratios(layers, of_weights, norms(before))))
    for (layers, updates, _), (_, factors) in zip(begun, found, strict=True):
        torch._foreach_mul_(updates, list((1 - factors).unbind()))
        torch._foreach_add_([_local(p) for p in layers.parameters], updates)


_NO_DECAY = 0.0
"""Stands for the decay of a group, and is told from another zero by its identity."""


def _alike(optimizer: Optimizer, scaled: Container[Tensor]) -> list[Layers]:
    """Return the layers to scale, those together that one kernel can treat together."""
    found: dict[Any, Layers] = {}
    for group in optimizer.param_groups:
        settings = {key: _copy(value) for key, value in group.items() if key != "params"}
        for p in group["params"]:
            if p.grad is not None and p in scaled:
                layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
                layers = found.setdefault((p.device, p.dtype, layout), Layers([], []))
                layers.parameters.append(p)
                layers.settings.append(settings)
    return list(found.values())


def _scaled(layers: Layers, norms: Norms, ratios: Ratios) -> tuple[list[Tensor], Tensor]:
    """Return the gradients times their ratios, as shards where they are cut, and these."""
    for p in layers.parameters:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(
                f"A gradient must be dense to be multiplied by a trust ratio, got a "
                f"{p.grad.layout} one of shape {tuple(p.shape)}. Leave its parameter out, or build "
                "its layer with `sparse=False`."
            )
    of_weights = norms([_local(p) for p in layers.parameters])
    of_gradients = norms(_gradients(layers.parameters))
    factors = ratios(layers, of_weights, of_gradients)
    gradients: list[Tensor] = []
    for settings, where in layers.by_group():
        gradients += _decayed(layers.parameters[where], settings)
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return gradients, factors


def _decayed(parameters: Sequence[Tensor], settings: Group) -> list[Tensor]:
    """Return new tensors: gradients as the optimizer would see them after weight decay."""
    gradients, decay = _gradients(parameters), settings.get("weight_decay")
    if not decay or not gradients:
        return [gradient.clone() for gradient in gradients]
    if settings.get("maximize"):  # it turns the gradient around first, and then ours too
        decay = -decay
    weights = [_local(p) for p in parameters]
    return list(torch._foreach_add(gradients, weights, alpha=float(decay)))


def _stand_ins(
    parameters: Sequence[Tensor], values: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Return each parameter, its gradient, and what takes its place, cut over ranks as it is."""
    return [(p, p.grad, _spread(value, p)) for p, value in zip(parameters, values, strict=True)]


def _spread(shard: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        shape=like.shape,  # said, because it cannot be inferred from uneven shards
        stride=like.stride(),
    )


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [_local(p.grad) for p in parameters if p.grad is not None]


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory, of a tensor that is cut; else itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
