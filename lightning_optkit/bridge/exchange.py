"""Other values in a module's tensors for a while, and its own again after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Exchange"]

_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # of which schedulers send some
    if hasattr(signal, name)
]


class Exchange:
    """Exchanges a module's values with others that are kept aside, in place, there and back.

    Addresses stay, so optimizers, compiled modules, CUDA graphs and flattened weights notice
    nothing. A parameter changes places with its value aside: no memory is needed for a second
    copy. Where the value aside has another dtype, and of buffers, which a validation may write
    into, the module's own values are cloned; what was written into a buffer stays, on both sides.
    Names of one memory are exchanged together, once.

    Args:
        buffer_names: which of the names are buffers.
    """

    def __init__(self, buffer_names: Collection[str]) -> None:
        self._buffer_names = set(buffer_names)
        self._own: dict[str, Tensor] = {}  # clones
        self._goes_with: dict[str, str] = {}  # names whose memory is that of an earlier one
        self.is_exchanged = False
        """Whether the module holds the other values now."""

    @torch.no_grad()
    def exchange(self, live: Mapping[str, Tensor], aside: Mapping[str, Tensor]) -> None:
        """Put the other values into the module or, if they are there, its own.

        Args:
            live: the module's tensors by name.
            aside: the other values, all or some of these names.
        """
        if not self.is_exchanged:
            self._goes_with = _of_one_memory(live, aside)
        firsts = [name for name in aside if name not in self._goes_with]
        done: list[str] = []
        with _signals_held(), torch.inference_mode(False):  # clones made in it cannot be used later
            try:
                for name in firsts:
                    self._exchange_one(name, live[name], aside[name])
                    done.append(name)
            except BaseException:
                self.is_exchanged = not self.is_exchanged
                for name in done:
                    self._exchange_one(name, live[name], aside[name])
                self.is_exchanged = not self.is_exchanged
                raise
            self.is_exchanged = not self.is_exchanged

    def _exchange_one(self, name: str, here: Tensor, other: Tensor) -> None:
        changes_places = self._changes_places(name, here, other)
        if here.shape != other.shape and (changes_places or not self.is_exchanged):
            raise ValueError(  # lest one number fills all that are there
                "The module's tensors must keep their shapes while they are averaged, got "
                f"`{name}` of shape {tuple(here.shape)} whose average is of shape "
                f"{tuple(other.shape)}. Change layers before the average begins."
            )
        if changes_places:
            own = here.detach().clone()
            here.data.copy_(other)
            other.copy_(own)
        elif not self.is_exchanged:
            own = here.detach().clone()
            here.data.copy_(other)
            self._own[name] = own
        else:
            self._give_back(name, here, other)

    def own(self, live: Mapping[str, Tensor], aside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the module's own values of the names in ``aside``, wherever they are."""
        if not self.is_exchanged:
            return {name: live[name] for name in aside}
        firsts = {name: self._goes_with.get(name, name) for name in aside}
        return {name: self._own.get(first, aside[first]) for name, first in firsts.items()}

    def others(self, live: Mapping[str, Tensor], aside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the other values, wherever they are."""
        if not self.is_exchanged:
            return dict(aside)
        return {name: value if name in self._own else live[name] for name, value in aside.items()}

    def _changes_places(self, name: str, here: Tensor, other: Tensor) -> bool:
        return name not in self._buffer_names and here.dtype == other.dtype

    def _give_back(self, name: str, here: Tensor, other: Tensor) -> None:
        own = self._own.pop(name)
        is_buffer = name in self._buffer_names
        was_written = is_buffer and not _are_same(here, other)
        if not was_written:
            here.data.copy_(own)
        elif here.shape == other.shape:  # where the next validation is to find it
            other.copy_(here)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let Ctrl-C and the like wait for the end of the block: halfway there is a mixture."""
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield
        return
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda received, frame: waiting.append(received))
    try:
        yield
    finally:
        for number, handler in reversed(handlers.items()):  # Ctrl-C last: it raises from then on
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


def _of_one_memory(live: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """Return the first name of the same memory, for each of the names that is not the first."""
    firsts: dict[tuple[Any, ...], str] = {}
    places = {
        name: (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for name in names
        if (tensor := live[name]).numel()  # an empty one has no memory
    }
    found = {name: firsts.setdefault(place, name) for name, place in places.items()}
    return {name: first for name, first in found.items() if name != first}


def _are_same(here: Tensor, other: Tensor) -> bool:
    other = other.to(here)
    same_shape = here.shape == other.shape
    return same_shape and torch.allclose(here, other, rtol=0, atol=0, equal_nan=True)
