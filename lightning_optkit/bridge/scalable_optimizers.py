"""Which optimizers and layers can be scaled layer by layer from outside, and at what."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import ASGD, LBFGS, SGD, Optimizer

__all__ = [
    "Of",
    "of_optimizer",
    "parameters_of",
    "require_layers",
    "require_scalable",
]

Of = Literal["gradient", "update"]

_LINEAR = (SGD, ASGD)  # of torch's own: twice the gradient, twice the step
# How the names of such optimizers end; Adafactor's steps are relative to the size of the weights.
_LAYERWISE = ("lars", "lamb", "larc", "adafactor")


def of_optimizer(optimizer: Optimizer, of: Of | Literal["auto"]) -> Of:
    """Return what of its step is scaled: ``"auto"`` is the gradient of SGD, the update of others.

    Example:
        >>> import torch
        >>> p = nn.Parameter(torch.zeros(1))
        >>> of_optimizer(SGD([p]), "auto"), of_optimizer(torch.optim.Adam([p]), "auto")
        ('gradient', 'update')
    """
    if of != "auto":
        return of
    return "gradient" if isinstance(optimizer, SGD) else "update"


def require_scalable(trainer: pl.Trainer, i: int, optimizer: Optimizer, of: Of) -> None:
    """Refuse an optimizer whose layers cannot be scaled in this way, or are already.

    Raises:
        MisconfigurationException: see there.
    """
    name = f"Optimizer {i} ({type(optimizer).__qualname__})"
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            f"{name} must make one update a step to be scaled layer by layer, got several along a "
            "line whose steps it reckons with. Use another optimizer, or leave it out of "
            "`optimizers=[...]`."
        )
    if _is_layerwise(optimizer):
        raise MisconfigurationException(
            f"{name} must not scale its layers itself, got one that does: both would multiply. "
            "Remove the callback, or leave the optimizer out of `optimizers=[...]`."
        )
    if of == "gradient":
        _require_linear(trainer, name, optimizer)
    elif any("lr" not in group for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"{name} must have a learning rate in each group, which the length of its updates is "
            'compared with, and one has no "lr". Write `lr=`, or leave the optimizer out of '
            "`optimizers=[...]`."
        )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def require_layers(
    module: nn.Module, optimizers: Sequence[Optimizer], layers: Container[Tensor]
) -> None:
    """Refuse to have nothing to scale, and what has no norm to go by.

    Raises:
        MisconfigurationException: if none of the optimizers has one of the layers; for a complex or
            a lazy one, or one with sparse gradients.
    """
    scaled = {p for optimizer in optimizers for p in parameters_of(optimizer) if p in layers}
    embeddings = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    kinds: dict[Tensor, str] = {
        m.weight: "one with sparse gradients" for m in embeddings if m.sparse
    }
    kinds |= {p: "a complex one" for p in scaled if p.is_complex()}
    for name, p in module.named_parameters():
        if is_lazy(p):
            raise MisconfigurationException(
                f"`{name}` must have a shape before training, got a lazy parameter. Run one batch "
                "through the module in its `setup` or `configure_model`."
            )
        if p in scaled and p in kinds:
            raise MisconfigurationException(
                f"`{name}` must be a real, dense parameter to be scaled by its norm, got "
                f"{kinds[p]}. Pass the names, or patterns, of the others as `where=[...]`."
            )
    if not scaled:
        raise MisconfigurationException(
            "`TrustRatio` must find a layer to scale among the parameters of its optimizers, got "
            "none. Pass other patterns as `where`, or `exclude_norm_and_bias=False`."
        )


def _require_linear(trainer: pl.Trainer, name: str, optimizer: Optimizer) -> None:
    groups: list[dict[str, Any]] = optimizer.param_groups
    if not isinstance(optimizer, _LINEAR):
        if _is_torchs(optimizer) or any("betas" in group for group in groups):
            raise MisconfigurationException(
                f"{name} must be linear in the gradient to have it scaled, got one that divides by "
                "the gradient's own size: nothing would change. Write `of='update'`, or "
                "`of='auto'`."
            )
        if any(group.get("weight_decay") for group in groups):
            raise MisconfigurationException(
                f"{name} must have no weight decay to have its gradient scaled, got one, and "
                "whether it is a part of the gradient is known of SGD alone. Write `of='update'`."
            )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            f"{name} must leave unscaling to the gradient scaler to have its gradient scaled by "
            "layer, got `fused=True`. Write `fused=False`, `of='update'`, or "
            "`precision='bf16-mixed'`."
        )


def _is_layerwise(optimizer: Optimizer) -> bool:
    return any(kind.__name__.lower().endswith(_LAYERWISE) for kind in type(optimizer).__mro__)


def _is_torchs(optimizer: Optimizer) -> bool:
    kinds = type(optimizer).__mro__
    return any(k.__module__.startswith("torch.optim.") and k is not Optimizer for k in kinds)
