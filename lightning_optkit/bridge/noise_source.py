"""Where a run has gradients of independent batches at the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optkit.bridge.beside_training import BesideTraining
from lightning_optkit.bridge.half_batches import BatchGradients, half_gradient, half_gradients
from lightning_optkit.bridge.sharding import fsdp_groups
from lightning_optkit.bridge.step_batches import BatchesOfStep

__all__ = ["NoiseSource", "gradients_of_halves", "gradients_of_step"]


class NoiseSource(IntEnum):
    """Where the gradients come from: a code, as it is logged."""

    ACCUMULATED = 0
    RANKS = 1
    BOTH = 2
    HALVES = 3

    @classmethod
    def of(cls, trainer: pl.Trainer, pl_module: pl.LightningModule) -> NoiseSource:
        """Return that of a run: what training computes anyway, before a pass beside it."""
        # under manual optimization nobody knows which backward passes are of one loss, and FSDP2
        # reduces gradients before they reach the parameters
        if not pl_module.automatic_optimization or fsdp_groups(pl_module):
            return cls.HALVES
        if trainer.accumulate_grad_batches > 1:
            return cls.BOTH if trainer.world_size > 1 else cls.ACCUMULATED
        return cls.RANKS if trainer.world_size > 1 else cls.HALVES


def gradients_of_halves(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    beside: BesideTraining,
    owned: Sequence[Mapping[str, Tensor]],
    batch: Any,
    batch_idx: int,
) -> BatchGradients:
    """Return the gradients of two halves of the batch, before it is trained on.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        beside: how to make passes.
        owned: the parameters to differentiate by, by name, of each optimizer.
        batch: of this rank.
        batch_idx: its index.

    Raises:
        MisconfigurationException: if they belong to several optimizers, the batch cannot be split,
            or there is no pass beside training.
    """
    names = [list(each) for each in owned if each]
    if len(names) != 1:
        raise MisconfigurationException(
            f"The noise scale needs parameters of one optimizer, got those of {len(names)}. Pass "
            "`parameters=[...]` of one, `loss_index=` of its loss and `name=` to an instance for "
            "each, or `noise_scale=False`."
        )
    beside.require(trainer, pl_module)

    def gradient(half: Any, i: int) -> list[Tensor]:
        with beside.probe(trainer, pl_module, i) as probe:
            return half_gradient(probe, names[0], half, batch_idx)

    return half_gradients(trainer, batch, gradient)


def gradients_of_step(batches: BatchesOfStep, gradient_norm: float) -> BatchGradients:
    """Return the gradients of the batches that a step is made of, after it.

    Args:
        batches: of all ranks.
        gradient_norm: of the gradient that training used.

    Raises:
        MisconfigurationException: if it cannot be told how many samples a batch has.
    """
    if math.isnan(batches.batch_size):
        raise MisconfigurationException(
            "The tensors of a batch must share their first dimension, the samples, got different "
            "ones. Pass `noise_scale=False`."
        )
    mean = gradient_norm / batches.share
    return BatchGradients(batches.square_norms, mean**2, batches.sizes)
