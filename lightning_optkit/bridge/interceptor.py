"""One ordered place where interveners meet ``training_step``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_optkit.bridge.probe import is_probing

__all__ = ["ROLES", "AroundStep", "Step", "StepInterceptor"]

Step = Callable[[Any], Any]
"""``batch -> output``: the rest of the way to ``training_step``, its other arguments given."""

AroundStep = Callable[[Step, Any], Any]
"""``(step, batch) -> output``: what an intervener does in the place of ``step(batch)``."""

ROLES = ("passes", "mixing")
"""The order in which interveners stand around the step, the outermost first: who runs the step
several times, then who changes its batch."""


class StepInterceptor:
    """Stands around the ``training_step`` of a module while it trains.

    There is no other way for a callback to change a batch: Lightning ignores what hooks return. The
    method is shadowed on the instance, for all interceptors together and in the order of
    :data:`ROLES`, however callbacks are sorted. Validation that calls ``training_step`` itself and
    measurements of observers go past it: they see the step as the user wrote it.

    Args:
        around: called in the place of the step, with the step and the batch.
        role: one of :data:`ROLES`; a module has one interceptor of each.

    Example:
        In a callback::

            def setup(self, trainer, pl_module, stage):
                if stage == "fit":
                    self.interceptor.attach(pl_module)


            def teardown(self, trainer, pl_module, stage):
                self.interceptor.detach()


            def on_exception(self, trainer, pl_module, exception):
                self.interceptor.detach()
    """

    def __init__(self, around: AroundStep, *, role: str) -> None:
        if role not in ROLES:
            raise ValueError(f"`role` must be one of {', '.join(map(repr, ROLES))}, got {role!r}.")
        self.around = around
        self.role = role
        self._step: _InterceptedStep | None = None

    def attach(self, pl_module: pl.LightningModule) -> None:
        """Take the place of the step, in ``setup`` for fitting.

        Raises:
            MisconfigurationException: for a step that fetches its own batches, or if another has
                the role.
        """
        self.detach()
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "`training_step` must take a batch to be changed, got one that takes "
                "`dataloader_iter`. Write `training_step(self, batch, batch_idx)`, or remove the "
                "callback."
            )
        step = _intercepted_step(pl_module)
        if self.role in [other.role for other in step.interceptors]:
            step.leave_if_empty()
            raise MisconfigurationException(
                f"`training_step` must have one callback for {self.role}, got two. Remove one of "
                "them; `MixupOrCutMix` draws one of its two for each batch."
            )
        step.interceptors.append(self)
        step.interceptors.sort(key=lambda each: ROLES.index(each.role))
        self._step = step

    def detach(self) -> None:
        """Leave the step, in ``teardown`` and on an exception."""
        if self._step is not None:
            self._step.interceptors.remove(self)
            self._step.leave_if_empty()
            self._step = None


class _InterceptedStep:
    """Takes the place of one module's ``training_step``, on the instance."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.module = pl_module
        self._shadowed = vars(pl_module).get("training_step")  # of a compiled module
        self.interceptors: list[StepInterceptor] = []
        original = pl_module.training_step

        # A method, so that a copy of the module runs its own; Lightning looks at the signature.
        @functools.wraps(getattr(original, "__func__", original))
        def training_step(module: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
            if module is not pl_module:  # a copy, to which nobody has attached
                return type(module).training_step(module, *args, **kwargs)
            trains = module._trainer is not None and module._trainer.training
            if not trains or is_probing() or not self.interceptors:
                return original(*args, **kwargs)
            return self._run(original, *args, **kwargs)

        self._name_of_batch = next(iter(inspect.signature(original).parameters), "batch")
        vars(training_step)["_intercepted_step"] = self
        self._method = MethodType(training_step, pl_module)
        vars(pl_module)["training_step"] = self._method

    def leave_if_empty(self) -> None:
        """Give the step back. Where someone wrapped it since, what stays there does nothing."""
        if self.interceptors or vars(self.module).get("training_step") is not self._method:
            return
        del vars(self.module)["training_step"]
        if self._shadowed is not None:
            vars(self.module)["training_step"] = self._shadowed

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = "" if args else self._name_of_batch
        batch = args[0] if args else kwargs.pop(name)

        def innermost(batch: Any) -> Any:
            if name:
                return original(**{name: batch}, **kwargs)
            return original(batch, *args[1:], **kwargs)

        step: Step = innermost
        for interceptor in reversed(self.interceptors):
            step = functools.partial(interceptor.around, step)
        return step(batch)


def _intercepted_step(pl_module: pl.LightningModule) -> _InterceptedStep:
    """Return the one that all share."""
    found = getattr(pl_module.training_step, "_intercepted_step", None)
    if isinstance(found, _InterceptedStep) and found.module is pl_module:
        return found
    return _InterceptedStep(pl_module)
