"""Inputs and targets in batches of any form: found, and others put in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_optkit.bridge.arguments import is_count

__all__ = ["BatchFields", "Key", "Setter"]

Key = int | str | Sequence[int | str] | Callable[[Any], Any]
"""Where something is in a batch: an index, a key or attribute, a path of them, or a function."""

Setter = Callable[[Any, Any, Any], Any]
"""``(batch, inputs, targets) -> batch``: another batch, with these in their places."""

_INPUT_NAMES = ("image", "images", "input", "inputs", "x", "pixel_values", "input_values")
_TARGET_NAMES = ("label", "labels", "target", "targets", "y")


class BatchFields:
    """Where inputs and targets are in the batches of a run.

    Without keys they are the first two of a tuple or list, or what goes by a common name in a dict
    or an object with attributes.

    Args:
        input_key: an index, a key or attribute name, a path of them (``"view.image"``, or a tuple
            or list), or a function of the batch; ``None`` = guessed.
        target_key: the same of the targets.
        setter: returns a batch with other inputs and targets; needed with functions alone.

    Raises:
        TypeError: for a key of another type.
        ValueError: for a function without a setter, or a setter without one.
    """

    def __init__(
        self, input_key: Key | None = None, target_key: Key | None = None, setter: Any = None
    ) -> None:
        self._paths = {
            "input_key": _path(input_key, "input_key"),
            "target_key": _path(target_key, "target_key"),
        }
        self._setter = setter
        has_function = any(callable(path) for path in self._paths.values())
        if has_function and not callable(setter):
            raise ValueError(
                "`setter` must be given where a key is a function, got none. Write a function "
                "`setter(batch, inputs, targets)` that returns a new batch."
            )
        if setter is not None and not has_function:
            raise ValueError(
                "`setter` must come with a function as `input_key` or `target_key`, got none. "
                "Leave it out: what a key finds can be replaced."
            )

    def of(self, batch: Any, *, with_target: bool = True) -> tuple[Any, Any]:
        """Return inputs and targets.

        Args:
            batch: of the run.
            with_target: whether there are targets to be found; ``None`` in their place if not.

        Raises:
            MisconfigurationException: if they are not found, or are ambiguous.
        """
        inputs = self._find(batch, "input_key")
        return inputs, self._find(batch, "target_key") if with_target else None

    def replaced(self, batch: Any, inputs: Any, targets: Any, *, with_target: bool = True) -> Any:
        """Return a batch with these in their places; the one given stays as it is.

        Args:
            batch: of the run.
            inputs: in the place of its inputs.
            targets: in the place of its targets.
            with_target: whether there are targets.
        """
        if self._setter is not None:
            return self._setter(batch, inputs, targets)
        batch = _replaced(batch, self._path_in(batch, "input_key"), inputs)
        if not with_target:
            return batch
        return _replaced(batch, self._path_in(batch, "target_key"), targets)

    def _find(self, batch: Any, key: str) -> Any:
        path = self._paths[key]
        if callable(path):
            return path(batch)
        for part in self._path_in(batch, key):
            batch = _item(batch, part, key)
        return batch

    def _path_in(self, batch: Any, key: str) -> tuple[int | str, ...]:
        path = self._paths[key]
        return cast(tuple[int | str, ...], path) if path is not None else _guessed(batch, key)


def _path(key: Any, name: str) -> Any:
    if key is None or callable(key):
        return key
    if isinstance(key, str):
        return tuple(key.split("."))
    if is_count(key, least=0):
        return (key,)
    parts = tuple(key) if isinstance(key, (tuple, list)) else ()
    if not parts or not all(isinstance(part, str) or is_count(part, least=0) for part in parts):
        raise TypeError(
            f"`{name}` must be an index of at least 0, a key or attribute name, a list of them, or "
            f"a function, got {key!r}. Write `{name}='image'`, or `{name}=0`."
        )
    return parts


# -- guessed -----------------------------------------------------------------------------------


def _guessed(batch: Any, key: str) -> tuple[int | str, ...]:
    """Return the path of what a key stands for, by convention."""
    place = 0 if key == "input_key" else 1
    if isinstance(batch, Tensor) and key == "input_key":
        return ()
    names = _INPUT_NAMES if key == "input_key" else _TARGET_NAMES
    found = [name for name in names if name in _names(batch)]
    if len(found) == 1:
        return (found[0],)
    is_sequence = isinstance(batch, Sequence) and not isinstance(batch, str) and not found
    if is_sequence and len(batch) > place and all(map(_has_tensors, batch[: place + 1])):
        return (place,)
    what = "inputs" if key == "input_key" else "targets"
    raise MisconfigurationException(
        f"`{key}` must say where the {what} of a batch are, got a batch of {_contents(batch)}. "
        f"Write `{key}=` with an index, a key, an attribute name, or a path such as "
        "'first.image'."
    )


def _has_tensors(item: Any) -> bool:
    """Return whether it is a tensor or a few of them, and no batch of its own."""
    return isinstance(item, Tensor) or (
        isinstance(item, Mapping) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(item))
    )


def _names(batch: Any) -> list[str]:
    if isinstance(batch, Mapping):
        return [key for key in batch if isinstance(key, str)]
    if isinstance(batch, tuple):
        return list(getattr(batch, "_fields", ()))
    return [name for name in getattr(batch, "__dict__", {}) if not name.startswith("_")] + [
        name for name in getattr(batch, "__slots__", ()) if hasattr(batch, name)
    ]


def _contents(batch: Any) -> str:
    """Return what is in a batch, for messages."""
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        items = ", ".join(_shown(item) for item in batch[:8])
        return f"{type(batch).__name__}({items}{', ...' if len(batch) > 8 else ''})"
    names = _names(batch)
    return (
        f"{type(batch).__name__} with {', '.join(map(repr, names[:16]))}"
        if names
        else _shown(batch)
    )


def _shown(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"tensor{tuple(item.shape)}"
    return type(item).__name__


# -- found and replaced ------------------------------------------------------------------------


def _item(container: Any, part: int | str, key: str) -> Any:
    try:
        if isinstance(container, Mapping) or _is_indexed(container, part):
            return container[_index(container, part)]
        if isinstance(part, str):
            return getattr(container, part)
        return container[part]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise MisconfigurationException(
            f"`{key}` must lead to something in a batch, got {part!r}, which is not in "
            f"{_contents(container)}."
        ) from None


def _is_indexed(container: Any, part: int | str) -> bool:
    """Return whether a part is a place in a sequence: "0" is, the name of a namedtuple's not."""
    return isinstance(container, Sequence) and (isinstance(part, int) or part.isdecimal())


def _index(container: Any, part: int | str) -> int | str:
    if isinstance(container, Mapping):
        is_number = part not in container and isinstance(part, str) and part.isdecimal()
        return int(part) if is_number else part
    return int(part)


def _replaced(container: Any, path: tuple[int | str, ...], value: Any) -> Any:
    """Return a copy of the containers along a path, with another value at its end."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    value = _replaced(_item(container, part, "key"), rest, value)
    if isinstance(container, tuple):
        return _tuple_with(container, part, value)
    duplicate = copy.copy(container)
    if isinstance(duplicate, MutableMapping) or _is_indexed(duplicate, part):
        duplicate[_index(container, part)] = value
    else:
        object.__setattr__(duplicate, str(part), value)  # frozen dataclasses too
    return duplicate


def _tuple_with(container: Any, part: int | str, value: Any) -> Any:
    fields = getattr(container, "_fields", ())
    place = fields.index(part) if part in fields else int(part)
    items = [*container[:place], value, *container[place + 1 :]]
    return type(container)._make(items) if fields else type(container)(items)
