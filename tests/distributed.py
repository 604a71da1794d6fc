"""What runs in other processes: functions in two of one gloo group or alone, and scripts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Processes are forks of one that has imported these and done nothing else: to import torch and
# Lightning anew in each takes longer than most of what is tested in them.
multiprocessing.set_forkserver_preload(
    [
        "lightning.pytorch",
        "matplotlib.backends.backend_agg",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
    ]
)
FORKS = multiprocessing.get_context("forkserver")


def run_in_two_processes(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return what ``function(*args)`` returns in each of two ranks of one process group.

    The function must be importable from its module; its result must survive ``torch.save``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _worker, (function, folder, port, args), nprocs=2, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def run_in_new_process(function: Callable[[], None]) -> None:
    """Run a function in a process in which torch is imported, and nothing was done with it."""
    torch.multiprocessing.start_processes(_call, (function,), nprocs=1, start_method="forkserver")


def run_script(path: Path, *options: str, folder: Path) -> str:
    """Return what a script prints that is run in a folder, as ``python path options`` would."""
    torch.multiprocessing.start_processes(
        _script, (path, options, folder), nprocs=1, start_method="forkserver"
    )
    return (folder / "printed.txt").read_text(encoding="utf-8")


def _call(rank: int, function: Callable[[], None]) -> None:
    function()


def _script(rank: int, path: Path, options: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    sys.argv = [str(path), *options]
    sys.path[0] = str(path.parent)
    printed = (folder / "printed.txt").open("w", encoding="utf-8")
    with printed, contextlib.redirect_stdout(printed):
        runpy.run_path(str(path), run_name="__main__")


def _worker(
    rank: int, function: Callable[..., Any], folder: Path, port: int, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
    }
    torch.set_num_threads(1)
    result = function(*args)
    torch.save(result, folder / f"rank{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
