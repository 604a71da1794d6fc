"""The command line, as a person uses it."""

import sys
from pathlib import Path

import pytest

import lightning_optkit
from lightning_optkit.cli import main


def test_demo_trains_and_ends_with_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "--logdir", str(tmp_path), "--epochs", "1"]) == 0
    shown = capsys.readouterr().out
    rows = ("training loss", "accuracy", "λ max", "minimum ratio", "kind of point", "cost")
    for row in rows:
        assert row in shown
    assert f"tensorboard --logdir {tmp_path}" in shown
    picture = next(Path(tmp_path).rglob("spectrum.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_without_its_data_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--logdir", str(tmp_path)]) == 1
    assert "pip install 'lightning-optkit[examples]'" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["demo", "--epochs", "0"], ["nothing"]])
def test_wrong_arguments_exit_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: lightning-optkit" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == lightning_optkit.__version__
