"""Checkpoint folders, into which each rank of FSDP2 wrote its own shards, read by one process."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = ["load_folder"]

_ALL_ELSE = "meta.pt"


def load_folder(folder: Path) -> dict[str, Any]:
    """Return a checkpoint as it would be in one file, on the CPU, but for the optimizers' states.

    Nothing in the folder is run: what ``torch.load(weights_only=True)`` refuses is refused here,
    in torch's own files too, which its readers would unpickle.

    Args:
        folder: that Lightning wrote under ``ModelParallelStrategy``.

    Raises:
        ValueError: for another folder.
        pickle.UnpicklingError: if it holds code.
    """
    if not all((folder / name).is_file() for name in (_ALL_ELSE, ".metadata")):
        raise ValueError(
            f"`path` must be a checkpoint of Lightning's, got the folder {str(folder)!r} without "
            f"`{_ALL_ELSE}` and `.metadata` in it. Use what `ModelCheckpoint` or `save_checkpoint` "
            "wrote."
        )
    checkpoint: dict[str, Any] = torch.load(
        folder / _ALL_ELSE, map_location="cpu", weights_only=True
    )
    reader = _Reader(folder)
    contents = reader.read_metadata()
    values = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in contents.state_dict_metadata.items()
        if contents.planner_data[name][0] == "state_dict"
    }
    _fill(values, reader, contents)
    return checkpoint | unflatten_state_dict(values, contents.planner_data)


def _fill(values: dict[str, Any], reader: _Reader, contents: Metadata) -> None:
    """Read the values, step by step as torch does, but without asking other ranks."""
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(values, contents, is_coordinator=True)
    reader.set_up_storage_reader(contents, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()


class _Reader(FileSystemReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._folder / ".metadata").open("rb") as file:
            contents: Metadata = _Unpickler(file).load()
        return contents


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(
            value, map_location="cpu", weights_only=True
        )


class _Unpickler(pickle.Unpickler):
    """Knows what torch writes about shards, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_about_shards = module == metadata.__name__ and name in _ABOUT_SHARDS
        is_path = module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_path:
            return _joined  # where it was written, perhaps on another system
        if is_about_shards or is_dtype or (module, name) in _OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Unexpected in a checkpoint's metadata: {module}.{name}")


def _joined(*parts: str) -> str:
    return "/".join(parts)


_ABOUT_SHARDS = {
    name
    for name, value in vars(metadata).items()
    if isinstance(value, type) and value.__module__ == metadata.__name__
}
_OTHERS = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
