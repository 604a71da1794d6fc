"""The page as one offline file: the tab's own modules, and the data inside.

A file opened from disk may load nothing, so the modules are put into one script. Each becomes a
function that returns what the module exports; imports become reads of what others returned. The
page's policy allows that script and that style by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lightning_optkit import __version__
from lightning_optkit.board.tags import TOPICS

__all__ = ["STATIC", "EmbeddedRun", "about", "html_page", "one_script"]

STATIC = Path(__file__).parent / "static"
"""The modules, as a browser loads them from TensorBoard."""

_IMPORT = re.compile(r'^import \{([^}]*)\} from "([^"]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let) (\w+))", re.MULTILINE)


@dataclass(frozen=True)
class EmbeddedRun:
    """A run within a page.

    Attributes:
        name: as TensorBoard names it.
        payload: of all its data, see :mod:`lightning_optkit.board.payload`.
        alerts: what is to be said of it, see :mod:`lightning_optkit.diagnosis`.
    """

    name: str
    payload: bytes
    alerts: Sequence[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return what the page's ``source.js`` reads."""
        packed = base64.b64encode(zlib.compress(self.payload, 9)).decode()
        return {"name": self.name, "payload": packed, "alerts": list(self.alerts)}


def about() -> dict[str, Any]:
    """Return what the page knows of this version: topics, and the lines that fill each panel."""
    topics = [
        {
            "name": topic.name,
            "callbacks": list(topic.callbacks),
            "scalars": [vars(tag) for tag in topic.scalars],
            "example": list(topic.example),
        }
        for topic in TOPICS
    ]
    return {"version": __version__, "topics": topics}


def html_page(runs: Sequence[EmbeddedRun], *, title: str, notes: Sequence[str] = ()) -> str:
    """Return a page that needs no server, no network and no other file.

    Args:
        runs: what to show.
        title: of the window.
        notes: shown at the foot, such as that points were left out.
    """
    script = f"{one_script('index.js')}\n$['index.js'].renderReport();\n"
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = {"about": about() | {"notes": list(notes)}, "runs": [run.as_dict() for run in runs]}
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<script type="application/json" id="optkit-data">{_inert(data)}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def one_script(entry: str, *, folder: Path = STATIC) -> str:
    """Return a module and all that it imports as one script, which leaves them in ``$``.

    Args:
        entry: the module, relative to ``folder``.
        folder: where the modules are.

    Raises:
        ValueError: where a module imports or exports in a way that is not understood here.
    """
    functions: dict[str, str] = {}

    def visit(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        if name in functions:
            return
        source = path.read_text(encoding="utf-8")
        for _, target in _IMPORT.findall(source):
            visit(_target(path, target))
        functions[name] = _as_function(path, source, folder)

    visit(folder / entry)
    return "const $ = {};\n" + "".join(functions.values())


def _as_function(path: Path, source: str, folder: Path) -> str:
    def read(match: re.Match[str]) -> str:
        target = _target(path, match[2]).relative_to(folder).as_posix()
        return f"const {{{match[1].replace(' as ', ': ')}}} = $[{json.dumps(target)}];\n"

    exported = _EXPORT.findall(source)
    body = _EXPORT.sub("", _IMPORT.sub(read, source))
    left = re.search(r"^(?:import|export)\b.*", body, re.MULTILINE)
    if left is not None or "</script" in body:
        raise ValueError(
            f"{path.name} cannot be put into a page: {left[0] if left else '</script'}"
        )
    name = json.dumps(path.relative_to(folder).as_posix())
    return f"$[{name}] = (() => {{\n{body}return {{ {', '.join(exported)} }};\n}})();\n"


def _target(path: Path, relative: str) -> Path:
    parts = [*path.parent.parts]
    for part in relative.split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return Path(*parts)


def _hash(text: str) -> str:
    """Return the hash of a script or style in the words of a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _inert(data: object) -> str:
    """Return JSON that no parser of HTML can take for a tag, whatever runs are called."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
