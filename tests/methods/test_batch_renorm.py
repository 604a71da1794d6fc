"""Batch renormalization against the paper's algorithm written out, and against BatchNorm."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_optkit.methods.batch_renorm import BatchRenorm

AT_ONCE = {"relax_from": 0, "r_max_at": 0, "d_max_at": 0}
FREE = {"r_max": math.inf, "d_max": math.inf} | AT_ONCE
SHAPES = [(6, 3), (4, 3, 5), (3, 3, 4, 2), (2, 3, 2, 3, 2)]


def drawn(*shape, seed=0, dtype=torch.float64):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 + 3 * values).to(dtype)


def made(**options):
    """Return a layer with γ, β and running statistics that are all different."""
    layer = BatchRenorm(3, dtype=torch.float64, **options)
    with torch.no_grad():
        if layer.affine:
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([-1.0, 0.0, 3.0]))
        layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.running_var.copy_(torch.tensor([4.0, 9.0, 0.25]))
    return layer


def renormalised(x, gamma, beta, mu, sigma, *, eps, r_max, d_max):
    """Return Algorithm 1 of the paper, with its own r and d, and the batch's mean and deviation."""
    dims = [0, *range(2, x.ndim)]
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean = x.mean(dims)
    deviation = (eps + (x - mean.view(shape)).square().mean(dims)).sqrt()
    r = (deviation / sigma).clamp(1 / r_max, r_max).detach()
    d = ((mean - mu) / sigma).clamp(-d_max, d_max).detach()
    normalised = (x - mean.view(shape)) / deviation.view(shape) * r.view(shape) + d.view(shape)
    return gamma.view(shape) * normalised + beta.view(shape), mean.detach(), deviation.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (math.inf, math.inf)]
)
def test_it_is_the_algorithm_of_the_paper(shape, r_max, d_max):
    layer = made(eps=0.01, momentum=0.3, r_max=r_max, d_max=d_max, **AT_ONCE)
    gamma, beta = (p.detach().clone().requires_grad_() for p in layer.parameters())
    mu = layer.running_mean.clone()
    sigma = (layer.running_var + 0.01).sqrt()
    for step in range(4):
        x = drawn(*shape, seed=step).requires_grad_()
        again = x.detach().clone().requires_grad_()
        weights = drawn(*shape, seed=step + 10)
        found = layer(x)
        expected, mean, deviation = renormalised(
            again, gamma, beta, mu, sigma, eps=0.01, r_max=r_max, d_max=d_max
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-10)
        mu, sigma = mu + 0.3 * (mean - mu), sigma + 0.3 * (deviation - sigma)
        torch.testing.assert_close(layer.running_mean, mu, rtol=1e-12, atol=0)
        torch.testing.assert_close((layer.running_var + 0.01).sqrt(), sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.weight.grad, gamma.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, beta.grad, rtol=1e-9, atol=1e-10)
    assert layer.num_batches_tracked == 4
    x = drawn(*shape, seed=20)
    shape = (1, -1, *[1] * (x.ndim - 2))
    expected = (x - mu.view(shape)) / sigma.view(shape) * gamma.view(shape) + beta.view(shape)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"r_max": 1, "d_max": 0}, {}], ids=["limits", "schedule"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_limits_1_and_0_it_is_batch_norm(shape, options):
    layer = made(**options).float()
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    plain = kind(3)
    plain.load_state_dict(layer.state_dict())
    inputs = [drawn(*shape, dtype=torch.float32).requires_grad_() for _ in range(2)]
    outputs = [each(x) for each, x in zip((layer, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-7)
    for output in outputs:
        output.pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-7)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_limits_training_gives_what_evaluation_does(shape):
    layer = made(**FREE)
    for step in range(3):
        x = drawn(*shape, seed=step)
        torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=1e-12, atol=1e-12)
    single = layer.float()
    x = drawn(*shape, seed=9, dtype=torch.float32)
    torch.testing.assert_close(single.eval()(x), single.train()(x), rtol=1e-5, atol=1e-5)


def limits(layer, batch):
    """Return the limits of r and d in the training batch of this number, 1 for the first."""
    layer.num_batches_tracked.fill_(batch - 1)
    layer.running_mean.fill_(0)
    layer.running_var.fill_(1)
    far = 1000 + 100 * drawn(64, 3)
    y = layer(far)
    return float(y.std(0, correction=0)[0].detach()), float(y.mean(0)[0].detach())


def test_the_schedule_is_the_papers():
    layer = BatchRenorm(3, dtype=torch.float64)
    for batch, r_max, d_max in [
        (1, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (90_000, 3, 5),
    ]:
        assert limits(layer, batch) == pytest.approx((r_max, d_max), rel=1e-4)
    assert limits(layer, 5_001)[1] == pytest.approx(5 / 20_000, rel=1e-6)


def test_a_schedule_of_one_batch_and_one_that_ends_as_it_begins():
    layer = BatchRenorm(3, dtype=torch.float64, relax_from=2, r_max_at=2, d_max_at=3)
    assert limits(layer, 2) == pytest.approx((1, 0), abs=1e-3)
    assert limits(layer, 3) == pytest.approx((3, 5), rel=1e-3)
    layer = BatchRenorm(3, dtype=torch.float64, **AT_ONCE)
    assert limits(layer, 1) == pytest.approx((3, 5), rel=1e-3)


def test_an_infinite_limit_with_a_schedule_opens_at_once():
    options = {"r_max": math.inf, "d_max": math.inf, "relax_from": 2}
    layer = BatchRenorm(3, dtype=torch.float64, **options)
    assert limits(layer, 2) == pytest.approx((1, 0), abs=1e-3)
    assert limits(layer, 3)[1] > 900


def test_checkpoints_pass_to_batch_norm_and_back():
    layer, plain = made(), nn.BatchNorm2d(3).double()
    layer(drawn(4, 3, 2, 2))
    plain.load_state_dict(layer.state_dict())
    x = drawn(4, 3, 2, 2, seed=1)
    assert torch.equal(plain.eval()(x), layer.eval()(x))
    other = BatchRenorm(3, dtype=torch.float64)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.eval()(x), layer(x))
    assert other.num_batches_tracked == 1


def test_without_momentum_the_statistics_are_means_over_batches():
    layer = BatchRenorm(3, momentum=None, eps=0.01, dtype=torch.float64)
    batches = [drawn(5, 3, seed=seed) for seed in range(3)]
    for x in batches:
        layer(x)
    means = torch.stack([x.mean(0) for x in batches])
    deviations = torch.stack([(x.var(0, correction=0) + 0.01).sqrt() for x in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    torch.testing.assert_close((layer.running_var + 0.01).sqrt(), deviations.mean(0))


def test_without_gamma_and_beta():
    layer, plain = made(affine=False, **FREE), made(**FREE)
    with torch.no_grad():
        plain.weight.fill_(1)
        plain.bias.fill_(0)
    x = drawn(4, 3)
    torch.testing.assert_close(layer(x), plain(x))
    assert list(layer.parameters()) == []


def test_gamma_alone():
    layer = made(**FREE)
    layer.bias = None
    x = drawn(4, 3)
    expected = made(**FREE)(x) - torch.tensor([-1.0, 0.0, 3.0])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_is_normalised_by_statistics_in_single(parameters):
    x = drawn(32, 3, 4, 4).to(torch.bfloat16)
    layer = made(**FREE).to(parameters)
    reference = made(**FREE).to(parameters).float()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference(x.float()), rtol=2e-2, atol=2e-2)
    exactness = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[parameters]
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(layer, name).float(), getattr(reference, name), rtol=exactness, atol=exactness
        )
    assert layer.running_mean.dtype == parameters


def test_a_constant_channel_keeps_a_variance_of_at_least_zero():
    below = 0
    for eps in [k * 1e-6 for k in range(1, 30)]:
        layer = BatchRenorm(1, momentum=1.0, eps=eps)
        layer(torch.full((4, 1), 0.1))
        assert 0 <= float(layer.running_var) < 1e-9
        below += bool((torch.tensor(0.0) + eps).sqrt().square() - eps < 0)
    assert below  # of which rounding alone would have made a negative one


def test_it_is_copied_and_pickled_after_a_batch():
    layer = made(**AT_ONCE)
    layer(drawn(4, 3))
    x = drawn(4, 3, seed=1)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), copy.deepcopy(layer)(x))
    assert "r_max=3.0, d_max=5.0, relax_from=0" in repr(layer)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r_max": 0.5}, "`r_max` must be a number of at least 1, got 0.5"),
        ({"r_max": True}, "`r_max` must be a number of at least 1, got True"),
        ({"r_max": math.nan}, "`r_max` must be a number"),
        ({"d_max": -1.0}, "`d_max` must be a number of at least 0, got -1.0"),
        ({"d_max": "5"}, "`d_max` must be a number"),
        ({"relax_from": -1}, "`relax_from` must be a number of training batches of at least 0"),
        ({"relax_from": 1.5}, "`relax_from` must be a number of training batches"),
        (
            {"r_max_at": 4_999},
            "`r_max_at` must be a number of training batches of at least 5000, where",
        ),
        ({"d_max_at": 10, "relax_from": 11}, "`d_max_at` must be .* of at least 11"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        BatchRenorm(3, **options)


def test_inputs_that_cannot_be_normalised_are_refused():
    with pytest.raises(ValueError, match=r"`input` must have the shape \(N, C, ...\), got \(3,\)"):
        BatchRenorm(3)(torch.zeros(3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        BatchRenorm(3)(torch.zeros(1, 3))
