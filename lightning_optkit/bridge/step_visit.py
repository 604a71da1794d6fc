"""The parameters of each optimizer, met just before one real step of it and just after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.bridge.sharding import at_rest
from lightning_optkit.bridge.together import together

__all__ = ["StepVisit", "gradient_scale"]

Before = TypeVar("Before")
After = TypeVar("After")
Parameters = Mapping[str, Tensor]


class StepVisit(Generic[Before, After]):
    """Calls one function before the next real step of each optimizer, and another right after it.

    Before: in ``on_before_optimizer_step``, where Lightning has unscaled the gradients and has not
    yet clipped them. After: inside ``optimizer.step()``, where groups hold the rates that were
    used. Of several steps in a batch the first is visited. A step that a gradient scaler skipped is
    none, nor is one without a gradient: a later one is visited in its place. An optimizer that runs
    none of torch's hooks is looked at after the batch; it stepped if a weight changed.

    Between ``start`` and the step it keeps nothing on optimizers or parameters, and nothing at all
    after ``after_batch``. A function that fails leaves training alone; ``after_batch`` raises.

    Args:
        before: ``(parameters by name, scale of their gradients) -> found``.
        after: ``(optimizer, parameters by name, copies of them from before) -> found``.
        is_chosen: whether to visit a parameter of this name.
    """

    def __init__(
        self,
        before: Callable[[Parameters, float], Before],
        after: Callable[[Optimizer, Parameters, Parameters], After],
        *,
        is_chosen: Callable[[str], bool],
    ) -> None:
        self._before = before
        self._after = after
        self._is_chosen = is_chosen
        self._names: dict[int, str] = {}
        self._waiting: set[int] = set()  # optimizers yet to be visited, by index
        self._visits: dict[int, _Visit[Before, After]] = {}  # of this batch
        self._found: dict[int, tuple[Before, After]] = {}

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for a step of each optimizer, in ``on_train_batch_start``; all ranks together."""
        self.close()
        with at_rest(pl_module):  # FSDP2 gives gathered parameters another identity
            self._names = {id(p): name for name, p in pl_module.named_parameters()}
        self._found = {}
        self._waiting = {
            i for i, optimizer in enumerate(trainer.optimizers) if self.parameters(optimizer)
        }

    def parameters(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the chosen parameters that an optimizer trains now, by name."""
        owned = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        named = {self._names[id(p)]: p for p in owned if id(p) in self._names}
        return {name: p for name, p in named.items() if self._is_chosen(name)}

    def before_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Visit the optimizer if it is its turn, in ``on_before_optimizer_step``."""
        i = next((i for i, each in enumerate(trainer.optimizers) if each is optimizer), -1)
        if i in self._visits:  # a second step in this batch, or a closure that is called again
            self._visits[i].is_over = self._visits[i].has_stepped
        elif i in self._waiting:
            parameters = self.parameters(optimizer)
            if any(p.grad is not None for p in parameters.values()):  # else nothing will move
                self._visits[i] = self._opened(trainer, optimizer, parameters)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Settle which steps were made, in ``on_train_batch_end``; all ranks together.

        Raises:
            Exception: what one of the functions raised, on this rank or another.
        """
        visits = self._visits
        self.close()
        for i, visit in visits.items():
            self._waiting.discard(i)  # if it failed, it would again
            together(trainer, visit.raise_failure)
            if not visit.has_stepped:
                self._look_again(trainer, visit)
                together(trainer, visit.raise_failure)
            if visit.has_stepped:
                self._found[i] = cast(Before, visit.before), cast(After, visit.after)
            else:
                self._waiting.add(i)

    @property
    def is_complete(self) -> bool:
        """Whether all optimizers were visited."""
        return not self._waiting

    @property
    def found(self) -> list[tuple[Before, After]]:
        """What was found before and after a step of each optimizer, those visited so far."""
        return [self._found[i] for i in sorted(self._found)]

    def close(self) -> None:
        """Let go of optimizers and copies; what was found stays."""
        for visit in self._visits.values():
            if visit.handle is not None:
                visit.handle.remove()
        self._visits = {}

    # -- one optimizer ----------------------------------------------------------------------------

    @torch.no_grad()
    def _opened(
        self, trainer: pl.Trainer, optimizer: Optimizer, parameters: dict[str, Tensor]
    ) -> _Visit[Before, After]:
        visit: _Visit[Before, After] = _Visit(optimizer, parameters)
        with visit.holding_failure():  # all ranks may take part in what follows, so none stays away
            visit.copies = together(trainer, partial(_copied, visit.parameters))
            visit.before = self._before(visit.parameters, gradient_scale(trainer, optimizer))
            visit.handle = optimizer.register_step_post_hook(partial(self._stepped, visit))
        return visit

    def _stepped(self, visit: _Visit[Before, After], optimizer: Optimizer, *_: Any) -> None:
        # runs again where a subclass calls `super().step()`: the last time is right
        skipped = getattr(optimizer, "found_inf", None)  # of a fused optimizer that unscales
        if not visit.is_over and (skipped is None or float(torch.as_tensor(skipped)) == 0):
            self._finish(visit)

    @torch.no_grad()
    def _finish(self, visit: _Visit[Before, After]) -> None:
        with visit.holding_failure():
            visit.after = self._after(visit.optimizer, visit.parameters, visit.copies)
            visit.has_stepped = True

    @torch.no_grad()
    def _look_again(self, trainer: pl.Trainer, visit: _Visit[Before, After]) -> None:
        """Finish the visit if a weight changed although no hook of the optimizer has run."""
        pairs = zip(visit.parameters.values(), visit.copies.values(), strict=True)
        changed = any(not torch.equal(_local(now), _local(before)) for now, before in pairs)
        if trainer.strategy.reduce_boolean_decision(changed, all=False):
            self._finish(visit)


@dataclass(eq=False)
class _Visit(Generic[Before, After]):
    optimizer: Optimizer
    parameters: dict[str, Tensor]
    copies: dict[str, Tensor] = field(default_factory=dict)
    before: Before | None = None
    after: After | None = None
    has_stepped: bool = False
    is_over: bool = False
    failure: Exception | None = None
    handle: RemovableHandle | None = None

    @contextmanager
    def holding_failure(self) -> Iterator[None]:
        """Keep an exception for later: here it would stop training."""
        try:
            yield
        except Exception as error:
            self.failure = error

    def raise_failure(self) -> None:
        """Raise what was kept."""
        if self.failure is not None:
            raise self.failure


def _copied(tensors: Parameters) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer | None = None) -> float:
    """Return by how much gradients are too large because of a gradient scaler.

    Args:
        trainer: the Trainer, fitting.
        optimizer: whose gradients, in ``on_before_optimizer_step``; ``None`` = those in a backward
            pass. Fused optimizers unscale theirs only in the step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0
    is_scaled = optimizer is None or getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if is_scaled else 1.0
