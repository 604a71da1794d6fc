"""Losses at many points, with all that can be prepared once prepared once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.gradient_graph import LossFn, flat, scalar
from lightning_optkit.measures.precision import full_precision

__all__ = ["HoldingLossFn", "LossesAlong", "Reduce"]

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""


@runtime_checkable
class HoldingLossFn(Protocol):
    """A loss function that can prepare once for many losses at the same tensors."""

    def __call__(self, params: dict[str, Tensor]) -> Any:
        """Return the loss at these parameters."""

    def holding(self, params: dict[str, Tensor]) -> AbstractContextManager[Callable[[], Any]]:
        """Open the loss at what these very tensors hold when it is called.

        The caller writes their values in place before each call, under ``torch.no_grad``.
        """


class LossesAlong:
    """The weighted sum of losses along straight lines through the parameters: a context.

    The parameters have tensors of their own here, which each point is written into, and a loss
    function that has ``holding`` prepares for them once. Nothing else may be asked of the same
    losses while the context is open. No graph is kept, unless a loss function differentiates
    within, as for a gradient penalty.

    Args:
        loss_fns: one for each batch.
        params: the parameters by name.
        weights: of the batches; over all processes they sum to 1.
        reduce: sums a tensor over processes; ``None`` = there is one.
    """

    def __init__(
        self,
        loss_fns: Sequence[LossFn],
        params: Mapping[str, Tensor],
        *,
        weights: Sequence[float],
        reduce: Reduce | None,
    ) -> None:
        self._loss_fns = loss_fns
        self._weights = weights
        self._reduce = reduce
        self._here = flat([p.detach() for p in params.values()], params)
        # Each point is written into one vector. The tensors that the losses see are other objects
        # on its memory, as long as a step gives them no new data; those of another dtype have their
        # own, and are copied to.
        self._point = self._here.clone()
        parts = self._point.split([p.numel() for p in params.values()])
        self._parts = [part.view(p.shape) for part, p in zip(parts, params.values(), strict=True)]
        self._live = {
            name: part.detach().to(p)
            for part, (name, p) in zip(self._parts, params.items(), strict=True)
        }
        self._needs_graph = False  # for a step that differentiates within
        self._losses: list[Callable[[], Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> LossesAlong:
        """Open: preparing waits for the first loss."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Put back what was prepared."""
        self._stack.close()

    def __call__(
        self, direction: Tensor, positions: Iterable[float], start: Tensor | None = None
    ) -> Tensor:
        """Return the losses at the parameters plus ``start + position * direction``.

        Args:
            direction: shape ``(n,)``.
            positions: as many on all processes.
            start: shape ``(n,)``; ``None`` = zero.

        Returns:
            Shape ``(positions,)``, NaN or infinite where the loss is.
        """
        begin = self._here if start is None else self._here + start
        positions = list(positions)
        found = torch.zeros(len(positions) + 1, dtype=begin.dtype, device=begin.device)
        failure: Exception | None = None
        try:
            with full_precision(begin.device.type):
                for i, position in enumerate(positions):
                    found[i] = self._loss_at(begin, direction, float(position))
        except Exception as error:
            if self._reduce is None:
                raise
            failure, found[-1] = error, 1.0
        total = found if self._reduce is None else self._reduce(found)
        if failure is not None:
            raise failure
        if self._reduce is not None and float(total[-1]) > 0:
            raise CurvatureError("The loss could not be computed on another process, see there.")
        return total[:-1]

    def _loss_at(self, begin: Tensor, direction: Tensor, position: float) -> Tensor:
        """Return this process's part of the loss at one point."""
        if not self._losses:  # only here, so that other processes hear of a failure
            opened = [self._stack.enter_context(_held(f, self._live)) for f in self._loss_fns]
            self._losses = opened
        total = torch.zeros((), dtype=self._here.dtype, device=self._here.device)
        for loss, weight in zip(self._losses, self._weights, strict=True):
            move = partial(self._move, begin, direction, position)
            total += weight * self._computed(loss, move)
        return total

    def _computed(self, loss: Callable[[], Any], move: Callable[[], None]) -> Tensor:
        move()  # anew for each: a step may write into its parameters
        try:
            with torch.set_grad_enabled(self._needs_graph):
                return scalar(loss()).detach()
        except RuntimeError:
            if self._needs_graph:
                raise
        self._needs_graph = True  # only an error like that of `autograd.grad` is gone then
        return self._computed(loss, move)

    @torch.no_grad()
    def _move(self, begin: Tensor, direction: Tensor, position: float) -> None:
        torch.add(begin, direction, alpha=position, out=self._point)
        for tensor, part in zip(self._live.values(), self._parts, strict=True):
            if tensor.data_ptr() != part.data_ptr():
                tensor.copy_(part)


def _held(loss_fn: LossFn, live: dict[str, Tensor]) -> AbstractContextManager[Callable[[], Any]]:
    if isinstance(loss_fn, HoldingLossFn):
        return loss_fn.holding(live)
    return nullcontext(lambda: loss_fn(dict(live)))
