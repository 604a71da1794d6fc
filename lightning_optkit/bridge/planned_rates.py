"""Which learning rates the user's schedulers will ask for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_optkit.bridge.attended_step import torch_optimizers
from lightning_optkit.bridge.steps_of_epochs import accumulated_batches

__all__ = ["UnknownScheduleError", "planned_rates"]

Rates = list[list[np.ndarray[Any, Any]]]
"""Rates by optimizer and group, one for each step."""


class UnknownScheduleError(RuntimeError):
    """What the schedulers will do cannot be known in advance; the message says why."""


def planned_rates(trainer: pl.Trainer, num_steps: int) -> Rates:
    """Return what ``group["lr"]`` will be at the next optimizer steps, by the schedulers alone.

    Copies of the schedulers are stepped as Lightning will step them, on copies of the parameter
    groups without parameters. Random streams are put back.

    Args:
        trainer: the Trainer, in ``on_train_start`` of a run that begins.
        num_steps: how many; no more than the run has.

    Returns:
        An array of shape ``(num_steps,)`` for each group of each optimizer.

    Raises:
        UnknownScheduleError: if that depends on metrics or on code of the module, or if a scheduler
            cannot be copied.
    """
    _require_known(trainer)
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schedulers, that no optimizer has stepped
        groups, configs = _copied(trainer)
        rates = [[np.empty(num_steps) for _ in each] for each in groups]
        for step in _steps(trainer, configs, num_steps):
            for row, each in zip(rates, groups, strict=True):
                for values, group in zip(row, each, strict=True):
                    values[step] = float(group["lr"])
    return rates


def _require_known(trainer: pl.Trainer) -> None:
    configs = trainer.lr_scheduler_configs
    module = trainer.lightning_module
    if is_overridden("optimizer_step", module):
        raise UnknownScheduleError("the module has an `optimizer_step` of its own")
    if not configs:
        return
    if not module.automatic_optimization:
        raise UnknownScheduleError("in manual optimization the module steps its schedulers")
    if is_overridden("lr_scheduler_step", module):
        raise UnknownScheduleError("the module has an `lr_scheduler_step` of its own")
    if any(config.reduce_on_plateau for config in configs):
        raise UnknownScheduleError("a scheduler waits for a metric")
    by_step = all(config.interval == "step" and config.frequency == 1 for config in configs)
    if not math.isfinite(trainer.num_training_batches) and not by_step:
        raise UnknownScheduleError("the data have no length, and a scheduler counts epochs")


def _copied(trainer: pl.Trainer) -> tuple[list[list[dict[str, Any]]], list[LRSchedulerConfig]]:
    """Return groups without parameters, and schedulers that write into them."""
    optimizers = torch_optimizers(trainer)
    stand_ins = [_stand_in(optimizer) for optimizer in optimizers]
    kept = (trainer, trainer.lightning_module, trainer.strategy.model)  # not copied on the way
    memo: dict[int, Any] = {id(each): each for each in kept if each is not None}
    memo |= {id(o): stand_in for o, stand_in in zip(optimizers, stand_ins, strict=True)}
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    try:
        copies = copy.deepcopy(schedulers, memo)
    except Exception as error:
        names = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
        raise UnknownScheduleError(f"{names} cannot be copied ({error})") from error
    configs = [
        dataclasses.replace(config, scheduler=scheduler)
        for config, scheduler in zip(trainer.lr_scheduler_configs, copies, strict=True)
    ]
    return [stand_in.param_groups for stand_in in stand_ins], configs


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of the same class and settings that has nothing to step."""
    stand_in: Optimizer = object.__new__(type(optimizer))
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    vars(stand_in).update(
        param_groups=[copy.deepcopy(group) | {"params": []} for group in groups],
        defaults=dict(optimizer.defaults),
        state={},
    )
    return stand_in


def _steps(trainer: pl.Trainer, configs: list[LRSchedulerConfig], num_steps: int) -> Iterator[int]:
    """Yield the number of each optimizer step, and step the schedulers after it."""
    batches = trainer.num_training_batches
    step = 0
    for epoch in itertools.count(trainer.current_epoch):
        accumulated = accumulated_batches(trainer, epoch)
        for batch in itertools.count(1):
            if batch % accumulated == 0 or batch == batches:
                yield step
                step += 1
                if step == num_steps:
                    return
                _advance(configs, "step", batch)
            if batch == batches:
                break
        _advance(configs, "epoch", epoch + 1)


def _advance(configs: list[LRSchedulerConfig], interval: str, position: int) -> None:
    for config in configs:
        if config.interval == interval and position % config.frequency == 0:
            config.scheduler.step()  # type: ignore[call-arg]
