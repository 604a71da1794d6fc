"""Passes of the current batch beside training: at the same weights, and without a trace."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.probe import Probe, StepLossFn, require_batch_step
from lightning_optkit.bridge.sharding import fsdp_groups, whole_fits

__all__ = ["BesideTraining"]


class BesideTraining:
    """Opens probes for passes of a batch, each with random numbers of its own.

    Args:
        mode: ``"train"`` or ``"eval"``, how dropout and BatchNorm behave.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        seed: seeds the random layers.
    """

    def __init__(
        self,
        *,
        mode: Literal["eval", "train"],
        loss_fn: StepLossFn | None,
        loss_index: int,
        seed: int,
    ) -> None:
        self._mode: Literal["eval", "train"] = mode
        self._loss_fn = loss_fn
        self._loss_index = loss_index
        self._seed = seed

    def require(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a run in which there is no such pass; all ranks must call it.

        Raises:
            MisconfigurationException: if the step fetches its own batches, or the whole parameters
                of a sharded module do not fit.
        """
        if self._loss_fn is None:
            require_batch_step(pl_module)
        if fsdp_groups(pl_module) and not whole_fits(trainer, pl_module, num_vectors=2):
            raise MisconfigurationException(
                "The gathered parameters do not fit into half of the free memory, which a pass "
                "beside training needs. Pass `noise_scale=False` and `activations=False`."
            )

    def probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, part: int) -> Probe:
        """Return a probe, to be opened.

        Args:
            trainer: the Trainer, before the step.
            pl_module: its module.
            part: tells the passes of one step apart, and with them their random numbers.
        """
        step = logger_step(trainer, after_batch=True)
        return Probe(
            trainer,
            pl_module,
            mode=self._mode,
            loss_fn=self._loss_fn,
            loss_index=self._loss_index,
            seed=hash((self._seed, step, part, trainer.global_rank)) % 2**31,
        )
