"""Sharpness in a real Trainer."""

from __future__ import annotations

import csv
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optkit import LossLandscape, Sharpness
from lightning_optkit.board.tags import SHARPNESS_SCALARS
from lightning_optkit.measures import HessianOperator
from lightning_optkit.measures.sharpness import (
    average_sharpness,
    ball_sharpness,
    epsilon_sharpness,
)
from tests.contracts import assert_observer
from tests.modules import DictAutoencoder, images

ALL = ("epsilon", "ball", "adaptive", "average", "adaptive_average")


def quick(**options: Any) -> Sharpness:
    return Sharpness(**{"max_overhead": None, "num_batches": 2, "num_samples": 4} | options)


def train(module, data, *callbacks, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 2} | options,
    )
    trainer.fit(module, data)
    return trainer


def logged(trainer: pl.Trainer, topic: str = "optkit-sharpness") -> dict[str, float]:
    found = trainer.callback_metrics.items()
    return {k.split("/")[1]: float(v) for k, v in found if k.startswith(f"{topic}/")}


def autoencoder(n: int = 12, *, batch_size: int = 6) -> tuple[pl.LightningModule, DataLoader]:
    pl.seed_everything(3, verbose=False)
    rows = [{"image": x} for x in images(n)[0].double()]
    return DictAutoencoder().double(), DataLoader(rows, batch_size)


def surface_of(module: pl.LightningModule, batches: list[Any]) -> HessianOperator:
    def loss(batch):
        x = batch["image"].flatten(1)
        return lambda p: mse_loss(functional_call(module, {f"net.{k}": v for k, v in p.items()},
                                                  (x,)), x)  # fmt: skip

    module.forward = module.net.forward
    return HessianOperator(
        [loss(batch) for batch in batches],
        dict(module.net.named_parameters()),
        weights=[len(batch["image"]) for batch in batches],
    )


# -- the observer's contract -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_name", "options"),
    [
        ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
        ("gan", {}),
    ],
    ids=str,
)
def test_training_is_bit_identical(module_name, options, tmp_path):
    assert_observer(
        lambda: quick(kinds=ALL, epsilon=1e-3), module_name, tmp_path,
        limit_train_batches=2, **options,
    )  # fmt: skip


# -- the numbers -----------------------------------------------------------------------------------


def test_every_number_is_that_of_the_pure_functions():
    module, loader = autoencoder()
    trainer = train(module, loader, quick(kinds=ALL, seed=5, subspace_dim=7, per_batch_size=4))
    found = logged(trainer)
    surface = surface_of(module, list(loader))

    def generator():
        return torch.Generator().manual_seed(5)

    boxes = [
        epsilon_sharpness(surface, epsilon=size, subspace_dim=7, generator=generator())
        for size in (1e-3, 5e-4)
    ]
    balls = {
        "ball": ball_sharpness(surface, rho=0.05, generator=generator()),
        "adaptive": ball_sharpness(surface, rho=0.5, adaptive=True, generator=generator()),
    }
    means = {
        "average": average_sharpness(surface, num_samples=4, generator=generator()),
        "adaptive_average": average_sharpness(
            surface, adaptive=True, num_samples=4, generator=generator()
        ),
    }
    parts = surface_of(
        module, [{"image": b["image"][s]} for b in loader for s in (slice(4), slice(4, 6))]
    )
    truth = {
        "loss": float(surface.loss()),
        "num_samples": 12,
        "lambda_max": float(torch.linalg.eigvalsh(surface.dense())[-1]),
        "epsilon": boxes[0].value,
        "epsilon_lower": boxes[0].lower,
        "epsilon_0.0005": boxes[1].value,
        "epsilon_0.0005_lower": boxes[1].lower,
        "ball_per_batch": parts.mean_over_batches(lambda s: ball_sharpness(s).value),
    }
    for name, ball in balls.items():
        truth |= {name: ball.value, f"{name}_lower": ball.one_step}
    for name, mean in means.items():
        truth |= {name: mean.value, f"{name}_standard_error": mean.standard_error}
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=1e-2 if name == "lambda_max" else 1e-5), name
    left = {"seconds", "lambda_max_lower", "epsilon_per_batch", "adaptive_per_batch"}
    assert set(found) - set(truth) == left
    assert found["lambda_max_lower"] <= truth["lambda_max"] * (1 + 1e-6)
    documented = {tag.name for tag in SHARPNESS_SCALARS}
    assert {
        name for name in found if "per_batch" not in name and "0.0005" not in name
    } == documented


def test_only_what_is_asked_for_is_measured():
    found = logged(
        train(*autoencoder(), quick(kinds=["ball"], name="small")), "optkit-sharpness-small"
    )
    assert set(found) == {
        "ball", "ball_lower", "lambda_max", "lambda_max_lower", "loss", "num_samples", "seconds"
    }  # fmt: skip


# -- when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [5]), ({"every_n_epochs": 2}, [3, 5]), ({"every_n_epochs": 2, "at_end": False}, [3])],
    ids=str,
)
def test_it_measures_at_the_end_or_every_few_epochs(options, steps, tmp_path):
    logger = CSVLogger(tmp_path)
    module, loader = autoencoder()
    train(module, loader, quick(kinds=("ball",), **options), logger=logger, max_epochs=3)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["optkit-sharpness/ball"]]
    assert [int(row["step"]) for row in rows] == steps
    assert (Path(logger.log_dir) / "optkit-sharpness-history.png").stat().st_size > 5_000


def test_it_says_which_measures_a_rescaling_of_layers_moves(caplog):
    class ReLUNet(DictAutoencoder):
        def __init__(self):
            super().__init__()
            self.net[1] = torch.nn.ReLU()

    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        train(ReLUNet(), autoencoder()[1], quick(kinds=("ball", "adaptive")), precision="64-true")
        train(*autoencoder(), quick(kinds=("ball",)))
        train(*autoencoder(), quick(kinds=("ball",), invariance_check=False))
    said = [record.message for record in caplog.records if "Sharpness:" in record.message]
    assert "net.0 × 4 and net.2 ÷ 4" in said[0]
    assert "adaptive: stays" in said[0]
    assert "lambda_max: moves by " in said[0]
    assert "No two layers of this net can be rescaled" in said[1]
    assert len(said) == 2


def test_a_layer_without_a_second_derivative_leaves_out_lambda_max_alone():
    class OnceDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    class Net(DictAutoencoder):
        def training_step(self, batch):
            x = batch["image"].flatten(1)
            return mse_loss(OnceDifferentiable.apply(self.net(x)), x)

    found = logged(train(Net().double(), autoencoder()[1], quick(kinds=("ball",))))
    assert found["ball"] > 0
    assert "lambda_max" not in found


@pytest.mark.parametrize("at", [9, 40])  # in different searches, with weights far away
@pytest.mark.parametrize("make", [quick, lambda **o: LossLandscape(resolution=7, **o)])
def test_an_error_amid_a_measurement_leaves_the_weights(make, at):
    calls = []

    def breaks(module, batch):
        calls.append(0)
        if len(calls) >= at:
            raise RuntimeError("out of something")
        x = batch["image"].flatten(1)
        return mse_loss(module.net(x), x)

    weights = []
    for observers in ([], [make(loss_fn=breaks, num_batches=2, max_overhead=None)]):
        module, loader = autoencoder()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(module, loader, *observers)
        weights.append({k: v.clone() for k, v in module.state_dict().items()})
    assert len(calls) >= at
    assert "out of something" in str([str(w.message) for w in caught])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_that_is_nan_warns_once_and_training_goes_on():
    class Diverged(DictAutoencoder):
        def training_step(self, batch):
            return super().training_step(batch)["loss"] * math.nan

    _, loader = autoencoder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(Diverged().double(), loader, quick(every_n_epochs=1))
    assert trainer.global_step == 4
    said = [str(w.message) for w in caught if "Sharpness measured nothing" in str(w.message)]
    assert len(said) == 1


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("sam",)}, "`kinds` must be a tuple of 'epsilon', 'ball'"),
        ({"kinds": "ball"}, "`kinds` must be a tuple"),
        ({"kinds": ()}, "`kinds` must be a tuple"),
        ({"at_end": False}, "`every_n_epochs` must be given where `at_end` is False"),
        ({"epsilon": 0.0}, "`epsilon` must be positive and finite, got 0.0"),
        ({"epsilon": (1e-3, -1.0)}, "`epsilon` must be positive and finite, got -1.0"),
        ({"epsilon": ()}, "`epsilon` must be positive and finite"),
        ({"rho": math.inf}, "`rho` must be positive and finite, got inf"),
        ({"adaptive_rho": True}, "`adaptive_rho` must be positive and finite, got True"),
        ({"num_samples": 7}, "`num_samples` must be an even integer of at least 4, got 7"),
        ({"subspace_dim": 0}, "`subspace_dim` must be an integer of at least 1 or None, got 0"),
        ({"per_batch_size": 1.5}, "`per_batch_size` must be an integer of at least 1 or None"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be an integer of at least 1"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sharpness(**options)
