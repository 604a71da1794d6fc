"""Normalization layers of a net replaced by those of another kind, in place."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_optkit.methods.batch_renorm import BatchRenorm
from lightning_optkit.methods.channel_affine import ChannelAffine
from lightning_optkit.methods.ghost_batch_norm import GhostBatchNorm
from lightning_optkit.methods.normalization import (
    GUARDS,
    KINDS,
    Divisor,
    NormRule,
    NotDivisible,
    NotSwappable,
    Replacement,
    Source,
    Target,
    class_of,
    history,
)

__all__ = [
    "NormLayer",
    "SwapPlan",
    "SwapReport",
    "Where",
    "listed",
    "named_layers",
    "require_where",
    "swap_norms",
]

Where = Sequence[str] | Callable[[str, nn.Module], bool]
"""Glob patterns of layer names, or a function of name and layer."""


@dataclass(frozen=True)
class NormLayer:
    """A norm layer, and what became of it.

    Attributes:
        name: in the module; the first, where it has several.
        layer: what it is.
        becomes: what takes its place, if anything.
        status: ``"swapped"``; ``"done"`` if it was what is wanted; ``"left"`` alone, though it is
            or may be of the kind; ``"other"``, which was not asked for.
        note: what is lost, or why it stays.
    """

    name: str
    layer: str
    becomes: str
    status: Literal["swapped", "done", "left", "other"]
    note: str


@dataclass(frozen=True)
class SwapReport:
    """The norm layers of a module, and what became of each. Prints as a table.

    Attributes:
        layers: in the order of ``named_modules``.
    """

    layers: tuple[NormLayer, ...]

    def of(self, *status: str) -> list[NormLayer]:
        """Return the layers of which this became."""
        return [layer for layer in self.layers if layer.status in status]

    @property
    def summary(self) -> str:
        """What was done, in a line."""
        swapped = Counter(
            (each.layer.partition("(")[0], each.becomes.partition("(")[0])
            for each in self.of("swapped")
        )
        parts = [f"{number} {old} replaced by {new}" for (old, new), number in swapped.items()]
        if done := len(self.of("done")):
            parts.append(f"{done} as wanted already")
        line = ", ".join(parts) or "nothing replaced"
        left: dict[tuple[str, str], list[str]] = {}
        for each in self.of("left"):
            left.setdefault((each.layer.partition("(")[0], each.note), []).append(each.name)
        alone = [f"{listed(names)}, {kind}: {note}" for (kind, note), names in left.items()]
        return f"{line}." + (f" Left alone: {'; '.join(alone)}." if alone else "")

    def __str__(self) -> str:
        if not self.layers:
            return "No norm layers."
        header = ("name", "layer", "becomes", "note")
        rows = [(each.name, each.layer, each.becomes or "stays", each.note) for each in self.layers]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in [header, *rows]
        ]
        return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """Return names in a line that does not grow with their number.

    Example:
        >>> listed(["stem"]), listed(["a", "b", "c", "d", "e"])
        ('stem', 'a, b, c and 2 more')
    """
    few = ", ".join(names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"


def swap_norms(
    module: nn.Module,
    source: Source = "batch",
    target: Target = "group",
    *,
    num_groups: int = 32,
    channels_per_group: int | None = None,
    divisor: Divisor = "largest",
    where: Where | None = None,
    keep_affine: bool = True,
    target_options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> SwapReport:
    """Replace the norm layers of a module by those of another kind, in place.

    A new layer has the old one's name and place, its γ and β themselves, training flag, hooks, and
    what else was set on it; running statistics where both kinds have those of a batch. A layer with
    several names, or one that a list or dict of a module holds, is replaced once and everywhere.
    Subclasses, layers fused with others, and those with more state are reported and left alone.

    Swap before the module is compiled, pruned, parametrized or sharded. Optimizers go on, for the
    parameters are the same.

    Args:
        module: what holds the layers.
        source: see :class:`~lightning_optkit.methods.normalization.NormRule`, as for all but these:
        target: see there.
        num_groups: see there.
        channels_per_group: see there.
        divisor: see there.
        where: which layers: glob patterns of names such as ``["encoder.*"]``, or a function of name
            and layer; ``None`` = all.
        keep_affine: see there.
        target_options: see there.
        dry_run: change nothing, only report.

    Returns:
        All norm layers of the module, and what became of them.

    Raises:
        ValueError: if no layer is or was of this kind, if a pattern is of none, or a value is out
            of range.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 72, 3), nn.BatchNorm2d(72), nn.ReLU())
        >>> print(swap_norms(net))
        name  layer            becomes            note
        1     BatchNorm2d(72)  GroupNorm(24, 72)  without running statistics
        >>> net[1]
        GroupNorm(24, 72, eps=1e-05, affine=True...)
    """
    rule = NormRule(
        source, target, num_groups, channels_per_group, divisor, keep_affine, target_options
    )
    plan = SwapPlan(module, rule, where)
    if not dry_run:
        plan.require_layers()
        plan.carry_out()
    return plan.report


class SwapPlan:
    """Which layers of a module are replaced by which.

    Args:
        module: what holds the layers.
        rule: which layer takes the place of which.
        where: which layers, see :func:`swap_norms`.
        apart: names of layers that are another's to replace.

    Raises:
        TypeError: if ``where`` is neither patterns nor a function.
        ValueError: if the module is itself a norm layer, or channels are not divisible.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: NormRule,
        where: Where | None = None,
        *,
        apart: Collection[str] = (),
    ) -> None:
        require_where(where)
        if rule.takes(module):
            raise ValueError(
                f"`module` must hold the layers, got the layer {described(module)} itself. Pass "
                "what it is a part of."
            )
        self._module = module
        self._rule = rule
        self._where = where
        self._apart = frozenset(apart)
        self._new: dict[int, tuple[nn.Module, Replacement]] = {}
        self._not_divisible: list[str] = []
        named = named_layers(module)
        self.report = SwapReport(tuple(self._planned(layer, names) for layer, names in named))
        if self._not_divisible:
            raise ValueError(
                "`divisor` must be 'largest' where channels are not divisible, got 'error' and: "
                f"{'; '.join(self._not_divisible)}."
            )

    @property
    def layers(self) -> list[nn.Module]:
        """Those that are to be replaced."""
        return [layer for layer, _ in self._new.values()]

    @property
    def names(self) -> list[str]:
        """Those of the layers that are to be as the rule says, or are already."""
        return [layer.name for layer in self.report.of("swapped", "done")]

    def require_layers(self) -> None:
        """Raise unless there are layers to replace, and each pattern finds one.

        Raises:
            ValueError: naming the norm layers that there are.
        """
        rule = self._rule
        if not self.report.of("swapped", "done"):
            there = [
                f"{each.name} {each.layer}" + (f" ({each.note})" if each.note else "")
                for each in self.report.layers
            ]
            chosen = "" if self._where is None else f" in where={self._where!r}"
            raise ValueError(
                f"`source` must be a kind of norm layer that the module has{chosen}, got "
                f"{rule.source!r}. Its norm layers: {'; '.join(there) or 'none'}."
            )
        found = [name for layer, names in named_layers(self._module) for name in names]
        patterns = [] if self._where is None or callable(self._where) else list(self._where)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(
                    f"Each pattern of `where` must match a norm layer, got {pattern!r}. They are: "
                    f"{', '.join(found)}."
                )

    def carry_out(self) -> None:
        """Put the new layers into their places."""
        for old, replacement in self._new.values():
            _take_over(replacement, old)
        new = {key: replacement.layer for key, (_, replacement) in self._new.items()}
        for holder in list(self._module.modules()):
            for container in _containers(holder):
                _replace_in(container, new)

    def _planned(self, layer: nn.Module, names: list[str]) -> NormLayer:
        name, was = names[0], described(layer)
        if not self._is_chosen(names, layer):
            return NormLayer(name, was, "", "other", "not in `where`")
        if name in self._apart:
            return NormLayer(name, was, "", "other", "replaced by another")
        if self._rule.is_done(layer):
            return NormLayer(name, was, was, "done", "as wanted already")
        if not self._rule.takes(layer):
            reason = _why_it_may_be_more(layer, self._rule.source)
            status: Literal["left", "other"] = "left" if reason else "other"
            reason = reason or f"not of source={self._rule.source!r}"
            return NormLayer(name, was, "", status, reason)
        try:
            if owner := _owner_of(self._module, names):
                raise NotSwappable(owner)
            replacement = self._rule.replacement(layer, like=_nearest(self._module, name))
        except NotSwappable as error:
            if isinstance(error, NotDivisible):
                self._not_divisible.append(f"{name}, {error}")
            return NormLayer(name, was, "", "left", str(error))
        self._new[id(layer)] = layer, replacement
        return NormLayer(name, was, described(replacement.layer), "swapped", replacement.note)

    def _is_chosen(self, names: list[str], layer: nn.Module) -> bool:
        if self._where is None:
            return True
        if callable(self._where):
            return any(self._where(name, layer) for name in names)
        return any(fnmatchcase(name, pattern) for name in names for pattern in self._where)


# -- the layers of a module ----------------------------------------------------------------------

_ALL_KINDS = tuple(kind for kinds in KINDS.values() for kind in kinds)
_KNOWN = {*_ALL_KINDS, ChannelAffine, nn.Identity}
_NORM = re.compile(r"norm|bn(\d|$)", re.IGNORECASE)


def named_layers(module: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return the norm layers of a module, of any library, each with all its names.

    Others' layers are told by their names. What was put in the place of a norm layer is one.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> [names for _, names in named_layers(nn.Sequential(norm, nn.Linear(2, 2), norm))]
        [['0', '2']]
    """
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if name and _is_norm(layer):
            found.setdefault(id(layer), (layer, []))[1].append(name)
    return list(found.values())


def _is_norm(layer: nn.Module) -> bool:
    if class_of(layer) in (nn.Identity, ChannelAffine):
        return bool(history(layer))
    if isinstance(layer, _ALL_KINDS):
        return True
    is_part = not layer._modules or layer._parameters or layer._buffers  # and no mere container
    return bool(is_part and _NORM.search(type(layer).__name__))


def _why_it_may_be_more(layer: nn.Module, source: Source) -> str | None:
    """Return why a layer that is not exactly of a kind is left alone, if it may be of it."""
    kinds = KINDS[source]
    if getattr(layer, "cls_to_become", None) in kinds:
        return "lazy: pass a batch through the module before the swap"
    if isinstance(layer, kinds):
        base = next(kind.__name__ for kind in type(layer).__mro__ if kind in kinds)
        return f"a subclass of {base}, which may do more than normalise"
    if source == "batch" and isinstance(layer, _BatchNorm) and class_of(layer) not in _KNOWN:
        return "not torch's own BatchNorm"
    return None


def described(layer: nn.Module) -> str:
    """Return a layer in a few letters.

    Example:
        >>> described(nn.BatchNorm2d(3)), described(nn.GroupNorm(2, 4)), described(nn.Identity())
        ('BatchNorm2d(3)', 'GroupNorm(2, 4)', 'Identity()')
    """
    kind: Any = layer
    sizes: list[Any] = []
    for attribute in ("num_groups", "num_channels", "num_features", "normalized_shape", "shape"):
        value = getattr(kind, attribute, None)
        sizes += [] if value is None else value if isinstance(value, tuple) else [value]
    return f"{class_of(layer).__name__}({', '.join(map(str, sizes))})"


def _nearest(module: nn.Module, name: str) -> Tensor | None:
    """Return a floating parameter of the smallest part that holds the layer, and has one."""
    while name:
        name = name.rpartition(".")[0]
        for parameter in module.get_submodule(name).parameters():
            if parameter.is_floating_point():
                return parameter
    return None


def _owner_of(module: nn.Module, names: list[str]) -> str | None:
    """Return why the module around a layer would be mistaken about a new one, if it would."""
    for name in names:
        path = name.split(".")
        around = [module.get_submodule(".".join(path[:i])) for i in range(len(path))]
        if type(around[-1]).__name__ == "OptimizedModule":  # not to import the compiler
            return "it is compiled by itself; compile after the swap"
        if isinstance(around[-1], nn.TransformerEncoderLayer):
            return "TransformerEncoderLayer computes it as LayerNorm in evaluation, whatever it is"
        for each in around:
            if type(each).__module__.startswith(("torch.ao.", "torch.nn.intrinsic")):
                return f"a part of {type(each).__name__}, which expects it"
    return None


# -- one for another -----------------------------------------------------------------------------

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name] + ["_is_full_backward_hook"]
_ATTRIBUTES = {"swapped_from"}.union(
    *(
        vars(kind)
        for kind in (
            nn.BatchNorm1d(1),
            nn.SyncBatchNorm(1),
            nn.GroupNorm(1, 1),
            nn.LayerNorm(1),
            BatchRenorm(1),
            GhostBatchNorm(1),
        )
    )
)


def _take_over(replacement: Replacement, old: nn.Module) -> None:
    """Give the new layer what else the old one has: flag, hooks with their handles, marks."""
    new: Any = replacement.layer
    new.training = old.training
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]  # the very dict: handles that were given out hold it
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    for key, hook in list(new._forward_pre_hooks.items()):
        if any(hook is guard for guard in GUARDS):
            del new._forward_pre_hooks[key], new._forward_pre_hooks_with_kwargs[key]
    if replacement.guard is not None:
        new.register_forward_pre_hook(replacement.guard, with_kwargs=True)
    vars(new).update({k: v for k, v in vars(old).items() if k not in _ATTRIBUTES})
    new.swapped_from = (*history(old), class_of(old).__name__)


def _containers(holder: nn.Module) -> Iterator[Any]:
    """Yield what a module may hold layers in: its children, attributes, and lists and dicts."""
    yield vars(holder)
    for value in vars(holder).values():
        if isinstance(value, (dict, list)):
            yield value


def _replace_in(container: Any, new: Mapping[int, nn.Module]) -> None:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        if id(value) in new:
            container[key] = new[id(value)]
        elif type(value) is tuple and any(id(each) in new for each in value):
            container[key] = tuple(new.get(id(each), each) for each in value)


def require_where(where: Any) -> None:
    """Raise unless it says which layers.

    Raises:
        TypeError: if it is neither patterns nor a function.
    """
    if where is None or callable(where):
        return
    if isinstance(where, str):
        raise TypeError(
            f"`where` must be a list of glob patterns, got the string {where!r}. Write "
            f"`where=[{where!r}]`."
        )
    if not isinstance(where, Sequence) or not all(isinstance(each, str) for each in where):
        raise TypeError(
            f"`where` must be a list of glob patterns, or a function of name and layer, got "
            f"{where!r}. Write `where=['encoder.*']`."
        )
