"""Running statistics of the norm layers, from a pass over the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from lightning_optkit.bridge.held_batches import stream_batches
from lightning_optkit.bridge.probe import Probe
from lightning_optkit.bridge.reduce import sum_over_ranks
from lightning_optkit.bridge.snapshot import put_back
from lightning_optkit.methods.norm_statistics import refresh_norm_statistics, tracking_layers

__all__ = ["StatisticsPass", "statistics_names", "statistics_of"]


def statistics_names(module: torch.nn.Module) -> list[str]:
    """Return the names of the buffers that a pass recomputes."""
    return [
        f"{layer}.{statistic}".lstrip(".")
        for layer in tracking_layers(module)
        for statistic in ("running_mean", "running_var")
    ]


def statistics_of(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    passes: Callable[[], Iterable[Callable[[], object]]],
    *,
    layerwise: bool = False,
) -> dict[str, Tensor]:
    """Return running statistics by buffer name; the module's own are as before. All ranks call it.

    Layers that training kept in eval mode keep their statistics, and are left out.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module.
        passes: starts a pass, an iterable of calls, each of which runs the module on a batch.
        layerwise: a pass for each layer, see
            :func:`~lightning_optkit.methods.norm_statistics.refresh_norm_statistics`.
    """
    buffers = dict(pl_module.named_buffers())
    names = [name for name in statistics_names(pl_module) if name in buffers]
    before = {name: buffers[name].detach().clone() for name in names}
    try:
        layers = refresh_norm_statistics(
            pl_module,
            passes,
            frozen=_frozen_layers(trainer, pl_module),
            layerwise=layerwise,
            reduce=sum_over_ranks(trainer),
        )
        prefixes = tuple(f"{layer}." if layer else "" for layer in layers)
        return {name: buffers[name].detach().clone() for name in names if name.startswith(prefixes)}
    finally:
        for name in names:
            put_back(buffers[name], before[name])


class StatisticsPass:
    """A pass of ``training_step`` over the training data that only the norm layers notice.

    The steps run through the probe: no optimizer steps, nothing is logged, no counter moves. Layers
    that training kept in eval mode keep their statistics.

    Args:
        num_batches: training batches on each rank; ``None`` takes all that training does.
        layerwise: a pass for each layer, see
            :func:`~lightning_optkit.methods.norm_statistics.refresh_norm_statistics`.
        seed: seeds what is random in the data.
    """

    def __init__(self, *, num_batches: int | None, layerwise: bool, seed: int) -> None:
        self._num_batches = num_batches
        self._layerwise = layerwise
        self._seed = seed
        self.num_samples = 0
        """Samples in the last pass, over all ranks."""

    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run one batch, so that what cannot be run raises before training."""
        for forward in self._forwards(trainer, pl_module, num_batches=1):
            forward()

    @torch.inference_mode(False)  # validation is in it, and would pass it on to what is made here
    def statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Return the statistics by buffer name; the module's own are as before. All ranks call it.

        Args:
            trainer: the Trainer, fitting.
            pl_module: its module, with the weights to take the statistics of.
        """
        return statistics_of(
            trainer,
            pl_module,
            partial(self._forwards, trainer, pl_module, num_batches=self._num_batches),
            layerwise=self._layerwise,
        )

    def _forwards(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, num_batches: int | None
    ) -> Iterator[Callable[[], None]]:
        num_samples = torch.zeros(1, dtype=torch.long, device=trainer.strategy.root_device)
        stream = stream_batches(trainer, pl_module, num_batches=num_batches, seed=self._seed)
        with closing(stream), Probe(trainer, pl_module, seed=self._seed) as probe:
            for batch_idx, held in enumerate(stream):
                num_samples += held.num_samples
                yield partial(probe.forward, held.batch, batch_idx)
        reduce = sum_over_ranks(trainer)
        self.num_samples = int(num_samples if reduce is None else reduce(num_samples))


def _frozen_layers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Return the norm layers that training keeps in eval mode; a validation puts all into it."""
    modes = {name: child.training for name, child in pl_module.named_modules()}
    if trainer.state.stage in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING):
        modes |= trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return [name for name in tracking_layers(pl_module) if not modes[name]]
