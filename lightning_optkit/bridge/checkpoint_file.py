"""Checkpoints as data, whoever wrote them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from lightning_optkit.bridge.checkpoint_folder import load_folder

__all__ = ["load_checkpoint"]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint of Lightning's holds, on the CPU, without running code in it.

    Args:
        path: of a file, or of a folder in which each rank has a part.

    Raises:
        ValueError: if it is no checkpoint, or holds code.
    """
    try:
        if Path(path).is_dir():
            checkpoint = load_folder(Path(path))
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"`path` must hold data alone, and {str(path)!r} holds objects that could run code, "
            "such as hyperparameters of a class of your own. If you trust it, allow them with "
            f"`torch.serialization.add_safe_globals([{found[1] if found else '...'}])`."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"`path` must be a checkpoint of Lightning's, got {str(path)!r}, which has no "
            "`state_dict` in it. Use the file that `ModelCheckpoint` or `save_checkpoint` wrote."
        )
    return checkpoint
