"""All runs below a folder: event files, and what is left as ``optkit.npz`` beside other loggers.

Event files are read by TensorBoard's own reader, and then by the lines that the tab reads with; of
a tag, up to 10,000 points are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from lightning_optkit.board.npz_file import FILE_NAME, read_npz
from lightning_optkit.board.reader import listed_runs, read_run
from lightning_optkit.board.runs import Problem, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["read_folder"]


def read_folder(folder: str | Path) -> list[Run]:
    """Return the runs below a folder that have something of this package, the first one first.

    What cannot be read becomes a problem of its run. Where a run has both kinds of files, the event
    files are read: they hold the same, and more.

    Args:
        folder: with event files or ``optkit.npz`` anywhere below.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder of logs, got {folder}: there is none.")
    runs = {run.name: run for run in _from_npz(folder)} | {
        run.name: run for run in _from_event_files(folder)
    }
    return sorted(runs.values(), key=lambda run: (_began(run), run.name))


def _began(run: Run) -> float:
    """Return when a run began: TensorBoard lists runs in that order, and colours them by it."""
    return min((float(s.wall_times[0]) for s in run.scalars.values() if len(s.steps)), default=0.0)


def _from_event_files(folder: Path) -> Iterator[Run]:
    multiplexer = EventMultiplexer(
        size_guidance={"tensors": 0},  # all of them
        tensor_size_guidance={"images": 1},  # which nobody looks at here
    )
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    ctx = RequestContext()
    for listed in listed_runs(provider, ctx, ""):
        yield read_run(provider, ctx, "", listed["name"])


def _from_npz(folder: Path) -> Iterator[Run]:
    for path in sorted(folder.rglob(FILE_NAME)):
        name = path.parent.relative_to(folder).as_posix()
        try:
            yield read_npz(path, name=name)
        except Exception as error:  # a file that was cut short must not hide the other runs
            yield Run(name, problems=(Problem("", None, f"{FILE_NAME} cannot be read: {error}"),))
