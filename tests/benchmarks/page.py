"""The page that benchmarks write their results on: one marked section each."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import lightning_optkit

PAGE = Path(lightning_optkit.__file__).parents[1] / "docs/benchmarks.md"

INTRO = """\
# Benchmarks

`make bench` measures everything on this page again and rewrites it; each section says on what
machine it was measured.
"""


def write_section(name: str, body: str, *, page: Path = PAGE) -> None:
    """Put ``body`` between the markers of ``name``, at the end of the page if it has none yet."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    section = f"{start}\n{body.strip()}\n{end}"
    text = page.read_text(encoding="utf-8") if page.exists() else INTRO
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    page.parent.mkdir(exist_ok=True)
    page.write_text(text, encoding="utf-8")


def machine() -> str:
    """Return what a reader needs to know about where and when this was measured."""
    threads = torch.get_num_threads()
    return (
        f"CPU, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning_optkit {lightning_optkit.__version__}; {datetime.date.today():%Y-%m-%d}"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])
