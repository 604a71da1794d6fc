"""The page as one file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_optkit.board import tags
from lightning_optkit.board.page import STATIC, EmbeddedRun, about, html_page, one_script
from lightning_optkit.board.schema import ARRAYS

SCRIPTS = sorted(STATIC.rglob("*.js"))
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
TSC = Path(__file__).parent / "node_modules" / ".bin" / "tsc"
NODE = shutil.which("node")


def code_lines(text):
    """Lines that are neither empty nor comment."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [
        line for line in text.splitlines() if line.strip() and not line.strip().startswith("//")
    ]


def test_it_is_small_and_uses_nothing_that_is_not_ours():
    assert len(code_lines(SOURCE)) < 2000
    assert set(re.findall(r'from "([^"]+)"', SOURCE)) == {
        name
        for path in SCRIPTS
        for name in re.findall(r'from "(\.[^"]+)"', path.read_text("utf-8"))
    }
    for word in ("eval(", "Function(", "innerHTML", "outerHTML", "insertAdjacentHTML", "http:"):
        assert word not in SOURCE


def test_all_tags_that_panels_read_are_logged_by_someone():
    topics = {topic.name: {tag.name for tag in topic.scalars} for topic in tags.TOPICS}
    assert set(re.findall(r'"(optkit-[a-z]+)"', SOURCE)) - {"optkit-data"} <= set(topics)
    arrays = {kind.name for kind in ARRAYS}
    constants = dict(re.findall(r'const (TOPIC) = "(optkit-[a-z]+)"', SOURCE))
    assert constants
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        own = dict(re.findall(r'const (TOPIC) = "(optkit-[a-z]+)"', text))
        calls = re.findall(
            r'(?:linesOf\(store|(?:arrayTracks|tracks)\()[, ]*("optkit-[a-z]+"|TOPIC), "(\w+)"',
            text,
        )
        for topic, name in calls:
            topic = own[topic] if topic == "TOPIC" else topic.strip('"')
            assert name in topics[topic] | arrays, f"{path.name}: {topic}/{name}"


@pytest.mark.skipif(not TSC.exists(), reason="needs TypeScript: npm install --prefix tests/board")
def test_types_of_the_page_hold():
    done = subprocess.run([TSC, "-p", STATIC], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_modules_become_one_script_in_the_order_of_their_imports():
    script = one_script("index.js")
    names = re.findall(r'^\$\["([^"]+)"\] = \(\(\) => \{', script, flags=re.MULTILINE)
    assert set(names) == {path.relative_to(STATIC).as_posix() for path in SCRIPTS}
    for i, name in enumerate(names):
        text = (STATIC / name).read_text(encoding="utf-8")
        for target in re.findall(r'^import .* from "([^"]+)";', text, flags=re.MULTILINE):
            imported = ((STATIC / name).parent / target).resolve().relative_to(STATIC.resolve())
            assert imported.as_posix() in names[:i], f"{name} before {target}"
    assert not re.search(r"^(import|export)\b", script, flags=re.MULTILINE)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_script_behaves_as_its_modules(tmp_path):
    (tmp_path / "panels").mkdir()
    (tmp_path / "a.js").write_text("export const one = 1;\nconst mine = 2;\n")
    (tmp_path / "panels" / "b.js").write_text(
        'import { one } from "../a.js";\nconst mine = 10;\nexport function sum() {\n'
        "  return one + mine;\n}\n"
    )
    (tmp_path / "c.js").write_text(
        'import { one as first } from "./a.js";\nimport { sum } from "./panels/b.js";\n'
        "export class C {\n  value = first + sum();\n}\nexport async function later() {}\n"
    )
    script = one_script("c.js", folder=tmp_path)
    script += "\nconsole.log(new $['c.js'].C().value, typeof $['c.js'].later);"
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["12", "function"]


@pytest.mark.parametrize(
    "source", ['import x from "./y.js";\n', "export default 1;\n", 'const a = "</script>";\n']
)
def test_what_cannot_be_put_together_is_refused(source, tmp_path):
    (tmp_path / "a.js").write_text(source)
    with pytest.raises(ValueError, match=r"a\.js cannot be put into a page"):
        one_script("a.js", folder=tmp_path)


EVIL = "</script><img src=x onerror=alert(1)>"


def test_the_page_asks_for_nothing_and_runs_only_what_it_brings():
    alerts = [{"title": EVIL}]
    page = html_page([EmbeddedRun(EVIL, b"payload", alerts)], title=EVIL, notes=[EVIL])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, kind in (('<script type="module">', "script"), ("<style>", "style")):
        (content,) = re.findall(f"{re.escape(tag)}(.*?)</{kind}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert EVIL not in page
    assert not re.search(r'(?:src|href)="', page)
    (data,) = re.findall(r'id="optkit-data">(.*?)</script>', page, flags=re.DOTALL)
    found = json.loads(data)
    assert found["runs"][0]["name"] == EVIL
    assert found["about"]["notes"] == [EVIL]


def test_the_lines_that_fill_a_panel_build_the_callback():
    import lightning_optkit

    for topic in about()["topics"]:
        first, second = topic["example"]
        names = {}
        exec(first, names)
        call = re.fullmatch(r"Trainer\(callbacks=\[(.*)\]\)", second)[1]
        callback = eval(call, names)
        assert type(callback).__name__ == topic["callbacks"][0]
        for name in topic["callbacks"]:
            assert hasattr(lightning_optkit, name)
