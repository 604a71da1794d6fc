r"""Running statistics of normalization layers, taken anew from data.

Weights that no training step has seen, such as an average, need statistics of their own. From
batches b of n_b values a channel, with means m_b and centred sums of squares S_b, follow those of
all N values exactly (law of total variance):

.. math:: m = \sum_b \frac{n_b}{N} m_b, \qquad
          \sigma^2 = \frac{1}{N - 1} \sum_b \left( S_b + n_b (m_b - m)^2 \right).

A mean of the batches' variances would lack the last term.

References:
    P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson, *Averaging Weights Leads to
    Wider Optima and Better Generalization*, UAI 2018, section 3.2. T. F. Chan, G. H. Golub,
    R. J. LeVeque, *Algorithms for Computing the Sample Variance*, The American Statistician, 1983,
    equation 2.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_optkit.methods.batch_norm import BatchNormVariant
from lightning_optkit.methods.moments import InstanceMoments, Moments, ValueMoments, exact_dtype

__all__ = ["StatisticsNotFiniteError", "refresh_norm_statistics", "tracking_layers"]

_Layers = dict[str, nn.Module]
_Passes = Callable[[], Iterable[Callable[[], object]]]
_Reduce = Callable[[Tensor], Tensor]

_SPATIAL_DIMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


class StatisticsNotFiniteError(ValueError):
    """Inputs of a norm layer are NaN, infinite or overflow its buffers; nothing was changed."""


def tracking_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose running statistics can be taken anew, by name.

    They are torch's BatchNorm, SyncBatchNorm and InstanceNorm layers, and their subclasses such as
    BatchRenorm and GhostBatchNorm, that have running statistics; lazy ones not before their first
    batch. A layer with several names has
    its first.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.InstanceNorm1d(4))
        >>> list(tracking_layers(net))
        ['1']
    """
    return {name: layer for name, layer in module.named_modules() if _tracks(layer)}


def refresh_norm_statistics(
    module: nn.Module,
    passes: _Passes,
    *,
    frozen: Collection[str] = (),
    layerwise: bool = False,
    reduce: _Reduce | None = None,
) -> list[str]:
    r"""Write the statistics of the data into the norm layers, and return these layers' names.

    For BatchNorm they are the mean and the unbiased variance over all values of a channel; for
    InstanceNorm the mean over instances of each one's mean and unbiased variance. These are what
    torch stores for one batch of all the data, with momentum 1.

    While a pass runs, these layers normalise by the statistics of the batch, as in training. All
    else stays in the mode in which the module is called: call it in eval mode, and dropout is off,
    so that the statistics are those of the function that will be evaluated. A batch with a single
    value a channel is counted, but normalised by the statistics of before.

    Exact for layers whose input depends on no other norm layer. Further down, the inputs were
    normalised batch by batch, and their statistics are as near to those of one big batch as the
    batches are like it. With ``layerwise`` they are exact for all layers that a forward pass runs
    once.

    Sums are made in float64 (float32 on MPS, which has no float64), whatever the inputs. Momentum
    plays no part, and ``num_batches_tracked`` stays. If anything fails, all statistics are as they
    were.

    Args:
        module: the net, with the weights to take the statistics of.
        passes: starts a pass over the data: an iterable of calls without arguments, each of which
            runs the module on a batch. Every pass must give the same batches. A compiled module
            must run uncompiled, else it passes the hooks by. What a call changes in the module may
            be undone after it, and whatever the iterable holds open is closed with it.
        frozen: names of layers, of :func:`tracking_layers`, that keep their statistics and are left
            in the mode of the call: those that were in eval mode in training.
        layerwise: refresh one layer after another in the order of execution, each in a pass of its
            own, in which the BatchNorm layers before it normalise by the mean and, as in a batch,
            the biased variance of all data. Costs as many passes as there are layers. A layer that
            a forward pass runs several times comes where it is first.
        reduce: sums a tensor over processes, in place or not; all must call this function, and
            receive the statistics of all their data together. The order of ``layerwise`` is then
            the one that most batches of all processes have. ``None`` = there is one process.

    Returns:
        Names in the order in which the layers were refreshed: that of ``named_modules``, or with
        ``layerwise`` of execution. Layers that no batch reached keep their statistics and are left
        out.

    Raises:
        StatisticsNotFiniteError: if a layer's statistics are not finite.
        ValueError: if a pass is empty; if a layer saw too few values for a variance; if ``frozen``
            names no such layer.

    Example:
        >>> net = nn.BatchNorm1d(1).eval()
        >>> data = torch.tensor([[1.0], [2.0], [6.0]])
        >>> batches = data[:2], data[2:]
        >>> refresh_norm_statistics(
        ...     nn.Sequential(net), lambda: [lambda b=b: net(b) for b in batches]
        ... )
        ['0']
        >>> net.running_mean, net.running_var
        (tensor([3.]), tensor([7.]))
    """
    layers = tracking_layers(module)
    if unknown := sorted(set(frozen) - set(layers)):
        raise ValueError(
            f"`frozen` must hold names of `tracking_layers(module)`, got {unknown}. These are: "
            f"{list(layers)}."
        )
    layers = {name: layer for name, layer in layers.items() if name not in set(frozen)}
    if not layers:
        return []
    buffers = [buffer for layer in layers.values() for buffer in _running(layer)]
    before = [buffer.clone() for buffer in buffers]
    refresh = _refresh_layerwise if layerwise else _refresh_at_once
    try:
        return refresh(layers, passes, reduce or _identity)
    except BaseException:
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)
        raise


def _refresh_at_once(layers: _Layers, passes: _Passes, reduce: _Reduce) -> list[str]:
    statistics = _Pass(layers, measured=layers).run(passes, reduce)
    for name, found in statistics.items():
        _write(name, layers[name], found)
    return list(statistics)


def _refresh_layerwise(layers: _Layers, passes: _Passes, reduce: _Reduce) -> list[str]:
    first_pass = _Pass(layers, measured=layers)
    statistics = first_pass.run(passes, reduce)
    order = first_pass.execution_order(list(statistics), reduce)
    settled: dict[str, _Statistics] = {}
    for name in order:
        if settled:  # else it is the first, and exact already
            statistics = _Pass(layers, measured=[name], settled=settled).run(passes, reduce)
        if name not in statistics:
            raise ValueError(
                f"`passes` must give the same batches each time, got a pass that does not reach "
                f"{_called(name)}, as the first did. Leave out shuffling, or fix its seed."
            )
        settled[name] = statistics[name]
        _write(name, layers[name], settled[name])
    return order


def _write(name: str, layer: nn.Module, found: _Statistics) -> None:
    """Put statistics into a layer's buffers, if they can be.

    Raises:
        ValueError: if they do not exist or are not finite.
    """
    if found.num_squares < 1:
        raise ValueError(
            f"`passes` must give {_called(name)} two values a channel to take a variance of, got "
            "one. Pass more data, or name the layer in `frozen`."
        )
    for buffer, values in zip(_running(layer), (found.mean, found.variance), strict=True):
        buffer.copy_(values)  # which may overflow in its dtype
        if not bool(torch.isfinite(buffer).all()):
            raise StatisticsNotFiniteError(
                f"`passes` must give {_called(name)} inputs with finite statistics, got "
                f"{float(buffer[~torch.isfinite(buffer)][0])}. Look for weights or data that are "
                "not finite, or too large for the layer's dtype."
            )


@dataclass(frozen=True)
class _Statistics:
    """What a pass finds of a layer, over all processes; tensors have the shape (channels,)."""

    mean: Tensor
    squares: Tensor
    num_squares: int
    """What makes a variance of the sum of squares: N - 1 values, or the number of instances."""

    @property
    def variance(self) -> Tensor:
        """What torch stores."""
        return self.squares / self.num_squares

    def normalise(self, layer: Any) -> None:
        """Have a BatchNorm layer in eval mode normalise as torch does a batch: by S / N."""
        layer.running_mean = self.mean.to(layer.running_mean)
        layer.running_var = (self.squares / (self.num_squares + 1)).to(layer.running_var)


class _Pass:
    """A pass over the data, in which some layers are measured.

    Args:
        layers: all but the frozen ones, by name.
        measured: names of those whose inputs are added up.
        settled: statistics of all data, for those that are done; the others use the batch's.
    """

    def __init__(
        self,
        layers: _Layers,
        *,
        measured: Collection[str],
        settled: Mapping[str, _Statistics] | None = None,
    ) -> None:
        self._moments = {name: _moments_of(layers[name]) for name in layers if name in measured}
        self._used: list[str] = []  # by the call that runs
        self._orders: Counter[tuple[str, ...]] = Counter()  # of first use, and in how many calls
        self._device = _running(next(iter(layers.values())))[0].device
        self._watches = [
            _Watch(layer, self._see_of(name), settled=(settled or {}).get(name))
            for name, layer in layers.items()
        ]

    def _see_of(self, name: str) -> Callable[[Tensor], None]:
        def see(values: Tensor) -> None:
            self._used.append(name)
            if name in self._moments:
                self._moments[name].add(values)

        return see

    def run(self, passes: _Passes, reduce: _Reduce) -> dict[str, _Statistics]:
        """Return the statistics of the measured layers that a batch reached, on any process."""
        with ExitStack() as stack:
            for watch in self._watches:
                stack.enter_context(watch)
            calls = iter(passes())
            # Before the hooks go: a pass may put back, as it ends, what it found when it began.
            stack.callback(getattr(calls, "close", lambda: None))
            for call in calls:
                self._used.clear()
                call()
                self._orders[tuple(dict.fromkeys(self._used))] += 1
        return self._pooled(reduce)

    def _pooled(self, reduce: _Reduce) -> dict[str, _Statistics]:
        """Pool what all processes found: numbers, then means, then squares about these means."""
        moments = self._moments
        numbers = self._summed_numbers(reduce)
        shares = {name: m.num_means / max(1, numbers[name][0]) for name, m in moments.items()}
        means = self._summed({name: m.mean * shares[name] for name, m in moments.items()}, reduce)
        squares = self._summed(
            {name: m.squares_about(means[name]) for name, m in moments.items()}, reduce
        )
        return {
            name: _Statistics(means[name], squares[name], num_squares - moments[name].num_lost)
            for name, (num_means, num_squares) in numbers.items()
            if num_means > 0
        }

    def _summed_numbers(self, reduce: _Reduce) -> dict[str, list[int]]:
        """Return for each layer what its mean is over, and what its sum of squares is over."""
        numbers = [(m.num_means, m.num_squares) for m in self._moments.values()]
        numbers.append((self._orders.total(), 0))
        *summed, (num_calls, _) = reduce(torch.tensor(numbers, device=self._device)).tolist()
        if num_calls == 0:
            raise ValueError(
                "`passes` must give at least one batch, got none. Is the data an iterator that was "
                "used up? Start a new one for each pass."
            )
        return dict(zip(self._moments, summed, strict=True))

    def _summed(self, tensors: dict[str, Tensor], reduce: _Reduce) -> dict[str, Tensor]:
        """Return each tensor summed over processes, by one exchange for all."""
        dtype = exact_dtype(self._device)
        flat = torch.cat([tensor.to(self._device, dtype) for tensor in tensors.values()])
        parts = reduce(flat).split([len(tensor) for tensor in tensors.values()])
        return dict(zip(tensors, parts, strict=True))

    def execution_order(self, names: Sequence[str], reduce: _Reduce) -> list[str]:
        """Return names in the order of first execution, the same on all processes.

        Of two layers, the one comes first that does so in more calls, over all processes. A circle
        is cut where fewest come before; what this leaves open is as in ``names``.
        """
        index = {name: i for i, name in enumerate(names)}
        precedes = torch.zeros(len(names), len(names), dtype=torch.long)
        for used, num_calls in self._orders.items():
            places = [index[name] for name in used]
            for i, place in enumerate(places):
                precedes[place, places[i + 1 :]] += num_calls
        precedes = reduce(precedes.to(self._device)).cpu()
        is_before = precedes > precedes.T
        waiting = list(range(len(names)))
        order: list[str] = []
        while waiting:
            num_before = is_before[waiting][:, waiting].sum(0)
            order.append(names[waiting.pop(int(num_before.argmin()))])
        return order


class _Watch:
    """Hooks on a norm layer: they show its inputs, and have it normalise as in one big batch.

    Its own statistics are not written: others take their place while it runs.

    Args:
        layer: the layer.
        see: takes each input that is not empty, of shape (batch, channels, ...).
        settled: statistics of all data; ``None`` = those of the batch, or part of it, at hand.
    """

    def __init__(
        self, layer: nn.Module, see: Callable[[Tensor], None], *, settled: _Statistics | None
    ) -> None:
        self._layer = layer
        self._see = see
        # An instance is normalised by its own statistics, whatever else is in the batch.
        self._settled = settled if isinstance(layer, _BatchNorm) else None
        self._own: _State | None = None  # while the layer runs

    def __enter__(self) -> None:
        self._at_first = _State(self._layer)
        self._handles = [
            self._layer.register_forward_pre_hook(self._before, with_kwargs=True),
            self._layer.register_forward_hook(self._after, always_call=True),
        ]

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            self._at_first.put_back()  # an interrupted layer does not call its hooks

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = _batched(layer, next(iter((*args, *kwargs.values())), None))
        if values is None:
            return  # the layer will say what is wrong
        if values.numel() > 0:
            self._see(values)
        self._own = _State(layer)
        for name, buffer in self._own.buffers.items():
            setattr(layer, name, buffer.clone())
        layer.training = self._settled is None and _can_use_batch(layer, values)
        if isinstance(layer, BatchNormVariant):
            layer.plain = True  # chunks are no batch, and its running statistics are old ones
        if self._settled is not None:
            self._settled.normalise(layer)

    def _after(self, *_: object) -> None:
        if self._own is not None:
            self._own.put_back()
            self._own = None


class _State:
    """Which modes a layer is in and which tensors are its buffers."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._training = layer.training
        self._plain = getattr(layer, "plain", None)
        self.buffers = dict(layer.named_buffers(recurse=False))

    def put_back(self) -> None:
        self._layer.training = self._training
        if isinstance(self._layer, BatchNormVariant):
            self._layer.plain = bool(self._plain)
        for name, buffer in self.buffers.items():
            setattr(self._layer, name, buffer)


def _moments_of(layer: Any) -> Moments:
    kind = ValueMoments if isinstance(layer, _BatchNorm) else InstanceMoments
    return kind(layer.num_features)


def _tracks(layer: nn.Module) -> bool:
    if isinstance(layer, tuple(_SPATIAL_DIMS)):
        uses_them = bool(layer.track_running_stats)  # else each instance's own, in eval mode too
    else:
        uses_them = isinstance(layer, _BatchNorm)
    running_mean = layer.running_mean if uses_them else None
    return isinstance(running_mean, Tensor) and not is_lazy(running_mean)


def _running(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.running_mean, layer.running_var


def _batched(layer: Any, values: Any) -> Tensor | None:
    """Return a layer's input as (batch, channels, ...), or ``None`` if it is none."""
    if not isinstance(values, Tensor):
        return None
    for kind, num_dims in _SPATIAL_DIMS.items():
        if isinstance(layer, kind) and values.ndim == num_dims + 1:
            values = values.unsqueeze(0)
    fits = values.ndim >= 2 and values.shape[1] == layer.num_features
    return values if fits else None


def _can_use_batch(layer: nn.Module, values: Tensor) -> bool:
    """Return whether a batch has statistics, for which torch asks two values a channel."""
    if isinstance(layer, nn.SyncBatchNorm) and _num_processes(layer) > 1:
        return True  # others wait for this one
    num_values = values.shape[2:].numel()
    if isinstance(layer, _BatchNorm):
        num_values *= len(values)
    return num_values > 1


def _num_processes(layer: nn.SyncBatchNorm) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(layer.process_group)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _called(name: str) -> str:
    return f"the layer `{name}`" if name else "the layer"
