"""Operators summed over two processes against one process on all samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import (
    GaussNewtonOperator,
    HessianOperator,
    critical_point,
    hessian_spectrum,
    layer_spectra,
    top_eigenpairs,
)
from tests.distributed import run_in_two_processes

pytestmark = pytest.mark.distributed

# Rows of each rank's batches: as a loader of eleven samples leaves them, the last one short.
RANGES = {0: [(0, 4), (4, 8)], 1: [(8, 11)]}
SETTINGS = {"num_matvecs": 12, "num_probes": 2, "exact_below": 0}


def operator_on(ranges, dtype, kind, reduce=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, y = torch.randn(11, 6).to(dtype), torch.randint(0, 3, (11,))

    def loss_on(first, last):
        rows = slice(first, last)
        return lambda p: cross_entropy(functional_call(net, p, (x[rows],)), y[rows])

    return kind(
        [loss_on(*pair) for pair in ranges],
        dict(net.named_parameters()),
        weights=[last - first for first, last in ranges],
        reduce=reduce,
    )


def findings(operator):
    """Return everything that is measured of an operator, as tensors."""
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    product = operator @ vector.to(operator.dtype)
    spectrum = hessian_spectrum(operator, **SETTINGS)
    point = critical_point(operator, spectrum)
    layers = layer_spectra(operator, **SETTINGS)
    top = top_eigenpairs(operator, 2, which="both", rtol=1e-8)
    exact = {"product": product, "top": top.values, "ritz": spectrum.ritz_values[:, [0, -1]]}
    exact |= {"layers": torch.tensor([layer.lambda_max for layer in layers.values()])}
    exact |= {"gradient": torch.tensor([point.gradient_norm, point.flatness])}
    return {name: tensor.detach() for name, tensor in exact.items()}


KINDS = [HessianOperator, GaussNewtonOperator]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}


def of_one_rank():
    torch.distributed.init_process_group("gloo")
    ranges, sums = RANGES[torch.distributed.get_rank()], []

    def reduce(tensor):
        sums.append(tensor.numel())
        torch.distributed.all_reduce(tensor)
        return tensor

    results = []
    for kind in KINDS:
        for dtype in DTYPES:
            operator = operator_on(ranges, dtype, kind, reduce)
            found = findings(operator)
            sums.clear()
            operator @ torch.ones(operator.shape[0], dtype=dtype)
            results.append((found, list(sums) == [operator.shape[0]]))
    return results


def test_two_processes_find_what_one_does(tmp_path):
    ranks = run_in_two_processes(of_one_rank, tmp_path)
    cases = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
    for (kind, dtype), first, second in zip(cases, *ranks, strict=True):
        alone = findings(operator_on([*RANGES[0], *RANGES[1]], dtype, kind))
        for name, truth in alone.items():
            where = f"{name} of {kind.__name__} in {dtype}"
            assert torch.equal(first[0][name], second[0][name]), where  # so that no loop can part
            error = float((first[0][name] - truth).abs().max())
            assert error <= DTYPES[dtype] * float(truth.abs().max()), f"{where}: {error:.1e}"
        assert first[1]  # one sum a product, of the flat vector
        assert second[1]
