"""Blocks of the Hessian, layer by layer, against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_optkit.measures import HessianOperator, hessian_spectrum, layer_spectra
from lightning_optkit.measures.layers import layers_of
from tests.quadratics import Quadratic, random_params, symmetric


def net_operator(**options) -> HessianOperator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x = torch.randn(9, 3, dtype=torch.float64)
    losses = [
        lambda p, part=part: functional_call(net, p, (part,)).square().mean()
        for part in x.split([5, 4])
    ]
    return HessianOperator(losses, dict(net.named_parameters()), weights=[5, 4], **options)


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
PLACES = dict(zip(NAMES, torch.arange(26).split([12, 4, 8, 2]), strict=True))


def block_of(matrix: Tensor, names: list[str]) -> Tensor:
    places = torch.cat([PLACES[name] for name in names])
    return matrix[places][:, places]


# -- one block ----------------------------------------------------------------------------------


def test_names_are_in_the_order_of_the_vectors():
    operator = net_operator()
    assert operator.names == NAMES
    assert operator.gradient().shape == (26,)
    for i, name in enumerate(NAMES):
        only = operator.restricted([name])
        assert only.names == [name]
        torch.testing.assert_close(only.gradient(), operator.gradient()[PLACES[NAMES[i]]])


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
@pytest.mark.parametrize("names", [["0.weight"], ["2.bias", "0.bias"], NAMES[::-1], set(NAMES)])
def test_a_restricted_operator_is_the_block(names, graphs):
    operator = net_operator(graphs=graphs)
    block = operator.restricted(names)
    ordered = [name for name in NAMES if name in names]  # the operator's order, not the names'
    truth = block_of(operator.dense(), ordered)
    torch.testing.assert_close(block.dense(), truth, rtol=1e-10, atol=1e-14)
    assert block.names == ordered
    assert block.shape == truth.shape
    torch.testing.assert_close(block.loss(), operator.loss(), rtol=0, atol=0)
    assert block.total_weight == operator.total_weight == 9
    assert block.works_in_blocks == operator.works_in_blocks


def test_a_block_follows_parameters_outside_it():
    """The graph of a block is stale too where a parameter that it holds has moved."""
    a = nn.Parameter(torch.tensor([3.0]).double())
    b = nn.Parameter(torch.ones(2).double())
    operator = HessianOperator(lambda p: p["a"].square() * p["b"].square().sum(), {"a": a, "b": b})
    block = operator.restricted(["b"])
    ones = torch.ones(2).double()
    assert (block @ ones).tolist() == [18, 18]
    with torch.no_grad():
        a.mul_(2)
    assert (block @ ones).tolist() == [72, 72]
    a.data = torch.ones(1).double()
    assert (block @ ones).tolist() == [2, 2]
    assert a.grad is None


def test_a_block_of_a_block_is_a_block():
    operator = net_operator()
    inner = operator.restricted(NAMES[:3]).restricted(["2.weight", "2.bias"])
    truth = block_of(operator.dense(), ["2.weight"])
    torch.testing.assert_close(inner.dense(), truth, rtol=1e-10, atol=1e-14)
    # what the first block held moves with the parameters too
    assert inner.names == ["2.weight"]


def test_a_block_is_checked_once_if_at_all():
    operator = net_operator()
    before = operator.restricted(["2.bias"])
    before @ torch.ones(2).double()
    assert before.num_matvecs == 1 + 2
    operator @ torch.ones(26).double()
    after = operator.restricted(["2.bias"])
    after @ torch.ones(2).double()
    assert after.num_matvecs == 1
    operator.noise = 0.125  # as the check finds it near convergence
    assert operator.restricted(["2.bias"]).noise == 0.125


def test_a_block_reduces_over_processes_as_the_whole():
    operator = net_operator(reduce=lambda tensor: 2 * tensor)
    assert operator.total_weight == 18
    block = operator.restricted(["2.weight"])
    assert block.total_weight == 18
    truth = block_of(net_operator().dense(), ["2.weight"])
    torch.testing.assert_close(block.dense(), truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("names", [[], ["3.weight"], ["weight"]])
def test_names_of_no_parameter_are_refused(names):
    with pytest.raises(ValueError, match=r"`names` must hold a parameter.*begin with: 0\.weight"):
        net_operator().restricted(names)


# -- all layers ---------------------------------------------------------------------------------


def test_layers_are_the_modules_that_own_the_parameters():
    names = ["a.0.weight", "a.0.bias", "scale", "a.1.weight", "b", "a.0.extra"]
    assert layers_of(names) == {
        "a.0": ["a.0.weight", "a.0.bias", "a.0.extra"],
        "scale": ["scale"],
        "a.1": ["a.1.weight"],
        "b": ["b"],
    }
    assert layers_of([]) == {}


@pytest.mark.parametrize("options", [{}, {"exact_below": 0}], ids=["exact", "lanczos"])
def test_the_spectra_are_those_of_the_blocks(options):
    operator = net_operator()
    dense = operator.dense()
    whole = hessian_spectrum(operator)
    found = layer_spectra(operator, **options)
    assert list(found) == ["0", "2"]
    for layer, names in layers_of(NAMES).items():
        truth = torch.linalg.eigvalsh(block_of(dense, names))
        spectrum = found[layer]
        noise = spectrum.noise
        assert spectrum.num_params == len(truth)
        assert spectrum.lambda_max == pytest.approx(float(truth[-1]), rel=1e-9)
        assert abs(spectrum.lambda_min - float(truth[0])) <= spectrum.lambda_min_error + noise
        assert spectrum.lambda_max <= whole.lambda_max + noise  # interlacing
        assert spectrum.lambda_min >= whole.lambda_min - noise
        positive = float((truth > spectrum.tol).double().mean())
        assert spectrum.positive.lower <= positive <= spectrum.positive.upper
        if not options:
            assert spectrum.trace == pytest.approx(float(truth.sum()), rel=1e-10)
    if not options:
        assert sum(s.trace for s in found.values()) == pytest.approx(whole.trace, rel=1e-10)


def test_layers_may_be_given():
    operator = HessianOperator(
        Quadratic(symmetric([1.0, 2.0, 3.0, 4.0])), random_params((2,), (1,), (1,))
    )
    operator @ torch.ones(4).double()  # checked
    found = layer_spectra(operator, layers={"all": ["p0", "p1", "p2"], "last": ["p2"]})
    assert found["all"].ritz_values[0].tolist() == pytest.approx([1, 2, 3, 4])
    last = float(operator.dense()[3, 3])
    assert found["last"].lambda_max == found["last"].lambda_min == pytest.approx(last)
    assert found["last"].num_matvecs == 1


def test_a_layer_without_a_part_has_zeros():
    params = {"a.weight": torch.ones(2).double(), "dead.weight": torch.ones(3).double()}
    operator = HessianOperator(lambda p: p["a.weight"].square().sum(), params)
    found = layer_spectra(operator)
    assert found["a"].lambda_max == 2
    assert (found["dead"].zero_ratio, found["dead"].trace) == (1, 0)


def test_settings_are_the_same_for_each_and_refused_alike():
    with pytest.raises(ValueError, match="`num_probes` must be at least 1"):
        layer_spectra(net_operator(), num_probes=0)
