"""Mixup and cutmix of tensors: identities, areas, statistics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch.nn import functional as F

from lightning_optkit.methods.mixed_target import MixedTarget, settled
from lightning_optkit.methods.mixing import (
    Box,
    Mixed,
    cut_dims,
    cutmix,
    drawn_box,
    drawn_mixing,
    mixup,
    pasted,
)

NUM_DRAWS = 20_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=6, channels=2, size=(5, 7), dtype=torch.float64):
    numbers = torch.arange(n * channels * size[0] * size[1]).view(n, channels, *size)
    return numbers.to(dtype)


# -- λ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 2.5])
def test_mixing_is_beta_distributed(alpha):
    mixing = drawn_mixing(alpha, NUM_DRAWS, generator=generator())
    assert mixing.dtype is torch.float64
    variance = 1 / (4 * (2 * alpha + 1))
    sem = math.sqrt(variance / NUM_DRAWS)
    assert abs(float(mixing.mean()) - 0.5) <= 4 * sem
    squares = (mixing - 0.5) ** 2
    assert abs(float(squares.mean()) - variance) <= 4 * float(squares.std()) / NUM_DRAWS**0.5
    assert kstest(mixing.numpy(), beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 1.0, 50.0, 1e4])
def test_mixing_is_the_quantile_of_a_uniform_number(alpha):
    mixing = drawn_mixing(alpha, 100, generator=generator()).numpy()
    uniform = torch.rand(100, dtype=torch.float64, generator=generator()).numpy()
    inside = (mixing > 1e-290) & (1 - mixing > 1e-9)  # where the law is not steeper than numbers
    np.testing.assert_allclose(beta(alpha, alpha).cdf(mixing)[inside], uniform[inside], rtol=1e-9)
    assert ((mixing >= 0) & (mixing <= 1)).all()
    assert drawn_mixing(alpha, generator=generator()) == mixing[0]
    assert drawn_mixing(1.0, generator=generator()) == pytest.approx(uniform[0], rel=1e-14)


def test_none_is_a_fixed_seed_and_the_global_stream_is_left_alone():
    before = torch.get_rng_state()
    for draw in (drawn_mixing, lambda alpha, **kw: mixup(torch.ones(5, 2), alpha, **kw).partners):
        one, two = draw(0.3), draw(0.3)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    assert drawn_mixing(0.3, generator=generator(1)) != drawn_mixing(0.3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("function", [mixup, cutmix])
def test_another_alpha_is_refused(function, alpha):
    with pytest.raises(ValueError, match="`alpha` must be a positive number"):
        function(images(), alpha)


# -- mixup -------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_is_its_formula(per_sample):
    x = images()
    mixed = mixup(x, 1.0, per_sample=per_sample, generator=generator(3))
    weight = torch.as_tensor(mixed.mixing, dtype=torch.float64).expand(6).view(6, 1, 1, 1)
    expected = weight * x + (1 - weight) * x[mixed.partners]
    torch.testing.assert_close(mixed.inputs, expected, rtol=1e-14, atol=0)
    assert sorted(mixed.partners.tolist()) == list(range(6))
    assert isinstance(mixed.mixing, torch.Tensor) == per_sample
    assert torch.equal(x, images())  # which stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_mixup_keeps_the_dtype(dtype):
    x = images(dtype=dtype)
    for per_sample in (False, True):
        mixed = mixup(x, 1.0, per_sample=per_sample)
        assert mixed.inputs.dtype is dtype
        exact = mixup(images(), 1.0, per_sample=per_sample).inputs
        real = mixed.inputs.real if dtype.is_complex else mixed.inputs
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(real.double(), exact, rtol=4 * eps, atol=200 * eps)


@pytest.mark.parametrize(("weight", "is_own"), [(0.0, False), (1.0, True)])
def test_ends_are_identities(weight, is_own):
    x, y = images(), torch.arange(6)
    partners = torch.tensor([3, 4, 5, 0, 1, 2])
    for mixing in (weight, torch.full((6,), weight, dtype=torch.float64)):
        mixed = Mixed(None, partners, mixing)
        here = slice(None) if is_own else partners
        assert torch.equal(mixed.direct(x), x[here])
        hot = F.one_hot(y[here], 6).float()
        assert torch.equal(mixed.soft(y, 6), hot)
        assert torch.equal(settled(mixed.target(y)), y[here])


def test_mixup_mixes_a_nest_by_the_same():
    x = {"image": images(), "features": [torch.arange(6.0).double()]}
    mixed = mixup(x, 1.0)
    alone = mixup(x["image"], 1.0)
    assert torch.equal(mixed.inputs["image"], alone.inputs)
    expected = (
        alone.mixing * torch.arange(6.0).double() + (1 - alone.mixing) * alone.partners.double()
    )
    torch.testing.assert_close(mixed.inputs["features"][0], expected, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"of one batch, got sizes \[5, 6\]"):
        mixup([torch.ones(5), torch.ones(6)])


def test_mixup_of_what_requires_a_gradient():
    x = images().requires_grad_()
    for per_sample in (False, True):
        mixed = mixup(x, 1.0, per_sample=per_sample)
        (gradient,) = torch.autograd.grad(mixed.inputs.sum(), x)
        weight = torch.as_tensor(mixed.mixing, dtype=torch.float64).expand(6)
        expected = weight + torch.zeros(6).double().index_add(0, mixed.partners, 1 - weight)
        torch.testing.assert_close(gradient[:, 0, 0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.bool])
def test_mixup_refuses_integers_and_says_what_to_write(dtype):
    with pytest.raises(TypeError, match=r"`images.float\(\) / 255`.*mix the embeddings"):
        mixup(images(dtype=torch.long).to(dtype))


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_targets_go_with_the_inputs(per_sample):
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    mixed = mixup(images(), 1.0, per_sample=per_sample)
    weight = torch.as_tensor(mixed.mixing, dtype=torch.float64).expand(6)
    second = y[mixed.partners]
    assert torch.equal(mixed.second(y), second)
    soft = mixed.soft(y, 3, dtype=torch.float64)
    expected = weight[:, None] * F.one_hot(y, 3) + (1 - weight)[:, None] * F.one_hot(second, 3)
    torch.testing.assert_close(soft, expected, rtol=1e-14, atol=0)
    target = mixed.target(y)
    assert isinstance(target, MixedTarget)
    target += 1  # the target given stays
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    logits = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    loss = settled(F.cross_entropy(logits, mixed.target(y)))
    torch.testing.assert_close(loss, F.cross_entropy(logits, soft), rtol=1e-13, atol=0)


def test_soft_targets_of_places_have_classes_where_cross_entropy_looks_for_them():
    y = torch.randint(3, (6, 5), generator=generator())
    mixed = mixup(torch.ones(6, 1), 1.0)
    logits = torch.randn(6, 3, 5, generator=generator(), dtype=torch.float64)
    soft = mixed.soft(y, 3, dtype=torch.float64)
    assert soft.shape == (6, 3, 5)
    loss = settled(F.cross_entropy(logits, mixed.target(y)))
    torch.testing.assert_close(F.cross_entropy(logits, soft), loss, rtol=1e-13, atol=0)
    assert mixed.soft(y, 3).dtype is torch.get_default_dtype()


# -- cutmix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_pasted_is_the_box_and_mixing_what_is_left(per_sample, seed):
    x = images(n=9)
    mixed = cutmix(x, per_sample=per_sample, generator=generator(seed))
    foreign = mixed.inputs != x
    fixed = mixed.partners == torch.arange(9)
    assert torch.equal(mixed.inputs[foreign], x[mixed.partners][foreign])
    for i in range(9):
        box = (mixed.box.low, mixed.box.high)
        low, high = (bound[i].tolist() if per_sample else bound.tolist() for bound in box)
        expected = torch.zeros(5, 7, dtype=torch.bool)
        expected[low[0] : high[0], low[1] : high[1]] = not fixed[i]
        assert torch.equal(foreign[i, 0], expected)
        assert torch.equal(foreign[i, 1], expected)
        left = float(mixed.mixing[i]) if per_sample else mixed.mixing
        area = (high[0] - low[0]) * (high[1] - low[1])
        assert left == pytest.approx(1 - area / 35, abs=1e-15)
    assert torch.equal(x, images(n=9))


def brute_force(sizes, mixing, centre):
    """Return the box around a pixel, from its definition."""
    found = []
    for size, middle in zip(sizes, centre, strict=True):
        side = math.floor(size * (1 - mixing) ** (1 / len(sizes)))
        pixels = [i for i in range(middle - side // 2, middle - side // 2 + side) if 0 <= i < size]
        found.append(pixels)
    return found


@pytest.mark.parametrize("sizes", [(9,), (8, 8), (5, 7), (3, 4, 6)])
def test_box_is_its_definition(sizes):
    for i, mixing in enumerate(np.linspace(0, 1, 23)):
        box = drawn_box(sizes, float(mixing), generator=generator(i))
        uniform = torch.rand(len(sizes), dtype=torch.float64, generator=generator(i))
        centre = [int(u * size) for u, size in zip(uniform, sizes, strict=True)]
        expected = brute_force(sizes, mixing, centre)
        shape = [len(pixels) for pixels in expected]
        assert (box.high - box.low).clamp(min=0).tolist() == shape
        for k, pixels in enumerate(expected):
            assert list(range(int(box.low[k]), int(box.high[k]))) == pixels
        assert float(box.share) == pytest.approx(math.prod(shape) / math.prod(sizes), abs=1e-15)
        assert float(box.share) <= 1 - mixing + 1e-12
    assert float(drawn_box(sizes, 1.0).share) == 0
    boxes = drawn_box(sizes, torch.zeros(400, dtype=torch.float64))
    assert boxes.low.shape == (400, len(sizes))
    assert boxes.share.max() == 1
    assert boxes.low.min() == 0


def test_centres_lie_anywhere_alike():
    sizes = torch.tensor([4, 6])
    small = torch.full((NUM_DRAWS,), 1 - 1.001 / 16, dtype=torch.float64)  # one pixel of each
    box = drawn_box((4, 6), small, generator=generator())
    assert torch.equal(box.high - box.low, torch.ones(NUM_DRAWS, 2, dtype=torch.long))
    pixel = box.low[:, 0] * 6 + box.low[:, 1]
    counts = torch.bincount(pixel, minlength=int(sizes.prod())).double()
    p = 1 / 24
    sem = math.sqrt(NUM_DRAWS * p * (1 - p))
    assert float((counts - NUM_DRAWS * p).abs().max()) <= 4 * sem


def test_whole_and_empty_boxes_are_identities():
    x, partners = images(), torch.tensor([3, 4, 5, 0, 1, 2])
    for shape in ((2,), (6, 2)):
        whole = Box((5, 7), torch.zeros(shape).long(), torch.tensor([5, 7]).expand(shape))
        assert torch.equal(pasted(x, partners, whole, dims=[2, 3]), x[partners])
        empty = Box((5, 7), torch.ones(shape).long(), torch.ones(shape).long())
        assert torch.equal(pasted(x, partners, empty, dims=[2, 3]), x)


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [
        ((4, 9), None, [1]),
        ((4, 3, 9), None, [2]),
        ((4, 3, 8, 8), None, [2, 3]),
        ((4, 3, 5, 8, 8), None, [2, 3, 4]),
        ((4, 9, 3), [1], [1]),
        ((4, 8, 8, 3), [-3, -2], [1, 2]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.long])
def test_what_is_cut_of_sequences_images_and_volumes(shape, dims, expected, dtype):
    x = torch.arange(math.prod(shape)).view(shape).remainder(251).to(dtype)
    assert cut_dims(x, dims) == expected
    for per_sample in (False, True):
        mixed = cutmix(x, dims=dims, per_sample=per_sample, generator=generator(2))
        assert mixed.inputs.dtype is dtype
        others = [d for d in range(1, len(shape)) if d not in expected]
        foreign = (mixed.inputs != x).float().mean([0, *others]) > 0
        assert foreign.shape == tuple(shape[d] for d in expected)
        assert mixed.box.sizes == tuple(shape[d] for d in expected)


def test_label_maps_are_cut_as_the_inputs():
    x = images(n=6, channels=1)
    for per_sample in (False, True):
        mixed = cutmix(x, per_sample=per_sample, generator=generator(1))
        assert torch.equal(mixed.cut(x[:, 0], dims=[1, 2]), mixed.inputs[:, 0])


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((4,), None), ((4, 3), [0]), ((4, 3), [2]), ((4, 3), []), ((4, 3, 3), [1, -2]), ((4,), [-2])],
)
def test_dims_that_are_not_there_are_refused(shape, dims):
    with pytest.raises(ValueError, match="`dims` must name dimensions to cut after that of the ba"):
        cutmix(torch.ones(shape), dims=dims)


def test_inputs_of_several_sizes_cannot_share_a_box():
    with pytest.raises(ValueError, match="of one size to be cut"):
        cutmix([torch.ones(4, 1, 8, 8), torch.ones(4, 1, 9, 8)])
    pair = cutmix([images(), images(dtype=torch.long)])
    assert torch.equal(pair.inputs[0].long(), pair.inputs[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("function", [mixup, cutmix])
def test_a_gpu_mixes_the_same(function, per_sample):
    x, y = images(), torch.arange(6)
    expected = function(x, 1.0, per_sample=per_sample, generator=generator(1))
    there, labels = x.cuda(), y.cuda()
    found = function(there, 1.0, per_sample=per_sample, generator=generator(1))
    torch.testing.assert_close(found.inputs.cpu(), expected.inputs)
    torch.testing.assert_close(found.soft(labels, 6).cpu(), expected.soft(y, 6))
    assert torch.equal(found.second(labels).cpu(), expected.second(y))
