"""State of a module and of all that hangs on it, remembered and put back in place."""

from __future__ import annotations

import functools
import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler

__all__ = ["Snapshot", "put_back"]

Restore = Callable[[], None]

# Objects of these packages hold the whole training run; what a training step changes in them is
# muted by the probe instead. Modules, samplers and generators are the exceptions.
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "builtins", "threading")

_DATA = (torch.utils.data.Dataset, pl.LightningDataModule)
_TOGETHER = 100  # dicts: a step that changes one has these looked at singly


class Snapshot:
    """Attributes, containers, tensors and random generators reachable from some objects.

    Followed: attributes of modules (torchmetrics and their states among them), samplers and
    objects of user classes; dicts, lists, tuples, sets and deques; tensors that are no parameters,
    NumPy arrays; ``torch``, NumPy and Python random generators. Not followed: datasets, classes
    with ``__slots__``, open files and whatever lies outside the objects.

    Args:
        roots: where to start; ``None`` is passed over.
        max_items: follow datasets too, but no tensor or container with more items than this.
        skip: objects that are neither remembered nor followed.
    """

    def __init__(
        self, *roots: object, max_items: int | None = None, skip: Iterable[object] = ()
    ) -> None:
        self._max_items = max_items
        self._restores: list[Restore] = []
        self._keep: list[object] = list(skip)  # an id is only unique while its object is alive
        seen = set(map(id, self._keep))
        waiting: list[object] = list(roots)
        dicts: list[dict[Any, Any]] = []
        while waiting:
            item = waiting.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            self._keep.append(item)
            waiting.extend(self._remember(item, dicts))
        self._dicts = [_Dicts(dicts[i : i + _TOGETHER]) for i in range(0, len(dicts), _TOGETHER)]

    def restore(self) -> None:
        """Put everything back, each object in place and only where it changed."""
        for dicts in self._dicts:
            dicts.restore()
        for restore in self._restores:
            restore()

    @classmethod
    @contextmanager
    def undone(cls, *roots: object, max_items: int | None = None) -> Iterator[None]:
        """Undo, on leaving, what happens to the objects meanwhile."""
        snapshot = cls(*roots, max_items=max_items)
        try:
            yield
        finally:
            snapshot.restore()

    def _remember(self, item: object, dicts: list[dict[Any, Any]]) -> Iterable[object]:
        """Store how to restore ``item``; return what to look at next."""
        if self._max_items is not None and _num_items(item) > self._max_items:
            return ()
        if isinstance(item, dict):
            dicts.append(item)
            return item.values()
        for kind, remember in _REMEMBER.items():
            if isinstance(item, kind):
                restore, inside = remember(item)
                if restore is not _nothing:
                    self._restores.append(restore)
                return inside
        if isinstance(item, tuple):
            return item
        follows_data = self._max_items is not None and isinstance(item, _DATA)
        if follows_data or _is_plain_object(item):
            return (vars(item),)
        return ()


def _num_items(item: object) -> int:
    if isinstance(item, Tensor):
        return item.numel()
    if isinstance(item, np.ndarray):
        return item.size
    return len(item) if isinstance(item, (dict, list, tuple, set, deque)) else 1


def _is_plain_object(item: object) -> bool:
    if isinstance(item, (nn.Module, Sampler)):
        return True
    if isinstance(item, (type, types.ModuleType, *_DATA)):
        return False
    return hasattr(item, "__dict__") and type(item).__module__.split(".")[0] not in _FOREIGN


def _nothing() -> None:
    """Restore what is never changed in place."""


class _Dicts:
    """Some dicts, compared with what was in them at one go: a net has a thousand of them."""

    def __init__(self, dicts: list[dict[Any, Any]]) -> None:
        self._dicts = dicts
        self._views = [item.values() for item in dicts]
        self._saved = [dict(item) for item in dicts]
        self._lengths = list(map(len, dicts))
        self._keys = list(chain.from_iterable(dicts))
        self._values = list(chain.from_iterable(self._views))

    def restore(self) -> None:
        """Put back what is not as it was."""
        if (
            list(map(len, self._dicts)) == self._lengths
            and _same(chain.from_iterable(self._dicts), self._keys)
            and _same(chain.from_iterable(self._views), self._values)
        ):
            return
        for item, saved in zip(self._dicts, self._saved, strict=True):
            if len(item) != len(saved) or not (
                _same(item, saved) and _same(item.values(), saved.values())
            ):
                item.clear()
                item.update(saved)


def _same(items: Iterable[object], saved: Iterable[object]) -> bool:
    return all(map(operator.is_, items, saved))


def _sequence(item: list[Any] | deque[Any]) -> tuple[Restore, Iterable[object]]:
    saved = list(item)

    def restore() -> None:
        if len(item) != len(saved) or not _same(item, saved):
            item.clear()
            item.extend(saved)

    return restore, saved


def _set(item: set[Any]) -> tuple[Restore, Iterable[object]]:
    saved = set(item)

    def restore() -> None:
        if item != saved:
            item.clear()
            item.update(saved)

    return restore, ()


def _tensor(item: Tensor) -> tuple[Restore, Iterable[object]]:
    if isinstance(item, nn.Parameter) or item.layout != torch.strided or item.is_meta:
        return _nothing, ()  # the probe substitutes parameters
    if isinstance(item, DTensor):
        item = cast(DTensor, item.detach()).to_local()  # shares its memory, needs no other rank
    if item.is_inference() or (item.numel() > 1 and 0 in item.stride()):
        return _nothing, ()  # nothing can be written into it
    return functools.partial(put_back, item, item.detach().clone()), ()


def put_back(tensor: Tensor, saved: Tensor) -> None:
    """Give a tensor its saved values, behind autograd, without waiting for a GPU."""
    if not (tensor.is_cpu and torch.equal(tensor, saved)):  # a comparison would wait
        tensor.data.copy_(saved)


def _array(item: np.ndarray[Any, Any]) -> tuple[Restore, Iterable[object]]:
    saved = item.copy()

    def restore() -> None:
        if item.flags.writeable:
            item[...] = saved

    return restore, ()


def _torch_generator(item: torch.Generator) -> tuple[Restore, Iterable[object]]:
    saved = item.get_state()

    def restore() -> None:
        item.set_state(saved)

    return restore, ()


def _python_generator(item: random.Random) -> tuple[Restore, Iterable[object]]:
    return functools.partial(item.setstate, item.getstate()), ()


def _numpy_generator(item: np.random.Generator) -> tuple[Restore, Iterable[object]]:
    saved = item.bit_generator.state
    return functools.partial(setattr, item.bit_generator, "state", saved), ()


def _numpy_random_state(item: np.random.RandomState) -> tuple[Restore, Iterable[object]]:
    return functools.partial(item.set_state, item.get_state()), ()


_REMEMBER: dict[type, Callable[[Any], tuple[Restore, Iterable[object]]]] = {
    list: _sequence,
    deque: _sequence,
    set: _set,
    Tensor: _tensor,
    np.ndarray: _array,
    torch.Generator: _torch_generator,
    random.Random: _python_generator,
    np.random.Generator: _numpy_generator,
    np.random.RandomState: _numpy_random_state,
}
