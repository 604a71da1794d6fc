"""The gradients of single batches before they are summed: over batches, and over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["LocalGradients"]


class LocalGradients:
    """Norms of the gradients that each backward pass hands to the parameters, on this rank.

    Hooks of the tensors see what a backward pass adds, before it is accumulated and before DDP
    reduces it. They are there between ``start`` and ``stop`` alone and change no bit. A hook that
    fails leaves the backward pass alone; ``stop`` raises instead.

    Args:
        norm: returns the norm of a tensor as a tensor, without waiting for the device.
    """

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        self._norm = norm
        self._handles: list[RemovableHandle] = []
        self._norms: list[list[Tensor]] = []  # of each batch
        self._met: set[tuple[int, int]] = set()  # batch, parameter
        self._failure: Exception | None = None

    def start(self, parameters: Iterable[Tensor]) -> None:
        """Hook the parameters, before the first batch."""
        self.close()
        self._norms, self._met, self._failure = [], set(), None
        for i, parameter in enumerate(parameters):
            self._handles.append(parameter.register_hook(lambda grad, i=i: self._meet(i, grad)))

    def next_batch(self) -> None:
        """Say that gradients from now on are those of the next batch."""
        self._norms.append([])

    def stop(self) -> list[float]:
        """Unhook the parameters; return the squared norm of each batch's gradient.

        A parameter that was not met counts as zero, a batch that met none as NaN.

        Raises:
            RuntimeError: if a parameter was met twice in one batch: its gradient came in pieces.
        """
        self.close()
        if self._failure is not None:
            raise self._failure
        return [_sum_of_squares(norms) for norms in self._norms]

    def close(self) -> None:
        """Unhook the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _meet(self, i: int, grad: Tensor) -> None:
        try:
            self._add(i, grad)
        except Exception as error:  # never in a backward pass of training
            self._failure = error

    def _add(self, i: int, grad: Tensor) -> None:
        batch = len(self._norms) - 1
        if (batch, i) in self._met:
            raise RuntimeError(
                "The gradient of a parameter must come whole, once for each batch, got it in "
                "pieces. Does a step differentiate it twice, or do reentrant checkpoints share it "
                "(then pass them `use_reentrant=False`)? If not, pass `noise_scale=False`."
            )
        self._met.add((batch, i))
        self._norms[batch].append(self._norm(grad))


def _sum_of_squares(norms: list[Tensor]) -> float:
    if not norms:  # the batch made no backward pass
        return math.nan
    devices = {norm.device for norm in norms}  # one wait for each
    found = [torch.stack([n for n in norms if n.device == device]).cpu() for device in devices]
    return sum(float(each.double().square().sum()) for each in found)
