"""Imports point one way: every module of the package against the table of the house rules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_optkit

ROOT = Path(lightning_optkit.__file__).parents[1]
MODULES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("lightning_optkit/**/*.py"))

# Folder or top-level module -> what it may import besides the standard library, itself,
# `lightning_optkit.__version__` and anything under `if TYPE_CHECKING:`. A leading dot: our own.
MAY_IMPORT = {
    "measures": "torch numpy scipy",
    "methods": "torch numpy scipy",
    "optim": "torch .measures",
    "diagnosis": "numpy .board.runs .board.tags",
    "figures": "matplotlib numpy .measures",
    "board": "tensorboard numpy werkzeug .diagnosis",
    "bridge": "torch numpy lightning lightning_utilities torchmetrics .board.tags .board.schema "
    ".board.runs .board.npz_file .diagnosis .measures .methods",
    "metrics": "torch torchmetrics .measures .methods",
    "callbacks": "torch lightning .measures .methods .metrics .optim .diagnosis .figures .board "
    ".bridge .compat",
    "compat": "torch numpy pyhessian .measures",
    "cli": "",  # and everything, inside functions
    "__init__": "",
}


def imports(node: ast.AST, inside: bool = False):
    """Yield (line, full dotted name, inside a function?) of the imports under `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child.body = []
        elif isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = "." * child.level + (child.module or "")
            exports = lightning_optkit._EXPORTS if source == "lightning_optkit" else {}
            for alias in child.names:
                yield child.lineno, f"{exports.get(alias.name, source)}.{alias.name}", inside
        yield from imports(child, inside or isinstance(child, ast.FunctionDef))


def forbidden_imports(path: str, source: str) -> list[str]:
    """Return the imports that the module at `path` must not have, as `path:line name`."""
    parts = Path(path).parts
    folder = parts[1].removesuffix(".py")
    if folder in ("demo", "inspection", "inspection_report", "run_summary"):
        return []
    itself = "" if folder == "callbacks" else f".{folder}"  # never another callback
    allowed = [*MAY_IMPORT[folder].split(), *sys.stdlib_module_names, itself, ".__version__"]
    prefixes = tuple(f"{name}." for name in allowed if name)
    found = []
    for line, name, inside in imports(ast.parse(source)):
        fits = f"{name.removeprefix('lightning_optkit')}.".startswith(prefixes)
        if (not fits and not (folder == "cli" and inside)) or "matplotlib.pyplot" in name:
            found.append(f"{path}:{line} {name}")
    return found


@pytest.mark.parametrize("path", MODULES)
def test_module_imports_only_what_its_folder_may(path):
    assert forbidden_imports(path, (ROOT / path).read_text(encoding="utf-8")) == []


GOOD = """
measures/a.py   import math, torch; from scipy.linalg import eigh
measures/a.py   from lightning_optkit import __version__; from lightning_optkit.measures import b
measures/a.py   if typing.TYPE_CHECKING: import lightning
bridge/a.py     from lightning_optkit.board import tags, schema
figures/a.py    from matplotlib.figure import Figure
cli.py          def main(): import torch; from lightning_optkit import demo
demo.py         import torch, lightning_optkit
"""
BAD = """
measures/a.py   import lightning
measures/a.py   def f(): import matplotlib
measures/a.py   import lightning_optkit.methods.mixing
measures/a.py   from lightning_optkit import HessianSpectrum
measures/a.py   from .lanczos import lanczos
bridge/a.py     from lightning_optkit.board import plugin
bridge/a.py     import lightning_optkit.board.tags_of_others
figures/a.py    from matplotlib import pyplot
callbacks/a.py  from lightning_optkit.callbacks.sharpness import Sharpness
cli.py          import torch
__init__.py     import torch
"""


@pytest.mark.parametrize("line", [*GOOD.strip().splitlines(), *BAD.strip().splitlines()])
def test_checker_tells_right_from_wrong(line):
    path, source = line.split(maxsplit=1)
    assert bool(forbidden_imports(f"lightning_optkit/{path}", source)) == (line in BAD)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("lightning_optkit", "torch lightning numpy matplotlib tensorboard"),
        ("lightning_optkit.cli", "torch lightning numpy matplotlib tensorboard"),
        ("lightning_optkit.measures", "lightning matplotlib tensorboard"),
        ("lightning_optkit.methods", "lightning matplotlib tensorboard"),
        ("lightning_optkit.optim", "lightning matplotlib tensorboard"),
        ("lightning_optkit.metrics", "lightning tensorboard"),  # torchmetrics imports matplotlib
        ("lightning_optkit.board.tags, lightning_optkit.board.schema", "torch lightning"),
    ],
)
def test_import_loads_nothing_heavy(modules, heavy):
    command = [sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert set(heavy.split()).isdisjoint(loaded.split())
