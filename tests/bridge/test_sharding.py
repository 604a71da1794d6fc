"""The probe on modules that FSDP2 shards over two processes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_optkit.bridge import sharding
from lightning_optkit.bridge.probe import Probe, select_parameters
from lightning_optkit.bridge.reduce import require_whole_parameters
from lightning_optkit.bridge.sharding import foreign_shard, whole_fits
from tests.bridge.test_probe import Plain, trainer_for
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed


class Net(pl.LightningModule):
    """Uneven shards, tied weights, buffers, and a step that reaches for FSDP itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.tied = nn.Linear(3, 3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(3, 1)
        self.average: Tensor | None = None
        self.breaks = False

    def hidden(self, x: Tensor) -> Tensor:
        return self.again(self.tied(self.body(x)))

    def training_step(self, batch: Tensor) -> Tensor:
        if isinstance(self.head, sharding._FSDPModule):
            self.head.set_requires_gradient_sync(False)
            self.head.unshard(async_op=True).wait()
        if self.average is not None:
            self.average.mul_(0.5)
        if self.breaks:
            raise KeyError("broken step")
        loss = self.head(self.hidden(batch)).square().mean()
        with torch.no_grad():
            self.head.weight.data.clamp_(-1e-3, 1e-3)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def sharded(net: Net) -> Net:
    for part in (net.body[0], [net.tied, net.again], net.head, net):
        fully_shard(part, mesh=mesh())
    register_fsdp_forward_method(net, "hidden")
    return net


def net_and_batch(*, seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net().double(), torch.randn(5, 4, dtype=torch.float64)


def loss_and_gradient(module: Net, batch: Tensor, **options: Any) -> list[Tensor]:
    with Probe(trainer_for(module), module, **options) as probe:
        leaves = {
            name: p.requires_grad_()
            for name, p in probe.parameters(list(select_parameters(module))).items()
        }
        first, second = (probe.loss_fn(batch)(leaves) for _ in range(2))
        return [first.detach(), second.detach(), *torch.autograd.grad(second, [*leaves.values()])]


def trace(module: Net) -> dict[str, Any]:
    """Return what must not change, with this rank's shards."""
    states = [vars(state).copy() for state in sharding._states(module)]
    groups = [
        {key: value for key, value in vars(group).items() if isinstance(value, (bool, str, float))}
        for group in sharding.fsdp_groups(module)
    ]
    return {
        "ids": [[id(p) for p in child._parameters.values()] for child in module.modules()],
        "names": [list(vars(child)) for child in module.modules()],
        "hooks": [
            [list(child._forward_pre_hooks.items()), list(child._forward_hooks.items())]
            for child in module.modules()
        ],
        "states": states,
        "groups": groups,
        "gathered": [not isinstance(p, DTensor) for p in module.parameters()],
    }


def values(module: Net) -> list[Tensor]:
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return [tensor.detach().clone() for tensor in [*shards, *module.buffers()]]


def facts() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    plain, batch = net_and_batch()
    module = sharded(copy.deepcopy(plain))
    found: dict[str, Any] = {"rows": [p.to_local().shape[0] for p in module.parameters()]}

    module.average = distribute_tensor(torch.ones(3), mesh(), [Shard(0)])
    for state in ("fresh", "sharded", "gathered"):
        module.eval()  # BatchNorm's statistics stay
        if state == "sharded":
            module.head(module.hidden(batch)).sum().backward()
        if state == "gathered":
            with torch.no_grad():
                module.hidden(batch)  # FSDP leaves the outermost group gathered
        module.train()
        before, value_before = trace(module), values(module)
        found[state] = {
            mode: loss_and_gradient(module, batch, mode=mode) for mode in ("eval", "train")
        }
        found[state]["gathered"] = sum(before["gathered"])
        found[state]["same"] = trace(module) == before
        found[state]["same values"] = all(map(torch.equal, values(module), value_before))
        found[state]["average"] = module.average.to_local().clone()

    module.breaks, before = True, trace(module)
    with pytest.raises(KeyError, match="broken step"):
        loss_and_gradient(module, batch)
    found["same after an error"] = trace(module) == before

    half = Plain()
    fully_shard(half.net, mesh=mesh(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    found["kept"] = half.net.weight.full_tensor()
    with torch.no_grad():
        half.net(torch.ones(2, 3))  # gathered, in bfloat16
    with Probe(trainer_for(half), half) as probe:
        found["measured"] = probe.parameters(["net.weight"])["net.weight"]

    found["foreign"] = [foreign_shard(module)]
    module.lone = nn.Parameter(module.average)
    found["foreign"].append(foreign_shard(module))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_in_two_processes(facts, tmp_path_factory.mktemp("facts"))


STATES = ["fresh", "sharded", "gathered"]


@pytest.fixture(scope="module")
def truth():
    module, batch = net_and_batch()
    return {mode: loss_and_gradient(module, batch, mode=mode) for mode in ("eval", "train")}


def test_shards_are_uneven_and_empty(found):
    rows = list(zip(found[0]["rows"], found[1]["rows"], strict=True))
    assert (2, 1) in rows
    assert (1, 0) in rows
    assert found[0]["gathered"]["gathered"] > 0
    assert found[0]["sharded"]["gathered"] == 0


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_loss_and_gradient_are_those_of_the_plain_module(found, truth, state, mode):
    for rank in found:
        torch.testing.assert_close(rank[state][mode], truth[mode], rtol=1e-12, atol=1e-14)
        assert torch.equal(rank[state][mode][0], rank[state][mode][1])  # the step clamps weights
    assert not torch.equal(truth["eval"][0], truth["train"][0])


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_left_behind(found, state):
    for rank in found:
        assert rank[state]["same"]
        assert rank[state]["same values"]
        assert bool((rank[state]["average"] == 1).all())
        assert rank["same after an error"]


def test_parameters_are_those_of_the_optimizer_not_the_rounded_ones_in_use(found):
    for rank in found:
        assert not torch.equal(rank["kept"], rank["kept"].bfloat16().float())
        assert torch.equal(rank["measured"], rank["kept"])


# -- what is refused ----------------------------------------------------------------------------


def test_dtensors_that_are_not_of_fsdp_are_named(found):
    assert found[0]["foreign"] == [None, "lone"]


def model_parallel(module: nn.Module, *, tensor_parallel_size: int = 1) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy()
    size = SimpleNamespace(size=lambda: tensor_parallel_size)
    strategy._device_mesh = {"tensor_parallel": size}  # type: ignore[assignment]
    strategy._model = module  # type: ignore[attr-defined]
    return strategy


def test_data_parallel_modules_are_taken():
    require_whole_parameters(model_parallel(Net()), "HessianSpectrum")


def test_tensor_parallelism_is_refused():
    with pytest.raises(MisconfigurationException, match="`tensor_parallel_size` to be 1, got 2"):
        require_whole_parameters(model_parallel(Net(), tensor_parallel_size=2), "HessianSpectrum")


def test_parallelized_layers_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_optkit.bridge.reduce.foreign_shard", lambda module: "head.bias")
    with pytest.raises(MisconfigurationException, match=r"`head\.bias` is a DTensor"):
        require_whole_parameters(model_parallel(Net()), "HessianSpectrum")


def test_first_fsdp_is_refused():
    with pytest.raises(MisconfigurationException, match="`FSDPStrategy` may shard"):
        require_whole_parameters(object.__new__(FSDPStrategy), "HessianSpectrum")


# -- what fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "fits"), [(10 * 4 * 7 * 2, True), (10 * 4 * 7 * 2 - 1, False), (None, True)]
)
def test_whole_parameters_fit_into_half_of_the_free_memory(monkeypatch, free, fits):
    monkeypatch.setattr(sharding, "_free_bytes", lambda device, *, ranks: free)
    answers: list[bool] = []
    strategy = SimpleNamespace(root_device=None, reduce_boolean_decision=answers.append)
    trainer = SimpleNamespace(strategy=strategy, num_devices=2)
    half = nn.Linear(9, 1, dtype=torch.bfloat16)  # 10 parameters, measured in float32
    assert whole_fits(trainer, half, num_vectors=3) is None  # type: ignore[arg-type]
    assert answers == [fits]


def test_ranks_share_the_memory_of_their_host():
    alone = sharding._free_bytes(torch.device("cpu"), ranks=1)
    if alone is None:
        pytest.skip("free memory is unknown on this platform")
    shared = sharding._free_bytes(torch.device("cpu"), ranks=4)
    assert shared is not None
    assert 0.2 < shared / alone < 0.3
    assert alone > 2**20
