"""What is drawn of a mixed batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optkit.methods.mixing import Mixed

__all__ = ["MixedImages", "mixed_images"]

_SHOWN = 8
"""Samples in a picture: two rows of four can be read at a glance."""


@dataclass(frozen=True)
class MixedImages:
    """Some samples of a mixed batch, to be drawn.

    Attributes:
        images: shape ``(n, channels, height, width)``, with 1 or 3 channels.
        mixing: λ of each, shape ``(n,)``.
        labels: of each, and of its partner; ``None`` if they are no classes.
        is_cut: whether a box was pasted.
    """

    images: np.ndarray[Any, Any]
    mixing: np.ndarray[Any, Any]
    labels: tuple[list[int], list[int]] | None
    is_cut: bool


def mixed_images(mixed: Mixed, targets: Any) -> MixedImages | None:
    """Return the first samples of a batch on the CPU, if its inputs look like images.

    Args:
        mixed: the inputs of the batch.
        targets: before they were mixed.
    """
    x = mixed.inputs
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] in (1, 3)):
        return None
    labels = None
    is_class = isinstance(targets, Tensor) and not targets.is_floating_point()
    if is_class and targets.numel() == len(targets):
        pair = [each.flatten()[:_SHOWN].tolist() for each in (targets, mixed.second(targets))]
        labels = (pair[0], pair[1])
    mixing = torch.as_tensor(mixed.mixing, dtype=torch.float64).cpu().expand(len(x))
    images = x[:_SHOWN].detach().float().cpu().numpy()
    return MixedImages(images, mixing[:_SHOWN].numpy(), labels, mixed.box is not None)
