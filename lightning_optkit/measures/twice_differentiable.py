"""Layers whose fast kernels have no second derivative, or a wrong one, in kernels that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

__all__ = ["twice_differentiable"]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run forward passes inside in kernels that can be differentiated twice.

    * attention: the math kernel; flash and memory-efficient ones have no double backward;
    * weight normalisation: plain arithmetic; the second derivative of the fused kernel is wrong by
      20 to 60 % in torch 2.13, old and new interface alike;
    * recurrent layers on CUDA: without cuDNN, which has no double backward;
    * embeddings with ``sparse=True``: dense gradients;
    * activation checkpointing: off, since it would run the module again at each product.

    Values do not change beyond rounding.
    """
    with sdpa_kernel(SDPBackend.MATH), _without_checkpointing(), _TwiceDifferentiable():
        yield


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """Make ``checkpoint(function, ...)``, of either kind, a plain call of the function."""

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args)

    def nothing_to_recompute(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    inner = {
        "CheckpointFunction": Plain,
        "_checkpoint_without_reentrant_generator": nothing_to_recompute,
    }
    before = {name: getattr(checkpoint, name) for name in inner if hasattr(checkpoint, name)}
    for name in before:
        setattr(checkpoint, name, inner[name])
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(checkpoint, name, original)


class _TwiceDifferentiable(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _dense_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return functional.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse=False
    )


def _without_cudnn(func: Callable[..., Any]) -> Callable[..., Any]:
    def recurrent(*args: Any, **kwargs: Any) -> Any:
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            return func(*args, **kwargs)
        finally:
            torch.backends.cudnn.enabled = enabled

    return recurrent


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    functional.embedding: _dense_embedding,
    **{f: _without_cudnn(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
