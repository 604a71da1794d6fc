"""SWA and EMA on two processes, each with half of every parameter."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_optkit import EMA, SWA
from lightning_optkit.bridge.averaged_checkpoint import load_averaged, load_raw, without_average
from tests.callbacks.averaging_modules import (
    AdversarialNet,
    Raises,
    assert_close,
    data,
    held_out,
    initialised,
    mean_of,
    samples,
    trainer_of,
)
from tests.callbacks.test_averaging_ddp import (
    DECAY,
    exponential_mean,
    parameters_in,
    uneven_batches,
)
from tests.contracts import ResumableLoader, assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed


class Sharded(pl.LightningModule):
    """Uneven and empty shards, tied and frozen weights; validation leaves some gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.tied = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.tied.weight
        self.again.bias.requires_grad_(False)
        self.head = nn.Linear(5, 1)
        self.register_buffer("num_calls", torch.tensor(0))
        self.seen: list[dict[str, Tensor]] = []
        self.gathered: list[bool] = []
        initialised(self).double()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            for part in (self.body, [self.tied, self.again], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.tied(self.body(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_calls += 1
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])  # leaves the outermost group gathered
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.gathered.append(not isinstance(self.head.weight, DTensor))
            self.seen.append(whole_weights(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take anything: Lightning hands over something else when it loads a single file."""


class ShardedGAN(AdversarialNet):
    """Two groups, none around both."""

    def configure_model(self) -> None:
        for part in (self.maker, self.critic):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of whole parameters and buffers; a shared one once."""
    return {
        name: tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


class WholeSnapshots(pl.Callback):
    """Notes the whole weights of training after every batch, and what was logged of the average."""

    def __init__(self) -> None:
        self.by_step: list[dict[str, Tensor]] = []
        self.distances: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.by_step.append(whole_weights(pl_module))
        self.distances.append(float(trainer.callback_metrics.get("optkit-averaging/distance", -1)))


def fit(
    module: pl.LightningModule, *callbacks: pl.Callback, distributed: bool = True, **options: Any
) -> pl.Trainer:
    """Train for three epochs of 6 batches, on other data on each rank; return the Trainer."""
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)
    ckpt_path = options.pop("ckpt_path", None)
    loader = options.pop("loader", None) or ResumableLoader(data(dtype=torch.float64))
    options = {"log_every_n_steps": 1, "use_distributed_sampler": False} | options
    trainer = trainer_of(*callbacks, devices=2, strategy=strategy, **options)
    trainer.fit(module, loader, held_out(dtype=torch.float64), ckpt_path=ckpt_path)
    return trainer


def shards_of(trainer: pl.Trainer) -> list[Any]:
    """Return what the optimizer knows on this rank."""
    return [
        {key: value.to_local() if isinstance(value, DTensor) else value for key, value in s.items()}
        for s in trainer.optimizers[0].state.values()
    ]


def ema(**options: Any) -> EMA:
    return EMA(**{"decay": DECAY, "warmup": False} | options)


def swa() -> SWA:
    return SWA(start=1, every_n_steps=2)


def exponential() -> dict[str, Any]:
    """Return what EMA leaves on this rank, and what a run without it leaves."""
    average, snapshots, module = ema(), WholeSnapshots(), Sharded()
    trainer = fit(module, average, snapshots, val_check_interval=3)
    optimizer = shards_of(trainer)
    without, plain = WholeSnapshots(), Sharded()
    trainer_without = fit(plain, without, val_check_interval=3)
    trainer.validate(module, held_out(dtype=torch.float64), verbose=False)
    return {
        "steps": snapshots.by_step,
        "optimizer": optimizer,
        "distances": snapshots.distances,
        "seen": module.seen,
        "gathered": module.gathered,
        "in the end": whole_weights(module),
        "numbers kept": sum(t.numel() for t in average._weights.average.tensors.values()),
        "without": {"steps": without.by_step, "optimizer": shards_of(trainer_without)},
    }


def kept_aside() -> list[dict[str, Tensor]]:
    """Return the weights of training, an average that only `averaged` puts to use, and these."""
    average, module = ema(use_for=()), Sharded()
    fit(module, average)
    found = [whole_weights(module)]
    with average.averaged(module):
        found.append(whole_weights(module))
    return [*found, whole_weights(module)]


def refreshed() -> dict[str, Any]:
    average, snapshots = SWA(start=1, refresh_norm_stats="layerwise"), WholeSnapshots()
    module = Sharded()
    loader = DataLoader(uneven_batches(int(os.environ["RANK"])), batch_size=None)
    fit(module, average, snapshots, loader=loader)
    return {
        "steps": snapshots.by_step,
        "seen": module.seen,
        "in the end": whole_weights(module),
        "summary": average.summary,
    }


def adversarial() -> dict[str, Any]:
    average, snapshots, module = ema(), WholeSnapshots(), ShardedGAN().double()
    fit(module, average, snapshots, limit_val_batches=0)
    return {"steps": snapshots.by_step, "in the end": whole_weights(module)}


def fails_in_validation() -> list[dict[str, Tensor]]:
    """Return the last weights of training, and what an error in a validation leaves."""
    snapshots, module = WholeSnapshots(), Sharded()
    error = Raises("on_validation_batch_end", KeyError("broken"))
    with pytest.raises(KeyError, match="broken"):
        fit(module, ema(), snapshots, error)
    return [snapshots.by_step[-1], whole_weights(module), module.seen[-1]]


def resumed(folder: Path, make: Callable[[], SWA | EMA], *, distributed: bool) -> dict[str, Any]:
    """Return what a run leaves, what those leave that go on from its checkpoints, and its steps."""
    ends = []
    for ckpt_path in (None, folder / "step=8.ckpt", folder / "step=12.ckpt"):
        average, snapshots, module = make(), WholeSnapshots(), Sharded()
        files = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [average, snapshots] if ckpt_path else [average, snapshots, files]
        options = {"ckpt_path": ckpt_path, "enable_checkpointing": ckpt_path is None}
        trainer = fit(module, *callbacks, distributed=distributed, **options)
        ends.append(
            {
                "average": whole_weights(module),
                "weights": snapshots.by_step[-1],
                "optimizer": shards_of(trainer),
                "callback": [average.num_averaged, average.summary],
            }
        )
        if ckpt_path is None:
            steps = snapshots.by_step
    return {"ends": ends, "steps": steps}


def validated(path: Path, *, distributed: bool) -> dict[str, Tensor]:
    """Return what a new run validates from a checkpoint."""
    module, strategy = Sharded(), ModelParallelStrategy(2, 1, distributed)
    trainer = trainer_of(ema(), devices=2, strategy=strategy, use_distributed_sampler=False)
    loader = held_out(dtype=torch.float64)
    trainer.validate(module, loader, ckpt_path=path, verbose=False)
    return module.seen[-1]


def everything(folder: Path) -> dict[str, Any]:
    return {
        "exponential": exponential(),
        "kept aside": kept_aside(),
        "refreshed": refreshed(),
        "adversarial": adversarial(),
        "failed": fails_in_validation(),
        "folders": resumed(folder / "folders", ema, distributed=True),
        "files": resumed(folder / "files", ema, distributed=False),
        "swa folders": resumed(folder / "swa folders", swa, distributed=True),
        "swa files": resumed(folder / "swa files", swa, distributed=False),
        "validated": {
            kind: validated(folder / kind / "step=8.ckpt", distributed=kind == "folders")
            for kind in ("folders", "files")
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("averaging_fsdp")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_in_two_processes(everything, folder, folder)


def test_the_average_is_the_closed_form_of_whole_weights(ranks):
    one, two = (rank["exponential"] for rank in ranks)
    assert_same(one["in the end"], two["in the end"])
    assert len(one["steps"]) == 18
    assert_close(one["in the end"], exponential_mean(one["steps"]), atol=1e-12)


def test_each_rank_averages_its_own_shards_and_whole_buffers(ranks):
    steps = ranks[0]["exponential"]["steps"][0]
    parameters = parameters_in(steps)
    buffers = sum(
        v.numel() for n, v in steps.items() if n.endswith(("running_mean", "running_var"))
    )
    for rank in (0, 1):
        shards = [torch.chunk(parameter, 2) for parameter in parameters.values()]
        numbers = sum(parts[rank].numel() for parts in shards if rank < len(parts))
        assert ranks[rank]["exponential"]["numbers kept"] == numbers + buffers
    assert any(len(torch.chunk(parameter, 2)) == 1 for parameter in parameters.values())


def test_the_distance_is_that_of_whole_weights(ranks):
    for rank in ranks:
        steps, distances = (rank["exponential"][key] for key in ("steps", "distances"))
        for i, distance in enumerate(distances):
            average = flat(parameters_in(exponential_mean(steps[: i + 1])))
            weights = flat(parameters_in(steps[i]))
            expected = float((average - weights).norm() / weights.norm())
            assert distance == pytest.approx(expected, rel=1e-6, abs=1e-9)  # logged in float32


def flat(weights):
    return torch.cat([value.flatten() for value in weights.values()])


def test_both_ranks_validate_the_average_and_go_back_from_gathered_parameters(ranks):
    one, two = (rank["exponential"] for rank in ranks)
    assert_same(one["seen"], two["seen"])
    assert all(one["gathered"]), "a validation must leave parameters gathered, else this is easy"
    *seen, after_fit = one["seen"]
    assert len(seen) == 6
    for i, weights in enumerate(seen, start=1):
        assert_close(weights, exponential_mean(one["steps"][: 3 * i]), atol=1e-12)
    assert_same(after_fit, one["in the end"])


def test_training_is_bit_identical(ranks):
    for rank in ranks:
        found = rank["exponential"]
        assert_same({key: found[key] for key in ("steps", "optimizer")}, found["without"])


def test_an_average_that_is_kept_aside_is_lent_and_taken_back(ranks):
    for rank in ranks:
        raw, average, again = rank["kept aside"]
        assert_same(raw, again)
        assert_same(average, ranks[0]["exponential"]["in the end"])
        assert_same(raw, rank["exponential"]["steps"][-1])


def test_statistics_are_those_of_one_batch_of_all_samples_of_both_ranks(ranks):
    one, two = (rank["refreshed"] for rank in ranks)
    assert_same(one["in the end"], two["in the end"])
    assert_same(one["seen"][1:], two["seen"][1:])
    assert one["summary"].endswith("; normalization statistics from 24 samples")
    expected = mean_of(one["steps"][7::4])
    assert_close(parameters_in(one["in the end"]), parameters_in(expected), atol=1e-12)
    module = Sharded()
    module.load_state_dict(one["in the end"], strict=False)
    for layer in module.body:
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 1.0  # what torch itself then stores for a batch
    module.train()(samples(24)[0].double())
    for name, buffer in module.named_buffers():
        if "running" in name:
            assert torch.allclose(one["in the end"][name], buffer, rtol=0, atol=1e-12), name


def test_manual_optimization_of_two_nets_that_are_sharded_apart(ranks):
    one, two = (rank["adversarial"] for rank in ranks)
    assert_same(one["in the end"], two["in the end"])
    assert_close(one["in the end"], exponential_mean(one["steps"]), atol=1e-12)


def test_an_error_in_a_validation_leaves_the_weights_of_training(ranks):
    for rank in ranks:
        before, after, lent = rank["failed"]
        assert_same(before, after)
        assert not torch.equal(lent["head.weight"], before["head.weight"])


KINDS = ["folders", "files", "swa folders", "swa files"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(ranks, kind):
    ends = [rank[kind]["ends"] for rank in ranks]
    for end in ends[1]:  # each rank has statistics of its own, and a checkpoint those of rank zero
        end["weights"] = parameters_in(end["weights"])
    for whole, mid_epoch, epoch_end in ends:
        assert_same(whole, mid_epoch)
        assert_same(whole, epoch_end)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_checkpoints_hold_the_average_and_the_weights_of_training(ranks, folder, kind):
    steps = ranks[0][kind]["steps"]
    for step in (4, 8, 12, 16):
        path = folder / kind / f"step={step}.ckpt"
        assert path.is_dir() == (kind == "folders")
        averaged, raw = load_averaged(path), load_raw(path)
        for state_dict in (averaged, raw):
            assert state_dict.pop("_extra_state") == {"version": 3}
            assert torch.equal(state_dict["tied.weight"], state_dict.pop("again.weight"))
            assert all(type(value) is Tensor for value in state_dict.values())
        expected = exponential_mean(steps[:step])
        assert_close(averaged, {name: expected[name] for name in averaged}, atol=1e-12)
        assert_same(raw, {name: steps[step - 1][name] for name in raw})
        assert raw.keys() == averaged.keys() == expected.keys()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_validation_from_a_checkpoint_sees_its_average(ranks, folder, kind):
    averaged = load_averaged(folder / kind / "step=8.ckpt")
    for rank in ranks:
        seen = rank["validated"][kind]
        assert_same(seen, {name: averaged[name] for name in seen})


def test_a_folder_that_is_no_checkpoint_or_runs_code_is_refused(ranks, folder, tmp_path):
    with pytest.raises(ValueError, match=r"got the folder '.*' without `meta.pt`"):
        load_raw(tmp_path)
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "file")
    torch_save_to_dcp(tmp_path / "file", tmp_path / "another")
    torch.save({}, tmp_path / "another" / "meta.pt")
    with pytest.raises(ValueError, match="which has no `state_dict` in it"):
        load_raw(tmp_path / "another")
    found = folder / "folders" / "step=8.ckpt"
    with pytest.raises(ValueError, match="`path` must be a file, got the folder"):
        without_average(found, tmp_path / "to.ckpt")
    for name in ("meta.pt", ".metadata"):
        spoiled = tmp_path / name.strip(".")
        shutil.copytree(found, spoiled)
        content = Code(tmp_path / "ran")
        if name == "meta.pt":
            torch.save(content, spoiled / name)
        else:
            (spoiled / name).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="`path` must hold data alone"):
            load_averaged(spoiled)
    assert not (tmp_path / "ran").exists()


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
