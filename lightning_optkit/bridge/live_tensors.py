"""A module's parameters and buffers as a checkpoint names them, wherever they are right now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_optkit.bridge.sharding import shard_of, whole_of_shards

__all__ = ["LiveTensors"]


class LiveTensors:
    """The floating-point parameters and persistent buffers of a module, by name.

    Each is looked up where it hangs, every time: training steps assign new tensors to buffers, and
    moving a module to a device replaces them all. A shared parameter is there once, and so is a
    buffer of a shared submodule. Left out are buffers that a checkpoint does not hold, those of
    integers, and those that ``expand`` lays over themselves, which nobody can write into.

    Args:
        module: sharded by FSDP2 or not.

    Raises:
        ValueError: for a lazy parameter or buffer, which is not there yet.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._aliases: dict[str, str] = {}
        self.parameter_names: list[str] = []
        self.buffer_names: list[str] = []
        first_names: dict[int | tuple[int, str], str] = {}
        for prefix, child in module.named_modules(remove_duplicate=False):
            for key, parameter in child._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if first_names.setdefault(id(parameter), name) != name:
                    self._aliases[name] = first_names[id(parameter)]
                    continue
                _refuse_lazy(name, parameter)
                self._places[name] = (child._parameters, key)
                self.parameter_names.append(name)
        for prefix, child in module.named_modules(remove_duplicate=False):
            for key, buffer in child._buffers.items():
                if buffer is None or key in child._non_persistent_buffers_set:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                _refuse_lazy(name, buffer)
                if not _can_be_averaged(buffer):
                    continue
                if first_names.setdefault((id(child), key), name) != name:
                    self._aliases[name] = first_names[id(child), key]
                    continue
                self._places[name] = (child._buffers, key)
                self.buffer_names.append(name)
        self.is_sharded = any(
            isinstance(owner[key], DTensor) for owner, key in self._places.values()
        )

    @property
    def names(self) -> list[str]:
        """Of all of them."""
        return list(self._places)

    def masks(self) -> list[str]:
        """Return the names of buffers that are not finite now, such as a mask of minus infinity.

        There is nothing between two of them.
        """
        live = self.local(self.buffer_names)
        return [name for name, buffer in live.items() if not torch.isfinite(buffer).all()]

    def local(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors themselves, of sharded ones this rank's shard; they share memory."""
        places = self._places if names is None else {name: self._places[name] for name in names}
        if not self.is_sharded:
            return {name: owner[key] for name, (owner, key) in places.items()}
        return {name: _local(owner[key]) for name, (owner, key) in places.items()}

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's values with all shards in them. All ranks must call it.

        A shared parameter is there under each of its names, as it is in a checkpoint.
        """
        found = {name: whole_of_shards(value, self._like(name)) for name, value in values.items()}
        shared = {alias: name for alias, name in self._aliases.items() if name in found}
        return found | {alias: found[name] for alias, name in shared.items()}

    def shards(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shards of the values whose names are known; all ranks must call it."""
        known = {name: value for name, value in values.items() if name in self._places}
        return {name: shard_of(value, self._like(name)) for name, value in known.items()}

    def _like(self, name: str) -> Tensor:
        owner, key = self._places[name]
        return cast(Tensor, owner[key])


def _local(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    return cast(DTensor, tensor.detach()).to_local()  # shares its memory, needs no other rank


def _can_be_averaged(tensor: Tensor) -> bool:
    fractional = tensor.is_floating_point() or tensor.is_complex()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return fractional and not any(size > 1 and stride == 0 for size, stride in steps)


def _refuse_lazy(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"`{name}` must be initialized before training to be averaged, got a lazy one. "
            "Run one batch through the module in its `setup` or `configure_model`."
        )
