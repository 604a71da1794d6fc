"""What TensorBoard shows of a run without the Optkit tab: charts with bounds, and a verdict."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.board.runs import Run, Series
from lightning_optkit.diagnosis import alerts

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

__all__ = [
    "VERDICT",
    "PlainBoard",
    "chart_layout",
    "close_plain_board",
    "plain_board_of",
    "verdict_text",
]

VERDICT = "optkit/verdict"
"""Tag of the verdict, as text."""

_LAYOUT = re.compile(rb"custom_scalars__config__(?!.{0,24}optkit-)", re.DOTALL)
"""A layout in an event file whose first category is none of ours: its title follows the tag."""

_MAX_BYTES = 50_000_000  # of event files that are searched for the user's own layout

Chart = tuple[str, list[str]]


class PlainBoard:
    """Writes them into the event file of one logger.

    Args:
        logger: a TensorBoard logger, of torch's writer or of tensorboardX's.
    """

    def __init__(self, logger: Logger) -> None:
        self._writer: Any = getattr(logger, "experiment")  # noqa: B009 Logger itself has none
        self._folder = Path(str(logger.log_dir))
        self._points: dict[str, list[tuple[int, float, float]]] = {}
        self._layout: dict[str, dict[str, Chart]] = {}
        self._is_told = True
        self._may_lay_out: bool | None = None

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Keep what was reported, and write the layout where there is a new quantity."""
        now, is_new = time.time(), not scalars.keys() <= self._points.keys()
        for tag, value in scalars.items():
            self._points.setdefault(tag, []).append((step, now, float(value)))
        self._is_told = False
        if is_new:
            self._lay_out()

    def close(self) -> None:
        """Write the verdict, if there is something new to judge."""
        if self._is_told:
            return
        self._is_told = True
        run = Run("", {tag: Series.of(points) for tag, points in self._points.items()})
        last = max(points[-1][0] for points in self._points.values())
        try:
            self._writer.add_text(VERDICT, verdict_text(run), global_step=last)
        except Exception as error:  # a table must not end a run
            rank_zero_warn(f"The verdict was not written: {type(error).__name__}: {error}")

    def _lay_out(self) -> None:
        layout = chart_layout(self._points)
        if layout == self._layout:
            return
        if self._may_lay_out is None:
            self._may_lay_out = not _has_layout(self._writer, self._folder)
        if self._may_lay_out:
            self._writer.add_custom_scalars(layout)  # TensorBoard shows the last one
            self._layout = layout


_boards: weakref.WeakKeyDictionary[Logger, PlainBoard] = weakref.WeakKeyDictionary()


def plain_board_of(logger: Logger) -> PlainBoard:
    """Return the board of a TensorBoard logger: all callbacks share it."""
    if logger not in _boards:
        _boards[logger] = PlainBoard(logger)
    return _boards[logger]


def close_plain_board(logger: Logger) -> None:
    """Write the verdict, if anything was reported to this logger."""
    if logger in _boards:
        _boards[logger].close()


def chart_layout(logged: Iterable[str]) -> dict[str, dict[str, Chart]]:
    """Return a layout of TensorBoard's Custom Scalars tab: a chart for all that has bounds.

    A quantity with ``_lower`` and ``_upper`` becomes a margin chart; one with ``_lower`` alone is
    an upper end itself. One with an error is a chart of both lines, as bounds would have to be
    tags.

    Args:
        logged: tags.

    Returns:
        Charts by title by topic, as ``SummaryWriter.add_custom_scalars`` takes them.

    Example:
        >>> chart_layout(["optkit-a/x", "optkit-a/x_lower", "optkit-a/x_upper", "optkit-a/y"])
        {'optkit-a': {'x': ('Margin', ['optkit-a/x', 'optkit-a/x_lower', 'optkit-a/x_upper'])}}
    """
    tags = set(logged)
    layout: dict[str, dict[str, Chart]] = {}
    for tag in sorted(tags):
        topic, _, name = tag.partition("/")
        lower, upper = f"{tag}_lower", f"{tag}_upper"
        error = next((e for e in (f"{tag}_standard_error", f"{tag}_error") if e in tags), None)
        if lower in tags:
            bounds = [tag, lower, upper if upper in tags else tag]
            layout.setdefault(topic, {})[name] = ("Margin", bounds)
        elif error is not None:
            lines = [f"^{re.escape(each)}$" for each in (tag, error)]
            layout.setdefault(topic, {})[f"{name} and its error"] = ("Multiline", lines)
    return layout


def verdict_text(run: Run) -> str:
    """Return what is to be said of a run as Markdown, the worst first."""
    lines = ["| | finding | evidence | what to do | how sure |", "|---|---|---|---|---|"]
    for alert in alerts(run):
        cells = (alert.title, alert.evidence, alert.advice, alert.confidence)
        cleaned = " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| **{alert.severity}** | {cleaned} |")
    return "\n".join(lines)


def _has_layout(writer: Any, folder: Path) -> bool:
    """Return whether the run's event files hold a layout of the user's own, which stays.

    Where they are too large to search, the answer is yes.
    """
    writer.flush()
    files = list(folder.glob("events.out.tfevents.*"))
    if sum(file.stat().st_size for file in files) > _MAX_BYTES:
        return True
    return any(_LAYOUT.search(file.read_bytes()) for file in files)
