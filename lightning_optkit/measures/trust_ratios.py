"""How far a layer may move, by the size of its weights: the ratios of LARS and LAMB."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lamb_ratios", "lars_ratios"]


def lars_ratios(
    weight_norms: Tensor,
    gradient_norms: Tensor,
    *,
    trust_coefficient: float = 0.001,
    weight_decay: float | Tensor = 0.0,
    eps: float = 0.0,
) -> Tensor:
    r"""Return what LARS multiplies the learning rate of each layer by.

    .. math:: \lambda = \frac{\eta\,\|w\|}{\|g\| + \beta\,\|w\| + \epsilon},

    and 1 where :math:`\|w\|` or :math:`\|g\|` is zero. With ``trust_coefficient=1`` and no decay it
    is the ratio of weights to gradient that You et al. tabulate by layer.

    Args:
        weight_norms: :math:`\|w\|_2` of each layer, shape (k,).
        gradient_norms: :math:`\|g\|_2` of each, without weight decay, shape (k,).
        trust_coefficient: :math:`\eta`.
        weight_decay: :math:`\beta`, one for all or of shape (k,).
        eps: :math:`\epsilon`; the paper has none.

    Returns:
        Shape (k,), in the dtype and on the device of the norms.

    Example:
        >>> weights, gradients = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([4.0, 0.0, 4.0])
        >>> lars_ratios(weights, gradients, trust_coefficient=0.1, weight_decay=0.5)
        tensor([0.0400, 1.0000, 1.0000])

    References:
        Y. You, I. Gitman, B. Ginsburg, *Large Batch Training of Convolutional Networks*, 2017,
        algorithm 1.
    """
    size = gradient_norms + weight_decay * weight_norms + eps
    return _where_both(weight_norms, gradient_norms, trust_coefficient * weight_norms / size)


def lamb_ratios(
    weight_norms: Tensor, update_norms: Tensor, *, max_weight_norm: float | None = None
) -> Tensor:
    r"""Return what LAMB multiplies the learning rate of each layer by.

    .. math:: \frac{\phi(\|w\|)}{\|u\|}, \qquad \phi(z) = \min(z, \text{max\_weight\_norm}),

    and 1 where :math:`\|w\|` or :math:`\|u\|` is zero: a layer's step then has norm
    :math:`\gamma\,\phi(\|w\|)`.

    Args:
        weight_norms: :math:`\|w\|_2` of each layer, shape (k,).
        update_norms: :math:`\|u\|_2` of each layer's update, weight decay included, shape (k,).
        max_weight_norm: the upper end of :math:`\phi`, which in the paper may have a lower one too;
            ``None`` makes it the identity.

    Returns:
        Shape (k,), in the dtype and on the device of the norms.

    Example:
        >>> lamb_ratios(torch.tensor([3.0, 30.0, 0.0]), torch.full((3,), 2.0), max_weight_norm=10.0)
        tensor([1.5000, 5.0000, 1.0000])

    References:
        Y. You et al., *Large Batch Optimization for Deep Learning: Training BERT in 76 minutes*,
        ICLR 2020, algorithm 2.
    """
    trusted = weight_norms if max_weight_norm is None else weight_norms.clamp(max=max_weight_norm)
    return _where_both(weight_norms, update_norms, trusted / update_norms)


def _where_both(first: Tensor, second: Tensor, ratios: Tensor) -> Tensor:
    """Return the ratios, but 1 where a norm is zero: it has no size to go by. NaN stays NaN."""
    return torch.where((first == 0) | (second == 0), 1.0, ratios)
