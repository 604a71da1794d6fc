"""Runs of a folder as one HTML file, or as JSON for machines: ``lightning-optkit report``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optkit import __version__
from lightning_optkit.board.event_files import read_folder
from lightning_optkit.board.page import EmbeddedRun, html_page
from lightning_optkit.board.payload import encode_run, thinned
from lightning_optkit.board.runs import Run
from lightning_optkit.diagnosis import alerts

__all__ = ["html_report", "json_report", "read_folders"]

MAX_BYTES = 2_000_000
"""Of a report: what a mail takes, and a browser opens at once."""

_DIGITS = 12  # binary, of arrays: three and a half decimal ones, more than a picture shows
_LEAST_POINTS = 25


def read_folders(folders: Sequence[str | Path]) -> list[Run]:
    """Return all runs of several folders; where there are several, names begin with theirs.

    Raises:
        FileNotFoundError: if one of them is not there.
        LookupError: if no run in them has anything of this package.
    """
    runs = []
    for folder in folders:
        prefix = f"{Path(folder).resolve().name}/" if len(folders) > 1 else ""
        runs += [
            Run(_joined(prefix, run.name, folder), run.scalars, run.arrays, run.problems)
            for run in read_folder(folder)
        ]
    if not runs:
        raise LookupError(
            f"`folders` must hold what a callback of lightning-optkit logged, got "
            f"{', '.join(map(str, folders))}: event files of TensorBoardLogger, or `optkit.npz`."
        )
    return runs


def html_report(runs: Sequence[Run], *, max_points: int = 200) -> str:
    """Return one HTML page with all data inside, which needs no server and no network.

    Arrays are rounded to 12 binary digits. Where the page would exceed 2 MB, fewer points are
    shown, and the page says so.

    Args:
        runs: what to show.
        max_points: of a tag, at least 2.
    """
    found = {run.name: [vars(alert) for alert in alerts(run)] for run in runs}
    while True:
        embedded = [
            EmbeddedRun(run.name, encode_run(thinned(run, max_points), digits=_DIGITS), said)
            for run, said in zip(runs, found.values(), strict=True)
        ]
        notes = [f"{len(runs)} run{'s' * (len(runs) != 1)}, at most {max_points} points of a tag"]
        page = html_page(embedded, title=f"Optkit: {_title(runs)}", notes=notes)
        if len(page) <= MAX_BYTES or max_points <= _LEAST_POINTS:
            return page
        max_points = max(_LEAST_POINTS, max_points * 3 // 4)


def json_report(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what is to be said of the runs and their last numbers, ready for ``json.dumps``.

    Numbers that JSON does not have are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
    """
    return {
        "lightning_optkit": __version__,
        "runs": [
            {
                "name": run.name,
                "alerts": [vars(alert) for alert in alerts(run)],
                "last": {
                    tag: {"step": int(s.steps[-1]), "value": _number(float(s.values[-1]))}
                    for tag, s in run.scalars.items()
                    if len(s.steps)
                },
                "arrays": {tag: s.steps.tolist() for tag, s in run.arrays.items()},
                "problems": [vars(problem) for problem in run.problems],
            }
            for run in runs
        ],
    }


def _joined(prefix: str, name: str, folder: str | Path) -> str:
    """Return a run's name; TensorBoard calls the folder itself a dot, which tells nobody much."""
    if name == ".":
        return Path(folder).resolve().name
    return f"{prefix}{name}"


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
