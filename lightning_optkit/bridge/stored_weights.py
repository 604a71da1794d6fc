"""Weights of a checkpoint, in the places of a module's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_optkit.bridge.checkpoint_file import load_checkpoint

__all__ = ["stored_weights"]


def stored_weights(path: str | Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, in dtype and on the device of a module's own.

    Args:
        path: of the checkpoint.
        like: the module's, by name; all of them must be in the checkpoint.

    Raises:
        ValueError: if there is no such file, it is no checkpoint, or of another module.
    """
    if not Path(path).exists():
        raise ValueError(
            f"`directions` must be a kind of directions or the path of a checkpoint, got "
            f"{str(path)!r}, where there is no file."
        )
    found = load_checkpoint(path)["state_dict"]
    for name, tensor in like.items():
        there = found.get(name)
        if not isinstance(there, Tensor) or there.shape != tensor.shape:
            shape = tuple(there.shape) if isinstance(there, Tensor) else "nothing"
            raise ValueError(
                f"`directions` must be a checkpoint of the same net, got {str(path)!r}, in which "
                f"`{name}` is {shape} in the place of {tuple(tensor.shape)}."
            )
    return {name: found[name].to(tensor) for name, tensor in like.items()}
