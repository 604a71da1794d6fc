"""How the targets of a batch are mixed: chosen by what they are, and done."""

from __future__ import annotations

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optkit.bridge.arguments import is_count
from lightning_optkit.methods.mixed_target import MixedTarget, Mixing
from lightning_optkit.methods.mixing import Mixed

__all__ = ["TargetMixing", "Targets", "TargetsOfCut"]

Targets = Literal["auto", "proxy", "soft", "two_pass", "direct", "none"]
"""How the loss of a mixed batch comes about, see ``docs/mixing.md``."""

TargetsOfCut = Literal["auto", "proxy", "soft", "two_pass", "direct", "cut", "none"]
"""The same where inputs are cut."""

SAID = {
    "proxy": "the loss is computed for both targets in one pass, and mixed",
    "soft": "targets become class probabilities",
    "two_pass": "the step runs for both targets, and their losses are mixed",
    "direct": "float targets are mixed as the inputs are",
    "cut": "targets are cut as the inputs are",
    "none": "targets stay as they are",
}
"""What each of them does."""


class TargetMixing:
    """Mixes the targets of batches.

    Args:
        targets: how the loss comes about.
        num_classes: for ``targets="soft"``.
        can_cut: whether inputs are cut.
        per_sample: whether each sample has its own λ.

    Raises:
        ValueError: for what does not go together.
    """

    def __init__(
        self, targets: str, *, num_classes: int | None, can_cut: bool, per_sample: bool
    ) -> None:
        modes = [mode for mode in ("auto", *SAID) if can_cut or mode != "cut"]
        if targets not in modes:
            raise ValueError(
                f"`targets` must be one of {', '.join(map(repr, modes))}, got {targets!r}. 'auto' "
                "fits nearly all."
            )
        if targets == "soft" and not is_count(num_classes, least=2):
            raise ValueError(
                "`num_classes` must be an integer of at least 2 with `targets='soft'`, got "
                f"{num_classes!r}. Or write `targets='proxy'`, which needs none."
            )
        if targets != "soft" and num_classes is not None:
            raise ValueError(
                f"`num_classes` must be given with `targets='soft'` alone, got {num_classes!r} "
                f"with {targets!r}. Leave it out."
            )
        if per_sample and targets == "two_pass":
            raise ValueError(
                "`per_sample` must be False with `targets='two_pass'`, got True: two losses of a "
                "batch have one λ. Write `targets='proxy'`."
            )
        self.targets = targets
        self._num_classes = num_classes or 0

    @property
    def has_target(self) -> bool:
        """Whether targets are looked for in a batch."""
        return self.targets != "none"

    def modes(self, targets: Any, mixed: Mixed) -> list[str]:
        """Return how each target of a batch is mixed, if all can be.

        Args:
            targets: a tensor, or a nest of some.
            mixed: the inputs of the batch.

        Raises:
            MisconfigurationException: if one cannot be mixed in this way.
        """
        if not self.has_target:
            return ["none"]
        return [self._mode(target, mixed) for target in tree_leaves(targets)]

    def mixed(self, targets: Any, mixed: Mixed, which: Mixing | int) -> Any:
        """Return the targets of a batch, mixed.

        Args:
            targets: a tensor, or a nest of some.
            mixed: the inputs of the batch.
            which: of targets with a loss of their own: both, with these weights, or the first (0)
                or second (1).
        """
        if not self.has_target:
            return targets

        def one(target: Tensor) -> Tensor:
            match self._mode(target, mixed):
                case "direct":
                    return mixed.direct(target)
                case "soft":
                    return mixed.soft(target, self._num_classes)
                case "cut":
                    return mixed.cut(target, dims=_last_dims(target, mixed))
            own = target.clone()  # the step may write into it
            if isinstance(which, Mixing):
                return MixedTarget.of(own, mixed.second(target), which)
            return own if which == 0 else mixed.second(target)

        return tree_map(one, targets)

    def check_labels(self, targets: Any) -> None:
        """Refuse labels that are no classes where they become probabilities.

        Raises:
            MisconfigurationException: if there are such.
        """
        for target in tree_leaves(targets) if self.targets == "soft" else []:
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= self._num_classes:
                raise MisconfigurationException(
                    f"`targets='soft'` must have labels in [0, {self._num_classes}), got {low} to "
                    f"{high}. Write `targets='proxy'` for labels that are ignored, or another "
                    "`num_classes`."
                )

    def _mode(self, target: Tensor, mixed: Mixed) -> str:
        is_float = target.is_floating_point() or target.is_complex()
        mode = self.targets
        if mode == "auto":
            return _cut_or("direct" if is_float else "proxy", target, mixed)
        if (mode == "soft" and is_float) or (mode == "direct" and not is_float):
            raise MisconfigurationException(
                f"`targets={mode!r}` must have {'labels' if is_float else 'floats'} as targets, "
                f"got {target.dtype}. Write `targets='auto'`."
            )
        if mode == "cut" and not _is_as_large(target, mixed):
            size = () if mixed.box is None else mixed.box.sizes
            raise MisconfigurationException(
                f"`targets='cut'` must have targets that end in the size of the inputs, {size}, "
                f"got the shape {tuple(target.shape)}. Write `targets='auto'`."
            )
        return mode


def batch_size(inputs: Any, targets: Any) -> int:
    """Return the number of samples, if inputs and targets agree on it.

    Args:
        inputs: a tensor, or a nest of some.
        targets: the same; ``None`` = there are none.

    Raises:
        MisconfigurationException: if they do not, or are no tensors that begin with the batch.
    """
    sizes = []
    for key, value in (("input_key", inputs), ("target_key", targets)):
        for leaf in [] if value is None else tree_leaves(value):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                found = "a number" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise MisconfigurationException(
                    f"`{key}` must lead to tensors that begin with the batch, got {found}. Write "
                    f"`{key}=` with where they are, or `targets='none'` if the loss needs none."
                )
            sizes.append(len(leaf))
    if len({*sizes}) != 1:
        raise MisconfigurationException(
            f"Inputs and targets must have one entry a sample, got {sizes}. Write `input_key=` and "
            "`target_key=` with where they are."
        )
    return sizes[0]


def _last_dims(target: Tensor, mixed: Mixed) -> range:
    k = 0 if mixed.box is None else len(mixed.box.sizes)
    return range(target.dim() - k, target.dim())


def _is_as_large(target: Tensor, mixed: Mixed) -> bool:
    """Return whether a target ends in the size of what is cut, as label maps do."""
    dims = _last_dims(target, mixed)
    if mixed.box is None or dims.start < 1:
        return False
    return tuple(target.shape[dim] for dim in dims) == mixed.box.sizes


def _cut_or(mode: str, target: Tensor, mixed: Mixed) -> str:
    """Return how a target goes with inputs that may have been cut."""
    if not _is_as_large(target, mixed):
        return mode
    if mode == "direct" and len(_last_dims(target, mixed)) == 1:
        raise MisconfigurationException(
            "`targets` must say whether float targets as long as the inputs are cut with them, got "
            f"the shape {tuple(target.shape)}. Write `targets='cut'` for one value at each place, "
            "`targets='direct'` for class probabilities."
        )
    return "cut"
