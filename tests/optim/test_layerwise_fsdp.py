"""LARS and LAMB on two processes, each with a part of every parameter, against one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss

from lightning_optkit.optim import LAMB, LARS, lars_param_groups
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

Make = Callable[..., LARS | LAMB]
MAKERS: dict[str, Make] = {
    "lars": lambda groups, **more: LARS(groups, lr=2.0, trust_coefficient=0.05, **more),
    "nesterov": lambda groups, **more: LARS(groups, lr=0.5, nesterov=True, **more),
    "lamb": lambda groups, **more: LAMB(groups, lr=0.03, **more),
    "captured": lambda groups, **more: LAMB(groups, lr=0.03, capturable=True, **more),
}
MESHES = {"sharded": (2,), "sharded in copies of one": (1, 2), "two copies": (2, 1)}
STEPS = 6


def net() -> nn.Sequential:
    """Return a net with uneven shards, an empty one, tied weights and a frozen layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 5)
        )
        made.append(nn.Linear(5, 1))
        made[4].weight = made[3].weight
        made[4].bias.requires_grad_(False)
    return made.double()


def sharded(shape: tuple[int, ...]) -> nn.Sequential:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    made = net()
    for part in (made[0], [made[3], made[4]], made):
        fully_shard(part, mesh=mesh)
    return made


def batches(part: slice) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [(rows[part, :3], rows[part, 3:]) for rows in drawn]


def train(module: nn.Sequential, optimizer: torch.optim.Optimizer, data: Any) -> list[Tensor]:
    """Return the ratios of each step."""
    ratios = []
    for x, y in data:
        optimizer.zero_grad()
        mse_loss(module(x), y).backward()
        optimizer.step()
        ratios.append(optimizer.last_trust_ratios())
    return ratios


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def own_half() -> list[tuple[Tensor, Tensor]]:
    rank = int(os.environ["RANK"])
    return batches(slice(4 * rank, 4 * rank + 4))


def trained(make: Make, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    module = sharded(shape)
    optimizer = make(lars_param_groups(module, weight_decay=0.1), **more)
    sums = []
    real = torch.distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    original = type(optimizer).step

    def counted(self: Any, *args: Any) -> Any:
        with mock.patch("torch.distributed.all_reduce", counting):
            return original(self, *args)

    with mock.patch.object(type(optimizer), "step", counted):
        ratios = train(module, optimizer, own_half())
    return {
        "weights": [whole(parameter) for parameter in module.parameters()],
        "ratios": ratios,
        "sums": sums,
        "like the parameter": [
            isinstance(value, DTensor)
            and value.placements == parameter.placements
            and value.to_local().shape == parameter.to_local().shape
            for parameter, state in optimizer.state.items()
            for name, value in state.items()
            if name != "step"
        ],
        "counts": [state["step"] for state in optimizer.state.values() if "step" in state],
    }


def resumed(make: Make, folder: Path) -> list[list[Tensor]]:
    """Return where a run ends, and one that goes on from its checkpoint after three steps."""
    ends, data = [], own_half()
    for is_first in (True, False):
        module = sharded((2,))
        optimizer = make(lars_param_groups(module, weight_decay=0.1))
        if is_first:
            train(module, optimizer, data[:3])
            weights, state = get_state_dict(module, optimizer)
            checkpoint.save({"weights": weights, "state": state}, checkpoint_id=folder)
        else:
            weights, state = get_state_dict(module, optimizer)
            found = {"weights": weights, "state": state}
            checkpoint.load(found, checkpoint_id=folder)
            set_state_dict(
                module,
                optimizer,
                model_state_dict=found["weights"],
                optim_state_dict=found["state"],
            )
        train(module, optimizer, data[3:])
        ends.append([whole(parameter) for parameter in module.parameters()])
    return ends


def placed(make: Make, mesh: DeviceMesh) -> list[list[Tensor]]:
    """Return where parameters of other layouts end, one of them whole, and where they should."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    layouts = [Shard(0), Shard(1), Replicate(), None]
    spread = [
        nn.Parameter(value if at is None else distribute_tensor(value, mesh, [at]))
        for value, at in zip(values, layouts, strict=True)
    ]
    plain = [nn.Parameter(value.clone()) for value in values]
    optimizers = [make(spread, weight_decay=0.1), make(plain, weight_decay=0.1)]
    for _ in range(3):
        grads = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
        for parameter, grad, at in zip(plain, grads, layouts, strict=True):
            parameter.grad = grad
            is_sharded = isinstance(at, Shard)  # let the gradient lie differently
            other = [Replicate()] if is_sharded else [Shard(0)]
            mine = spread[len(plain) - 1] if at is None else spread[layouts.index(at)]
            mine.grad = grad if at is None else distribute_tensor(grad, mesh, other)
        for optimizer in optimizers:
            optimizer.step()
    ratios = [optimizer.last_trust_ratios() for optimizer in optimizers]
    ends = [[whole(parameter) for parameter in params] for params in (spread, plain)]
    return [[*end, ratio] for end, ratio in zip(ends, ratios, strict=True)]


def everything(folder: Path) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {
        f"{name}, {kind}": trained(make, shape)
        for name, make in MAKERS.items()
        for kind, shape in MESHES.items()
    }
    found["lamb, one by one"] = trained(MAKERS["lamb"], (2,), foreach=False)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("lars", "lamb", "captured"):
        found[f"{name}, resumed"] = resumed(MAKERS[name], folder / name)
    for name in ("lars", "lamb"):
        found[f"{name}, placed"] = placed(MAKERS[name], mesh)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerwise_fsdp")
    return run_in_two_processes(everything, folder, folder)


def alone(name: str) -> tuple[list[Tensor], list[Tensor]]:
    module = net()
    optimizer = MAKERS[name](lars_param_groups(module, weight_decay=0.1))
    ratios = train(module, optimizer, batches(slice(None)))
    return [whole(parameter) for parameter in module.parameters()], ratios


@pytest.mark.parametrize("name", MAKERS)
def test_shards_are_trained_as_whole_parameters_are(ranks, name):
    weights, ratios = alone(name)
    kinds = [*MESHES, "one by one"] if name == "lamb" else [*MESHES]
    for kind in kinds:
        one, two = (rank[f"{name}, {kind}"] for rank in ranks)
        for found in (one, two):
            torch.testing.assert_close(found["weights"], weights, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(found["ratios"], ratios, rtol=1e-10, atol=0)
        assert all(map(torch.equal, one["ratios"], two["ratios"]))  # to the bit, on all ranks


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_makes_one_sum_of_all_norms_of_what_is_scaled(ranks, name):
    scaled = 3  # of the weights one is tied; each has two norms
    for rank in ranks:
        assert rank[f"{name}, sharded"]["sums"] == [2 * scaled] * STEPS
        assert rank[f"{name}, sharded in copies of one"]["sums"] == [2 * scaled] * STEPS
        assert rank["lamb, one by one"]["sums"] == [2 * scaled] * STEPS


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_remembered_is_sharded_as_the_parameters_are(ranks, name):
    for rank in ranks:
        for kind in MESHES:
            found = rank[f"{name}, {kind}"]
            assert found["like the parameter"]
            assert all(found["like the parameter"])
            assert {int(count) for count in found["counts"]} <= {STEPS}


@pytest.mark.parametrize("name", ["lars", "lamb", "captured"])
def test_a_distributed_checkpoint_is_gone_on_with_to_the_bit(ranks, name):
    for rank in ranks:
        truth, found = rank[f"{name}, resumed"]
        assert all(map(torch.equal, found, truth))


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_gradients_may_lie_otherwise_than_their_parameters(ranks, name):
    for rank in ranks:
        spread, plain = rank[f"{name}, placed"]
        torch.testing.assert_close(spread, plain, rtol=1e-11, atol=1e-14)
