"""Arithmetic on lists of tensors by numbers, which may differ from tensor to tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Tensors", "add_quotients_", "add_scaled_", "beside", "number", "working_dtype"]

Tensors = tuple[Tensor, ...] | list[Tensor]


def working_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of norms of ``like`` and of numbers for it: at least float32."""
    return torch.promote_types(like.dtype, torch.float32)


def number(value: float | Tensor, like: Tensor) -> Any:
    """Return a number to calculate with on a list of tensors such as ``like``, to the same bits.

    On the CPU torch makes a tensor of a Python number anew for each tensor of the list, which costs
    more than the arithmetic on a small one: it gets one of no dimensions.
    """
    if isinstance(value, Tensor):
        return beside(value, like)
    if like.is_cpu and not torch.compiler.is_compiling():
        return torch.scalar_tensor(value, dtype=working_dtype(like))
    return value


def beside(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of one element so that tensors such as ``like`` can be multiplied with it.

    From the CPU it can be with those of any device, and no copy is waited for.
    """
    value = value.detach().reshape(())
    return value if value.is_cpu else value.to(like.device)


def add_scaled_(
    targets: Tensors, directions: Tensors, scales: Tensor | None, *, share: float | Tensor
) -> None:
    r"""Add :math:`c\,s_i\,d_i` to each target.

    Args:
        targets: k tensors, written to.
        directions: :math:`d_i`, k tensors.
        scales: :math:`s_i`, shape (k,), on the device of the targets; ``None`` are ones.
        share: c, a number or a tensor of one element.
    """
    if isinstance(share, Tensor):
        share = beside(share, directions[0])
        if scales is None:
            torch._foreach_add_(targets, torch._foreach_mul(directions, share))
            return
        scales, share = scales * share, 1.0
    if scales is None:
        torch._foreach_add_(targets, directions, alpha=share)
    else:
        torch._foreach_addcmul_(targets, directions, scales.unbind(), value=share)


def add_quotients_(
    targets: Tensors, numerators: Tensors, denominators: Tensors, factors: Any
) -> None:
    r"""Add :math:`f_i\,n_i / d_i` to each target.

    Args:
        targets: k tensors, written to.
        numerators: :math:`n_i`, k tensors.
        denominators: :math:`d_i`, k tensors; may be written to.
        factors: :math:`f_i`, k numbers, or k tensors of no dimensions, which are not waited for.
    """
    if isinstance(factors[0], Tensor):
        torch._foreach_div_(denominators, factors)
        torch._foreach_addcdiv_(targets, numerators, denominators)
    else:
        torch._foreach_addcdiv_(targets, numerators, denominators, factors)
