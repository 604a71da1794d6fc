"""SWA and EMA on two processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit import EMA, SWA
from lightning_optkit.bridge.averaged_checkpoint import load_averaged, load_raw
from tests.callbacks.averaging_modules import (
    AdversarialNet,
    Net,
    Snapshots,
    assert_close,
    held_out,
    initialised,
    mean_of,
    samples,
    trainer_of,
    weights_of,
)
from tests.contracts import assert_resumes, assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2, "precision": "64-true"}
DECAY = 0.8
SIZES = ((4, 4, 3, 4), (3, 2, 2, 2))
"""Samples in each batch, by rank."""


def uneven_batches(rank: int) -> list[list[torch.Tensor]]:
    """Return a rank's batches: 15 samples for one, 9 for the other."""
    ours = [part.split([sum(sizes) for sizes in SIZES])[rank] for part in samples(24)]
    pairs = zip(*(part.double().split(list(SIZES[rank])) for part in ours), strict=True)
    return [list(pair) for pair in pairs]


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Train for three epochs of 4 batches, on other data on each rank; return the Trainer."""
    initialised(module)
    rank = int(os.environ["RANK"])
    trainer = trainer_of(*callbacks, **{"use_distributed_sampler": False} | DDP | options)
    loader = DataLoader(uneven_batches(rank), batch_size=None)
    trainer.fit(module, loader, held_out(seed=4 + rank, dtype=torch.float64))
    return trainer


def optimizers_of(trainer: pl.Trainer) -> list[Any]:
    return [optimizer.state_dict() for optimizer in trainer.optimizers]


def exponential(folder: Path) -> dict[str, Any]:
    """Return what EMA leaves on this rank, and what a run without it leaves."""
    ema, snapshots, module = EMA(DECAY, warmup=False), Snapshots(), Net(norm=True)
    files = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, ema, snapshots, files, enable_checkpointing=True)
    without, plain = Snapshots(), Net(norm=True)
    trainer_without = fit(plain, without)
    return {
        "steps": snapshots.by_step,
        "optimizers": optimizers_of(trainer),
        "seen": module.seen["validate"],
        "in the end": weights_of(module),
        "without": {"steps": without.by_step, "optimizers": optimizers_of(trainer_without)},
    }


def kept_aside() -> dict[str, torch.Tensor]:
    """Return an average that only `averaged` puts to use."""
    ema, module = EMA(DECAY, warmup=False, use_for=()), Net(norm=True)
    fit(module, ema)
    with ema.averaged(module):
        return weights_of(module)


class Deep(Net):
    """Two norm layers after one another."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.net.insert(2, nn.BatchNorm1d(4))


def refreshed(make: Callable[[], Net], **options: Any) -> dict[str, Any]:
    swa, snapshots, module = SWA(start=1, **options), Snapshots(), make()
    fit(module, swa, snapshots)
    return {
        "epochs": snapshots.by_epoch,
        "seen": module.seen["validate"],
        "in the end": weights_of(module),
        "summary": swa.summary,
    }


class Traced(Net):
    """With a buffer that is set in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("trace", torch.zeros(2))


class Spoils(pl.Callback):
    """Sets the buffer to what is not finite, on rank one after the fifth step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        is_bad = trainer.global_step == 5 and os.environ["RANK"] == "1"
        pl_module.trace.fill_(torch.nan if is_bad else 1.0)


def spoiled() -> dict[str, Any]:
    ema, snapshots, module = EMA(DECAY, warmup=False), Snapshots(), Traced()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(module, Spoils(), ema, snapshots)
    return {
        "steps": snapshots.by_step,
        "in the end": weights_of(module),
        "summary": ema.summary,
        "warned": [str(warning.message) for warning in warned],
    }


def adversarial() -> dict[str, Any]:
    ema, snapshots, module = EMA(DECAY, warmup=False), Snapshots(), AdversarialNet()
    options = {"strategy": "ddp_find_unused_parameters_true", "limit_val_batches": 0}
    fit(module, ema, snapshots, **options)
    return {"steps": snapshots.by_step, "in the end": weights_of(module)}


def resumed(folder: Path) -> list[int]:
    """Return models in averages of runs that were resumed, and compared to whole ones, here."""
    averages = []
    for name, callback, module_name, options in (
        ("ema", lambda: EMA(0.9, warmup=False), "classifier", {"strategy": "ddp"}),
        ("swa", lambda: SWA(start=1, every_n_steps=2), "classifier", {"strategy": "ddp"}),
        ("gan", EMA, "gan", {"strategy": "ddp_find_unused_parameters_true"}),
    ):
        options |= {"devices": 2, "use_distributed_sampler": False}
        whole = assert_resumes(callback, module_name, folder / name, **options)
        averages.append(whole.num_averaged)
    return averages


def everything(folder: Path) -> dict[str, Any]:
    return {
        "exponential": exponential(folder / "exponential"),
        "kept aside": kept_aside(),
        "refreshed": refreshed(lambda: Net(norm=True)),
        "layerwise": refreshed(Deep, refresh_norm_stats="layerwise"),
        "spoiled": spoiled(),
        "adversarial": adversarial(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("averaging_ddp")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_in_two_processes(everything, folder, folder)


def parameters_in(weights):
    buffers = ("running_mean", "running_var", "num_batches_tracked", "trace", "num_calls")
    return {name: value for name, value in weights.items() if not name.endswith(buffers)}


def in_order(state_dict):
    """Return parameters before buffers."""
    parameters = parameters_in(state_dict)
    return parameters | {name: state_dict[name] for name in state_dict if name not in parameters}


def exponential_mean(steps):
    """Return the exponential average of all steps in closed form."""
    last = len(steps) - 1
    weights = [DECAY**last] + [(1 - DECAY) * DECAY ** (last - i) for i in range(1, last + 1)]
    return mean_of(steps, weights)


def test_the_average_is_the_closed_form_and_the_same_on_both_ranks(ranks):
    one, two = (rank["exponential"] for rank in ranks)
    assert_same(one["in the end"], two["in the end"])
    assert len(one["steps"]) == 12
    assert_close(one["in the end"], exponential_mean(one["steps"]), atol=1e-12)
    # each rank has statistics of its own; the average's are rank zero's, which a file would hold
    assert one["steps"][-1]["net.0.running_mean"].ne(two["steps"][-1]["net.0.running_mean"]).any()


def test_an_average_that_is_kept_aside_is_the_same_on_both_ranks(ranks):
    assert_same(ranks[0]["kept aside"], ranks[1]["kept aside"])
    assert_same(ranks[0]["kept aside"], ranks[0]["exponential"]["in the end"])


def test_both_ranks_validate_the_model_that_the_checkpoint_holds(ranks, folder):
    one, two = (rank["exponential"]["seen"] for rank in ranks)
    assert_same(one, two)
    steps = ranks[0]["exponential"]["steps"]
    for epoch in range(3):
        path = folder / "exponential" / f"epoch={epoch}.ckpt"
        assert_same(one[epoch], in_order(load_averaged(path)))
        assert_close(one[epoch], exponential_mean(steps[: 4 * epoch + 4]), atol=1e-12)
        assert_same(steps[4 * epoch + 3], in_order(load_raw(path)))


def test_training_is_bit_identical_on_both_ranks(ranks):
    for rank in ranks:
        found = rank["exponential"]
        assert_same({key: found[key] for key in ("steps", "optimizers")}, found["without"])


@pytest.mark.parametrize("kind", ["refreshed", "layerwise"])
def test_statistics_are_those_of_one_batch_of_all_samples_of_both_ranks(ranks, kind):
    one, two = (rank[kind] for rank in ranks)
    assert_same(one["in the end"], two["in the end"])
    assert_same(one["seen"][1:], two["seen"][1:])
    assert one["summary"] == two["summary"]
    assert one["summary"].endswith("; normalization statistics from 24 samples")
    expected = mean_of(one["epochs"][1:])
    assert_close(parameters_in(one["in the end"]), parameters_in(expected), atol=1e-12)
    module = Net(norm=True).double() if kind == "refreshed" else Deep().double()
    module.load_state_dict(one["in the end"])
    for layer in module.net:
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 1.0  # what torch itself then stores for a batch
    module.train()(samples(24)[0].double())
    for name, buffer in module.named_buffers():
        if "running" in name:
            assert torch.allclose(one["in the end"][name], buffer, rtol=0, atol=1e-12), name


def test_a_model_that_is_not_finite_on_one_rank_is_left_out_on_both(ranks):
    one, two = (rank["spoiled"] for rank in ranks)
    line = "EMA: average of 11 models, steps 1–12, 1 left out that were not finite"
    assert one["summary"] == two["summary"] == line
    assert_same(one["in the end"], two["in the end"])
    assert bool(torch.isnan(two["steps"][4]["trace"]).all())
    taken = [one["steps"][i] for i in range(12) if i != 4]
    assert_close(one["in the end"], exponential_mean(taken), atol=1e-12)
    assert any("leaves out the weights after step 5, which" in text for text in one["warned"])


def test_manual_optimization_of_two_nets(ranks):
    one, two = (rank["adversarial"] for rank in ranks)
    assert_same(one["in the end"], two["in the end"])
    assert_close(one["in the end"], exponential_mean(one["steps"]), atol=1e-12)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted_on_both_ranks(tmp_path):
    assert run_in_two_processes(resumed, tmp_path, tmp_path) == [[15, 5, 15]] * 2
