"""Which parameters of a module LARS and LAMB scale and decay, and which they leave alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from lightning_optkit.optim.norms import is_flattened
from lightning_optkit.optim.settings import check_number

__all__ = ["lars_param_groups", "left_alone"]

_NORM_LAYERS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def lars_param_groups(
    module: nn.Module, *, weight_decay: float, exclude: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return two groups of parameters: those to scale and decay, and those to do neither with.

    The first are matrices and filters. The second are biases and the parameters of norm layers: all
    of at most one dimension, all of a norm layer, all whose name has the word ``bias``, and what
    ``exclude`` names. Their norms say little, a bias that starts at zero least of all, and decay
    would pull a norm layer's scale to zero.

    Frozen parameters are in neither, shared ones once. The order is that of
    ``module.named_parameters()``, in each group. Optimizers that do not know ``layerwise``
    leave it as it is, so the groups are right for torch's ``SGD`` and ``AdamW`` too.

    Args:
        module: its layers as they will be trained: made, initialised, frozen where wanted.
        weight_decay: of the first group, at least 0.
        exclude: patterns of further names for the second group, such as ``"head.*"``, in which
            ``*`` stands for anything.

    Returns:
        ``{"params": [...], "weight_decay": ..., "layerwise": True}`` and ``{"params": [...],
        "weight_decay": 0.0, "layerwise": False}``. One of the lists may be empty.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if nothing in it is trained, a parameter has no shape yet or is part of a
            flattened one, or a pattern fits no name.

    Example:
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2)
        ... )
        >>> scaled, plain = lars_param_groups(net, weight_decay=5e-4)
        >>> [tuple(p.shape) for p in scaled["params"]], [tuple(p.shape) for p in plain["params"]]
        ([(8, 3, 3, 3), (2, 8)], [(8,), (8,), (8,), (2,)])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"`module` must be a torch.nn.Module, got {type(module).__name__}. Give the module "
            "itself, not its parameters: what is excluded depends on the layers."
        )
    check_number("weight_decay", weight_decay, "5e-4 is usual, 0 is none.")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`exclude` must hold patterns of parameters' names, got {pattern!r}, which fits "
                f"none. They begin with: {', '.join(sorted(names)[:5])}."
            )
    apart = set(map(id, left_alone(module, patterns)))
    scaled: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            _check(name, parameter)
            (plain if id(parameter) in apart else scaled).append(parameter)
    if not scaled and not plain:
        raise ValueError(
            "`module` must have a parameter that requires a gradient, got none. Make its layers "
            "first, and unfreeze those to train."
        )
    return [
        {"params": scaled, "weight_decay": weight_decay, "layerwise": True},
        {"params": plain, "weight_decay": 0.0, "layerwise": False},
    ]


def left_alone(module: nn.Module, patterns: Sequence[str]) -> Iterator[nn.Parameter]:
    """Yield the parameters that are neither scaled nor decayed, some more than once.

    Args:
        module: as for :func:`lars_param_groups`; frozen ones are among them.
        patterns: of further names.
    """
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            if (
                isinstance(owner, _NORM_LAYERS)
                or re.search(r"(^|_)bias(_|$)", name)
                or isinstance(parameter, UninitializedParameter)
                or parameter.ndim <= 1
                or any(fnmatchcase(full, pattern) for pattern in patterns)
            ):
                yield parameter


def _check(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(
            f"`module` must have parameters of a shape, got `{name}` without one. Run a batch "
            "through its lazy layers first."
        )
    if is_flattened(parameter):
        raise ValueError(
            f"`module` must have parameters of their own shapes, got `{name}`, part of a flattened "
            "one. Use FSDP2 (`fully_shard`) in place of FullyShardedDataParallel."
        )
