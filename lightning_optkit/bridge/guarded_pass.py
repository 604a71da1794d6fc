"""A pass through ``training_step`` beside that of the Trainer, which leaves a loss and no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_optkit.bridge.muting import CapturedLosses, mute
from lightning_optkit.bridge.probe import probing
from lightning_optkit.bridge.sharding import at_rest, mute_setters, resharded_after
from lightning_optkit.bridge.snapshot import Snapshot

__all__ = ["guarded_pass"]


@contextmanager
def guarded_pass(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Undo what a pass of the block does, but not its graph.

    Random streams, buffers, metrics and attributes are put back in place, logs are mute and
    backward hooks do not fire. Unlike a probe it runs on the module's own parameters, in the
    precision of training, and can be differentiated after. Modules with automatic optimization.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module.
    """
    loggers, should_stop = trainer.loggers, trainer.should_stop
    with isolate_rng(), probing(), at_rest(pl_module), resharded_after(pl_module):
        snapshot = Snapshot(pl_module)
        try:
            mute(pl_module, CapturedLosses(wanted=None))
            mute_setters(pl_module)
            trainer.loggers = [DummyLogger() for _ in loggers]
            yield
        finally:
            snapshot.restore()
            trainer.loggers, trainer.should_stop = loggers, should_stop
