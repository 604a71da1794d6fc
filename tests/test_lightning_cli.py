"""Every callback can be written in the YAML of a `LightningCLI`, and the run's config be saved."""

import inspect
import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import lightning_optkit

CALLBACKS = [
    name
    for name in lightning_optkit.__all__
    if isinstance(found := getattr(lightning_optkit, name), type) and issubclass(found, pl.Callback)
]
# What somebody would write. A new callback is one row.
TYPICAL = {
    "HessianSpectrum": {
        "every_n_steps": 3,
        "num_matvecs": 8,
        "tol_rel": "auto",
        "parameters": ["net.0.*"],
        "max_overhead": None,
    },
    "Stability": {"every_n_epochs": 1, "num_batches": 2, "mode": "train", "name": "net"},
    "Sharpness": {"kinds": ["ball", "adaptive"], "every_n_epochs": 1, "per_batch_size": 2},
    "LossLandscape": {"kind": "line", "directions": "init", "resolution": 5, "basin_rise": 0.5},
    "SaddleEscape": {"every_n_steps": 2, "gradient_tol": 0.2, "max_escapes": 3},
    "SWA": {"start": 1, "lr": 0.01, "refresh_norm_stats": "layerwise", "use_for": ["validate"]},
    "BatchScaling": {"reference_batch_size": 2, "rule": "sqrt", "warmup_epochs": 1.5},
    "GradientMonitor": {"every_n_steps": 3, "per_layer": False, "parameters": ["net.0.*"]},
    "EMA": {"half_life": 5.0, "every_n_steps": 2, "device": "cpu", "name": "slow"},
    "Mixup": {"alpha": 0.4, "per_sample": True, "targets": "none", "stop_epoch": 1},
    "CutMix": {"probability": 0.5, "dims": [1], "targets": "none"},
    "MixupOrCutMix": {"mixup_alpha": 0.1, "switch_probability": 0.3, "targets": "none", "seed": 3},
    "NormSwap": {
        "target": "ghost",
        "where": ["net.*"],
        "target_options": {"chunk_size": 2, "eps": 0.001},
        "name": "all",
    },
    "TrustRatio": {"of": "update", "max_ratio": 10.0, "where": ["net.*"], "log": False},
    "LRWarmup": {"fraction": 0.5, "shape": "cosine", "start_factor": 0.1, "optimizers": [0]},
}
LEAST = {  # of those that need something
    "LRWarmup": {"steps": 3},
    "Mixup": {"targets": "none"},
    "CutMix": {"targets": "none"},
    "MixupOrCutMix": {"targets": "none"},
}
CASES = [(name, LEAST.get(name, {})) for name in CALLBACKS] + [
    (name, TYPICAL.get(name)) for name in CALLBACKS
]


class Net(pl.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        rows = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loss_of(pl_module, batch):
    return mse_loss(pl_module.net(batch), batch[:, :1])


@pytest.fixture(autouse=True)
def _own_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])  # not pytest's
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls


def command_line(*args, run=False):
    return LightningCLI(Net, args=list(args), run=run, seed_everything_default=False)


def config_file(folder, name, init_args):
    """Write the config of a short run with one callback, and return its path."""
    callback = {"class_path": f"lightning_optkit.{name}"}
    if init_args:
        callback["init_args"] = init_args
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "callbacks": [callback],
        "default_root_dir": str(folder),
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    path = folder / "written.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    return path


def parsed(folder, name, init_args):
    """Return what the constructor is called with, and the callback that it makes."""
    cli = command_line(f"--config={config_file(folder, name, init_args)}")
    (callback,) = (c for c in cli.trainer.callbacks if type(c).__name__ == name)
    return cli.config.trainer.callbacks[0].init_args.as_dict(), callback


def test_every_callback_has_a_typical_use():
    assert set(TYPICAL) == set(CALLBACKS)


@pytest.mark.parametrize(("name", "init_args"), CASES, ids=str)
def test_callback_is_built_from_yaml_and_its_config_saved(name, init_args, tmp_path):
    cli = command_line("fit", f"--config={config_file(tmp_path, name, init_args)}", run=True)
    assert cli.trainer.global_step == 8
    assert name in [type(callback).__name__ for callback in cli.trainer.callbacks]
    (saved,) = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"]
    defaults = {
        key: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for key, parameter in inspect.signature(getattr(lightning_optkit, name)).parameters.items()
    }
    assert saved["init_args"] == defaults | init_args


@pytest.mark.parametrize("name", CALLBACKS)
def test_saved_config_builds_the_same_again(name, tmp_path):
    cli = command_line(f"--config={config_file(tmp_path, name, TYPICAL[name])}")
    saved = tmp_path / "saved.yaml"
    saved.write_text(cli.parser.dump(cli.config, skip_none=False))
    again = command_line(f"--config={saved}")
    assert again.config.trainer.callbacks[0].init_args == cli.config.trainer.callbacks[0].init_args
    assert again.parser.dump(again.config, skip_none=False) == saved.read_text()


@pytest.mark.parametrize(
    ("name", "init_args"),
    [
        ("SWA", {"start": 30}),
        ("SWA", {"start": 0}),
        ("SWA", {"start": 0.5}),
        ("SWA", {"start": 0.0}),
        ("SWA", {"start": "30ep"}),
        ("SWA", {"start": "5000st"}),
        ("SWA", {"every_n_steps": 10}),
        ("SWA", {"lr": 0.1, "cycle": 2}),
        ("SWA", {"lr": [0.1, 0.2]}),
        ("SWA", {"refresh_norm_stats": True}),
        ("SWA", {"refresh_norm_stats": False}),
        ("SWA", {"refresh_norm_stats": 1}),
        ("SWA", {"refresh_norm_stats": 50}),
        ("SWA", {"refresh_norm_stats": "layerwise"}),
        ("SWA", {"use_for": ["validate", "test"]}),
        ("SWA", {"use_for": []}),
        ("SWA", {"device": "cpu"}),
        ("SWA", {"device": "cuda:0"}),
        ("SWA", {"average": "polynomial", "eta": 2.0}),
        ("EMA", {"decay": 0.99}),
        ("EMA", {"decay": 0.0, "warmup": False}),
        ("LRWarmup", {"steps": 500}),
        ("LRWarmup", {"steps": [500, 200], "shape": "constant"}),
        ("LRWarmup", {"epochs": 0.5}),
        ("LRWarmup", {"shape": "untuned", "optimizers": 1}),
        ("LRWarmup", {"steps": 4000, "shape": "noam", "d_model": 512}),
        ("Mixup", {"input_key": 0, "target_key": "truth.label"}),
        ("Mixup", {"input_key": ["views", 1, "image"], "alpha": 1.0}),
        ("CutMix", {"targets": "cut", "dims": [2, 3]}),
        ("HessianSpectrum", {"tol_rel": 1e-4}),
        ("HessianSpectrum", {"num_batches": None, "data": [1, 2]}),
    ],
    ids=str,
)
def test_value_arrives_as_it_is_written(name, init_args, tmp_path):
    arrived, _ = parsed(tmp_path, name, init_args)
    for key, value in init_args.items():
        assert (arrived[key], type(arrived[key])) == (value, type(value))


def test_function_is_given_by_its_path(tmp_path):
    path = f"{loss_of.__module__}.loss_of"
    for name in ("HessianSpectrum", "Stability", "SaddleEscape"):
        arrived, _ = parsed(tmp_path, name, {"loss_fn": path})
        assert arrived["loss_fn"].__code__.co_name == "loss_of"


@pytest.mark.filterwarnings("ignore:.LRWarmup. never released")
@pytest.mark.filterwarnings("ignore:.until. must ask for a metric")
def test_condition_is_given_by_its_class(tmp_path):
    condition = {
        "class_path": "lightning_optkit.ErrorBelow",
        "init_args": {"metric": "loss", "value": 0.5},
    }
    path = config_file(tmp_path, "LRWarmup", {"until": condition})
    cli = command_line("fit", f"--config={path}", run=True)
    (callback,) = (c for c in cli.trainer.callbacks if type(c).__name__ == "LRWarmup")
    assert callback._settings.until == lightning_optkit.ErrorBelow("loss", 0.5)
    (saved,) = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"]
    assert saved["init_args"]["until"] == condition


def test_start_in_yaml_means_what_it_means_in_python(tmp_path):
    arrived, callback = parsed(tmp_path, "SWA", {"start": 30})
    assert type(arrived["start"]) is int
    callback.setup(pl.Trainer(max_epochs=31, logger=False, barebones=True), Net(), "fit")


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_is_added_on_the_command_line(name):
    key, value = next(iter(TYPICAL[name].items()))
    cli = command_line(
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
        f"--trainer.callbacks+=lightning_optkit.{name}",
        f"--trainer.callbacks.{key}={value}",
    )
    assert cli.config.trainer.callbacks[0].init_args[key] == value
