"""Ghost batch normalization against BatchNorm over its chunks."""

import pytest
import torch
from torch import nn

from lightning_optkit.methods.ghost_batch_norm import GhostBatchNorm, chunk_sizes

SHAPES = [(), (5,), (4, 2), (2, 3, 2)]


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def made(**options):
    layer = GhostBatchNorm(3, dtype=torch.float64, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([-1.0, 0.0, 3.0]))
    return layer


def plain_of(layer, shape):
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape)]
    plain = kind(3, layer.eps, layer.momentum, layer.affine, layer.track_running_stats).double()
    plain.load_state_dict(layer.state_dict())
    return plain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_samples", [8, 10, 9, 11], ids=str)
def test_each_chunk_is_normalised_as_batch_norm_does(num_samples, shape):
    layer = made(chunk_size=4)
    x = drawn(num_samples, 3, *shape).requires_grad_()
    again = x.detach().clone().requires_grad_()
    sizes = {8: [4, 4], 10: [4, 4, 2], 9: [4, 5], 11: [4, 4, 3]}[num_samples]
    assert chunk_sizes(num_samples, 4) == sizes
    plain = plain_of(layer, shape)
    expected = torch.cat([plain(chunk) for chunk in again.split(sizes)])
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for output in (found, expected):
        (output * drawn(*x.shape, seed=1)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-10, atol=1e-10)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None], ids=str)
def test_running_statistics_take_in_means_over_chunks_weighted_by_samples(momentum):
    layer = made(chunk_size=4, momentum=momentum)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step, num_samples in enumerate((10, 9, 3), start=1):
        x = drawn(num_samples, 3, 2, seed=step)
        layer(x)
        chunks = x.split(chunk_sizes(num_samples, 4))
        share = 1 / step if momentum is None else momentum
        of_batch = sum(len(c) * c.mean((0, 2)) for c in chunks) / num_samples
        torch.testing.assert_close(of_batch, x.mean((0, 2)))  # by these weights alone
        mean = (1 - share) * mean + share * of_batch
        variances = sum(len(c) * c.transpose(0, 1).flatten(1).var(1) for c in chunks) / num_samples
        variance = (1 - share) * variance + share * variances
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, variance, rtol=1e-12, atol=1e-12)
        assert layer.num_batches_tracked == step


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_chunk_is_batch_norm_to_the_bit(shape, options):
    layer = made(chunk_size=8, **options)
    plain = plain_of(layer, shape)
    for seed in range(3):
        x = drawn(8 if seed else 9, 3, *shape, seed=seed)
        assert torch.equal(layer(x), plain(x))
        for name, value in plain.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_without_running_statistics_evaluation_takes_the_whole_batch():
    layer = made(chunk_size=2, track_running_stats=False)
    plain = plain_of(layer, ())
    x = drawn(6, 3)
    torch.testing.assert_close(layer(x), torch.cat([plain(part) for part in x.split(2)]))
    assert torch.equal(layer.eval()(x), plain(x))
    assert not list(layer.buffers())


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision(parameters):
    x = drawn(32, 3, 4, 4).to(torch.bfloat16)
    layer, reference = made(chunk_size=8).to(parameters), made(chunk_size=8).float()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference(x.float()), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        layer.running_var.float(), reference.running_var, rtol=1e-2, atol=1e-2
    )


def test_a_batch_of_one_sample_needs_positions():
    layer = made(chunk_size=4)
    assert layer(drawn(1, 3, 5)).shape == (1, 3, 5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(drawn(1, 3))


@pytest.mark.parametrize("chunk_size", [1, 0, 2.0, True, "8", None], ids=repr)
def test_a_chunk_that_has_no_variance_is_refused(chunk_size):
    with pytest.raises(ValueError, match="`chunk_size` must be an integer of at least 2, got"):
        GhostBatchNorm(3, chunk_size=chunk_size)
    assert "chunk_size=8" in repr(GhostBatchNorm(3, chunk_size=8))
