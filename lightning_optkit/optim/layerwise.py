"""What LARS and LAMB share: one path from gradients over norms to ratios and a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_optkit.optim.foreach import Tensors
from lightning_optkit.optim.norms import Layout, is_flattened, layout_of, local_norms, whole_norms

__all__ = ["Bucket", "LayerwiseOptimizer"]

# Numbers after which a bucket on the CPU is full. Temporary tensors then stay small enough for the
# allocator to keep; what a further bucket costs is little beside the arithmetic on so many.
_FULL = 2**19
# Numbers of a part, on the CPU: what one pass over them writes is in the cache for the next.
_CACHED = 2**16


class Bucket:
    """Tensors that move by the same calls: of one group, device, dtype and layout.

    Attributes:
        group: their settings.
        layout: how they are spread over ranks; ``None``: they are whole.
        is_new: whether none of the parameters remembers anything; else all do.
        size: how many numbers they have.
        members: position, parameter, state and gradient of each.
        positions: of the parameters among all of the optimizer.
        params: under FSDP2 the shards of this rank, which share the memory of the parameters.
        grads: likewise; never written to.
        directions: which way to go.
        measured: what the ratios compare the weights' norms with the norms of.
        ratios: of shape (k,); ``None`` are ones.
    """

    def __init__(self, group: dict[str, Any], layout: Layout | None, is_new: bool) -> None:
        self.group = group
        self.layout = layout
        self.is_new = is_new
        self.size = 0
        self.directions: Tensors = ()
        self.measured: Tensors = ()
        self.ratios: Tensor | None = None
        self.members: list[tuple[int, Tensor, dict[str, Any], Tensor]] = []

    def close(self) -> None:
        """Have the members as lists: no more will come."""
        positions, owners, states, grads = zip(*self.members, strict=True)
        self.positions: Sequence[int] = positions
        self.states: Sequence[dict[str, Any]] = states
        self.params: Tensors = owners
        self.grads: Tensors = grads
        if self.layout is not None:
            self.params = [_local(owner) for owner in owners]
            pairs = zip(grads, owners, strict=True)
            self.grads = [_local(_as_placed(grad, owner)) for grad, owner in pairs]

    def parts(self) -> Iterator[slice]:
        """Yield slices of the lists: together all, each small enough for the cache."""
        begin = size = 0
        for i, parameter in enumerate(self.params):
            size += parameter.numel()
            if size >= _CACHED and parameter.is_cpu:
                yield slice(begin, i + 1)
                begin, size = i + 1, 0
        if begin < len(self.params):
            yield slice(begin, None)

    def make_state(self, name: str) -> None:
        """Give each parameter zeros of its own shape, dtype and layout."""
        for _, parameter, state, _ in self.members:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def state(self, name: str) -> list[Tensor]:
        """Return what each parameter remembers under a name, as shards where they are."""
        tensors = [state[name] for state in self.states]
        return tensors if self.layout is None else [_local(tensor) for tensor in tensors]


class LayerwiseOptimizer(Optimizer):
    """An optimizer that scales the step of each layer by norms of that layer.

    A subclass says which way it goes, what its ratios are made of, and how it moves.
    """

    _memory: ClassVar[str]
    """The name under which a parameter that has made a step remembers something."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._last: list[tuple[Sequence[int], Tensor | None]] = []
        super().__init__(params, defaults)

    # -- what a subclass says ----------------------------------------------------------------------

    def _check(self, group: dict[str, Any]) -> None:
        """Raise if the settings of a group cannot be."""
        raise NotImplementedError

    def _begin(self, bucket: Bucket) -> None:
        """Make the state of parameters that step for the first time."""
        raise NotImplementedError

    def _direct(self, bucket: Bucket) -> None:
        """Set ``directions`` and what the ratios are ``measured`` by; unscaled, it may move."""
        raise NotImplementedError

    def _ratios(self, group: dict[str, Any], weight_norms: Tensor, norms: Tensor) -> Tensor:
        """Return the ratio of each layer, shape (k,)."""
        raise NotImplementedError

    def _move(self, bucket: Bucket) -> None:
        """Step along the directions."""
        raise NotImplementedError

    # -- what torch asks for -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; see :class:`torch.optim.Optimizer`."""
        if isinstance(param_group, dict):  # else torch says what is wrong
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            _check_parameters(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last = []
        for group in self.param_groups:  # those of another optimizer, such as torch's, say less
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: makes the gradients; called before the step, if given.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last = []
        buckets = self._buckets()
        for bucket in buckets:
            if bucket.layout is None:
                self._step([bucket])
        self._step([bucket for bucket in buckets if bucket.layout is not None])
        return loss

    def last_trust_ratios(self) -> Tensor:
        """Return the ratios of the last step, in the order of the optimizer's parameters.

        Returns:
            Shape (k,) for the k parameters of all groups, in float32 or finer, on the device of the
            first: nothing waits for it. 1 where ``layerwise=False``, NaN where there was no
            gradient, or no step yet.
        """
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        if not params:
            return torch.empty(0)
        found = [ratios for _, ratios in self._last if ratios is not None]
        dtype = torch.float64 if any(r.dtype == torch.float64 for r in found) else torch.float32
        like = torch.empty((), dtype=dtype, device=params[0].device)
        ratios = [torch.full_like(like, torch.nan)] * len(params)
        for positions, values in self._last:
            ones = [torch.ones_like(like)] * len(positions)
            for i, value in zip(positions, ones if values is None else values, strict=True):
                ratios[i] = value.to(like)
        return torch.stack(ratios)

    # -- a step ------------------------------------------------------------------------------------

    def _buckets(self) -> list[Bucket]:
        """Return the parameters that have a gradient, those together that move together."""
        buckets: list[Bucket] = []
        states, memory = self.state, self._memory
        position = -1
        for group in self.param_groups:
            filling: dict[Hashable, Bucket] = {}
            one_by_one = group["foreach"] is False
            for parameter in group["params"]:
                position += 1
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        "Gradients must be dense, got a sparse one. Write `sparse=False` in the "
                        "embedding, or give its weight to `torch.optim.SparseAdam`."
                    )
                state = states[parameter]
                is_new = state.get(memory) is None
                layout = layout_of(parameter) if isinstance(parameter, DTensor) else None
                key = (parameter.device, parameter.dtype, layout, is_new)
                bucket = filling.get(key)
                if bucket is None or one_by_one or (bucket.size >= _FULL and parameter.is_cpu):
                    bucket = filling[key] = Bucket(group, layout, is_new)
                    buckets.append(bucket)
                bucket.members.append((position, parameter, state, grad))
                bucket.size += parameter.numel()
        for bucket in buckets:
            bucket.close()
        return buckets

    def _step(self, buckets: Sequence[Bucket]) -> None:
        """Move some buckets; one sum over ranks tells the norms of all that are spread alike."""
        for bucket in buckets:
            if bucket.is_new:
                self._begin(bucket)
            self._direct(bucket)
        layerwise = [bucket for bucket in buckets if bucket.group["layerwise"]]
        for layout in dict.fromkeys(bucket.layout for bucket in layerwise):
            alike = [bucket for bucket in layerwise if bucket.layout == layout]
            parts = [local_norms([*bucket.params, *bucket.measured]) for bucket in alike]
            for bucket, norms in zip(alike, whole_norms(parts, layout), strict=True):
                bucket.ratios = self._ratios(bucket.group, *norms.chunk(2))
        for bucket in buckets:
            self._move(bucket)
            bucket.directions = bucket.measured = ()  # their memory is for the next
            self._last.append((bucket.positions, bucket.ratios))


def _check_parameters(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.is_complex():
            raise TypeError(
                f"`params` must be real, got a parameter of {parameter.dtype}. Hold it as a real "
                "one, and use `torch.view_as_complex` where it is needed."
            )
        if group["layerwise"] and is_flattened(parameter):
            raise ValueError(
                "`params` must have their own shapes, got a part of a flattened parameter, which "
                "has no norm here. Use FSDP2 (`fully_shard`, `ModelParallelStrategy`)."
            )


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_placed(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient in the layout of its parameter: FSDP2's has it, others' need not."""
    gradient, parameter = cast(DTensor, gradient), cast(DTensor, parameter)
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)
