"""Checkpoints that hold an average and the weights of training, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_optkit.board.tags import AVERAGING
from lightning_optkit.bridge.averaged_weights import AveragedWeights
from lightning_optkit.bridge.checkpoint_file import load_checkpoint

__all__ = [
    "KIND",
    "StateDictOfAverage",
    "load_averaged",
    "load_raw",
    "raw_weights",
    "without_average",
]

KIND = "averaging"
"""Marks the state of an averaging callback in a checkpoint."""


class StateDictOfAverage:
    """Has a strategy collect the average where a checkpoint collects the module's weights.

    Callbacks are not asked when a checkpoint of weights alone is made; the strategy always is.

    Args:
        strategy: of the Trainer that writes the checkpoints.
        weights: whose average it is.
        is_wanted: asked each time.
    """

    def __init__(
        self, strategy: Strategy, weights: AveragedWeights, is_wanted: Callable[[], bool]
    ) -> None:
        self._strategy = strategy
        collected = strategy.lightning_module_state_dict

        def lightning_module_state_dict() -> dict[str, Any]:
            if not is_wanted():
                return collected()
            with weights.in_module():
                return _cloned(collected())

        vars(strategy)["lightning_module_state_dict"] = lightning_module_state_dict

    def remove(self) -> None:
        """Have the strategy collect what is in the module again."""
        vars(self._strategy).pop("lightning_module_state_dict", None)


def _cloned(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return copies of all tensors, in place; those that share memory do so again."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            key = (id(value),) if type(value) is not Tensor else _place(value)
            if key not in copies:
                copies[key] = value.detach().clone()
            state_dict[name] = copies[key]
    return state_dict


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def raw_weights(checkpoint: dict[str, Any], *, absent_from: Collection[str]) -> dict[str, Tensor]:
    """Return the weights of training that only an absent callback knows, if there is one.

    Args:
        checkpoint: with the states of callbacks.
        absent_from: state keys of the callbacks that are there and see to it themselves.
    """
    for key, state in _averages(checkpoint).items():
        if key not in absent_from and state["state_dict_is"] == "average":
            return dict(state["weights"]["raw"])
    return {}


# -- for those who deploy without us -----------------------------------------------------------


def load_averaged(path: str | Path, *, name: str | None = None) -> dict[str, Any]:
    """Return the averaged weights in a checkpoint, as a plain ``state_dict`` on the CPU.

    Args:
        path: of a checkpoint, a file or a folder, that was written with ``SWA`` or ``EMA`` in the
            Trainer.
        name: of the callback, where there are several, ``""`` for the one without a name; ``None``
            takes the only one or, of several, the one that validation ran on, else the one without
            a name.

    Raises:
        ValueError: if there is no such average in the file, it is no checkpoint, or holds code.

    Example:
        ::

            module.load_state_dict(load_averaged("last.ckpt"))
    """
    checkpoint = load_checkpoint(path)
    state = _average_called(name, checkpoint, path)
    if state["state_dict_is"] == "average":
        return dict(checkpoint["state_dict"])
    return _replaced(_raw_state_dict(checkpoint), state["weights"]["average"])


def load_raw(path: str | Path) -> dict[str, Any]:
    """Return the weights of training in a checkpoint, as a plain ``state_dict`` on the CPU.

    Args:
        path: of any checkpoint of Lightning's, a file or a folder.

    Raises:
        ValueError: if the file is no checkpoint, or holds code.
    """
    return _raw_state_dict(load_checkpoint(path))


def without_average(path: str | Path, to: str | Path) -> None:
    """Write a checkpoint as it would be without an averaging callback.

    A run that resumes from it without the callback goes on as if there had never been one.

    Args:
        path: of a checkpoint that was written with ``SWA`` or ``EMA`` in the Trainer.
        to: of the new one.

    Raises:
        ValueError: if there is no average in the file, it is no checkpoint, or holds code.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"`path` must be a file, got the folder {str(path)!r}, in which each rank has a part "
            "of the optimizers' states. Resume from it with the callback, or write files with "
            "`ModelParallelStrategy(save_distributed_checkpoint=False)`."
        )
    checkpoint = load_checkpoint(path)
    averages = _averages(checkpoint)
    if not averages:
        raise ValueError(_no_average(path))
    checkpoint["state_dict"] = _raw_state_dict(checkpoint)
    for key in averages:
        del checkpoint["callbacks"][key]
    torch.save(checkpoint, to)


def _averages(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    states = checkpoint.get("callbacks", {})
    return {
        key: state
        for key, state in states.items()
        if isinstance(state, dict) and state.get("kind") == KIND
    }


def _average_called(
    name: str | None, checkpoint: dict[str, Any], path: str | Path
) -> dict[str, Any]:
    found = {
        key: state
        for key, state in _averages(checkpoint).items()
        if state["weights"].get("num_averaged")
    }
    if name is not None:
        topic = f"{AVERAGING}-{name}" if name else AVERAGING
        found = {key: state for key, state in found.items() if f"[{topic}]" in key}
    elif len(found) > 1:
        used = {k: state for k, state in found.items() if state["state_dict_is"] == "average"}
        unnamed = {key: state for key, state in found.items() if f"[{AVERAGING}]" in key}
        found = used or unnamed or found
    if not found:
        raise ValueError(_no_average(path))
    if len(found) > 1:
        keys = ", ".join(key.split(" ")[0] for key in found)
        raise ValueError(f"`name` must say which average of {str(path)!r} it is, of {keys}.")
    return next(iter(found.values()))


def _no_average(path: str | Path) -> str:
    return (
        f"`path` must be a checkpoint with an average in it, got {str(path)!r}. It was written "
        "without `SWA` or `EMA`, before the first model entered, under another `name=`, or with "
        "`save_weights_only=True`: then its `state_dict` is what validation saw."
    )


def _raw_state_dict(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return _replaced(checkpoint["state_dict"], raw_weights(checkpoint, absent_from=()))


def _replaced(state_dict: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Any]:
    """Return the ``state_dict`` with other values, in its own order and dtypes."""
    replaced = dict(state_dict)
    for name in replaced.keys() & values.keys():
        replaced[name] = values[name].to(replaced[name].dtype)
    return {name: replaced[name] for name in state_dict}
