"""What cannot be differentiated twice is refused with the way out; other errors pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_optkit.measures import CurvatureError, HessianOperator
from lightning_optkit.measures.gradient_graph import flat, split

W = {"w": torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)}


@pytest.mark.parametrize("k", [1, 2])
def test_a_layer_without_a_second_derivative_is_refused_with_the_way_out(k):
    op = HessianOperator(lambda p: torch.cdist(p["w"], p["w"].sin()).square().sum(), W)
    with pytest.raises(CurvatureError, match=r"no second derivative \(.*_cdist_backward.*MATH"):
        op @ torch.ones(6, k, dtype=torch.float64)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_a_plain_call(use_reentrant):
    """Recomputed at each product it would need the module as it was at the first."""
    op = HessianOperator(
        lambda p: checkpoint(torch.tanh, p["w"], use_reentrant=use_reentrant).sum(), W
    )
    plain = HessianOperator(lambda p: torch.tanh(p["w"]).sum(), W)
    ones = torch.ones(6, dtype=torch.float64)
    assert torch.equal(op @ ones, plain @ ones)


class Raises(torch.autograd.Function):
    """Raises what it is told to in its backward."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ctx.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory: double backward is not implemented for poor men"),
        RuntimeError("something else"),
        ValueError("not even a RuntimeError"),
    ],
)
def test_other_errors_pass_as_they_are(error):
    op = HessianOperator(lambda p: Raises.apply(p["w"], error).sum(), W)
    with pytest.raises(type(error), match=str(error)) as raised:
        op @ torch.ones(6, dtype=torch.float64)
    assert not isinstance(raised.value, CurvatureError)


class HungryInBatches(torch.autograd.Function):
    """Runs out of memory in a batched backward; one by one it would not."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        if torch._C._functorch.is_legacy_batchedtensor(g):
            raise torch.OutOfMemoryError("out of memory")
        return HungryInBatches.apply(g)


def test_memory_that_runs_out_in_a_batch_is_not_hidden():
    op = HessianOperator(lambda p: HungryInBatches.apply(p["w"]).sin().sum(), W, self_check=False)
    op @ torch.ones(6, dtype=torch.float64)
    with pytest.raises(torch.OutOfMemoryError):
        op @ torch.ones(6, 2, dtype=torch.float64)


def test_split_and_flat_are_inverse_and_keep_each_dtype():
    params = {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.float64), "c": torch.ones(4)}
    vector = torch.arange(11.0, dtype=torch.float64)
    pieces = split(vector, params)
    assert [p.shape for p in pieces] == [p.shape for p in params.values()]
    assert [p.dtype for p in pieces] == [torch.float32, torch.float64, torch.float32]
    assert torch.equal(flat(pieces, params), vector)
    assert flat(pieces[::2], {"a": params["a"], "c": params["c"]}).dtype == torch.float32
