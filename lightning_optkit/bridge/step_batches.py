"""The batches that one optimizer step is made of: accumulated ones, and those of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.bridge.batch_parts import num_rows
from lightning_optkit.bridge.local_gradients import LocalGradients
from lightning_optkit.bridge.step_visit import gradient_scale
from lightning_optkit.bridge.together import gathered

__all__ = ["BatchesOfStep", "StepBatches"]


@dataclass(frozen=True)
class BatchesOfStep:
    """What is known of each batch of a step, rank after rank; NaN for what is not.

    Attributes:
        sizes: samples in each.
        losses: of the training step on each, not divided for accumulation.
        square_norms: of each batch's own mean gradient, unscaled.
        share: of the batches that a step is planned to accumulate, those that it has: below 1 at
            the end of an epoch that they do not divide. Lightning divides by the planned number.
    """

    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    square_norms: tuple[float, ...]
    share: float

    @property
    def batch_size(self) -> float:
        """Samples of the whole step."""
        return sum(self.sizes)

    @property
    def loss(self) -> float:
        """Mean over the batches."""
        return sum(self.losses) / len(self.losses)


class StepBatches:
    """Collects size, loss and gradient norm of each batch of a step.

    Args:
        norm: returns the norm of a tensor as a tensor, without waiting for the device.
    """

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        self._gradients = LocalGradients(norm)
        self._has_gradients = False
        self._sizes: list[float] = []
        self._losses: list[float] = []
        self._square_norms: list[float] | None = None

    def start(self, parameters: Iterable[Tensor] = ()) -> None:
        """Begin a step, in ``on_train_batch_start`` of its first batch.

        Args:
            parameters: to watch the gradients of, in backward passes before the step.
        """
        parameters = list(parameters)
        self._has_gradients = bool(parameters)
        self._sizes, self._losses, self._square_norms = [], [], None
        self._gradients.start(parameters)

    def next_batch(self, batch: Any) -> None:
        """Add a batch, in ``on_train_batch_start``."""
        rows = num_rows(batch)
        self._sizes.append(math.nan if rows is None else rows)
        self._gradients.next_batch()

    def before_step(self, trainer: pl.Trainer) -> None:
        """Have seen all gradients of the step, in ``on_before_optimizer_step``."""
        if not self._has_gradients or self._square_norms is not None:
            return
        # that of the loss over the number to accumulate, times the scale
        factor = trainer.accumulate_grad_batches / gradient_scale(trainer)
        self._square_norms = [square * factor**2 for square in self._gradients.stop()]

    def after_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Add the loss, in ``on_train_batch_end``."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(float(loss) * trainer.accumulate_grad_batches)
        else:  # under manual optimization a step need not return it
            self._losses.append(math.nan)

    def of_all_ranks(self, trainer: pl.Trainer) -> BatchesOfStep:
        """Return what is known of the batches of all ranks; all must call it."""
        unknown = [math.nan] * len(self._sizes)
        own = torch.tensor(
            [self._sizes, self._losses, self._square_norms or unknown], dtype=torch.float64
        )
        every = gathered(trainer, own)
        sizes, losses, square_norms = (tuple(every[:, i].flatten().tolist()) for i in range(3))
        share = len(self._sizes) / trainer.accumulate_grad_batches
        return BatchesOfStep(sizes, losses, square_norms, share)

    def close(self) -> None:
        """Leave the parameters alone."""
        self._gradients.close()
