"""What happens inside ``optimizer.step()``: did it step, at which rate, and what did it change?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_optkit.bridge.attended_step import (
    AttendedStep,
    Count,
    Rate,
    Rule,
    attended_step,
    torch_optimizers,
)

__all__ = ["Rate", "RateInStep", "StepWatch", "UpdateInStep"]


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
        self._counts: list[Count] = []
        self._attended: list[tuple[AttendedStep, Count]] = []
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
        optimizers = torch_optimizers(trainer)
        new = [Count() for _ in optimizers[len(self._counts) :]]
        self._counts = self._counts[: len(optimizers)] + new
        for optimizer, count in zip(optimizers, self._counts, strict=True):
            step = attended_step(optimizer)
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
        self._counts = [Count(called) for called in state["num_steps"]]
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
        role: what the rates are changed for, such as ``"warmup"``, where one callback alone may.
        without: what to write to do without it, for who meets another in the same role.
    """

    def __init__(
        self,
        rate: Callable[[int, int, Rate], Rate],
        *,
        role: str | None = None,
        without: str | None = None,
    ) -> None:
        self._rate = rate
        self._role = role
        self._without = without
        self._attended: dict[int, tuple[AttendedStep, Rule]] = {}
        self._num_optimizers = 0

    def attach(self, trainer: pl.Trainer, optimizers: Sequence[int] | None = None) -> None:
        """Rule the steps of these optimizers of the Trainer, in ``on_train_start``.

        Args:
            trainer: the Trainer.
            optimizers: which, by index; ``None`` = all.

        Raises:
            MisconfigurationException: for an optimizer that is none of torch's, that has no
                learning rate, or whose rate another changes in the same role.
        """
        self.detach()
        self._num_optimizers = len(trainer.optimizers)
        ruled = dict(enumerate(torch_optimizers(trainer)))
        ruled = ruled if optimizers is None else {i: ruled[i] for i in optimizers}
        for i, optimizer in ruled.items():
            _require_rates(i, optimizer)
        steps = {i: attended_step(optimizer) for i, optimizer in ruled.items()}
        for i, step in steps.items():
            self._require_alone(i, step)
        for i, step in steps.items():
            rule = Rule(functools.partial(self._rate, i), self._role, self._without)
            step.rules.append(rule)
            self._attended[i] = step, rule

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Have the rates of the coming steps in ``group["lr"]`` for the block, for who reads it."""
        with ExitStack() as stack:
            for step, _ in self._attended.values():
                stack.enter_context(step.showing_rates())
            yield

    @property
    def effective(self) -> list[list[float]]:
        """Rates of the last step by optimizer and group, those of others who rule it included.

        Empty for an optimizer that has yet to step or is not ruled. Tensors are read only here.
        """
        return [
            [float(rate) for rate in self._attended[i][1].used] if i in self._attended else []
            for i in range(self._num_optimizers)
        ]

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception."""
        for step, rule in self._attended.values():
            step.rules.remove(rule)
            step.leave_if_empty()
        self._attended = {}

    def _require_alone(self, i: int, step: AttendedStep) -> None:
        other = next((rule for rule in step.rules if rule.role == self._role), None)
        if self._role is None or other is None:
            return
        remedies = dict.fromkeys(text for text in (other.without, self._without) if text)
        remedy = ", ".join(remedies) or "remove one of the callbacks"
        raise MisconfigurationException(
            f"Optimizer {i} must have one {self._role} of its learning rate, got two: both would "
            f"multiply. {remedy[0].upper()}{remedy[1:]}, or give them different optimizers."
        )


class UpdateInStep:
    """What holds, and what happens, only around an optimizer's update of its parameters.

    The closure, in which ``training_step`` may run, is outside; an optimizer that calls it several
    times makes as many updates. Rates of :class:`RateInStep` are in the groups by then. Several
    compose: the first attached is the outermost.

    Args:
        around: ``(optimizer index, optimizer) -> context``, entered before an update and left after
            it, without gradients. An update that fails raises through it.
    """

    def __init__(self, around: Callable[[int, Optimizer], AbstractContextManager[None]]) -> None:
        self._around = around
        self._attended: list[tuple[AttendedStep, Callable[[], AbstractContextManager[None]]]] = []

    def attach(self, trainer: pl.Trainer, optimizers: Sequence[int] | None = None) -> None:
        """Surround the updates of these optimizers of the Trainer, in ``on_train_start``.

        Args:
            trainer: the Trainer.
            optimizers: which, by index; ``None`` = all.

        Raises:
            MisconfigurationException: for an optimizer that is none of torch's.
        """
        self.detach()
        for i, optimizer in enumerate(torch_optimizers(trainer)):
            if optimizers is None or i in optimizers:
                step = attended_step(optimizer)
                surrounding = functools.partial(self._around, i, optimizer)
                step.surroundings.append(surrounding)
                self._attended.append((step, surrounding))

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception."""
        for step, surrounding in self._attended:
            step.surroundings.remove(surrounding)
            step.leave_if_empty()
        self._attended = []


def _require_rates(i: int, optimizer: Optimizer) -> None:
    for j, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise MisconfigurationException(
                f"Optimizer {i} ({type(optimizer).__qualname__}) must have a learning rate, and "
                f'its group {j} has no "lr". Return an optimizer with `lr=` from '
                "`configure_optimizers`."
            )
