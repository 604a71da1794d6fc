"""Batches that a step may change in place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["copied"]


def copied(batch: Any) -> Any:
    """Return a copy that a step may change in place: of any object, else of all tensors in it."""
    leaves, structure = tree_flatten(batch)
    if _are_plain_tensors(leaves):  # in a tenth of the time
        return tree_unflatten([leaf.clone() for leaf in leaves], structure)
    try:
        return copy.deepcopy(batch)
    except Exception:  # a file, a lock, a tensor with a graph
        return apply_to_collection(batch, Tensor, torch.clone)


def _are_plain_tensors(leaves: list[Any]) -> bool:
    """Return whether all are tensors without a history that share no memory."""
    if not all(type(t) is Tensor and t.layout == torch.strided for t in leaves):
        return False
    memories = {t.untyped_storage().data_ptr() for t in leaves}
    return len(memories) == len(leaves) and not any(t.requires_grad for t in leaves)
