"""The command line, as a person uses it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_optkit
from lightning_optkit.cli import _checked, _pairs, _share, _tolerance, _whole, main


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


STUDY = """\
import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset


class Fit(pl.LightningModule):
    def __init__(self, curvature=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.weights = nn.Parameter(torch.ones(2))

    def training_step(self, batch, batch_idx):
        print("the user's own output")
        return self.hparams.curvature * self.weights.square().sum() / 2 + 0 * batch[0].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    return DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=4)
"""


def study(folder, monkeypatch):
    """Write a user's module into a folder, train it there, and return its checkpoint."""
    (folder / "quadratic_study.py").write_text(STUDY)
    monkeypatch.syspath_prepend(str(folder))
    import lightning.pytorch as pl

    fit = importlib.import_module("quadratic_study")
    monkeypatch.delitem(sys.modules, "quadratic_study")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(fit.Fit(curvature=3.0), fit.data())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_inspect_prints_one_json_object_and_nothing_else(tmp_path, monkeypatch):
    study(tmp_path, monkeypatch)
    program = "import sys; from lightning_optkit.cli import main; sys.exit(main())"
    words = "inspect last.ckpt --module quadratic_study.Fit --data quadratic_study:data --json"
    result = subprocess.run(
        [sys.executable, "-c", program, *words.split(), "--device", "cpu", "--out", "figures"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    # the curvature is in the checkpoint's hyperparameters only
    assert found["spectrum"]["lambda_max"] == found["spectrum"]["lambda_min"] == 3.0
    assert found["gradient_step"]["step"] == pytest.approx(1 / 3, rel=1e-6)
    assert (found["epoch"], found["global_step"], found["num_samples"]) == (1, 2, 8)
    assert (tmp_path / "figures/spectrum.png").is_file()
    assert "the user's own output" in result.stderr


def test_inspect_takes_every_option(tmp_path, monkeypatch, capsys):
    path = study(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    words = (
        "--module quadratic_study.Fit --data quadratic_study.data --json --device cpu "
        "--curvature hessian --graphs lockstep "
        "--num-batches 1 --num-matvecs 5 --num-probes 2 --tol-rel auto --mode train "
        "--top-k 1 --exact-below 0 --per-layer --seed 3 --loss-index 0 --parameters weights x.* "
        "--module-args curvature=4.5"
    )
    assert main(["inspect", str(path), *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {
        "num_batches": 1,
        "num_matvecs": 5,
        "num_probes": 2,
        "tol_rel": "auto",
        "mode": "train",
        "parameters": ["weights", "x.*"],
        "loss_index": 0,
        "top_k": 1,
        "exact_below": 0,
        "curvature": "hessian",
        "graphs": "lockstep",
        "per_layer": True,
        "seed": 3,
        "device": "cpu",
    }
    assert found["num_samples"] == 4
    assert found["top_eigenvalues"][0]["value"] == pytest.approx(4.5, rel=1e-6)
    assert len(found["top_eigenvalues"]) == 1
    assert found["spectrum"]["method"] == "lanczos"
    assert list(found["layers"]) == ["weights"]


def test_inspect_of_what_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "no.ckpt"), "--module", "a.B"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("lightning-optkit inspect: The checkpoint must be a file")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["width=3"], {"width": 3}),
        (["name=relu"], {"name": "relu"}),
        (["widths=[3, 4]"], {"widths": [3, 4]}),
        (["rate=0.1", "bias=false"], {"rate": 0.1, "bias": False}),
        (['{"width": 3, "name": "a=b"}'], {"width": 3, "name": "a=b"}),
        (["path=a=b"], {"path": "a=b"}),
    ],
)
def test_arguments_are_json_or_strings(words, expected):
    merged = {}
    for word in words:
        merged |= _pairs(word)
    assert merged == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "a.ckpt"],
        ["inspect", "a.ckpt", "--module", "a.B", "--module-args", "width"],
        ["inspect", "a.ckpt", "--module", "a.B", "--module-args", '{"width": '],
        ["inspect", "a.ckpt", "--module", "a.B", "--num-matvecs", "1"],
        ["inspect", "a.ckpt", "--module", "a.B", "--tol-rel", "nan"],
        ["inspect", "a.ckpt", "--module", "a.B", "--mode", "test"],
        ["plan"],
        ["plan", "--params", "0"],
        ["plan", "--params", "nan"],
        ["plan", "--params", "1e6", "--efficiency", "1.5"],
        ["plan", "--params", "1e6", "--bandwidth", "0"],
    ],
)
def test_wrong_arguments_of_a_command_exit_with_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert f"usage: lightning-optkit {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan --params abc", "--params: must be a positive number such as 7e9, got abc"),
        ("plan --params 0", "--params: must be a positive number such as 7e9, got 0"),
        ("plan --params inf", "--params: must be a positive number such as 7e9, got inf"),
        ("plan --params 1 --activations x", "must be a positive number such as 7e9, got x"),
        ("plan --params 1 --flops fast", "must be a positive number such as 5e10, got fast"),
        ("plan --params 1 --bandwidth -1", "must be a positive number such as 5e10, got -1"),
        ("plan --params 1 --efficiency half", "must be a number in (0, 1], got half"),
        ("plan --params 1 --efficiency 2", "must be a number in (0, 1], got 2"),
        ("plan --params 1 --world-size 1.5", "must be a whole number of at least 1, got 1.5"),
        ("inspect a --module b --num-matvecs 1", "must be a whole number of at least 2, got 1"),
        ("inspect a --module b --seed x", "must be a whole number of at least 0, got x"),
        ("inspect a --module b --tol-rel x", "must be a number of at least 0, or auto, got x"),
        ("inspect a --module b --curvature x", "argument --curvature: invalid choice: 'x'"),
        ("demo --seed x", "argument --seed: must be a whole number, got x"),
        ("demo --epochs x", "must be a whole number of at least 1, got x"),
    ],
)
def test_a_wrong_argument_is_told_its_rule(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    assert message in capsys.readouterr().err


def test_numbers_in_range_are_taken():
    assert _checked("7e9", float, lambda number: number >= 1, "") == 7e9
    assert [_whole("-3"), _share("1"), _tolerance("0")] == [-3, 1.0, 0.0]


def test_plan_shows_products_bytes_and_seconds(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["plan", "--params", "7e9", "--world-size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "One measurement: 7,000,000,000 parameters, 64 devices, 256 samples" in shown
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.splitlines()
            if "│" in line}  # fmt: skip
    assert [cell.strip() for cell in rows["products"]] == ["323", "323", "332"]
    assert [cell.strip() for cell in rows["parameters"]] == ["28 GB", "28 GB", "875 MB"]
    assert [cell.strip() for cell in rows["Krylov vectors"]] == ["2.24 TB", "8.96 TB", "35 GB"]
    assert {"memory in all", "time in all", "work, FLOP"} <= rows.keys()


def test_plan_takes_another_machine(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = "--params 1e6 --num-matvecs 10 --num-probes 1 --num-batches 1 --sequence-length 1"
    machine = "--flops 1e9 --efficiency 1 --activations 1e3"
    assert main(["plan", *words.split(), *machine.split()]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "time, arithmetic" in x)
    # 13 products of 2.13 gradients, the graph, the check and two losses, each 6 n FLOP
    assert f"{(13 * 2.13 + 1.03 + 3.5 + 2 / 3) * 6e6 / 1e9:.2g} s" in line


def test_plan_counts_one_in_the_singular(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["plan", "--params", "1", "--num-batches", "1"]) == 0
    title = capsys.readouterr().out.splitlines()[0].strip()
    assert title == "One measurement: 1 parameter, 1 device, 1 sample"
