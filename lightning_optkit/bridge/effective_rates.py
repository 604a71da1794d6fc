"""The rates that optimizers step with, by name: logged, and true in ``LearningRateMonitor``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.optim import Optimizer

from lightning_optkit.board import tags
from lightning_optkit.bridge.attended_step import AttendedStep, attended_step, torch_optimizers
from lightning_optkit.bridge.optimizer_steps import RateInStep

__all__ = ["EffectiveRates", "group_names", "is_logged", "optimizer_names"]

_HOOKS = ("on_train_batch_start", "on_train_epoch_start")  # in which the monitor reads rates


class EffectiveRates:
    """Names the rates that optimizers step with, and makes ``LearningRateMonitor`` true.

    Several may attend one optimizer, each for what it rules: its rates are logged once.

    Args:
        ruling: who changes the rates.

    Example:
        Beside it, in a callback::

            def on_train_start(self, trainer, pl_module):
                self.ruling.attach(trainer)
                self.rates.attach(trainer)


            def on_train_batch_end(self, trainer, *_):
                if is_logged(trainer):
                    step = logger_step(trainer, after_batch=True)
                    report(trainer, step=step, scalars=self.rates.scalars())
    """

    def __init__(self, ruling: RateInStep) -> None:
        self._ruling = ruling
        self._names: list[list[str]] = []
        self._steps: dict[int, AttendedStep] = {}
        self._hooks: list[_ShowingHook] = []

    def attach(self, trainer: pl.Trainer, optimizers: Sequence[int] | None = None) -> None:
        """Begin, in ``on_train_start``, after ``ruling.attach`` and with the same arguments."""
        self.detach()
        self._names = group_names(trainer)
        for i, optimizer in enumerate(torch_optimizers(trainer)):
            if optimizers is None or i in optimizers:
                self._steps[i] = step = attended_step(optimizer)
                step.reporter = step.reporter or self
        for callback in vars(trainer)["callbacks"]:  # which the Trainer does not declare
            if isinstance(callback, LearningRateMonitor):
                self._hooks += [_showing_hook(callback, name) for name in _HOOKS]
        for hook in self._hooks:
            hook.ruling.append(self._ruling)

    def scalars(self) -> dict[str, float]:
        """Return the rates of the last steps by tag; waits for the device where they are tensors.

        Left out are optimizers that have yet to step, and those whose rates another reports.
        """
        rates = self._ruling.effective
        return {
            tags.tag(tags.RATES, f"{tags.EFFECTIVE}/{name}"): rate
            for i, step in self._steps.items()
            if step.reporter is self
            for name, rate in zip(self._names[i], rates[i], strict=False)  # groups that came later
        }

    def detach(self) -> None:
        """Leave, at the end of training or on an exception."""
        for step in self._steps.values():
            if step.reporter is self:
                step.reporter = None
        for hook in self._hooks:
            hook.ruling.remove(self._ruling)
            hook.leave_if_empty()
        self._steps, self._hooks = {}, []


def is_logged(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer logs after this batch, in ``on_train_batch_end``."""
    is_step = not trainer.fit_loop._should_accumulate()
    return is_step and trainer._logger_connector.should_update_logs


def optimizer_names(trainer: pl.Trainer) -> list[str]:
    """Return the names of the optimizers that ``LearningRateMonitor`` uses, without ``lr-``.

    The class, numbered where there are several: SGD, Adam, Adam-1. Those with a scheduler come
    first; a scheduler's ``name`` is its optimizer's.
    """
    optimizers = torch_optimizers(trainer)
    names: dict[int, str] = {}
    seen: Counter[str] = Counter()
    scheduled = [
        (config.scheduler.optimizer, config.name) for config in trainer.lr_scheduler_configs
    ]
    for optimizer, name in [*scheduled, *((optimizer, None) for optimizer in optimizers)]:
        if id(optimizer) in names:
            continue
        kind = type(optimizer).__name__
        if name is None:
            name = f"{kind}-{seen[kind]}" if seen[kind] else kind
            seen[kind] += 1
        names[id(optimizer)] = name
    return [names[id(optimizer)] for optimizer in optimizers]


def group_names(trainer: pl.Trainer) -> list[list[str]]:
    """Return the names of the parameter groups of each optimizer, as ``LearningRateMonitor`` does.

    The optimizer's, and where there are several groups, or one with a ``name``: SGD/pg1, SGD/head.
    """
    optimizers = torch_optimizers(trainer)
    names = optimizer_names(trainer)
    return [_of_groups(o, name) for o, name in zip(optimizers, names, strict=True)]


def _of_groups(optimizer: Optimizer, name: str) -> list[str]:
    groups = optimizer.param_groups
    suffixes = [group.get("name", f"pg{j + 1}") for j, group in enumerate(groups)]
    if len(groups) == 1 and "name" not in groups[0]:
        return [name]
    if len(set(suffixes)) < len(suffixes):  # which the monitor refuses
        suffixes = [f"pg{j + 1}" for j in range(len(groups))]
    return [f"{name}/{suffix}" for suffix in suffixes]


class _ShowingHook:
    """Takes the place of a hook of a monitor, on the instance: it finds the coming rates."""

    def __init__(self, monitor: LearningRateMonitor, name: str) -> None:
        self._monitor = monitor
        self._name = name
        self._shadowed = vars(monitor).get(name)
        self.ruling: list[RateInStep] = []
        hook: Callable[..., Any] = getattr(monitor, name)

        @wraps(hook)
        def showing(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for ruling in self.ruling:
                    stack.enter_context(ruling.shown())
                return hook(*args, **kwargs)

        vars(showing)["_showing_hook"] = self
        self._hook = vars(monitor)[name] = showing

    def leave_if_empty(self) -> None:
        """Give the hook back, unless someone replaced it since; what stays then does nothing."""
        if self.ruling or vars(self._monitor).get(self._name) is not self._hook:
            return
        del vars(self._monitor)[self._name]
        if self._shadowed is not None:
            vars(self._monitor)[self._name] = self._shadowed


def _showing_hook(monitor: LearningRateMonitor, name: str) -> _ShowingHook:
    """Return the one that all share."""
    found = getattr(getattr(monitor, name), "_showing_hook", None)
    return found if isinstance(found, _ShowingHook) else _ShowingHook(monitor, name)
