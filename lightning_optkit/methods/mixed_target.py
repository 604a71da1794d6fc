"""A target that stands for two: what is computed from it is computed for both, and mixed last."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["MixedTarget", "MixedTargetError", "Mixing", "settled"]


class MixedTargetError(RuntimeError):
    """A training step does something with a mixed target that has no exact mixed result."""


class Mixing:
    r"""The weights with which the two targets of a batch count, and whether they still do.

    Args:
        weight: λ of the first target, in [0, 1]: a number, or one a sample, shape ``(batch,)``.
    """

    def __init__(self, weight: float | Tensor) -> None:
        is_number = isinstance(weight, Tensor) and weight.dim() == 0
        self.weight = float(weight) if is_number else weight
        self.is_open = True
        """False once the loss is mixed: what is left of the batch's targets is plain then."""
        self.has_mixed_loss = False
        """Whether something that has a gradient was mixed."""
        self._made: list[weakref.ref[MixedTarget]] = []

    @property
    def is_per_sample(self) -> bool:
        """Whether each sample has its own λ."""
        return isinstance(self.weight, Tensor)

    def of(self, first: Any, second: Any) -> Any:
        """Return ``weight * first + (1 - weight) * second``, without rounding at both ends."""
        weight = self.weight
        if isinstance(weight, Tensor) and isinstance(first, Tensor):
            weight = _along(weight.to(first), first)
        mixture = weight * first + (1 - weight) * second
        self.has_mixed_loss |= isinstance(mixture, Tensor) and mixture.requires_grad
        return mixture

    def heavier(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the one that weighs more, the first of two equal ones."""
        if not isinstance(self.weight, Tensor):
            return first if self.weight >= 0.5 else second
        takes_first = (self.weight >= 0.5).to(first.device)
        return torch.where(_along(takes_first, first), first, second)

    def close(self) -> None:
        """Make all that is left of the batch plain, once its loss is mixed."""
        self.is_open = False
        left = [mixed for made in self._made if (mixed := made()) is not None]
        self._made.clear()
        for mixed in left:
            with contextlib.suppress(MixedTargetError):  # raised to whoever uses it
                _become_plain(mixed)


class MixedTarget(Tensor):
    r"""Two targets in the place of one, for losses that were written for one.

    .. math:: \ell(y) \;\to\; \lambda\,\ell(y_a) + (1 - \lambda)\,\ell(y_b)

    Every function of it runs twice, on either target, and gives two results in the place of one,
    until the loss is mixed (:func:`settled`). The net's outputs do not depend on targets, so the
    net runs once. Since nothing is assumed of the functions between target and loss, any loss is
    exact: class weights, ``ignore_index``, label smoothing, ``one_hot``, ``gather``, masks, losses
    that are written by hand. A plain tensor that is written into becomes two as well.

    What cannot be two is one: a number or an array that is taken out (``item``, ``numpy``) is the
    mixture of floats, and the label that weighs more of integers. What would take two ways through
    the step raises :class:`MixedTargetError`.

    With one λ a sample, results are mixed where samples are summed or averaged; what else would
    bring samples together raises.

    What is compiled to run without Python, such as ``torch.jit.script`` or a kernel of one's own,
    sees the first target alone.

    Example:
        >>> a, b = torch.tensor([0, 1]), torch.tensor([1, 1])
        >>> target = MixedTarget.of(a, b, Mixing(0.75))
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> loss = nn.functional.nll_loss(logits, target.long())
        >>> float(settled(loss))
        -1.25
    """

    _first: Tensor
    _second: Tensor
    _mixing: Mixing
    _was_plain: bool

    @staticmethod
    def of(first: Tensor, second: Tensor, mixing: Mixing) -> MixedTarget:
        """Return the target that stands for these two."""
        mixed = first.as_subclass(MixedTarget)
        _become_two(mixed, first, second, mixing, was_plain=False)
        return mixed

    @classmethod
    @_disable_dynamo  # a compiled step leaves its graph here; tracing would guard on λ
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function on both targets, or once on what they settle to."""
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs, mixing = _with_one_mixing(args, kwargs or {})
            if mixing is None or func in _ONCE or _is_number(func, args):
                return func(*settled(args), **settled(kwargs))
            if mixing.is_per_sample:
                from lightning_optkit.methods.mixed_samples import by_sample  # imports this one

                return by_sample(mixing, func, args, kwargs)
            return for_both(mixing, func, args, kwargs)


def settled(value: Any) -> Any:
    """Return the value with the mixture in the place of what is mixed in it.

    Floats are ``λ first + (1 - λ) second``; of integers and truth values it is the one that weighs
    more.

    Args:
        value: any nest of tuples, lists and dicts.
    """
    return tree_map(_settled, value)


def for_both(
    mixing: Mixing, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a function gives for either target, as one."""
    if func is Tensor.__iter__:
        return iter(for_both(mixing, torch.unbind, args, {}))
    into = written_into(func, args, kwargs)
    if isinstance(into, Tensor) and not isinstance(into, MixedTarget):
        if isinstance(into, nn.Parameter) or type(into) is not Tensor:
            return func(*settled(args), **settled(kwargs))  # stays what it is
        _split_in_place(into, mixing)
    with _same_numbers(func, into if into is not None else args[:1]):
        first = func(*first_of(args), **first_of(kwargs))
    second = func(*second_of(args), **second_of(kwargs))
    if isinstance(into, MixedTarget) and first is into._first:
        return into
    name = getattr(func, "__name__", str(func))
    return _paired(first, second, mixing, name, lambda: func(*settled(args), **settled(kwargs)))


def written_into(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the argument that a function writes into; ``None`` if there is none."""
    return kwargs.get("out", args[0] if args and _is_in_place(func) else None)


def first_of(value: Any) -> Any:
    """Return the nest with the first targets."""
    return tree_map(lambda leaf: leaf._first if isinstance(leaf, MixedTarget) else leaf, value)


def second_of(value: Any) -> Any:
    """Return the nest with the second targets."""
    return tree_map(lambda leaf: leaf._second if isinstance(leaf, MixedTarget) else leaf, value)


def _along(weight: Tensor, like: Tensor) -> Tensor:
    """Return one value a sample, to go with a tensor of more dimensions."""
    return weight.reshape(weight.shape + (1,) * (like.dim() - weight.dim()))


# -- which mixing ------------------------------------------------------------------------------


def _with_one_mixing(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Mixing | None]:
    """Return the arguments, what is of earlier batches settled, and the mixing of this batch."""
    mixings = {
        id(leaf._mixing): leaf._mixing
        for leaf in tree_leaves((args, kwargs))
        if isinstance(leaf, MixedTarget)
    }
    here = [mixing for mixing in mixings.values() if mixing.is_open]
    if len(here) > 1:
        raise MixedTargetError(
            "A loss must be of one mixed batch, got targets of two. Mix the next batch when this "
            "one is done with."
        )
    if here and len(mixings) > 1:
        args, kwargs = tree_map(_settled_if_closed, (args, kwargs))
    return args, kwargs, here[0] if here else None


def _settled_if_closed(leaf: Any) -> Any:
    is_closed = isinstance(leaf, MixedTarget) and not leaf._mixing.is_open
    return _settled(leaf) if is_closed else leaf


def _settled(leaf: Any) -> Any:
    if not isinstance(leaf, MixedTarget):
        return leaf
    first, second, mixing = leaf._first, leaf._second, leaf._mixing
    with torch._C.DisableTorchFunctionSubclass():
        if leaf.requires_grad and not (first.requires_grad or second.requires_grad):
            raise MixedTargetError(
                "A mixed target has no gradient through a `torch.autograd.Function` of one's own. "
                'Write the function with torch\'s, or mix with `targets="two_pass"`.'
            )
        if first.shape != second.shape:
            raise MixedTargetError(
                "Only results of the same shape can be mixed, got "
                f"{tuple(first.shape)} and {tuple(second.shape)}. Sum or average them, or mix "
                'with `targets="two_pass"`.'
            )
        weight = mixing.weight
        if isinstance(weight, Tensor) and first.shape[:1] != weight.shape:
            raise MixedTargetError(
                "Only what has one row a sample can have one λ a sample: got the shape "
                f"{tuple(first.shape)} for {len(weight)} of them. Mix with one λ a batch "
                "(`per_sample=False`)."
            )
        if first.is_floating_point() or first.is_complex():
            return mixing.of(first, second)
        return mixing.heavier(first, second)


# -- two results as one ------------------------------------------------------------------------

_COMPARED = (bool, int, float, complex, str, torch.Size, type(None))
_SAME = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _paired(
    first: Any, second: Any, mixing: Mixing, name: str, once: Callable[[], Any] | None
) -> Any:
    """Return two results as one.

    Args:
        first: of the first target.
        second: of the second.
        mixing: theirs.
        name: of the function, for messages.
        once: gives the result of what the arguments settle to; ``None`` inside a tuple.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first if first is second else MixedTarget.of(first, second, mixing)
    if isinstance(first, _SAME):
        return first
    if isinstance(first, _COMPARED):
        if first == second:
            return first
        if isinstance(first, float) and not mixing.is_per_sample:
            return mixing.of(first, second)
    elif isinstance(first, (tuple, list)):
        if len(first) == len(second):
            pairs = zip(first, second, strict=True)
            return _like(first, [_paired(a, b, mixing, name, None) for a, b in pairs])
    elif once is not None:
        return once()
    if once is not None and is_for_a_metric():
        return once()
    raise MixedTargetError(
        "A training step must go the same way for both targets of a mixed batch, got "
        f"{_shown(first)} for the one and {_shown(second)} for the other from `{name}`. Write it "
        'with tensors alone, or mix with `targets="two_pass"`.'
    )


def _like(sequence: Any, items: list[Any]) -> Any:
    is_namedtuple = isinstance(sequence, tuple) and hasattr(sequence, "_make")
    return type(sequence)._make(items) if is_namedtuple else type(sequence)(items)


def _shown(result: Any) -> str:
    return f"{len(result)} results" if type(result) in (tuple, list) else repr(result)


def is_for_a_metric() -> bool:
    """Return whether a function of torchmetrics asks, which may count by the heavier label."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torchmetrics."):
            return True
        frame = frame.f_back
    return False


# -- what runs once ----------------------------------------------------------------------------

_ONCE = {
    Tensor.backward, torch.autograd.backward, torch.autograd.grad,
    Tensor.__repr__, Tensor.__format__, Tensor.__reduce_ex__,
    Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__,
    Tensor.__int__, Tensor.__float__, Tensor.__complex__,
}  # fmt: skip
"""They differentiate, print, or take numbers out."""


def _is_number(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether a number is taken out: a truth value is not, the step may go by it."""
    return func is Tensor.item and first_of(args[0]).dtype is not torch.bool


# -- in place, and at random -------------------------------------------------------------------


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in _IN_PLACE
    return name.endswith("_")


_IN_PLACE = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


def _become_two(
    mixed: MixedTarget, first: Tensor, second: Tensor, mixing: Mixing, *, was_plain: bool
) -> None:
    mixed._first, mixed._second, mixed._mixing = first, second, mixing
    mixed._was_plain = was_plain
    mixing._made.append(weakref.ref(mixed))


def _split_in_place(tensor: Tensor, mixing: Mixing) -> None:
    """Make two of a plain tensor, which is about to be written into.

    What it is a view of is split too, so that it shows what is written.
    """
    base = tensor._base
    if base is None:
        first, second = tensor.clone(), tensor.clone()
        if first.stride() != tensor.stride():
            raise MixedTargetError(
                "A mixed target can be written into a tensor whose elements lie side by side, got "
                f"strides {tensor.stride()} of the shape {tuple(tensor.shape)}. Write "
                "`.contiguous()`."
            )
    else:
        if isinstance(base, nn.Parameter):
            raise MixedTargetError(
                "A mixed target cannot be written into a part of a parameter. Write into all of "
                "it, `parameter[index] = value`."
            )
        if not isinstance(base, MixedTarget):
            _split_in_place(base, mixing)
        shift = tensor.storage_offset() - base.storage_offset()
        first, second = (
            part.as_strided(tensor.shape, tensor.stride(), part.storage_offset() + shift)
            for part in (base._first, base._second)  # type: ignore[attr-defined]
        )
    tensor.__class__ = MixedTarget
    _become_two(tensor, first, second, mixing, was_plain=True)  # type: ignore[arg-type]


def _become_plain(mixed: MixedTarget) -> None:
    """Put the mixture in the place of the two, where no graph leads through both."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        value = _settled(mixed)
        if mixed.requires_grad or mixed._first.requires_grad:
            return
        was_plain = mixed._was_plain
        del mixed._first, mixed._second, mixed._mixing, mixed._was_plain
        mixed.__class__ = Tensor  # type: ignore[assignment]
        if was_plain:
            mixed.copy_(value)  # into its own memory, which others may look at
        else:
            mixed.data = value


_RANDOM = {
    "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "dropout",
    "bernoulli_", "uniform_", "normal_", "random_", "exponential_",
}  # fmt: skip


def _same_numbers(func: Callable[..., Any], operand: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context after which a random function draws the same numbers again."""
    if getattr(func, "__name__", "") not in _RANDOM:
        return contextlib.nullcontext()
    tensors = [leaf for leaf in tree_leaves(operand) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    return torch.random.fork_rng(list(devices))
