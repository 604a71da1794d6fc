"""GradientMonitor on two processes, with whole parameters and with sharded ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_optkit import GradientMonitor
from lightning_optkit.measures.gradient_noise import noise_point
from tests.contracts import assert_same, rng_state, run
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2, "limit_train_batches": 3}


def every_step(**options: Any) -> GradientMonitor:
    return GradientMonitor(**{"every_n_steps": 1, "max_overhead": None} | options)


# -- the contract ----------------------------------------------------------------------------------

ROWS = [
    ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, {}),
    ("autoencoder", {}, {}),
    (
        "gan",
        {"strategy": "ddp_find_unused_parameters_true"},
        {"parameters": ["critic.*"], "loss_index": 1},
    ),
]


def train_with_and_without(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for i, (name, options, settings) in enumerate(ROWS):
        without = run(name, [], folder / f"without{i}", **DDP | options)
        with_it = run(name, [every_step(**settings)], folder / f"with{i}", **DDP | options)
        pairs.append((without, with_it))
    return pairs


def all_of_it(folder: Path) -> tuple[Any, Any]:
    pairs = [*train_with_and_without(folder), tuple(sharded_states())]
    return pairs, measured_on_this_rank()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[Any]]:
    """What both ranks return: to start them takes longer than to run all of it."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_in_two_processes(all_of_it, folder, folder)


def test_training_is_bit_identical_on_two_processes(ranks):
    folder, results = ranks
    for pairs, _ in results:
        assert len(pairs) == len(ROWS) + 1
        for without, with_it in pairs:
            assert_same(without, with_it)
    for i in range(len(ROWS)):
        log = (folder / f"with{i}" / "csv" / "version_0" / "metrics.csv").read_text()
        assert "optkit-gradient/gradient_norm" in log


# -- the numbers -----------------------------------------------------------------------------------


class Regressor(pl.LightningModule):
    """A smooth net in float64 with a ReLU of which two units are dead, on one rank three."""

    def __init__(self, *, sharded: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        self.head = nn.Linear(5, 1)
        self.double()
        with torch.no_grad():
            self.body[0].bias[:2] = -100.0
            self.body[0].weight[2] = torch.tensor([1.0, 0.0, 0.0])
            self.body[0].bias[2] = 0.0
        self.sharded = sharded
        self.automatic_optimization = not by_hand

    def configure_model(self) -> None:
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.body, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self(batch)[:, 0] - batch.sum(1)).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data_of(rank: int) -> list[torch.Tensor]:
    """Return batches of other sizes on each rank; the third unit lives on the second rank alone."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [(5, 4, 6), (3, 8, 1)][rank]  # the last cannot be split on the second rank
    batches = [torch.randn(size, 3, generator=generator).double() for size in sizes]
    for batch in batches:
        batch[:, 0] = batch[:, 0].abs() * (1 if rank else -1)
    return batches


def fitted(
    monitor: GradientMonitor | None, *, sharded: bool = False, by_hand: bool = False, **options: Any
) -> Regressor:
    """Train on this rank's data; return the module."""
    sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    module = Regressor(sharded=sharded, by_hand=by_hand)
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharding if sharded else "ddp",
        callbacks=[] if monitor is None else [monitor],
        max_epochs=1,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    ).fit(module, DataLoader(data_of(int(os.environ["RANK"])), batch_size=None))
    return module


def measured(**options: Any) -> dict[str, Any]:
    """Return what is measured at the first step of this rank's run."""
    monitor = every_step()
    fitted(monitor, **options)
    first, last = monitor.history[0], monitor.history[-1]
    return {
        "rows": {row.layer: row.numbers for row in first.table.rows},
        "loss": first.loss,
        "batch_size": first.batch_size,
        "source": first.noise_source,
        "noise": (first.noise.variance, first.noise.square_norm),
        "num_points": last.noise.num_points,
        "dead": {name: dead for name, (dead, _) in first.activations.rows.items()},
        "steps": [each.step for each in monitor.history],
    }


def sharded_states() -> list[dict[str, Any]]:
    """Return what sharded training leaves on this rank, without the monitor and with it."""
    states = []
    for monitor in (None, every_step()):
        pl.seed_everything(5, verbose=False)
        module = fitted(monitor, sharded=True, accumulate_grad_batches=2)
        named = dict(module.named_parameters())
        states.append(
            {
                "weights": {name: p.detach().to_local() for name, p in named.items()},
                "gradients": {name: p.grad.to_local() for name, p in named.items()},
                "moments": [
                    state["exp_avg_sq"].to_local()
                    for state in module.trainer.optimizers[0].state.values()
                ],
                "attributes": [sorted(vars(child)) for child in module.modules()],
                "hooks": [
                    [len(child._forward_pre_hooks), len(child._forward_hooks)]
                    for child in module.modules()
                ],
                "rng": rng_state(),
            }
        )
    return states


CASES = {
    "ddp": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "by hand": {"by_hand": True},
    "sharded": {"sharded": True},
}


def measured_on_this_rank() -> dict[str, dict[str, Any]]:
    return {name: measured(**options) for name, options in CASES.items()}


def gradients(batches: list[torch.Tensor]) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Return the gradient of the loss of each batch at the initial weights, and the losses."""
    net, found, losses = Regressor(), [], []
    for batch in batches:
        loss = net.training_step(batch, 0)
        parts = torch.autograd.grad(loss, list(net.parameters()))
        found.append({n: g for (n, _), g in zip(net.named_parameters(), parts, strict=True)})
        losses.append(float(loss.detach()))
    return found, losses


def square(gradient: dict[str, torch.Tensor]) -> float:
    return sum(float(part.detach().square().sum()) for part in gradient.values())


def mean_of(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def test_it_is_what_one_process_finds_by_hand(ranks):
    first, second = (found for _, found in ranks[1])
    batches = [data_of(0), data_of(1)]
    for name, num_batches in {"ddp": 1, "accumulated": 2, "by hand": 1, "sharded": 1}.items():
        assert first[name] == second[name]
        found = first[name]
        of_step = [batch for each in batches for batch in each[:num_batches]]
        every, losses = gradients(of_step)
        mean = mean_of(every)
        weights = dict(Regressor().named_parameters())
        for layer in ("body.0", "head"):
            g, w = (
                sum(
                    float(t[f"{layer}.{kind}"].detach().square().sum())
                    for kind in ("weight", "bias")
                )
                ** 0.5
                for t in (mean, weights)
            )
            assert found["rows"][layer][0] == pytest.approx(g, rel=1e-10)
            assert found["rows"][layer][1] == pytest.approx(w, rel=1e-10)
            assert found["rows"][layer][3] == pytest.approx(w / g, rel=1e-10)
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-10)
        assert found["batch_size"] == sum(len(batch) for batch in of_step)
        assert found["source"] == {"ddp": 1, "accumulated": 2}.get(name, 3)
        if found["source"] == 3:  # the halves of both ranks' batches
            of_step = [half for b in of_step for half in (b[: len(b) // 2], b[len(b) // 2 :])]
            every, _ = gradients(of_step)
        point = noise_point(
            [square(each) for each in every],
            square(mean_of(every)),
            [len(batch) for batch in of_step],
        )
        assert found["noise"] == pytest.approx((point.variance, point.square_norm), rel=1e-9)
        assert found["dead"] == {"body.1": 2 / 5}
        # where the second rank cannot split its batch, both go without
        assert found["num_points"] == (3 if name == "ddp" else 2)
        assert found["steps"] == ([0, 1] if name == "accumulated" else [0, 1, 2])
    updates = {name: found["rows"]["head"][2] for name, found in first.items()}
    rates = {name: found["rows"]["head"][5] for name, found in first.items()}
    assert updates["sharded"] == pytest.approx(updates["ddp"], rel=1e-10)
    assert rates["sharded"] == pytest.approx(rates["ddp"], rel=1e-10)
