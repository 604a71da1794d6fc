"""What belongs together is there together: a callback, its export, its page, its test."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lightning_optkit

ROOT = Path(lightning_optkit.__file__).parents[1]
PACKAGE = ROOT / "lightning_optkit"
MODULES = sorted(PACKAGE.rglob("*.py"))
CALLBACKS = sorted(
    file.stem for file in PACKAGE.glob("callbacks/*.py") if not file.stem.startswith("_")
)
SECTIONS = ["Logged keys", "Cost", "When it misleads", "Example"]
NAMELESS = {"utils", "helpers", "common", "misc"}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def docstring_faults(docstring: str) -> list[str]:
    """Return what a callback's docstring lacks, by section 7 of the house rules."""
    faults = []
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    if not "".join(paragraphs[1:2]).startswith(("**Observer.**", "**Intervener.**")):
        faults.append("after its first line it says neither **Observer.** nor **Intervener.**")
    headings = re.findall(rf"^\W*({'|'.join(SECTIONS)})\b", "\n\n".join(paragraphs), re.MULTILINE)
    if list(dict.fromkeys(headings)) != SECTIONS:
        faults.append(f"its sections are {headings}, not {SECTIONS}")
    return faults


def undocumented(tree: ast.Module) -> list[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = (n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_"))
    return [node.name for node in public if not ast.get_docstring(node)]


def test_there_is_a_callback_to_check():
    assert CALLBACKS


@pytest.mark.parametrize("stem", CALLBACKS)
def test_callback_is_complete(stem):
    module = f"lightning_optkit.callbacks.{stem}"
    names = [name for name, home in lightning_optkit._EXPORTS.items() if home == module]
    assert names, f"{stem}.py has no row in lightning_optkit._EXPORTS"
    assert set(names) <= set(lightning_optkit.__all__)
    assert (ROOT / f"docs/callbacks/{stem}.md").is_file()
    assert (ROOT / f"tests/callbacks/test_{stem}.py").is_file()
    for node in parse(PACKAGE / f"callbacks/{stem}.py").body:
        if getattr(node, "name", None) in names:
            assert docstring_faults(ast.get_docstring(node) or "") == []


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_definitions_have_docstrings(file):
    assert undocumented(parse(file)) == []


def test_no_file_has_a_name_that_says_nothing():
    files = [*MODULES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py")]
    assert [str(file) for file in files if NAMELESS & set(file.stem.split("_"))] == []


@pytest.mark.parametrize("name", lightning_optkit.__all__)
def test_public_name_loads(name):
    assert name in dir(lightning_optkit)
    assert getattr(lightning_optkit, name).__module__ == lightning_optkit._EXPORTS[name]


def test_type_checkers_see_the_same_public_names():
    imports = [n for n in ast.walk(parse(PACKAGE / "__init__.py")) if isinstance(n, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname}
    assert seen == lightning_optkit._EXPORTS


def test_misspelt_public_name_is_met_with_the_right_one():
    with pytest.raises(AttributeError, match=r"'HesianSpectrum'.*'HessianSpectrum'"):
        _ = lightning_optkit.HesianSpectrum


@pytest.mark.parametrize(
    ("paragraphs", "count"),
    [
        ("Do. | **Observer.** It. | Logged keys: | Cost: | When it misleads: | Example:", 0),
        ("Do. | It. **Observer.** | Logged keys: | Cost: | When it misleads: | Example:", 1),
        ("Do. | **Intervener.** | Cost: | Logged keys: | When it misleads: | Example:", 1),
        ("Do.", 2),
    ],
)
def test_docstring_check_can_fail(paragraphs, count):
    assert len(docstring_faults(paragraphs.replace(" | ", "\n\n"))) == count


def test_missing_docstring_is_found():
    assert undocumented(ast.parse('def a(): ...\nclass B: "b"\ndef _c(): ...')) == ["a"]
