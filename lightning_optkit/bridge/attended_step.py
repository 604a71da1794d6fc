"""One optimizer's ``step()``, and what all who attend it do there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AttendedStep", "Count", "Rate", "Rule", "attended_step", "torch_optimizers"]

Rate = float | Tensor
"""A learning rate; a tensor of one element where the optimizer was given a tensor."""


@dataclass(eq=False)
class Count:
    """Steps of an optimizer since it is watched."""

    called: int = 0
    skipped: Tensor | None = None

    def add(self, found_inf: Any) -> None:
        """Count one call that returned; a fused optimizer may have skipped its update."""
        self.called += 1
        if found_inf is not None:
            skipped = torch.as_tensor(found_inf).detach() > 0
            self.skipped = skipped.long() if self.skipped is None else self.skipped + skipped

    def steps(self) -> int:
        """Return the real steps; waits for the device where a fused optimizer skips its own."""
        if self.skipped is not None:
            self.called -= int(self.skipped)
            self.skipped = None
        return self.called


@dataclass(eq=False)
class Rule:
    """``(group index, rate) -> rate``, what it is for, and the rates of the last step."""

    rate: Callable[[int, Rate], Rate]
    role: str | None = None
    without: str | None = None  # what to write to do without it
    used: list[Rate] = field(default_factory=list)


@dataclass(frozen=True)
class _Replaced:
    """A learning rate that stands in a group for a while, and what it stands for."""

    group: dict[str, Any]
    rate: Rate
    scheduled: Rate
    version: int

    def put_back(self) -> None:
        """Restore the scheduled rate, unless someone wrote another in the meantime."""
        if self.group["lr"] is self.rate and _version(self.rate) == self.version:
            _write(self.group, self.scheduled)


class AttendedStep:
    """Takes the place of one optimizer's ``step``, on the instance, for all who attend it.

    As torch's own schedulers do. Its step hooks would not serve: they run twice where a subclass
    calls ``super().step()``, nothing runs after a step that raised, and they cannot tell the
    closure from the update.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._shadowed = vars(optimizer).get("step")  # a scheduler's, where there is one
        self._step = optimizer.step
        self._replaced: list[_Replaced] = []
        self._update = ExitStack()  # what surrounds the update that is being made
        self.counts: list[Count] = []
        self.rules: list[Rule] = []
        self.surroundings: list[Callable[[], AbstractContextManager[None]]] = []
        self.reporter: object | None = None  # who of them logs its rates

        # A method, and with the attributes of what it wraps: schedulers look for both.
        @functools.wraps(getattr(self._step, "__func__", self._step))
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._attend(*args, **kwargs)

        vars(step)["_attended_step"] = self
        self._method = MethodType(step, optimizer)
        vars(optimizer)["step"] = self._method

    def leave_if_empty(self) -> None:
        """Give ``step`` back. Where someone wrapped it since, what stays there does nothing."""
        own = vars(self._optimizer).get("step") is self._method
        if self.counts or self.rules or self.surroundings or not own:
            return
        del vars(self._optimizer)["step"]
        if self._shadowed is not None:
            vars(self._optimizer)["step"] = self._shadowed

    @contextmanager
    def showing_rates(self) -> Iterator[None]:
        """Have the rates of the coming step in the groups for the block."""
        if self._replaced:  # they are there already: in a step, or shown by another who attends it
            yield
            return
        try:
            self._replace(noted=False)
            yield
        finally:
            self._put_back()

    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        has_closure = True
        if callable(kwargs.get("closure")):
            kwargs["closure"] = self._scheduled_inside(kwargs["closure"])
        elif args and callable(args[0]):
            args = (self._scheduled_inside(args[0]), *args[1:])
        else:
            has_closure = False
        try:
            self._replace()  # LBFGS reads the rate before its closure
            if not has_closure:
                self._begin_update()
            result = self._step(*args, **kwargs)
            self._end_update()
        except BaseException:
            self._end_update(*sys.exc_info())
            raise
        finally:
            self._put_back()
        for count in self.counts:
            count.add(getattr(self._optimizer, "found_inf", None))
        return result

    def _scheduled_inside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, in which ``training_step`` may run, with the scheduled rates."""

        def scheduled() -> Any:
            self._end_update()
            self._put_back()
            result = closure()
            self._replace()
            self._begin_update()
            return result

        return scheduled

    @torch.no_grad()
    def _begin_update(self) -> None:
        with ExitStack() as stack:
            for surrounding in self.surroundings:
                stack.enter_context(surrounding())
            self._update = stack.pop_all()

    @torch.no_grad()
    def _end_update(self, *exception: Any) -> None:
        update, self._update = self._update, ExitStack()
        update.__exit__(*(exception or (None, None, None)))

    @torch.no_grad()
    def _replace(self, *, noted: bool = True) -> None:
        if not self.rules:
            return
        groups = self._optimizer.param_groups
        scheduled = [_copy(group["lr"]) for group in groups]  # groups may share one tensor
        ruled = [self._ruled(j, rate) for j, rate in enumerate(scheduled)]
        for group, before, rate in zip(groups, scheduled, ruled, strict=True):
            lr = _write(group, rate)
            self._replaced.append(_Replaced(group, lr, before, _version(lr)))
        for rule in self.rules if noted else ():
            rule.used = [_copy(group["lr"]) for group in groups]

    def _ruled(self, j: int, rate: Rate) -> Rate:
        for rule in self.rules:
            rate = rule.rate(j, rate)
        return rate

    @torch.no_grad()
    def _put_back(self) -> None:
        replaced, self._replaced = self._replaced, []
        for each in replaced:
            each.put_back()


def _copy(rate: Rate) -> Rate:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _version(rate: Rate) -> int:
    """Return how often a tensor was written to; a number is replaced instead."""
    return rate._version if isinstance(rate, Tensor) else 0


def _write(group: dict[str, Any], rate: Rate) -> Rate:
    """Write a learning rate into a group, into its tensor if it has one; return what is there."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        group["lr"] = float(rate) if isinstance(rate, Tensor) else rate
    elif isinstance(rate, Tensor):
        lr.copy_(rate)
    else:
        lr.fill_(rate)
    return group["lr"]


def attended_step(optimizer: Optimizer) -> AttendedStep:
    """Return the one that all share, also through wrappers that schedulers put around it."""
    found = getattr(optimizer.step, "_attended_step", None)
    return found if isinstance(found, AttendedStep) else AttendedStep(optimizer)


def torch_optimizers(trainer: pl.Trainer) -> list[Optimizer]:
    """Return the optimizers of the Trainer, unwrapped.

    Raises:
        MisconfigurationException: for one that is none of torch's, or if there is none.
    """
    found = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in trainer.optimizers]
    if all(isinstance(optimizer, _MockOptimizer) for optimizer in found):
        raise MisconfigurationException(
            "`configure_optimizers` must return an optimizer, got none: its steps are what counts "
            "here. Return the one that trains the module."
        )
    for i, optimizer in enumerate(found):
        if not isinstance(optimizer, Optimizer):
            raise MisconfigurationException(
                f"Optimizer {i} must be a `torch.optim.Optimizer`, got "
                f"{type(optimizer).__qualname__}: whether it stepped cannot be seen. Use one of "
                "torch's, or a strategy that leaves it as it is."
            )
    return found
