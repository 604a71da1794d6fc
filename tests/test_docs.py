"""Every Python block of the README and of docs/ runs; the blocks of a page share one namespace."""

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(
    r"(?P<reason><!-- not run: \S[^\n]*-->\s*\n)?"
    r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[str]:
    """Return the blocks to run, each led by newlines so that line numbers are those of the page."""
    runnable = []
    for match in FENCE.finditer(page):
        line = page.count("\n", 0, match.start("code"))
        if match["info"].strip() == "no-run":
            assert match["reason"], f"line {line}: `no-run` needs <!-- not run: reason --> above it"
        else:
            assert not match["info"].strip(), f"line {line}: unknown mark {match['info']!r}"
            runnable.append("\n" * line + textwrap.dedent(match["code"]))
    return runnable


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_page_run(page, tmp_path, monkeypatch):
    module = ModuleType("page")  # in sys.modules, as dataclasses and pickle look names up there
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), module.__dict__)


def test_blocks_are_found_with_their_lines():
    page = "# T\n```python\nx = 1\n```\n1. a\n   ```python\n   y = x\n   ```\n```bash\nls\n```\n"
    assert blocks(page) == ["\n\nx = 1\n", "\n" * 6 + "y = x\n"]


def test_a_block_is_left_out_only_with_a_reason():
    block = "```python no-run\n1 / 0\n```\n"
    assert blocks(f"<!-- not run: needs a cluster -->\n{block}") == []
    with pytest.raises(AssertionError, match="needs <!-- not run"):
        blocks(block)
