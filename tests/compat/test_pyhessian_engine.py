"""The installed PyHessian as an engine: its own numbers, without its crashes and traces."""

import math
import random
import statistics
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.compat.pyhessian_engine import check_pyhessian, pyhessian_spectrum
from lightning_optkit.measures import CurvatureError, HessianOperator, hessian_spectrum
from lightning_optkit.measures.spectrum import Spectrum
from tests.quadratics import SPECTRA, Quadratic, random_params, symmetric

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    installed = pytest.importorskip("pyhessian").hessian


def problem(dtype=torch.float32):
    """Return a net and its uneven batches."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.7
    x = torch.randn(30, 4, generator=generator).to(dtype)
    y = (x[:, 0] * 2 + x[:, 1]).long().remainder(3)
    return net.to(dtype), [(x[:21], y[:21]), (x[21:], y[21:])]


def losses(net, batches):
    return [lambda p, x=x, y=y: cross_entropy(functional_call(net, p, (x,)), y) for x, y in batches]


def measured(dtype=torch.float32, **settings):
    net, batches = problem(dtype)
    params = dict(net.named_parameters())
    return pyhessian_spectrum(losses(net, batches), params, [21, 9], **settings)


def old_eig(matrix, eigenvectors):
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
def test_numbers_are_pyhessians_own(monkeypatch):
    net, batches = problem()
    found = measured(num_matvecs=20, num_probes=3, seed=5)
    torch.manual_seed(5)
    peer = installed(net, cross_entropy, dataloader=batches, cuda=False)
    values, _ = peer.eigenvalues()
    traces = peer.trace()
    monkeypatch.setattr(torch, "eig", old_eig)
    nodes, weights = peer.density(iter=20, n_v=3)
    assert found.top_eigenvalue == pytest.approx(values[0], rel=1e-5)
    assert found.lambda_max == found.top_eigenvalue
    assert found.trace == pytest.approx(statistics.fmean(traces), rel=1e-4)
    torch.testing.assert_close(
        found.ritz_values, torch.tensor(nodes).double().sort(dim=1).values, rtol=1e-3, atol=1e-4
    )
    pairs = [(t, w) for row in zip(nodes, weights, strict=True) for t, w in zip(*row, strict=True)]
    for share, counts in (
        (found.positive, lambda t: t > found.tol),
        (found.negative, lambda t: t < -found.tol),
        (found.zero, lambda t: abs(t) <= found.tol),
    ):
        assert share.value == pytest.approx(sum(w for t, w in pairs if counts(t)) / 3, abs=1e-4)
        assert share.bounds == (0.0, 1.0)
        assert not share.resolved


def test_numbers_agree_with_the_exact_ones():
    net, batches = problem(torch.float64)
    operator = HessianOperator(losses(net, batches), dict(net.named_parameters()), weights=[21, 9])
    exact = hessian_spectrum(operator)
    found = measured(torch.float64, num_matvecs=500)  # cut to the number of parameters
    assert found.num_params == exact.num_params == found.ritz_values.shape[1]
    assert found.lambda_max == pytest.approx(exact.lambda_max, rel=5e-3)
    # its unit vectors are too short by 1e-6
    assert found.lambda_min == pytest.approx(exact.lambda_min, rel=1e-5)
    assert found.tol == pytest.approx(exact.tol, rel=1e-2)
    # 51 parameters and one probe: a share of weight has a deviation of sqrt(2 / 51) / 2
    assert found.minimum_ratio == pytest.approx(exact.minimum_ratio, abs=0.3)
    assert isinstance(found, Spectrum)
    assert found.method == "pyhessian"


def test_products_are_counted():
    calls = []
    net, batches = problem()
    first, second = losses(net, batches)

    def counted(params):
        calls.append(1)
        return first(params)

    found = pyhessian_spectrum([counted, second], dict(net.named_parameters()), [21, 9])
    assert found.num_matvecs == len(calls) > 51


def test_a_dominant_negative_eigenvalue_is_lambda_min_with_its_vector():
    matrix = symmetric(SPECTRA["negative"])
    found = pyhessian_spectrum(Quadratic(matrix), random_params((10,)))
    assert found.lambda_min == found.top_eigenvalue == pytest.approx(-9, rel=1e-2)
    assert found.lambda_max == pytest.approx(-0.5, rel=1e-4)
    assert found.spectral_radius == -found.lambda_min
    u = found.lambda_min_vector
    assert float(u @ matrix @ u) == pytest.approx(-9, rel=1e-2)
    assert found.negative_ratio == pytest.approx(1)
    assert found.lambda_max_error == found.lambda_min_error == math.inf


def test_vector_that_pyhessian_does_not_tell_is_nan():
    found = measured()
    assert found.top_eigenvalue > 0 > found.lambda_min
    assert bool(found.lambda_min_vector.isnan().all())


@pytest.mark.parametrize("name", ["zero", "mostly zero", "repeated", "huge and small"])
def test_degenerate_spectra_come_back_finite(name):
    values = SPECTRA[name]
    found = pyhessian_spectrum(Quadratic(symmetric(values)), random_params((10,)))
    assert abs(found.top_eigenvalue) == pytest.approx(max(map(abs, values)), rel=1e-2, abs=1e-12)
    assert found.positive.value + found.negative.value + found.zero.value == pytest.approx(1)
    assert bool(found.density(torch.linspace(-1, 1, 5)).isfinite().all())
    assert found.condition_number == 0  # a lower bound that says nothing
    assert "PyHessian" in found.condition_reason


def test_a_loss_that_seeds_the_stream_does_not_repeat_the_probes():
    net, batches = problem()
    functions = losses(net, batches)

    def seeding(params):
        torch.manual_seed(3)
        return functions[0](params)

    found = pyhessian_spectrum([seeding], dict(net.named_parameters()), num_probes=3)
    plain = pyhessian_spectrum([functions[0]], dict(net.named_parameters()), num_probes=3)
    assert torch.equal(found.ritz_values, plain.ritz_values)
    assert found.trace_standard_error == plain.trace_standard_error > 0
    assert not torch.equal(found.ritz_values[0], found.ritz_values[1])


def test_parameters_without_part_or_with_a_linear_one():
    matrix = symmetric(SPECTRA["distinct"])
    params = random_params((10,), (2,), (3,))

    def loss(p):
        return Quadratic(matrix)({"p0": p["p0"]}) + p["p1"].sum()

    found = pyhessian_spectrum(loss, params, num_matvecs=15)
    assert found.num_params == 15
    assert found.lambda_max == pytest.approx(7, rel=1e-2)
    assert found.lambda_min == pytest.approx(-4, rel=1e-4)


def test_nothing_is_left_behind():
    net, batches = problem()
    params = dict(net.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    eig, stream, python = torch.eig, torch.get_rng_state(), random.getstate()
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyhessian_spectrum(losses(net, batches), params)
    assert torch.eig is eig
    assert torch.equal(torch.get_rng_state(), stream)
    assert random.getstate() == python
    assert torch.get_default_dtype() == torch.float32
    assert net.training
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_torch_is_put_back_after_a_failure(monkeypatch):
    net, batches = problem(torch.float64)
    eig, stream = torch.eig, torch.get_rng_state()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pyhessian_spectrum(losses(net, batches), dict(net.named_parameters()))
    assert torch.eig is eig
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_torch_without_eig_has_none_afterwards(monkeypatch):
    monkeypatch.delattr(torch, "eig")
    assert measured().ritz_values.shape == (1, 51)
    assert not hasattr(torch, "eig")


def test_same_seed_same_numbers():
    first, same, other = measured(seed=1), measured(seed=1), measured(seed=2)
    assert torch.equal(first.ritz_values, same.ritz_values)
    assert not torch.equal(first.ritz_values, other.ritz_values)


def test_absent_pyhessian_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-optkit\[pyhessian\]'"):
        check_pyhessian(num_matvecs=100, num_probes=1, tol_rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol_rel": "auto"}, "`tol_rel` must be a number with the engine 'pyhessian'"),
        ({"num_matvecs": 1}, "`num_matvecs` must be at least 2, got 1"),
        ({"num_probes": 0}, "`num_probes` must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        measured(**settings)


def test_weights_are_one_for_each_batch():
    net, batches = problem()
    with pytest.raises(ValueError, match="`weights` must have one entry for each of the 2 batches"):
        pyhessian_spectrum(losses(net, batches), dict(net.named_parameters()), [1.0])


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(CurvatureError, match="must run in a single process, got 2"):
        measured()


@pytest.mark.parametrize(
    "loss",
    [lambda w: (w / 0).square().sum(), lambda w: (w - 1).sqrt().sum()],
    ids=["infinite", "infinite slope"],
)
def test_a_loss_that_is_not_finite_is_told(loss):
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        pyhessian_spectrum(lambda p: loss(p["w"]), {"w": torch.ones(3)})


def test_a_layer_without_second_derivative_is_named():
    with pytest.raises(CurvatureError, match="no second derivative"):
        pyhessian_spectrum(lambda p: torch.cdist(p["p0"], 2 * p["p0"]).sum(), random_params((3, 2)))
