"""Checkpoints of modules whose norm layers were replaced, and how to read them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optkit.bridge.checkpoint_folder import load_folder
from lightning_optkit.methods.norm_swap import SwapPlan, listed, named_layers
from lightning_optkit.methods.normalization import STATISTICS, NormRule, history

__all__ = ["KIND", "StateDictFit", "load_swapped", "record_of", "save_record"]

KIND = "norm_swap"
"""Marks the state of a callback that replaces norm layers, in a checkpoint."""

_RECORDS = "optkit_norm_swaps"
"""Where a checkpoint says what was replaced, also one of weights alone."""

Module = TypeVar("Module", bound=pl.LightningModule)


def record_of(rule: NormRule, names: Iterable[str]) -> dict[str, Any]:
    """Return what a checkpoint says of a swap: which layers, and by what.

    Args:
        rule: what takes the place of what.
        names: of the layers in the module.
    """
    options = None if rule.target_options is None else dict(rule.target_options)
    settings = asdict(rule) | {"target_options": options}
    return {"kind": KIND, "rule": settings, "names": list(names)}


def save_record(record: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Write it into a checkpoint, after those of other swaps."""
    checkpoint.setdefault(_RECORDS, []).append(record)


def load_swapped(
    cls: type[Module],
    path: str | Path,
    *,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Module:
    """Return a module from a checkpoint that was trained with :class:`~lightning_optkit.NormSwap`.

    As ``cls.load_from_checkpoint(path, **kwargs)``, which makes the module from its
    hyperparameters, but with the layers that the checkpoint has weights of.

    Args:
        cls: class of the module.
        path: of the checkpoint, a file or a folder.
        strict: whether the weights must be those of the module, all of them; ``None`` as the module
            says.
        weights_only: see ``torch.load``; ``False`` runs code in the file.
        **kwargs: of ``load_from_checkpoint``, such as ``map_location`` or hyperparameters.

    Raises:
        ValueError: if nothing was replaced in the module of the checkpoint, or ``cls`` makes one
            that does not have these layers.
        RuntimeError: if the weights do not fit.

    Example:
        ::

            module = load_swapped(Classifier, "last.ckpt")
    """
    file: Any = path
    if Path(path).is_dir():
        checkpoint = load_folder(Path(path))
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
    else:
        checkpoint = _load(path, map_location="cpu", weights_only=weights_only)
    records = _records(checkpoint)
    if not records:
        raise ValueError(
            f"`path` must be a checkpoint of a run with `NormSwap`, got {str(path)!r}, which does "
            f"not say that layers were replaced. Use `{cls.__name__}.load_from_checkpoint(path)`, "
            "or `swap_norms(module, ...)` before you load the weights."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found keys that are")  # of layers yet to be replaced
        module = cls.load_from_checkpoint(file, strict=False, weights_only=weights_only, **kwargs)
    for record in records:
        _swap_again(module, record)
    module.load_state_dict(
        checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict
    )
    return module


def _records(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was replaced, in this order."""
    states = checkpoint.get("callbacks", {}).values()
    of_callbacks = [s for s in states if isinstance(s, dict) and s.get("kind") == KIND]
    return list(checkpoint.get(_RECORDS, of_callbacks))


def _swap_again(module: nn.Module, record: dict[str, Any]) -> None:
    wanted = set(record["names"])
    plan = SwapPlan(module, NormRule(**record["rule"]), lambda name, _: name in wanted)
    if missing := sorted(wanted - set(plan.names)):
        raise ValueError(
            f"`cls` must make the module of the checkpoint, got one without norm layers to replace "
            f"at {listed(missing)}. Pass its hyperparameters to `load_swapped`; layers made in "
            "`setup` are not there yet, make them in `configure_model`."
        )
    plan.carry_out()


# -- weights that were trained with other layers -----------------------------------------------


class StateDictFit:
    """Fits the weights of a checkpoint to layers that took the place of others.

    Running statistics that the new layers do not have are dropped, and those that the checkpoint
    does not have begin anew. Says so in a line. Knows nothing of what a folder of shards holds.

    Args:
        pl_module: whose layers were replaced.
        trains: whether training goes on, with the optimizer's state of the same parameters.

    Raises:
        MisconfigurationException: while loading, if it does and they are not the same.
    """

    def __init__(self, pl_module: pl.LightningModule, *, trains: bool) -> None:
        self._trains = trains
        self._handle = pl_module.register_load_state_dict_pre_hook(self._fit)

    def remove(self) -> None:
        """Load as if it had not been there."""
        self._handle.remove()

    def _fit(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        changes: dict[tuple[bool, bool], list[str]] = {}  # is a statistic, is in the file: layers
        for layer, names in named_layers(module):
            if not history(layer):
                continue
            own = _state_of(layer)
            for name in names:
                for key in ("weight", "bias", *STATISTICS):
                    full, value = f"{prefix}{name}.{key}", own.get(key)
                    in_file = full in state_dict
                    if in_file == (value is not None):
                        continue
                    changed = changes.setdefault((key in STATISTICS, in_file), [])
                    changed += [] if name in changed else [name]
                    if value is None:
                        del state_dict[full]
                    else:
                        state_dict[full] = _fresh(key, value)
        self._say(changes)

    def _say(self, changes: dict[tuple[bool, bool], list[str]]) -> None:
        for (is_statistic, in_file), names in changes.items():
            if self._trains and not is_statistic:
                raise MisconfigurationException(
                    "`ckpt_path` must hold the parameters of the module, with which the optimizer "
                    f"goes on, got one {'with' if in_file else 'without'} γ and β of "
                    f"{listed(names)}. Load the weights alone, into the module, after "
                    "`swap_norms(module, ...)`, and `fit` without `ckpt_path`."
                )
            what = "running statistics" if is_statistic else "γ and β"
            done = f"drops {what}" if in_file else f"begins new {what}"
            rank_zero_info(
                "NormSwap: the checkpoint was trained with other norm layers than the module has: "
                f"{done} of {listed(names)}. All else is taken from it."
            )


def _state_of(layer: nn.Module) -> dict[str, Tensor]:
    found = {name: value for name, value in layer._parameters.items() if value is not None}
    passing = layer._non_persistent_buffers_set
    buffers = layer._buffers.items()
    return found | {n: b for n, b in buffers if b is not None and n not in passing}


def _fresh(key: str, value: Tensor) -> Tensor:
    """Return what a parameter or statistic of a new layer is."""
    full = torch.ones_like if key in ("weight", "running_var") else torch.zeros_like
    return full(value.detach())
