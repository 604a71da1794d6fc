"""What a training step reaches outside its module, made inert for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

__all__ = [
    "CapturedLosses",
    "InertOptimizer",
    "LossFoundError",
    "ProbeError",
    "mute",
    "trainer_muted",
]


class ProbeError(RuntimeError):
    """The training loss could not be read from ``training_step``; the message says what to do."""


class LossFoundError(BaseException):
    """Ends a manual step once its loss is known; no ``except Exception`` in the step holds it."""


class CapturedLosses:
    """Stands for ``manual_backward``, and ends the step at the wanted loss.

    Args:
        wanted: which of the step's losses, counted from 0; ``None`` lets the step run to its end.
    """

    def __init__(self, wanted: int | None) -> None:
        self._wanted = wanted
        self.losses: list[Tensor] = []

    def __call__(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Take a loss in place of differentiating it."""
        self.losses.append(loss)
        if self._wanted is not None and len(self.losses) == self._wanted + 1:
            raise LossFoundError

    @property
    def chosen(self) -> Tensor:
        """The wanted loss.

        Raises:
            ProbeError: if the step handed in fewer.
        """
        if self._wanted is not None and len(self.losses) > self._wanted:
            return self.losses[self._wanted]
        if not self.losses:
            raise ProbeError(
                "`training_step` of a module with manual optimization must hand its loss to "
                "`self.manual_backward`, and did not. Call it in place of `loss.backward()`, or "
                "pass `loss_fn=(pl_module, batch) -> loss`."
            )
        raise ProbeError(
            f"`loss_index` must be below {len(self.losses)}, the number of `manual_backward` calls "
            f"in this `training_step`, got {self._wanted}."
        )


class InertOptimizer:
    """An optimizer that can be read but does nothing; it passes for one of the wrapped class."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for `isinstance`
        return type(self._optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the closure, for the loss that it hands to ``manual_backward``."""
        return closure() if closure is not None else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Leave the gradients."""

    def toggle_model(self, *args: Any, **kwargs: Any) -> nullcontext[None]:
        """Leave ``requires_grad``."""
        return nullcontext()


class _InertScheduler(InertOptimizer):
    def step(self, *args: Any, **kwargs: Any) -> None:
        """Leave the learning rate."""


def mute(module: pl.LightningModule, captured: CapturedLosses) -> None:
    """Shadow, on the instances, all methods that reach outside the module.

    The shadows live in ``__dict__`` and vanish when the snapshot is restored.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    for child in module.modules():
        child.__dict__["_backward_hooks"] = type(child._backward_hooks)()
        child.__dict__["_backward_pre_hooks"] = type(child._backward_pre_hooks)()
        if isinstance(child, pl.LightningModule):
            for name in ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer"):
                child.__dict__[name] = nothing
            child.__dict__["clip_gradients"] = nothing
            child.__dict__["manual_backward"] = captured
            child.__dict__["lr_schedulers"] = _inert(child.lr_schedulers, _InertScheduler)


def _inert(method: Callable[..., Any], stub: type[InertOptimizer]) -> Callable[..., Any]:
    def inert(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        if isinstance(found, list):
            return [stub(each) for each in found]
        return None if found is None else stub(found)

    return inert


@contextmanager
def trainer_muted(trainer: pl.Trainer) -> Iterator[None]:
    """Give the Trainer loggers that write nothing and optimizers that do nothing."""
    strategy = trainer.strategy
    loggers, should_stop = trainer.loggers, trainer.should_stop
    optimizers, wrapped = strategy._optimizers, strategy._lightning_optimizers
    trainer.loggers = [DummyLogger() for _ in loggers]
    strategy._optimizers = [cast(Any, InertOptimizer(each)) for each in optimizers]
    strategy._lightning_optimizers = [cast(Any, InertOptimizer(each)) for each in wrapped]
    try:
        yield
    finally:
        strategy._optimizers, strategy._lightning_optimizers = optimizers, wrapped
        trainer.loggers, trainer.should_stop = loggers, should_stop
