r"""Which layer takes the place of a normalization layer.

All of them give y = γ(x − μ)/σ + β, and differ in what mean and variance are over: BatchNorm the
batch, per channel; GroupNorm a group of channels of one sample; LayerNorm all channels of one
sample, which is GroupNorm with one group; InstanceNorm one channel of one sample, which is
GroupNorm with as many groups as channels.

References:
    Y. Wu, K. He, *Group Normalization*, ECCV 2018: 32 groups by default, and 16 channels a group as
    good. S. Ioffe, *Batch Renormalization*, NeurIPS 2017. E. Hoffer, I. Hubara, D. Soudry, *Train
    longer, generalize better*, NeurIPS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_optkit.methods.batch_norm import BatchNorm
from lightning_optkit.methods.batch_renorm import BatchRenorm
from lightning_optkit.methods.channel_affine import ChannelAffine
from lightning_optkit.methods.ghost_batch_norm import GhostBatchNorm

__all__ = [
    "GUARDS",
    "KINDS",
    "STATISTICS",
    "Divisor",
    "NormRule",
    "NotDivisible",
    "NotSwappable",
    "Replacement",
    "Source",
    "Target",
    "class_of",
    "groups_of",
    "history",
]

Source = Literal["batch", "sync", "group", "layer", "instance", "batch_renorm", "ghost"]
Target = Literal["group", "batch", "layer", "instance", "batch_renorm", "ghost", "sync", "none"]
Divisor = Literal["largest", "error"]

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm, nn.SyncBatchNorm),
    "sync": (nn.SyncBatchNorm,),
    "group": (nn.GroupNorm,),
    "layer": (nn.LayerNorm,),
    "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "batch_renorm": (BatchRenorm,),
    "ghost": (GhostBatchNorm,),
}
"""Classes of each kind; only these exactly, for a subclass may do more than normalise."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that layers with running statistics have."""

_OPTIONS = {
    "batch": ("eps", "momentum"),
    "sync": ("eps", "momentum"),
    "group": ("eps",),
    "layer": ("eps",),
    "instance": ("eps",),
    "batch_renorm": ("eps", "momentum", "r_max", "d_max", "relax_from", "r_max_at", "d_max_at"),
    "ghost": ("eps", "momentum", "chunk_size"),
    "none": (),
}
# Of a sample without positions, shape (N, C), a group's statistics are over its channels alone, and
# two of them leave a sign. 16 a group is the smallest that Wu & He recommend.
_CHANNELS_WITHOUT_POSITIONS = 16


class NotSwappable(ValueError):
    """Says why a layer stays."""


class NotDivisible(NotSwappable):
    """Says that a layer's channels cannot be put into so many groups."""


def groups_of(
    num_channels: int,
    *,
    num_groups: int = 32,
    channels_per_group: int | None = None,
    divisor: Divisor = "largest",
) -> int:
    """Return into how many groups of equal size so many channels are put.

    With ``channels_per_group`` C channels want C // ``channels_per_group`` groups, at least one.
    Where C is not divisible by what is wanted, it is the largest divisor of C below: groups get
    more channels, never fewer.

    Args:
        num_channels: C.
        num_groups: wanted, unless ``channels_per_group`` is given.
        channels_per_group: wanted.
        divisor: ``"error"`` refuses what is not divisible.

    Raises:
        ValueError: if C is not divisible, with ``divisor="error"``.

    Example:
        >>> [groups_of(c) for c in (64, 72, 80, 100, 144, 200, 20, 3, 97)]
        [32, 24, 20, 25, 24, 25, 20, 3, 1]
        >>> [groups_of(c, channels_per_group=16) for c in (64, 72, 8)]
        [4, 4, 1]
    """
    wanted = num_groups
    if channels_per_group is not None:
        wanted = max(1, num_channels // channels_per_group)
        is_exact = num_channels % channels_per_group == 0
    else:
        is_exact = num_channels % wanted == 0
    if divisor == "error" and not is_exact:
        into = f"{num_groups} groups" if channels_per_group is None else "groups of "
        into += "" if channels_per_group is None else f"{channels_per_group}"
        raise NotDivisible(f"its {num_channels} channels cannot be put into {into}")
    return next(k for k in range(min(wanted, num_channels), 0, -1) if num_channels % k == 0)


@dataclass(frozen=True)
class Replacement:
    """What takes a layer's place."""

    layer: nn.Module
    note: str
    """What is lost, or begins anew."""
    guard: Callable[..., None] | None
    """A hook before each forward pass, where not every input has a meaning for the new layer."""


@dataclass(frozen=True)
class NormRule:
    """Says which layer takes the place of one of a kind.

    Args:
        source: kind of the layers to replace, see :data:`KINDS`. ``"batch"`` are BatchNorm1d, 2d,
            3d and SyncBatchNorm; ``"sync"`` SyncBatchNorm alone.
        target: kind of the new layers. ``"layer"`` is GroupNorm with one group, for any number of
            dimensions; ``"none"`` no normalization, only γ and β.
        num_groups: of GroupNorm, at most; see :func:`groups_of`. In the place of BatchNorm1d and
            LayerNorm, whose inputs may have no positions, a group has at least 16 channels.
        channels_per_group: of GroupNorm, in place of ``num_groups``; at least so many.
        divisor: what to do where channels are not divisible: the ``"largest"`` divisor, or an
            ``"error"``.
        keep_affine: whether γ and β are kept: the parameters themselves, so that whoever holds them
            goes on to. Else they begin at 1 and 0.
        target_options: further arguments of the new layers: ``eps`` and ``momentum``, which are the
            old layer's unless given; ``chunk_size`` of
            :class:`~lightning_optkit.methods.ghost_batch_norm.GhostBatchNorm`; ``r_max``,
            ``d_max``, ``relax_from``, ``r_max_at`` and ``d_max_at`` of
            :class:`~lightning_optkit.methods.batch_renorm.BatchRenorm`.

    Raises:
        ValueError: if a value is out of range, or an option is none of the target's.

    Example:
        >>> NormRule().replacement(nn.BatchNorm2d(72)).layer
        GroupNorm(24, 72, eps=1e-05, affine=True...)
    """

    source: Source = "batch"
    target: Target = "group"
    num_groups: int = 32
    channels_per_group: int | None = None
    divisor: Divisor = "largest"
    keep_affine: bool = True
    target_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("source", Source), ("target", Target), ("divisor", Divisor)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        if self.source == self.target != "group":
            hint = " Write `source='sync'` for SyncBatchNorm." if self.source == "batch" else ""
            raise ValueError(f"`target` must be another kind than `source`, got both.{hint}")
        for name in ("num_groups", "channels_per_group"):
            value = getattr(self, name)
            is_left_out = name == "channels_per_group" and value is None
            if not is_left_out and (not _is_count(value) or value < 1):
                raise ValueError(
                    f"`{name}` must be an integer of at least 1, got {value!r}. 32 groups are "
                    "usual, or 16 channels in each."
                )
        if self.channels_per_group is not None and self.num_groups != 32:
            raise ValueError(
                f"At most one of `num_groups` and `channels_per_group` must be given, got "
                f"num_groups={self.num_groups} and channels_per_group={self.channels_per_group}. "
                "Leave one of them out."
            )
        self._require_options()

    def _require_options(self) -> None:
        options, known = self.target_options, _OPTIONS[self.target]
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"`target_options` must be a dict, got {options!r}.")
        if unknown := sorted(set(options or ()) - set(known)):
            takes = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(
                f"`target_options` must hold options of target={self.target!r}, got {unknown}. It "
                f"takes {takes}."
            )
        found = dict(options or {})
        eps, momentum = found.get("eps", 0.0), found.get("momentum")
        if not _is_number(eps) or not 0 <= eps < math.inf:
            raise ValueError(f"`eps` must be a number of at least 0, such as 1e-5, got {eps!r}.")
        if momentum is not None and (not _is_number(momentum) or not 0 <= momentum <= 1):
            raise ValueError(
                f"`momentum` must be a share in [0, 1], such as 0.1, got {momentum!r}. `None` is "
                "the mean over all batches."
            )
        if self.target in ("batch_renorm", "ghost"):  # which check the rest themselves
            self._new(_Place(nn.BatchNorm2d(1), None))

    # -- one layer -----------------------------------------------------------------------------

    def takes(self, layer: nn.Module) -> bool:
        """Return whether a layer is of the source's kind, exactly."""
        return class_of(layer) in KINDS[self.source]

    def is_done(self, layer: nn.Module) -> bool:
        """Return whether a layer is what the rule makes of those that it takes, or what it made."""
        sources = [kind.__name__ for kind in KINDS[self.source]]
        if not self.takes(layer) and not any(name in sources for name in history(layer)[-1:]):
            return False
        if self.target == "none":
            return class_of(layer) in (nn.Identity, ChannelAffine)
        if class_of(layer) not in _ALL_KINDS:
            return False
        try:
            wanted = self._new(_Place(layer, None))
        except NotDivisible:
            return False
        return type(wanted) is class_of(layer) and wanted.extra_repr() == layer.extra_repr()

    def replacement(self, layer: nn.Module, *, like: Tensor | None = None) -> Replacement:
        """Return what takes the place of a layer, with its parameters and statistics in it.

        Args:
            layer: one that the rule takes.
            like: has the dtype, device and ``requires_grad`` of new parameters and buffers, where
                the layer has none.

        Raises:
            NotSwappable: if nothing can, saying why.
        """
        place = _Place(layer, like)
        if reason := place.reason_to_stay(self.target):
            raise NotSwappable(reason)
        new = self._new(place)
        if not isinstance(new, nn.Identity):
            self._give_affine(new, place)
        _give_statistics(new, layer)
        return Replacement(new, _note(new, layer), _guard_of(new, place))

    def _new(self, place: _Place) -> Any:
        """Return a layer without γ and β, and with statistics of its own where it has any."""
        options = {"eps": place.eps} | dict(self.target_options or {})
        where: dict[str, Any] = {"device": place.device, "dtype": place.dtype}
        channels, dims = place.num_channels, place.num_dims
        if self.target == "none":
            if not self.keep_affine or not place.has_affine:
                return nn.Identity()
            shape = tuple(getattr(place.layer, "normalized_shape", (channels,)))
            trailing = isinstance(place.layer, nn.LayerNorm)
            return ChannelAffine(shape, trailing=trailing, **where)
        if self.target == "layer" and place.has_features_only:
            return nn.LayerNorm(channels, elementwise_affine=place.is_affine, **options)
        affine = {"affine": place.is_affine, **where}
        if self.target == "instance" and dims in (2, 3):
            kind = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
            return kind(channels, **options, **affine)
        if self.target in ("group", "layer", "instance"):
            return nn.GroupNorm(self._num_groups(place), channels, **options, **affine)
        options = {"momentum": place.momentum} | options | affine
        if self.target == "batch_renorm":
            return BatchRenorm(channels, **options)
        options["track_running_stats"] = place.tracks
        if self.target == "ghost":
            return GhostBatchNorm(channels, **options)
        if self.target == "sync":
            return nn.SyncBatchNorm(channels, **options)
        by_dims = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d, None: BatchNorm}
        return by_dims[dims](channels, **options)

    def _num_groups(self, place: _Place) -> int:
        channels = place.num_channels
        if self.target != "group":
            return 1 if self.target == "layer" else channels
        wanted = self.num_groups
        if place.num_dims == 1:
            wanted = min(wanted, max(1, channels // _CHANNELS_WITHOUT_POSITIONS))
        return groups_of(
            channels,
            num_groups=wanted,
            channels_per_group=self.channels_per_group,
            divisor=self.divisor,
        )

    def _give_affine(self, new: Any, place: _Place) -> None:
        """Put γ and β into the new layer: the old ones, or new ones like them."""
        old = place.layer
        for name, fill in (("weight", 1.0), ("bias", 0.0)):
            value = getattr(old, name)
            if value is None and place.is_given_affine:
                getattr(new, name).requires_grad_(place.trains)
            elif value is None or self.keep_affine:
                setattr(new, name, value)
            else:
                fresh = nn.Parameter(torch.full_like(value, fill), value.requires_grad)
                setattr(new, name, fresh)


class _Place:
    """What is known of a norm layer's place in a net.

    Args:
        layer: the norm layer.
        like: has dtype and device, where the layer has no tensor.
    """

    def __init__(self, layer: nn.Module, like: Tensor | None) -> None:
        self.layer = cast(Any, layer)
        own: Tensor | None = next(layer.parameters(), None)
        own = next(layer.buffers(), None) if own is None else own
        self.trains = like is None or like.requires_grad
        like = like if own is None else own
        self.device = None if like is None else like.device
        self.dtype = None if like is None else like.dtype
        names = (class_of(layer).__name__, *history(layer))
        self.has_features_only = "LayerNorm" in names
        self.num_dims = next((int(name[-2]) for name in names if name[-2:] in _BY_DIMS), None)
        if self.has_features_only:
            self.num_dims = 1
        for attribute in ("num_channels", "num_features", "normalized_shape"):
            if hasattr(layer, attribute):
                self._channels = getattr(layer, attribute)
        self.eps = self.layer.eps
        is_batch_norm = isinstance(layer, _BatchNorm)
        self.momentum = self.layer.momentum if is_batch_norm else 0.1
        self.tracks = not is_batch_norm or self.layer.track_running_stats

    @property
    def num_channels(self) -> int:
        is_shape = isinstance(self._channels, tuple)
        return self._channels[0] if is_shape else self._channels

    @property
    def is_given_affine(self) -> bool:
        """Whether it gets γ and β: InstanceNorm has none by default, which nobody chose."""
        return class_of(self.layer) in KINDS["instance"] and not self.layer.affine

    @property
    def has_affine(self) -> bool:
        return self.layer.weight is not None or self.layer.bias is not None

    @property
    def is_affine(self) -> bool:
        return self.is_given_affine or self.has_affine

    def reason_to_stay(self, target: Target) -> str | None:
        """Return why no layer of a kind can take this one's place, if so."""
        layer = self.layer
        if "forward" in vars(layer) or getattr(layer, "_compiled_call_impl", None) is not None:
            return "its `forward` was replaced or compiled; do that after the swap"
        own = {*layer._parameters, *layer._buffers} - {"weight", "bias", *STATISTICS}
        if own or layer._modules:
            names = ", ".join(sorted(own | {*layer._modules}))
            return f"it has state of its own ({names}); prune or parametrize after the swap"
        if isinstance(self._channels, tuple) and len(self._channels) > 1 and target != "none":
            return f"its `normalized_shape` {self._channels} has more in it than channels"
        if self.has_features_only and target == "instance":
            return "its inputs may be (N, C), where a channel of a sample is one value"
        if target == "batch_renorm" and not self.tracks:
            return "it keeps no running statistics, by which BatchRenorm normalises"
        return None


_BY_DIMS = ("1d", "2d", "3d")
_ALL_KINDS = tuple(kind for kinds in KINDS.values() for kind in kinds)


def history(layer: nn.Module) -> tuple[str, ...]:
    """Return the classes that stood in the place of a layer, the first one first."""
    found: tuple[str, ...] = vars(layer).get("swapped_from", ())
    return found


def class_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer, under what FSDP2 puts over the classes of modules it shards."""
    kind = type(layer)
    is_sharded = any(base.__name__ == "FSDPModule" for base in kind.__bases__)
    return kind.__bases__[-1] if is_sharded else kind


def _give_statistics(new: Any, old: nn.Module) -> None:
    """Hand running statistics on where both are those of a batch."""
    if isinstance(new, _BatchNorm) and isinstance(old, _BatchNorm):
        new._buffers.update(old._buffers)
        new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)


def _note(new: Any, old: Any) -> str:
    """Return what of the old layer is not in the new one, and what of the new was not in it."""
    notes = []
    had, has = (getattr(each, "running_mean", None) for each in (old, new))
    if had is not None and has is None:
        notes.append("without running statistics")
    elif has is not None and has is not had:
        notes.append("with new running statistics")
    weights = [getattr(each, "weight", None) for each in (old, new)]
    if weights[0] is not None and weights[1] is None:
        notes.append("without γ and β")
    elif weights[0] is not weights[1]:
        notes.append("γ = 1, β = 0")
    return ", ".join(notes)


# -- inputs that have no meaning for the new layer ---------------------------------------------


def _guard_of(new: nn.Module, place: _Place) -> Callable[..., None] | None:
    if place.has_features_only and not isinstance(new, (nn.LayerNorm, nn.Identity, ChannelAffine)):
        return require_features
    if isinstance(new, nn.GroupNorm) and new.num_groups == new.num_channels:
        return require_positions
    return None


def require_features(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs whose channels are last, as LayerNorm has them, with more dimensions than two.

    Raises:
        ValueError: for an input that is not (N, C).
    """
    values = next(iter((*args, *kwargs.values())))
    if values.ndim != 2:
        raise ValueError(
            f"`{type(layer).__name__}` in the place of LayerNorm must get inputs of shape (N, C), "
            f"got {tuple(values.shape)}: it takes channels from dimension 1, LayerNorm from the "
            "last. Leave this layer out with `where=`."
        )


def require_positions(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs of which GroupNorm would make zeros.

    Raises:
        ValueError: for an input with one value a group.
    """
    values = next(iter((*args, *kwargs.values())))
    if values.shape[2:].numel() * layer.num_channels == layer.num_groups:
        raise ValueError(
            f"GroupNorm must get more than one value a group, got an input of shape "
            f"{tuple(values.shape)} in {layer.num_groups} groups, which would come out as zeros. "
            "Take fewer groups by `channels_per_group=16`, or leave this layer out with `where=`."
        )


GUARDS = (require_features, require_positions)
"""Hooks that belong to a replacement, and go with it."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
