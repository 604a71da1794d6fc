"""FSDP2's own backward at moved shards, and differences of it, on two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_optkit.bridge.cadence import Cadence
from lightning_optkit.bridge.held_batches import HeldBatch
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, select_parameters
from lightning_optkit.bridge.sharded_gradient import (
    rank_generator,
    require_shards,
    sharded_gradient,
)
from lightning_optkit.bridge.sharding import fsdp_groups
from lightning_optkit.measures import HessianOperator
from lightning_optkit.measures.finite_difference import FiniteDifferenceOperator
from lightning_optkit.measures.lanczos import lanczos
from lightning_optkit.measures.quadrature import gauss
from tests.bridge.test_probe import Plain, trainer_for
from tests.bridge.test_sharding import Net, mesh, sharded, trace, values
from tests.callbacks.test_hessian_spectrum_fsdp import ShardedClassifier, ShardedGAN, trained
from tests.contracts import assert_same
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed


class Smooth(Net):
    """Without the steps that the other tests need."""

    def training_step(self, batch: Tensor) -> Tensor:
        if isinstance(self.head, nn.Module) and hasattr(self.head, "set_requires_gradient_sync"):
            self.head.set_requires_gradient_sync(False)
        if self.breaks:
            raise KeyError("broken step")
        return (self.head(self.hidden(batch)) - batch.sum(1)[:, None]).square().mean()


def two_ranks(module: pl.LightningModule) -> pl.Trainer:
    """Return a Trainer of two ranks as the probe finds it, without training."""
    trainer = trainer_for(module)
    trainer.strategy.world_size = 2
    trainer.strategy.global_rank = torch.distributed.get_rank()
    return trainer


def module_and_batches() -> tuple[Smooth, list[list[HeldBatch]]]:
    """Return 10 samples in two batches for one rank, 4 in one for the other."""
    torch.manual_seed(0)
    module = Smooth().double()
    x = torch.randn(14, 4, dtype=torch.float64)
    return module, [[HeldBatch(x[:7], 7), HeldBatch(x[7:10], 3)], [HeldBatch(x[10:], 4)]]


def own_part(vector: Tensor, module: nn.Module, rank: int) -> Tensor:
    """Return the rank's shards of a flat vector over all parameters, flat."""
    pieces = vector.split([p.numel() for p in module.parameters()])
    shards = []
    for piece, p in zip(pieces, module.parameters(), strict=True):
        rows = piece.view(p.shape).chunk(2)
        shards.append(rows[rank].reshape(-1) if rank < len(rows) else piece[:0])
    return torch.cat(shards)


def exact() -> HessianOperator:
    module, batches = module_and_batches()
    held = [batch for rank in batches for batch in rank]
    with Probe(trainer_for(module), module) as probe:
        return HessianOperator(
            [probe.loss_fn(each.batch) for each in held],
            probe.parameters(list(select_parameters(module))),
            weights=[each.num_samples for each in held],
            graphs="cached",
            self_check=False,
        )


def facts() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    plain, batches = module_and_batches()
    rank = torch.distributed.get_rank()
    n = sum(p.numel() for p in plain.parameters())
    vectors = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module = sharded(copy.deepcopy(plain))
    trainer = two_ranks(module)
    names = list(select_parameters(module))
    found: dict[str, Any] = {}

    module.head.set_requires_gradient_sync(False)  # a step of accumulation is under way
    module.eval()
    module.head(module.hidden(batches[rank][0].batch)).sum().backward()
    with torch.no_grad():
        module.hidden(batches[rank][0].batch)  # the outermost group is gathered
    module.train()
    hooked: list[Any] = []
    module.tied.bias.register_post_accumulate_grad_hook(hooked.append)

    def state() -> dict[str, Any]:
        gradients = [p.grad for p in module.parameters()]
        pending = [getattr(p, "_unsharded_param", p).grad for p in sharding_parameters(module)]
        return {
            "trace": trace(module),
            "values": [v.tolist() for v in values(module)],
            "gradients": [None if g is None else g.to_local().tolist() for g in gradients],
            "ids": [id(g) for g in gradients],
            "pending": [None if g is None else g.tolist() for g in pending],
        }

    before = state()
    found["pending"] = sum(g is not None for g in before["pending"])
    with (
        Probe(trainer, module) as probe,
        sharded_gradient(trainer, module, probe, names=names, held=batches[rank]) as gradient,
    ):
        operator = FiniteDifferenceOperator(
            gradient.functions,
            gradient.parameters,
            weights=gradient.weights,
            inner_sum=gradient.inner_sum,
            step=1e-5,
        )
        found |= {"shape": operator.shape, "samples": operator.total_weight}
        found["here"] = operator.loss(), operator.gradient()
        offset = own_part(vectors[:, 0], plain, rank)
        found["moved"] = operator.loss(offset), operator.gradient(offset)
        found["norm"] = operator.parameter_norm()
        found["noise"] = operator.gradient_noise()
        found["products"] = operator @ own_part_of_columns(vectors, plain, rank)
        start = own_part_of_columns(vectors[:, :2], plain, rank).T
        found["given"] = lanczos(operator, 6, start=start)
        found["drawn"] = lanczos(operator, 6, generator=rank_generator(trainer, 0))
        found["start"] = torch.randn(4, generator=rank_generator(trainer, 0))
        module.breaks = True
        with pytest.raises(KeyError, match="broken step"):
            operator.gradient()
        module.breaks = False
        found["after an error"] = operator.gradient()
    after = state()
    found["same"] = {key: before[key] == after[key] for key in before}
    found["hooked"] = len(hooked)
    return found


def sharding_parameters(module: nn.Module) -> list[Any]:
    return [p for group in fsdp_groups(module) for p in group.fsdp_params]


def own_part_of_columns(vectors: Tensor, module: nn.Module, rank: int) -> Tensor:
    return torch.stack([own_part(v, module, rank) for v in vectors.T], dim=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_in_two_processes(facts, tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def truth():
    return exact()


def columns() -> Tensor:
    n = sum(p.numel() for p in module_and_batches()[0].parameters())
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_loss_and_gradient_are_those_of_all_samples(found, truth):
    plain, _ = module_and_batches()
    offset = columns()[:, 0]
    for rank, facts_of_rank in enumerate(found):
        close = {"rtol": 1e-10, "atol": 1e-12}
        for key, at in (("here", None), ("moved", offset)):
            loss, gradient = facts_of_rank[key]
            torch.testing.assert_close(loss, truth.loss(at), **close)
            part = own_part(truth.gradient(at), plain, rank)
            torch.testing.assert_close(gradient, part, **close)
        assert facts_of_rank["shape"] == truth.shape
        assert facts_of_rank["samples"] == 14
        assert facts_of_rank["norm"] == pytest.approx(truth.parameter_norm(), rel=1e-12)
        assert facts_of_rank["noise"] > 0
        torch.testing.assert_close(facts_of_rank["after an error"], facts_of_rank["here"][1])


def test_products_are_those_of_the_exact_hessian(found, truth):
    plain, _ = module_and_batches()
    product = truth @ columns()
    for rank, facts_of_rank in enumerate(found):
        error = facts_of_rank["products"] - own_part_of_columns(product, plain, rank)
        assert float(error.abs().max()) < 1e-7 * float(product.abs().max())


def test_lanczos_on_shards_is_that_on_whole_vectors(found, truth):
    whole = lanczos(truth, 6, start=columns()[:, :2].T)
    for facts_of_rank in found:
        given = facts_of_rank["given"]
        torch.testing.assert_close(given.diagonal, whole.diagonal, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(given.off_diagonal, whole.off_diagonal, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(given.start_norms, whole.start_norms, rtol=1e-12, atol=0)
        assert given.size == truth.shape[0]


def test_ranks_agree_bit_for_bit_and_draw_apart(found):
    for key in ("given", "drawn"):
        assert torch.equal(found[0][key].diagonal, found[1][key].diagonal)
        assert torch.equal(found[0][key].off_diagonal, found[1][key].off_diagonal)
    assert not torch.equal(found[0]["start"], found[1]["start"])


def test_nothing_is_left_behind(found):
    for facts_of_rank in found:
        assert facts_of_rank["pending"] > 0
        assert facts_of_rank["hooked"] == 0
        assert all(facts_of_rank["same"].values()), facts_of_rank["same"]


# -- through training ---------------------------------------------------------------------------


class Differences(Observer[float]):
    """The largest eigenvalue, by differences of FSDP2's own gradients."""

    def __init__(self) -> None:
        super().__init__(
            topic="optkit-hessian", cadence=Cadence(every_n_steps=1), num_batches=1, loss_index=0
        )

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe) -> float:
        with sharded_gradient(
            trainer,
            pl_module,
            probe,
            names=self.parameter_names(pl_module),
            held=self.held_batches,
        ) as gradient:
            operator = FiniteDifferenceOperator(
                gradient.functions,
                gradient.parameters,
                weights=gradient.weights,
                inner_sum=gradient.inner_sum,
                step=1e-4,
            )
            run = lanczos(operator, 2, generator=rank_generator(trainer, 0))
            return float(gauss(*run.lanes()[0])[0][-1])

    def scalars(self, result: float) -> dict[str, float]:
        return {"lambda_max": result}


def train_with_and_without(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for i, make in enumerate((ShardedClassifier, ShardedGAN)):
        runs = []
        for name, callbacks in (("without", []), ("with", [Differences()])):
            pl.seed_everything(5, verbose=False)
            runs.append(trained(make(), callbacks, folder / f"{name}{i}", max_steps=4))
        pairs.append((runs[0], runs[1]))
    return pairs


def test_training_is_bit_identical(tmp_path):
    for pairs in run_in_two_processes(train_with_and_without, tmp_path, tmp_path):
        for without, with_it in pairs:
            assert_same(without, with_it)
    for i in range(2):
        log = (tmp_path / f"with{i}" / "csv" / "version_0" / "metrics.csv").read_text()
        assert "optkit-hessian/lambda_max" in log


# -- what is refused ----------------------------------------------------------------------------


def test_parameters_that_are_held_whole_are_refused():
    with pytest.raises(MisconfigurationException, match=r"`net\.weight` must be sharded"):
        require_shards(Plain(), ["net.weight"])


def test_half_precision_is_refused(tmp_path):
    for message in run_in_two_processes(refusal_of_half_precision, tmp_path):
        assert "need float32 or float64 throughout, got torch.bfloat16" in message


def refusal_of_half_precision() -> str:
    torch.distributed.init_process_group("gloo")
    module = Plain()
    fully_shard(module.net, mesh=mesh(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with pytest.raises(MisconfigurationException) as refused:
        require_shards(module, ["net.weight"])
    return str(refused.value)
