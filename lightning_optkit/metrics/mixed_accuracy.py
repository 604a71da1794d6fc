"""Accuracy where a sample has two labels, as mixup and cutmix give it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optkit.methods.mixed_target import settled

__all__ = ["MixedAccuracy"]


class MixedAccuracy(Metric):
    r"""The share of right predictions, where a mixed label counts as both that it is made of.

    .. math:: \lambda\,\mathrm{acc}(y_i) + (1 - \lambda)\,\mathrm{acc}(y_j)

    With plain labels, in validation, it is the plain accuracy; with class probabilities, such as
    those of ``targets="soft"``, the probability of the predicted class. Other metrics of a module
    count the label that weighs more.

    Args:
        ignore_index: label that does not count.
        **settings: as of ``torchmetrics.Metric``.

    Example:
        >>> from lightning_optkit.methods.mixed_target import MixedTarget, Mixing
        >>> a, b = torch.tensor([0, 1]), torch.tensor([1, 0])
        >>> metric = MixedAccuracy()
        >>> metric.update(
        ...     torch.tensor([[0.9, 0.1], [0.2, 0.8]]), MixedTarget.of(a, b, Mixing(0.75))
        ... )
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    takes_mixed_targets = True
    """Whether the callbacks that mix leave its targets mixed."""

    right: Tensor
    total: Tensor

    def __init__(self, *, ignore_index: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.ignore_index = ignore_index
        for name in ("right", "total"):  # float64 counts to 2^53
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: scores or probabilities, shape ``(batch, classes, ...)``, or labels, shape
                ``(batch, ...)``, in integers.
            target: labels, shape ``(batch, ...)``, mixed or not; or class probabilities, shape
                ``(batch, classes, ...)``.
        """
        predicted = preds.argmax(1) if preds.is_floating_point() else preds
        if target.is_floating_point():
            if target.dim() != predicted.dim() + 1:
                raise ValueError(
                    "`target` must be labels or class probabilities, got floats of the shape "
                    f"{tuple(target.shape)} for predictions of {tuple(predicted.shape)}. Write "
                    "`target.long()` for labels."
                )
            right = target.gather(1, predicted.unsqueeze(1))
            self.right += settled(right.double().sum())
            self.total += predicted.numel()
            return
        if target.shape != predicted.shape:
            raise ValueError(
                "`preds` and `target` must have one prediction for each label, got the shapes "
                f"{tuple(predicted.shape)} and {tuple(target.shape)}. Write `logits` as "
                "`(batch, classes, ...)`."
            )
        counts = target == target
        if self.ignore_index is not None:
            counts = target != self.ignore_index
        right = (target == predicted) & counts
        self.right += settled(right.double().sum())
        self.total += settled(counts.double().sum())

    def compute(self) -> Tensor:
        """Return the accuracy over all batches; NaN before the first."""
        return (self.right / self.total).float()
