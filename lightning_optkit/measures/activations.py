"""Which units of a net are dead, and which activations are saturated?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["ActivationRecorder", "Activations"]

# Share of the range, from either asymptote, that counts as saturated: there sigmoid and tanh have
# at most a fifth of their slope in the middle, 4 · 0.05 · 0.95.
_NEAR = 0.05


@dataclass(frozen=True)
class Activations:
    """Dead units and saturated values, by place of the net.

    Attributes:
        names: of the places, in the order of their first call.
        num_units: units of each ReLU; 0 at another place.
        num_dead: of these, those that were zero for every sample and position.
        num_values: values of each sigmoid or tanh; 0 at another place.
        num_saturated: of these, those near an asymptote, or at a limit of the hard forms.
    """

    names: tuple[str, ...]
    num_units: tuple[int, ...]
    num_dead: tuple[int, ...]
    num_values: tuple[int, ...]
    num_saturated: tuple[int, ...]

    @property
    def dead(self) -> float:
        """Share of dead units among those of all ReLUs; NaN where there is none."""
        return _share(sum(self.num_dead), sum(self.num_units))

    @property
    def saturated(self) -> float:
        """Share of saturated values among those of all sigmoids and tanhs; NaN without any."""
        return _share(sum(self.num_saturated), sum(self.num_values))

    @property
    def rows(self) -> dict[str, tuple[float, float]]:
        """Share of dead units and of saturated values at each place; NaN for what has none."""
        counts = zip(
            self.num_dead, self.num_units, self.num_saturated, self.num_values, strict=True
        )
        return {
            name: (_share(dead, units), _share(saturated, values))
            for name, (dead, units, saturated, values) in zip(self.names, counts, strict=True)
        }


class ActivationRecorder(TorchFunctionMode):
    """Sees the outputs of ReLU, sigmoid, tanh and their hard forms while this context is open.

    Functions (``F.relu``, ``torch.tanh``, ``x.sigmoid()``) are seen like modules. What is called
    again, such as a critic on real and on generated samples, adds to its places; a ReLU that one
    ``forward`` calls twice is two places. Units are channels: the last dimension after a linear
    layer or LayerNorm, the second after a convolution or BatchNorm. A value is saturated within
    5 % of the range from an asymptote, of the hard forms at a limit. Not seen are activations
    inside fused kernels (LSTM, GRU) and TorchScript.

    Args:
        modules: by name. Functions that are called in none of them, such as a hinge loss in a
            training step, are passed over.
        but: of these, whose activations are none of the net's, such as a metric's.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> _ = nn.init.constant_(net[0].bias, -100.0)
        >>> with ActivationRecorder(dict(net.named_modules())) as recorder:
        ...     _ = net(torch.ones(8, 2))
        >>> recorder.activations().dead
        1.0

    References:
        X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", 2010, section 3.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, but: Collection[str] = ()) -> None:
        super().__init__()
        self._modules = modules
        self._but = but
        self._frames: list[_Frame | None] = []
        self._channels_last: bool | None = None  # as the last layer leaves them
        self._places: dict[tuple[str, int], _Place] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ActivationRecorder:
        """Begin to look."""
        for name, each in self._modules.items():
            # not hooks of all modules at once, which torch.compile warns of
            self._handles += [
                each.register_forward_pre_hook(partial(self._enter_module, name)),
                each.register_forward_hook(self._leave_module, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Look no more."""
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._frames, self._handles = [], []

    @property
    def places(self) -> list[tuple[str, int]]:
        """Name and number of units of each place; processes that agree on it can be summed."""
        return list(self._places)

    def activations(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Activations:
        """Return what was seen.

        Args:
            reduce: sums a tensor over the processes that saw the same places, if there are several.
        """
        found = list(self._places.values())
        counts = [torch.cat([each.alive.long(), each.saturated, each.values]) for each in found]
        flat = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)
        if reduce is not None and found:
            flat = reduce(flat)
        sizes = [len(each.alive) for each in found]
        rows = flat.cpu().split([size + 2 for size in sizes])
        return Activations(
            names=tuple(self._names()),
            num_units=tuple(sizes),
            num_dead=tuple(int((row[:-2] == 0).sum()) for row in rows),
            num_values=tuple(int(row[-1]) for row in rows),
            num_saturated=tuple(int(row[-2]) for row in rows),
        )

    def _names(self) -> Iterator[str]:
        known = Counter(name for name, _ in self._places)
        for name, units in self._places:  # one that is called on inputs of several widths
            yield f"{name} ({units} units)" if known[name] > 1 else name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and look at what it returns."""
        output = func(*args, **(kwargs or {}))
        self._channels_last = _CHANNELS_LAST.get(func, self._channels_last)
        kind = _kind_of(func, args, kwargs or {})
        frame = self._frames[-1] if self._frames else None
        if kind is not None and frame is not None and output.numel():
            self._add(frame.place(func), self._look(kind, output.detach()))
        return output

    def _look(self, kind: _Kind, output: Tensor) -> _Place:
        none = torch.zeros(1, dtype=torch.int64, device=output.device)
        if kind.is_rectifier:
            others = [i for i in range(output.ndim) if i != self._channels(output)]
            return _Place((output != 0).any(others) if others else output != 0, none, none)
        margin = kind.near * (kind.high - kind.low)
        near = (output <= kind.low + margin) | (output >= kind.high - margin)
        return _Place(none[:0].bool(), none + near.sum(), none + output.numel())

    def _channels(self, output: Tensor) -> int:
        last = output.ndim <= 3 if self._channels_last is None else self._channels_last
        return output.ndim - 1 if last or output.ndim < 2 else 1

    def _add(self, name: str, seen: _Place) -> None:
        key = (name, len(seen.alive))
        self._places[key] = self._places[key] + seen if key in self._places else seen

    def _enter_module(self, name: str, entered: nn.Module, args: Any) -> None:
        above = self._frames[-1] if self._frames else _Frame("")
        if above is None or name in self._but:
            self._frames.append(None)
        else:
            is_activation = isinstance(entered, _ACTIVATION_MODULES)
            self._frames.append(_Frame(name + above.again(name), is_activation))

    def _leave_module(self, left: nn.Module, args: Any, output: Any) -> None:
        self._frames.pop()


@dataclass
class _Place:
    alive: Tensor  # for each unit whether it was ever not zero; empty unless a ReLU
    saturated: Tensor  # one number
    values: Tensor  # one number

    def __add__(self, other: _Place) -> _Place:
        return _Place(
            self.alive | other.alive,
            self.saturated + other.saturated,
            self.values + other.values,
        )


@dataclass
class _Frame:
    """One call of a module, and what was called in it so far."""

    name: str
    is_activation: bool = False
    calls: Counter[str] = field(default_factory=Counter)

    def place(self, func: Any) -> str:
        """Return the name of the place where the function is called now."""
        if self.is_activation:
            return self.name
        kind = func.__name__.rstrip("_")
        return f"{self.name}.{kind}".lstrip(".") + self.again(kind)

    def again(self, called: str) -> str:
        """Return a mark for what is not called for the first time."""
        self.calls[called] += 1
        return f"#{self.calls[called]}" if self.calls[called] > 1 else ""


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


@dataclass(frozen=True)
class _Kind:
    """An activation that has limits, and the share of its range that is near one."""

    low: float
    high: float
    near: float = 0.0
    is_rectifier: bool = False


_ACTIVATION_MODULES = tuple(getattr(activation, name) for name in activation.__all__)
_HARDTANHS = {F.hardtanh, F.hardtanh_}
_KINDS: dict[Any, _Kind] = {F.hardsigmoid: _Kind(0.0, 1.0)}
for _functions, _kind in (
    (
        (F.relu, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        _Kind(0.0, math.inf, is_rectifier=True),
    ),
    (
        (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, torch.special.expit),
        _Kind(0.0, 1.0, _NEAR),
    ),
    ((torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_), _Kind(-1.0, 1.0, _NEAR)),
):
    _KINDS |= dict.fromkeys(_functions, _kind)


def _kind_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Kind | None:
    if func not in _HARDTANHS:
        return _KINDS.get(func)
    given = dict(zip(("input", "min_val", "max_val"), args, strict=False)) | kwargs
    low, high = float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0))
    return _Kind(low, high, is_rectifier=low == 0)  # as in ReLU6


# Functions of layers that say where the channels of what follows are.
_CHANNELS_LAST: dict[Any, bool] = dict.fromkeys(
    (F.linear, F.bilinear, F.layer_norm, F.rms_norm, F.embedding), True
)
_CHANNELS_LAST |= dict.fromkeys(
    (
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.batch_norm,
        F.instance_norm,
        F.group_norm,
    ),
    False,
)
