"""Runs as a table in a terminal, and conditions on them: ``lightning-optkit summary``."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_optkit.board import tags
from lightning_optkit.board.report import json_report, read_folders
from lightning_optkit.board.runs import Run
from lightning_optkit.diagnosis import SEVERITIES, alerts
from lightning_optkit.diagnosis.evidence import Evidence, is_of

__all__ = ["Condition", "run_summary", "sparkline", "summary_table", "verdicts"]

_WIDE = 90  # characters of a terminal that has room for all columns
_BARS = "▁▂▃▄▅▆▇█"
_COLORS = {"critical": "bold red", "warning": "yellow", "info": "green"}
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Condition:
    """What must not hold of any run, such as ``lambda_max>50``.

    Attributes:
        name: of a quantity, with its topic (``optkit-stability/lambda_max``) or without, which
            means the first topic of :data:`~lightning_optkit.board.tags.TOPICS` that has it; or
            ``critical``, ``warning`` or ``info``, which count alerts.
        symbol: how it is compared.
        limit: with what.
    """

    name: str
    symbol: str
    limit: float

    @classmethod
    def of(cls, text: str) -> Condition:
        """Return the condition that a text says.

        Raises:
            ValueError: if it says none.

        Example:
            >>> Condition.of("lambda_max > 50")
            Condition(name='lambda_max', symbol='>', limit=50.0)
        """
        match = re.fullmatch(r"\s*([\w/.\-]+?)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*", text)
        try:
            if match is not None and not np.isnan(limit := float(match[3])):
                return cls(match[1], match[2], limit)  # nothing compares to NaN
        except ValueError:
            pass
        raise ValueError(
            f"`--fail-on` must be a name, one of > >= < <= == != and a number, got {text!r}. "
            "Write for example 'lambda_max>50' or 'critical>0'."
        )

    def failures(self, run: Run) -> list[str]:
        """Return one sentence for each quantity of the run that meets it, or is no number."""
        if self.name in SEVERITIES:
            count = sum(alert.severity == self.name for alert in alerts(run))
            found = f"{count} alert{'s' * (count != 1)}"
            return [f"{run.name}: {found}, {self}"] if self._holds(count) else []
        failures = []
        for tag in self._tags(run):
            step, value = run.scalars[tag].steps[-1], float(run.scalars[tag].values[-1])
            if np.isnan(value) or self._holds(value):  # NaN compares as false to anything
                failures.append(f"{run.name}: {tag} is {value:.4g} at step {step:,}, {self}")
        return failures

    def is_known(self, run: Run) -> bool:
        """Return whether the run has such a quantity."""
        return self.name in SEVERITIES or bool(self._tags(run))

    def __str__(self) -> str:
        return f"{self.name}{self.symbol}{self.limit:g}"

    def _tags(self, run: Run) -> list[str]:
        logged = [tag for tag, series in run.scalars.items() if len(series.steps)]
        if self.name in logged:
            return [self.name]
        named = [tag for tag in logged if tag.partition("/")[2] == self.name]
        for topic in tags.TOPICS:
            if found := [tag for tag in named if is_of(tag.partition("/")[0], topic.name)]:
                return found
        return named

    def _holds(self, value: float) -> bool:
        return _OPERATORS[self.symbol](value, self.limit)


def run_summary(
    folders: Sequence[str | Path], *, fail_on: Sequence[str] = (), as_json: bool = False
) -> int:
    """Print the summary.

    Args:
        folders: of logs.
        fail_on: conditions, as :meth:`Condition.of` reads them.
        as_json: print one JSON object and nothing else.

    Returns:
        As a process's exit status: 0 if no condition holds, 1 if one does, 2 if there is nothing to
        read, or a condition cannot be understood or names what no run has.
    """
    errors = Console(stderr=True)
    try:
        conditions = [Condition.of(text) for text in fail_on]
        runs = read_folders(folders)
        for condition in conditions:
            if not any(condition.is_known(run) for run in runs):
                raise LookupError(
                    f"`--fail-on` must name something that was logged, got {condition.name!r}."
                )
        failures = [text for c in conditions for run in runs for text in c.failures(run)]
    except (FileNotFoundError, LookupError, ValueError) as error:
        errors.print(escape(str(error.args[0] if error.args else error)), soft_wrap=True)
        return 2
    if as_json:
        print(json.dumps(json_report(runs) | {"failures": failures}, allow_nan=False))
    else:
        console = Console()
        console.print(summary_table(runs, width=console.width))
        for line in verdicts(runs):
            console.print(line)
        for text in failures:
            errors.print(f"[bold red]failed[/bold red] {escape(text)}", soft_wrap=True)
    return 1 if failures else 0


def summary_table(runs: Sequence[Run], *, width: int = 100) -> Table:
    """Return a table, a run a row; names are shown as they are, whatever they look like.

    Args:
        runs: what to show.
        width: of the terminal, in characters; sharpness needs 90.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column("run", style="bold", overflow="fold", min_width=10)
    for name in ("step", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("trend", no_wrap=True)
    table.add_column("minimum ratio", no_wrap=True)
    is_wide = width >= _WIDE
    for name in ("λmax", "of limit", *["sharpness"] * is_wide):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        evidence = Evidence(run)
        loss = evidence.loss()
        steps = [int(s.steps[-1]) for s in run.scalars.values() if len(s.steps)]
        table.add_row(
            escape(run.name),
            f"{max(steps, default=0):,}",
            "–" if loss is None else f"{loss[1].values[-1]:.3g}",
            "" if loss is None else sparkline(loss[1].values.tolist()),
            _ratio(evidence),
            _last(evidence, tags.HESSIAN, "lambda_max", tags.STABILITY),
            _last(evidence, tags.STABILITY, "ratio"),
            *[_last(evidence, tags.SHARPNESS, "adaptive")] * is_wide,
        )
    return table


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Return what is wrong with each run, in rich's markup; of a run that is well, one line."""
    lines = []
    for run in runs:
        found = alerts(run)
        for alert in [a for a in found if a.severity != "info"] or found[-1:]:
            color = _COLORS[alert.severity]
            said = f"{escape(alert.title)}[/]: {escape(alert.evidence)}"
            lines.append(f"[bold]{escape(run.name)}[/bold] [{color}]{said}")
        lines += [f"[bold]{escape(run.name)}[/bold] {escape(p.message)}" for p in run.problems[:3]]
    return lines


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Return bars as high as numbers are, on a log scale if all are positive; a dot for NaN.

    Example:
        >>> sparkline([1.0, 10.0, 100.0, float("nan")])
        '▁▅█·'
    """
    numbers = np.asarray(values, dtype=float)
    if len(numbers) > width:
        numbers = numbers[np.linspace(0, len(numbers) - 1, width).round().astype(int)]
    finite = numbers[np.isfinite(numbers)]
    if len(finite) and finite.min() > 0:
        with np.errstate(invalid="ignore"):
            numbers = np.log(numbers)
        finite = np.log(finite)
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    span = (high - low) or 1.0
    return "".join(
        _BARS[int((x - low) / span * 7 + 0.5)] if np.isfinite(x) else "·" for x in numbers
    )


def _ratio(evidence: Evidence) -> str:
    found = [evidence.last(tags.HESSIAN, f"minimum_ratio{end}") for end in ("", "_lower", "_upper")]
    if found[0] is None:
        return "–"
    if found[1] is None or found[2] is None:
        return f"{found[0][1]:.3f}"
    return f"{found[0][1]:.3f} [dim]{found[1][1]:.2f} to {found[2][1]:.2f}[/dim]"


def _last(evidence: Evidence, topic: str, name: str, other: str | None = None) -> str:
    """Return the last value as it is: one that is no number is news."""
    topics = (topic,) if other is None else (topic, other)
    for series in filter(None, (evidence.series(each, name) for each in topics)):
        if len(series.values):
            return f"{series.values[-1]:.3g}"
    return "–"
