"""What happens inside ``optimizer.step()``: did it step, and at which learning rate?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Rate", "RateInStep", "StepWatch"]

Rate = float | Tensor
"""A learning rate; a tensor of one element where the optimizer was given a tensor."""


class StepWatch:
    """Counts the real steps of each optimizer.

    A step is one call of ``optimizer.step()`` that returned, however often it called its closure.
    Steps that a gradient scaler skipped do not count: neither those in which it did not call the
    optimizer, nor those that a fused optimizer skipped itself (``found_inf``). The latter are
    looked up only when someone asks, for that waits for the device.

    Example:
        Asked in ``on_train_batch_end``, where accumulation and skipped steps are told apart from
        steps::

            def on_train_start(self, trainer, pl_module):
                self.watch.attach(trainer)


            def on_train_batch_end(self, trainer, *_):
                if self.watch.stepped():
                    self.average.update()
    """

    def __init__(self) -> None:
        self._counts: list[_Count] = []
        self._attended: list[tuple[_AttendedStep, _Count]] = []
        self._asked = 0

    def start(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._counts = []
        self._asked = 0

    def attach(self, trainer: pl.Trainer) -> None:
        """Watch all optimizers of the Trainer, in ``on_train_start``.

        Raises:
            MisconfigurationException: for an optimizer that is none of torch's.
        """
        self.detach()
        optimizers = _torch_optimizers(trainer)
        new = [_Count() for _ in optimizers[len(self._counts) :]]
        self._counts = self._counts[: len(optimizers)] + new
        for optimizer, count in zip(optimizers, self._counts, strict=True):
            step = _attended_step(optimizer)
            step.counts.append(count)
            self._attended.append((step, count))

    def stepped(self) -> bool:
        """Return whether any optimizer stepped since this was last asked, or since ``start``."""
        before, self._asked = self._asked, sum(self.num_steps)
        return self._asked != before

    @property
    def num_steps(self) -> list[int]:
        """Real steps of each optimizer, in the order of ``trainer.optimizers``."""
        return [count.steps() for count in self._counts]

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception; the counts stay."""
        for step, count in self._attended:
            step.counts.remove(count)
            step.leave_if_empty()
        self._attended = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {"num_steps": self.num_steps, "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run, before ``attach``."""
        self._counts = [_Count(called) for called in state["num_steps"]]
        self._asked = state["asked"]


class RateInStep:
    r"""Learning rates that hold only while the parameters are updated.

    .. math:: \eta_{used} = rate(i, j, \eta)

    for group j of optimizer i, with η what the user's scheduler says. Everyone else finds η in
    ``group["lr"]``: schedulers, the closure with its ``training_step``, logs, checkpoints. Several
    compose in the order of their ``attach``: each is handed what the one before it returned.

    A tensor stays the same tensor and is filled in place. A new value that someone writes into
    ``group["lr"]`` during the update is kept as it is. Momentum, which OneCycleLR moves too, is
    left alone.

    Args:
        rate: ``(optimizer index, group index, scheduled rate) -> rate to step with``. It may be
            asked several times in one step, so it must not count. Given a tensor, it returns a new
            one, or a number.
    """

    def __init__(self, rate: Callable[[int, int, Rate], Rate]) -> None:
        self._rate = rate
        self._rules: list[_Rule] = []
        self._attended: list[tuple[_AttendedStep, _Rule]] = []

    def attach(self, trainer: pl.Trainer) -> None:
        """Rule the steps of all optimizers of the Trainer, in ``on_train_start``.

        Raises:
            MisconfigurationException: for an optimizer that is none of torch's, or that has no
                learning rate.
        """
        self.detach()
        optimizers = _torch_optimizers(trainer)
        for i, optimizer in enumerate(optimizers):
            _require_rates(i, optimizer)
        self._rules = [_Rule(functools.partial(self._rate, i)) for i in range(len(optimizers))]
        for optimizer, rule in zip(optimizers, self._rules, strict=True):
            step = _attended_step(optimizer)
            step.rules.append(rule)
            self._attended.append((step, rule))

    @property
    def effective(self) -> list[list[float]]:
        """Rates of the last step by optimizer and group, those of others who rule it included.

        Empty for an optimizer that has yet to step. Tensors are read only here.
        """
        return [[float(rate) for rate in rule.used] for rule in self._rules]

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception."""
        for step, rule in self._attended:
            step.rules.remove(rule)
            step.leave_if_empty()
        self._attended = []


# -- one optimizer -----------------------------------------------------------------------------


@dataclass(eq=False)
class _Count:
    called: int = 0
    skipped: Tensor | None = None

    def add(self, found_inf: Any) -> None:
        self.called += 1
        if found_inf is not None:
            skipped = torch.as_tensor(found_inf).detach() > 0
            self.skipped = skipped.long() if self.skipped is None else self.skipped + skipped

    def steps(self) -> int:
        if self.skipped is not None:
            self.called -= int(self.skipped)
            self.skipped = None
        return self.called


@dataclass(eq=False)
class _Rule:
    rate: Callable[[int, Rate], Rate]
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


class _AttendedStep:
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
        self.counts: list[_Count] = []
        self.rules: list[_Rule] = []

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
        if self.counts or self.rules or not own:
            return
        del vars(self._optimizer)["step"]
        if self._shadowed is not None:
            vars(self._optimizer)["step"] = self._shadowed

    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        if callable(kwargs.get("closure")):
            kwargs["closure"] = self._scheduled_inside(kwargs["closure"])
        elif args and callable(args[0]):
            args = (self._scheduled_inside(args[0]), *args[1:])
        try:
            self._replace()  # LBFGS reads the rate before its closure
            result = self._step(*args, **kwargs)
        finally:
            self._put_back()
        for count in self.counts:
            count.add(getattr(self._optimizer, "found_inf", None))
        return result

    def _scheduled_inside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, in which ``training_step`` may run, with the scheduled rates."""

        def scheduled() -> Any:
            self._put_back()
            result = closure()
            self._replace()
            return result

        return scheduled

    @torch.no_grad()
    def _replace(self) -> None:
        if not self.rules:
            return
        groups = self._optimizer.param_groups
        scheduled = [_copy(group["lr"]) for group in groups]  # groups may share one tensor
        ruled = [self._ruled(j, rate) for j, rate in enumerate(scheduled)]
        for group, before, rate in zip(groups, scheduled, ruled, strict=True):
            lr = _write(group, rate)
            self._replaced.append(_Replaced(group, lr, before, _version(lr)))
        for rule in self.rules:
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


def _attended_step(optimizer: Optimizer) -> _AttendedStep:
    """Return the one that all share, also through wrappers that schedulers put around it."""
    found = getattr(optimizer.step, "_attended_step", None)
    return found if isinstance(found, _AttendedStep) else _AttendedStep(optimizer)


def _torch_optimizers(trainer: pl.Trainer) -> list[Optimizer]:
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


def _require_rates(i: int, optimizer: Optimizer) -> None:
    for j, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise MisconfigurationException(
                f"Optimizer {i} ({type(optimizer).__qualname__}) must have a learning rate, and "
                f'its group {j} has no "lr". Return an optimizer with `lr=` from '
                "`configure_optimizers`."
            )
