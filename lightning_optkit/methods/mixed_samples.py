"""Targets mixed with one λ a sample: two as long as each row is of one sample, then one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_optkit.methods.mixed_target import (
    MixedTarget,
    MixedTargetError,
    Mixing,
    first_of,
    for_both,
    is_for_a_metric,
    second_of,
    settled,
    written_into,
)

__all__ = ["by_sample"]

_LOSSES = {
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.soft_margin_loss,
    F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss,
    F.poisson_nll_loss, F.gaussian_nll_loss, F.hinge_embedding_loss, F.cosine_embedding_loss,
    F.margin_ranking_loss,
}  # fmt: skip
"""Losses that are computed by sample and then summed or averaged."""


_BY_ELEMENT = {
    "abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "bool", "bfloat16", "clamp", "clone",
    "contiguous", "cpu", "cuda", "detach", "div", "double", "eq", "exp", "expand", "expand_as",
    "float", "floor_divide", "full_like", "ge", "gt", "half", "int", "isfinite", "isnan", "le",
    "log", "log1p", "logical_and", "logical_not", "logical_or", "logsigmoid", "long", "lt",
    "masked_fill", "maximum", "minimum", "mul", "multiply", "ne", "neg", "ones_like", "pow",
    "relu", "remainder", "rsub", "short", "sigmoid", "softplus", "sqrt", "square", "sub",
    "subtract", "take", "to", "true_divide", "type", "type_as", "where", "zeros_like",
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__neg__", "__invert__", "__abs__",
}  # fmt: skip
"""Functions that broadcast. A dimension of theirs that is not the first is of one sample."""

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_BY_ELEMENT |= {f"__{side}{name}__" for name in _OPERATORS for side in ("", "r", "i")}

_RESHAPING = {"view", "view_as", "reshape", "flatten", "squeeze"}
_BY_LABEL = {"one_hot", "embedding", "unsqueeze"}
_ALONG = {"scatter", "scatter_add", "cumsum", "softmax", "log_softmax"}
_LINEAR = {"sum", "mean"}


def by_sample(
    mixing: Mixing, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a function gives for either target of each sample.

    Two losses a sample, mixed with the sample's λ, are one number a sample; their sum or mean is
    plain.
    """
    into = written_into(func, args, kwargs)
    if isinstance(into, Tensor) and not _is_mixed(into) and is_for_a_metric():
        return func(*settled(args), **settled(kwargs))
    try:
        return _by_row(mixing, func, args, kwargs)
    except MixedTargetError:
        if is_for_a_metric():
            return func(*settled(args), **settled(kwargs))
        raise


def _by_row(
    mixing: Mixing, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    name = getattr(func, "__name__", str(func))
    if func in _LOSSES:
        return _loss(mixing, func, args, kwargs)
    if name in _LINEAR and _dims_of_reduction(args, kwargs) is None:
        return func(*settled(args), **settled(kwargs))
    result = for_both(mixing, func, args, kwargs)
    rows = result if isinstance(result, MixedTarget) else None
    if name == "__setitem__":
        rows = args[0]
    elif rows is None:
        if hasattr(result, "__next__") or any(map(_is_mixed, tree_leaves(result))):
            raise _refusal(name)
        return result
    if rows.dim() == 0 or first_of(rows).shape[:1] != mixing.weight.shape:  # type: ignore[union-attr]
        raise _refusal(name)
    if not _keeps_samples(name, args, kwargs, first_of(rows)):
        raise _refusal(name)
    return result


def _refusal(name: str) -> MixedTargetError:
    return MixedTargetError(
        f"`{name}` of a target cannot be mixed with one λ a sample: it may bring samples "
        'together. Mix with one λ a batch (`per_sample=False`), or with `targets="soft"`.'
    )


def _dims_of_reduction(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """Return the dimensions that are summed; ``None`` if samples are among them."""
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if dims is None or isinstance(dims, torch.dtype):
        return None
    ndim = first_of(args[0]).dim()
    found = [dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)]
    return None if not found or 0 in found else found


def _keeps_samples(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> bool:
    """Return whether row i of the result, which has one a sample, is of sample i alone."""
    if name == "__getitem__":
        return _index_keeps_samples(args[0], args[1], result)
    if name == "__setitem__":
        return _is_mask(args[1], result) or _is_one_a_row(args[1], result)
    plain = name.removesuffix("_") if not name.startswith("__") else name
    if name in _LINEAR or plain in _RESHAPING:
        return True  # rows come in their order, and there are as many
    if plain in _BY_LABEL:
        return _is_mixed(args[0])
    dims = [leaf._first.dim() for leaf in tree_leaves((args, kwargs)) if _is_mixed(leaf)]
    if min(dims) < result.dim():  # broadcast in front
        return False
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    is_across = isinstance(dim, int) and dim % result.dim() == 0
    if plain == "index_select":
        return is_across and not _is_mixed(args[0])
    if plain == "gather":
        return not (is_across and _is_mixed(args[0]))
    return plain in _BY_ELEMENT or (plain in _ALONG and isinstance(dim, int) and not is_across)


def _index_keeps_samples(tensor: Any, index: Any, result: Tensor) -> bool:
    """Return whether an index takes row i for sample i."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(_is_mixed(part) for part in parts):  # weights[y], log_probabilities[arange, y]
        if _is_mixed(tensor) or not all(isinstance(part, Tensor) for part in parts):
            return False
        ndim = max(part.dim() for part in parts)
        whole = [part for part in parts if _is_mixed(part) and part.dim() == ndim]
        return len(whole) == sum(map(_is_mixed, parts)) and not any(map(_is_boolean, parts))
    if not all(part is None or isinstance(part, (int, slice)) for part in parts[1:]):
        return False
    if parts[0] is Ellipsis:
        return tensor.dim() > 1 or all(part is None for part in parts[1:])
    return isinstance(parts[0], slice) and parts[0] == slice(None)  # y[:, None]


def _is_boolean(part: Tensor) -> bool:
    return part.dtype is torch.bool


def _is_mask(index: Any, rows: Tensor) -> bool:
    return _is_mixed(index) and index.dtype is torch.bool and index.shape == rows.shape


def _is_one_a_row(index: Any, rows: Tensor) -> bool:
    """Return whether an index is ``[arange, y]``."""
    if not (isinstance(index, tuple) and len(index) == 2 and _is_mixed(index[1])):
        return False
    number, label = index
    if not (isinstance(number, Tensor) and not _is_mixed(number) and number.dim() == 1):
        return False
    return label.dim() == 1 and torch.equal(
        number, torch.arange(len(rows), device=number.device, dtype=number.dtype)
    )


def _is_mixed(leaf: Any) -> bool:
    return isinstance(leaf, MixedTarget)


# -- losses that reduce ------------------------------------------------------------------------


def _loss(
    mixing: Mixing, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return a loss whose samples are mixed before they are reduced.

    The mean of weighted classes divides by the mixed weights: where the second targets are the
    first ones in another order, a single λ gives the same as two losses.
    """
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    reduction = given["reduction"]
    is_legacy = given.get("reduce") is not None or given.get("size_average") is not None
    if is_legacy or reduction not in ("none", "mean", "sum"):
        raise MixedTargetError(
            f"`{func.__name__}` must have the reduction 'mean', 'sum' or 'none' to be mixed with "
            f"one λ a sample, got {'an old one' if is_legacy else repr(reduction)}. Mix with one λ "
            "a batch (`per_sample=False`)."
        )
    given["reduction"] = "none"
    losses = for_both(mixing, func, bound.args, bound.kwargs)
    if losses._first.shape[:1] != mixing.weight.shape:  # type: ignore[union-attr]
        raise _refusal(func.__name__)
    if reduction == "none":
        return losses
    total = settled(losses).sum()
    if reduction == "sum":
        return total
    shares = [_shares(branch(given["target"]), given) for branch in (first_of, second_of)]
    if shares[0] is None or shares[1] is None:
        return total / losses._first.numel()
    return total / mixing.of(*(share.to(total.dtype) for share in shares)).sum()  # type: ignore[union-attr]


def _shares(target: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Return what each element counts in a mean over classes; ``None`` = all alike."""
    if "ignore_index" not in given or target.is_floating_point():
        return None
    valid = target != given["ignore_index"]
    weight = given["weight"]
    if weight is None:
        return valid
    return weight[torch.where(valid, target, 0)] * valid


@functools.cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)
