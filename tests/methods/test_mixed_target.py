"""Losses of a mixed target against the two losses that it stands for, however they are written."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics.functional import (
    accuracy,
    auroc,
    calibration_error,
    confusion_matrix,
    f1_score,
)

from lightning_optkit.methods.mixed_target import MixedTarget, MixedTargetError, Mixing, settled

BATCH, CLASSES = 8, 4
WEIGHT = torch.tensor([1.0, 0.2, 3.0, 0.7], dtype=torch.float64)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(*shape, seed=0):
    """Return labels with all classes in them, and their partners' in another order."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(CLASSES, shape, generator=generator)
    first.view(-1)[:CLASSES] = torch.arange(CLASSES)
    return first, first[torch.randperm(len(first), generator=generator)]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# -- losses as people write them, of logits (batch, classes) and labels (batch,) ---------------


def one_hot_by_scatter(z, y):
    onehot = torch.zeros(len(z), CLASSES, dtype=z.dtype)
    onehot.scatter_(1, y.unsqueeze(1), 1.0)
    return onehot


def ignoring(z, y):
    y = torch.where(y == 3, -100, y)
    return F.cross_entropy(z, y, weight=WEIGHT, ignore_index=-100, label_smoothing=0.1)


def overwritten(z, y):
    y[y == 3] = -100
    return F.cross_entropy(z, y)


def masked(z, y):
    kept = y != 3
    return F.cross_entropy(z[kept], y[kept])


def masked_by_hand(z, y):
    kept = (y != 3).to(z.dtype)
    return (F.cross_entropy(z, y, reduction="none") * kept).sum() / kept.sum()


def focal(z, y):
    loss = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def focal_by_gather(z, y):
    log_p = F.log_softmax(z, 1).gather(1, y.view(-1, 1)).squeeze(1)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def focal_by_one_hot(z, y):
    p = (F.softmax(z, 1) * F.one_hot(y, CLASSES)).sum(1)
    return (-((1 - p) ** 2) * p.log()).mean()


def weighted_by_hand(z, y):
    w = WEIGHT[y]
    return (w * F.cross_entropy(z, y, reduction="none")).sum() / w.sum()


def margin(z, y):
    z = z.clone()
    z[torch.arange(len(z)), y] -= 0.3  # as ArcFace does
    return F.cross_entropy(z, y)


def margin_in_a_view(z, y):
    z = z.clone()
    z.view(-1)[torch.arange(len(z)) * CLASSES + y] -= 0.3
    return F.cross_entropy(z, y)


def hinge(z, y):
    right = z[torch.arange(len(z)), y].unsqueeze(1)
    return (z - right + 1).clamp(min=0).sum(1).mean()


def one_against_rest(z, y):
    return sum(
        F.binary_cross_entropy_with_logits(z[:, c], y.eq(c).to(z.dtype)) for c in range(CLASSES)
    )


def by_class(z, y):
    return torch.stack([z[y == c].mean() for c in range(CLASSES)]).square().sum()


def sample_by_sample(z, y):
    total = torch.zeros((), dtype=z.dtype)
    for row, label in zip(z, y, strict=True):
        total += F.cross_entropy(row[None], label[None])
    return total / len(y)


def added_up_in_rows(z, y):
    table = torch.zeros(2, dtype=z.dtype)
    table[0] += F.cross_entropy(z, y)
    table[1].copy_(F.multi_margin_loss(z, y))
    return table.square().sum()


def contrastive(z, y):
    same = y[:, None] == y[None, :]
    return ((z @ z.T).tanh() * same).sum() / same.sum()


def dice(z, y):
    p, truth = F.softmax(z, 1), F.one_hot(y, CLASSES).to(z.dtype)
    return 1 - (2 * (p * truth).sum(0) / (p.sum(0) + truth.sum(0))).mean()


def hard_examples(z, y):
    return F.cross_entropy(z, y, reduction="none").topk(3).values.mean()


def with_an_out(z, y):
    right = torch.empty(len(z), 1, dtype=z.dtype)
    with torch.no_grad():
        torch.gather(z, 1, y[:, None], out=right)
    return (z * right).mean()


def distilled(z, y):
    teacher = F.softmax(-z.detach(), 1)
    return 0.3 * F.cross_entropy(z, y) + 0.7 * F.kl_div(
        F.log_softmax(z, 1), teacher, reduction="batchmean"
    )


def noisy_labels(z, y):
    flipped = torch.rand_like(y.to(z.dtype)) < 0.5
    return F.cross_entropy(z, torch.where(flipped, (y + 1) % CLASSES, y))


def two_ways_that_agree(z, y):
    if (y >= 0).all() and y.max() < CLASSES and y.shape == (len(z),) and y.dtype == torch.long:
        return F.cross_entropy(z, y)
    raise AssertionError


class Model(nn.Module):
    """As those that are given their labels."""

    def forward(self, z, labels=None):
        loss = nn.CrossEntropyLoss()(z.view(-1, CLASSES), labels.view(-1).to(z.device))
        return {"loss": loss, "logits": z}


MEANS = {  # of one number a sample
    "cross entropy": F.cross_entropy,
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y),
    "none": lambda z, y: F.cross_entropy(z, y, reduction="none").mean(),
    "none, mean(0)": lambda z, y: F.cross_entropy(z, y, reduction="none").mean(0),
    "none, sum(dim=-1)": lambda z, y: F.cross_entropy(z, y, reduction="none").sum(dim=-1) / len(y),
    "long": lambda z, y: F.cross_entropy(z, y.int().long()),
    "view": lambda z, y: F.cross_entropy(z, y.view(-1, 1).view(-1)),
    "to": lambda z, y: F.cross_entropy(z, y.to(z.device, non_blocking=True).clone().detach()),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    "one hot": lambda z, y: -(F.one_hot(y) * F.log_softmax(z, 1)).sum(1).mean(),
    "one hot, probabilities": lambda z, y: F.cross_entropy(z, F.one_hot(y, CLASSES).double()),
    "gather": lambda z, y: -F.log_softmax(z, 1).gather(1, y.unsqueeze(1)).mean(),
    "index": lambda z, y: -F.log_softmax(z, 1)[torch.arange(len(z)), y].mean(),
    "scatter": lambda z, y: (
        -(torch.zeros_like(z).scatter(1, y[:, None], 1.0) * F.log_softmax(z, 1)).sum(1).mean()
    ),
    "scatter_": lambda z, y: (one_hot_by_scatter(z, y) - z).square().mean(),
    "focal": focal,
    "focal by gather": focal_by_gather,
    "focal by one hot": focal_by_one_hot,
    "multi margin": lambda z, y: F.multi_margin_loss(z, y, weight=WEIGHT),
    "hinge": hinge,
    "margin": margin,
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).to(z.dtype)),
    "kl": lambda z, y: F.kl_div(F.log_softmax(z, 1), F.one_hot(y, CLASSES).double() + 0.1),
    "smooth l1": lambda z, y: nn.SmoothL1Loss()(z[:, 0], y.to(z.dtype)),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 1).double()),
    "poisson": lambda z, y: F.poisson_nll_loss(z[:, 0], y),
    "one against the rest": one_against_rest,
    "ordinal": lambda z, y: ((y[:, None] > torch.arange(CLASSES)).double() * F.softplus(-z)).mean(),
    "by its size": lambda z, y: (
        F.cross_entropy(z, y, reduction="none").sum() / len(y) * y.size(0) / y.shape[0]
        + 0 * (y.numel() + y.dim() + len(str(y.device) + str(y.dtype)) + (y.is_cuda is True))
    ),
    "embedding": lambda z, y: (F.embedding(y, WEIGHT.diag()) * z).sum(1).exp().mean(),
    "distilled": distilled,
    "out": with_an_out,
    "labels=": lambda z, y: Model()(z, labels=y)["loss"],
    "checkpointed": lambda z, y: checkpoint(F.cross_entropy, z, y, use_reentrant=False),
}
WEIGHTED = {  # a mean by weights that depend on the labels
    "weight": lambda z, y: F.cross_entropy(z, y, weight=WEIGHT),
    "weight, smoothed": lambda z, y: F.cross_entropy(z, y, weight=WEIGHT, label_smoothing=0.2),
    "nll, weight": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, WEIGHT),
    "ignore_index": lambda z, y: F.cross_entropy(z, y, ignore_index=3),
    "ignore_index, -100": ignoring,
    "overwritten": overwritten,
    "masked by hand": masked_by_hand,
    "weighted by hand": weighted_by_hand,
}
TOGETHER = {  # what brings samples together
    "masked": masked,
    "by class": by_class,
    "sample by sample": sample_by_sample,
    "contrastive": contrastive,
    "hard examples": hard_examples,
    "asks": two_ways_that_agree,
    "margin in a view": margin_in_a_view,
    "noisy labels": noisy_labels,
    "prototypes": lambda z, y: (z @ z[y].T).square().mean() + z.index_select(0, y).T[:, y].sum(),
    "numpy order": lambda z, y: F.cross_entropy(z[torch.argsort(y, stable=True)], y.sort().values),
}
FURTHER = {  # one λ a sample mixes sums over samples, and what is made of these is plain
    "dice": dice,
    "squared": lambda z, y: F.cross_entropy(z, y).square() + z.mean(),
    "summed in rows": added_up_in_rows,
    "multiplied": lambda z, y: F.cross_entropy(z, y) * F.multi_margin_loss(z, y),
}
ALL = MEANS | WEIGHTED | TOGETHER | FURTHER


def value_and_gradient(loss, z):
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    return loss.detach(), gradient


def proxied(function, z, first, second, weight):
    """Return loss and gradient by way of a mixed target."""
    mixing = Mixing(weight)
    torch.manual_seed(0)
    loss = function(z, MixedTarget.of(first.clone(), second.clone(), mixing))
    found = value_and_gradient(settled(loss), z)
    assert mixing.has_mixed_loss
    mixing.close()
    return found


def apart(function, z, first, second, weight):
    """Return what two losses give."""
    losses = []
    for target in (first, second):
        torch.manual_seed(0)
        losses.append(function(z, target.clone()))
    return value_and_gradient(weight * losses[0] + (1 - weight) * losses[1], z)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_any_loss_is_the_mixture_of_two(name, weight):
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    assert_equal(
        proxied(ALL[name], z, first, second, weight), apart(ALL[name], z, first, second, weight)
    )


# -- one λ a sample ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("name", MEANS)
def test_each_sample_has_its_own_mixture(name):
    function = MEANS[name]
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    weights = torch.rand(BATCH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name == "one hot":  # of a sample alone the number of classes is not known
        function = lambda z, y: -(F.one_hot(y, CLASSES) * F.log_softmax(z, 1)).sum(1).mean()  # noqa: E731
    rows = [
        float(weights[i]) * function(z[i : i + 1], first[i : i + 1].clone())
        + (1 - float(weights[i])) * function(z[i : i + 1], second[i : i + 1].clone())
        for i in range(BATCH)
    ]
    expected = value_and_gradient(torch.stack(rows).mean(), z)
    assert_equal(proxied(function, z, first, second, weights), expected)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_means_divide_by_the_mixed_weights(name):
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    weights = torch.rand(BATCH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = (torch.arange(CLASSES) != 3).double()  # of what is ignored
    if "ignore" not in name and "mask" not in name and "overwritten" not in name:
        share = WEIGHT
    elif name == "ignore_index, -100":
        share = share * WEIGHT

    def parts(target):
        """Return for each sample its number, which is a mean of one, and what that counts."""
        numbers = []
        for i in range(BATCH):
            counts = share[target[i]] > 0
            one = WEIGHTED[name](z[i : i + 1], target[i : i + 1].clone()) if counts else z.sum() * 0
            numbers.append(one * share[target[i]])
        return torch.stack(numbers), share[target]

    (a, counts_a), (b, counts_b) = parts(first), parts(second)
    total = (weights * a + (1 - weights) * b).sum()
    expected = total / (weights * counts_a + (1 - weights) * counts_b).sum()
    found = proxied(WEIGHTED[name], z, first, second, weights)
    assert_equal(found, value_and_gradient(expected, z))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("name", [*MEANS, *WEIGHTED])
def test_equal_weights_by_sample_are_one_of_the_batch(name):
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    by_sample = proxied(ALL[name], z, first, second, torch.full((BATCH,), 0.3))
    by_sample = [part.double() for part in by_sample]
    expected = apart(ALL[name], z, first, second, float(torch.tensor(0.3).double()))
    assert_equal(by_sample, expected)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_brings_samples_together_is_refused(name):
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    with pytest.raises(MixedTargetError, match=r"one λ a sample.*`per_sample=False`"):
        proxied(TOGETHER[name], z, first, second, torch.full((BATCH,), 0.3))


SQUARE = (CLASSES, CLASSES)  # as many samples as classes: a wrong dimension passes for the right


@pytest.mark.parametrize(
    "function",
    [
        lambda z, y: z[:, y],
        lambda z, y: z[y][:, y],
        lambda z, y: y.view(-1, 1) == y,
        lambda z, y: y[:, None] == y[None],
        lambda z, y: y.unsqueeze(0) == y.unsqueeze(1),
        lambda z, y: y.expand(CLASSES, CLASSES),
        lambda z, y: torch.zeros_like(z).scatter(0, y[:, None], 1.0),
        lambda z, y: z.index_select(1, y),
        lambda z, y: F.one_hot(y, CLASSES).double().softmax(0),
        lambda z, y: F.one_hot(y, CLASSES).T,
        lambda z, y: F.one_hot(y, CLASSES).transpose(0, 1),
        lambda z, y: F.one_hot(y, CLASSES).cumsum(0),
        lambda z, y: y.flip(0),
        lambda z, y: y[torch.randperm(CLASSES)],
        lambda z, y: y[..., torch.randperm(CLASSES)],
        lambda z, y: y[y],
        lambda z, y: z[y == 0],
        lambda z, y: y[0] + y,
        lambda z, y: y.sort().values,
        lambda z, y: y.unbind(),
        lambda z, y: next(iter(y)),
        lambda z, y: torch.bincount(y, minlength=CLASSES),
        lambda z, y: F.embedding(torch.arange(CLASSES), F.one_hot(y, CLASSES).double()),
        lambda z, y: z + WEIGHT[y],  # a row of the sum is of all samples
        lambda z, y: y.__setitem__(torch.arange(2), 1),
        lambda z, y: y.__setitem__(y.clone(), 1),
        lambda z, y: F.kl_div(z, F.one_hot(y, CLASSES).double(), reduction="batchmean"),
        lambda z, y: F.mse_loss(z[:, 0], y.double(), size_average=False),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_no_function_mixes_rows_where_there_are_as_many_classes(function):
    first, second = labels(CLASSES)
    z = drawn(*SQUARE).requires_grad_()
    with pytest.raises(MixedTargetError, match="one λ a"):
        function(z, MixedTarget.of(first, second, Mixing(torch.full((CLASSES,), 0.3))))


# -- other targets -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("is_by_sample", [False, True])
def test_sequences_and_masks(shape, is_by_sample):
    first, second = labels(BATCH, *shape)
    z = drawn(BATCH, CLASSES, *shape).requires_grad_()
    weights = torch.linspace(0, 1, BATCH, dtype=torch.float64)
    for kwargs in ({}, {"weight": WEIGHT}, {"ignore_index": 2}):
        weight = weights if is_by_sample else 0.3
        found = proxied(
            lambda z, y, kwargs=kwargs: F.cross_entropy(z, y, **kwargs), z, first, second, weight
        )
        w = (weights if is_by_sample else weights * 0 + 0.3).view(-1, *[1] * len(shape))
        a, b = (F.cross_entropy(z, y, reduction="none", **kwargs) for y in (first, second))
        share = kwargs.get("weight", torch.ones(CLASSES).double()).clone()
        if "ignore_index" in kwargs:
            share[2] = 0
        expected = (w * a + (1 - w) * b).sum() / (w * share[first] + (1 - w) * share[second]).sum()
        assert_equal(found, value_and_gradient(expected, z))


def test_sequences_that_are_flattened():
    first, second = labels(BATCH, 5)
    z = drawn(BATCH, 5, CLASSES).requires_grad_()

    def function(z, y):
        return F.cross_entropy(z.view(-1, CLASSES), y.view(-1), ignore_index=2)

    assert_equal(proxied(function, z, first, second, 0.3), apart(function, z, first, second, 0.3))
    with pytest.raises(MixedTargetError, match="`view` of a target"):
        proxied(function, z, first, second, torch.full((BATCH,), 0.3))


@pytest.mark.parametrize("weight", [0.3, torch.linspace(0, 1, BATCH, dtype=torch.float64)])
def test_float_targets_give_two_losses_too(weight):
    first, second = drawn(BATCH, seed=1), drawn(BATCH, seed=2)
    z = drawn(BATCH).requires_grad_()
    found = proxied(lambda z, y: ((z - y) ** 2).mean(), z, first, second, weight)
    expected = (weight * (z - first) ** 2 + (1 - weight) * (z - second) ** 2).mean()
    assert_equal(found, value_and_gradient(expected, z))


def test_under_autocast():
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = proxied(lambda z, y: F.cross_entropy(z @ z.T @ z, y), z, first, second, 0.3)
        out = z @ z.T @ z
        assert out.dtype is torch.bfloat16
        expected = 0.3 * F.cross_entropy(out, first) + 0.7 * F.cross_entropy(out, second)
    for one, other in zip(found, value_and_gradient(expected, z), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("compiled", ["loss", "step"])
def test_compiled_code_leaves_its_graph_and_is_exact(compiled):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    first, second = labels(BATCH)
    net = nn.Linear(3, CLASSES).double()

    def loss_of(z, y):
        return focal(z, y) + F.cross_entropy(z, y.long())

    def step(x, y):
        return loss_of(torch.tanh(net(x)), y)

    x = drawn(BATCH, 3).requires_grad_()
    fast = torch.compile(step if compiled == "step" else loss_of, backend="eager")
    for weight in (0.1, 0.2, 0.4):
        expected = apart(step, x, first, second, weight)
        if compiled == "step":
            found = proxied(fast, x, first, second, weight)
        else:
            found = proxied(lambda x, y: fast(torch.tanh(net(x)), y), x, first, second, weight)
        assert_equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # λ is no guard


# -- what is taken out, and what stays ---------------------------------------------------------


def mixed(weight=0.3, *, floats=False):
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1, 0, 2])
    if floats:
        first, second = first.double(), second.double()
    return MixedTarget.of(first, second, Mixing(weight))


def test_what_is_taken_out_is_the_mixture_of_floats_and_the_heavier_label():
    y, x = mixed(0.3), mixed(0.3, floats=True)
    assert y.tolist() == [3, 1, 0, 2]
    assert mixed(0.5).tolist() == [0, 1, 2, 3]
    assert isinstance(y.numpy(), np.ndarray)
    assert np.asarray(y).tolist() == y.cpu().numpy().tolist() == [3, 1, 0, 2]
    assert (y[0].item(), int(y[0]), float(y[0])) == (3, 3, 3.0)
    assert x[0].item() == float(x[0]) == x.tolist()[0] == pytest.approx(2.1)
    assert f"{x[0]:.2f}" == "2.10"
    assert repr(y) == "tensor([3, 1, 0, 2])"
    assert accuracy_score([3, 1, 0, 0], y) == 0.75
    by_sample = mixed(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert by_sample.tolist() == [0, 1, 0, 3]
    hits = (torch.tensor([0, 1, 2, 3]) == y).float()
    assert float(hits.mean()) == pytest.approx(0.3 + 0.7 * 0.25)


def test_copies_and_files_are_plain_or_mixed_as_they_should_be(tmp_path):
    y = mixed()
    duplicate = copy.deepcopy(y)
    duplicate += 1
    assert settled(duplicate).tolist() == [4, 2, 1, 3]
    assert settled(y).tolist() == [3, 1, 0, 2]
    again = pickle.loads(pickle.dumps(y))
    assert type(again) is torch.Tensor
    torch.save({"y": y}, tmp_path / "y.pt")
    assert torch.load(tmp_path / "y.pt", weights_only=True)["y"].tolist() == [3, 1, 0, 2]


def test_settled_looks_into_nests_and_leaves_the_rest():
    plain = torch.ones(2)
    found = settled({"a": [mixed(), plain], "b": (1, "text")})
    assert type(found["a"][0]) is torch.Tensor
    assert found["a"][1] is plain
    assert found["b"] == (1, "text")


def test_what_is_left_of_a_batch_is_plain():
    z = drawn(4, CLASSES).requires_grad_()
    mixing = Mixing(0.3)
    y = MixedTarget.of(*labels(4), mixing)
    loss = F.cross_entropy(z, y)
    total, seen, shown = torch.zeros(()), torch.zeros(CLASSES), torch.zeros(2, CLASSES)
    total += loss.detach()
    alias = seen.view(2, 2)
    seen[y[:2]] += 1
    shown[1].copy_(loss.detach().float() * torch.ones(CLASSES))
    left = {"loss": loss.detach(), "labels": y, "hits": y == 1, "total": total, "shown": shown}
    expected = {name: settled(value) for name, value in left.items()}
    assert {type(value) for value in left.values()} == {MixedTarget}
    value = float(settled(loss).detach())
    mixing.close()
    for name, tensor in left.items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, expected[name])
    assert type(seen) is type(alias) is torch.Tensor
    assert torch.equal(alias.flatten(), seen)
    assert seen.sum() == 2
    assert float((loss + 0).detach()) == value  # has a graph, and is mixed when it is used
    assert type(loss + 0) is torch.Tensor
    assert torch.stack([loss, loss]).mean().item() == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("is_first", [False, True])
def test_what_is_left_goes_into_the_next_batch_as_it_is(is_first):
    z = drawn(BATCH, CLASSES).requires_grad_()
    before = Mixing(0.9)
    kept = F.cross_entropy(z, MixedTarget.of(*labels(BATCH), before))
    value = settled(kept)
    before.close()

    def function(kept):
        def loss(z, y):
            now = F.cross_entropy(z, y) ** 2
            return torch.mul(kept, now) if is_first else now + kept

        return loss

    batch = labels(BATCH, seed=1)
    expected = apart(function(value), z, *batch, 0.3)
    assert_equal(proxied(function(kept), z, *batch, 0.3), expected)


def test_what_is_written_into_stays_the_same_object():
    z = drawn(BATCH, CLASSES)
    mixing = Mixing(0.3)
    loss = F.cross_entropy(z, MixedTarget.of(*labels(BATCH), mixing))
    total = alias = torch.zeros((), dtype=torch.float64)
    total += loss
    assert total is alias
    assert torch.add(loss, loss, out=total) is alias
    memory = torch.zeros(2, dtype=torch.float64)
    part = memory[1:]
    part += loss
    mixing.close()
    mixing.close()  # once more does nothing
    assert memory.tolist() == [0.0, pytest.approx(float(loss))]


def test_backward_mixes_by_itself():
    z = drawn(BATCH, CLASSES).requires_grad_()
    first, second = labels(BATCH)
    expected = apart(F.cross_entropy, z, first, second, 0.3)[1]
    for backward in (lambda loss: loss.backward(), torch.autograd.backward):
        mixing = Mixing(0.3)
        backward(F.cross_entropy(z, MixedTarget.of(first, second, mixing)))
        assert mixing.has_mixed_loss
        torch.testing.assert_close(z.grad, expected, rtol=1e-13, atol=1e-15)
        z.grad = None


def test_a_number_that_has_no_gradient_is_no_loss():
    mixing = Mixing(0.3)
    z = drawn(BATCH, CLASSES).requires_grad_()
    loss = F.cross_entropy(z, MixedTarget.of(*labels(BATCH), mixing))
    with torch.no_grad():
        settled(loss)
    float(loss.detach())
    assert not mixing.has_mixed_loss


def test_parameters_stay_what_they_are():
    centres = nn.Parameter(torch.zeros(CLASSES, 2))
    y = mixed(0.3)
    with torch.no_grad():
        centres[y] = torch.arange(8.0).view(4, 2)
    assert type(centres) is nn.Parameter
    assert centres.tolist() == [[4.0, 5.0], [2.0, 3.0], [6.0, 7.0], [0.0, 1.0]]


def test_functions_of_torchmetrics_check_labels_and_are_mixed():
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES)
    first[first == 3] = 2  # fewer classes in one than in the other
    assert len(first.unique()) < len(second.unique())
    y = MixedTarget.of(first, second, Mixing(0.3))
    kwargs = {"task": "multiclass", "num_classes": CLASSES}
    a, b = (float(accuracy(z, target, **kwargs)) for target in (first, second))
    assert float(accuracy(z, y, **kwargs)) == pytest.approx(0.3 * a + 0.7 * b)
    found = settled(confusion_matrix(z, y, **kwargs))
    assert torch.equal(found, confusion_matrix(z, second, **kwargs))


@pytest.mark.parametrize("metric", [accuracy, confusion_matrix, f1_score, auroc, calibration_error])
def test_functions_of_torchmetrics_with_a_lambda_a_sample(metric):
    first, second = labels(40)
    p, weights = F.softmax(drawn(40, CLASSES), 1), torch.linspace(0, 1, 40, dtype=torch.float64)
    kwargs = {"task": "multiclass", "num_classes": CLASSES}
    found = settled(metric(p, MixedTarget.of(first, second, Mixing(weights)), **kwargs))
    assert type(found) is torch.Tensor
    if metric is not calibration_error:  # what is counted is the heavier label
        expected = metric(p, torch.where(weights >= 0.5, first, second), **kwargs)
        torch.testing.assert_close(found, expected)


# -- what is refused ---------------------------------------------------------------------------


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, y):
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda z, y: z.mean() if y[0] == 0 else z.sum(), "True for the one and False for the oth"),
        (lambda z, y: z.mean() if (y[:2] == 0).any().item() else z.sum(), "True for the one and F"),
        (lambda z, y: z[: y[0]].mean(), "got 0 for the one and 3 for the other from `__index__`"),
        (lambda z, y: z.sum() / len(y[y < 2][:1].unique() - y[0]), None),
        (lambda z, y: z.sum() / len(y[:2][y[:2] < 2]), "got 2 for the one and 1 for the other"),
        (lambda z, y: z.sum() / (y[:2] == 1).nonzero().numel(), None),
        (lambda z, y: z[: (y[:2] < 2).nonzero().shape[0]].sum(), r"Size\(\[2, 1\]\)"),
        (lambda z, y: sum(z[i] for i in y[:2][y[:2] < 2].unbind()).sum(), "2 results for the one"),
        (lambda z, y: z[y[:2][y[:2] < 2]], "Only results of the same shape"),
        (OwnFunction.apply, "a `torch.autograd.Function` of one's own"),
        (lambda z, y: F.cross_entropy(z, y) + F.cross_entropy(z, mixed(0.5)), "one mixed batch"),
    ],
)
def test_what_has_no_exact_mixture_is_refused(function, text):
    z = drawn(4, CLASSES).requires_grad_()
    if text is None:  # the same for both
        assert type(settled(function(z, mixed()))) is torch.Tensor
        return
    with pytest.raises(MixedTargetError, match=text):
        settled(function(z, mixed()))


def test_parts_that_cannot_be_written_into_are_refused():
    with pytest.raises(MixedTargetError, match=r"got strides \(8, 1\) of the shape \(4, 4\)"):
        torch.empty_strided((4, 4), (8, 1))[0].scatter_(0, mixed(), 1.0)
    table = nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad(), pytest.raises(MixedTargetError, match="a part of a parameter"):
        table[0].scatter_(0, mixed(), 1.0)


def test_parts_of_any_layout_are_written_into():
    def function(z, y):
        images = (z.view(2, 1, 4, 4) * torch.ones(2)[:, None, None, None]).expand(2, 3, 4, 4)
        images = images.contiguous(memory_format=torch.channels_last)
        images.transpose(1, 2)[1, :, 2].scatter_(1, y[:4, None], 0.5)
        images[:, 1:, ::2][..., 1] += y[:2].view(2, 1, 1)
        return images.square().sum()

    z, (first, second) = drawn(BATCH, CLASSES).requires_grad_(), labels(BATCH)
    assert_equal(proxied(function, z, first, second, 0.3), apart(function, z, first, second, 0.3))


def test_what_runs_without_python_sees_the_first_target_and_is_no_mixed_loss():
    mixing = Mixing(0.3)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        scripted = torch.jit.script(F.cross_entropy)
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    loss = scripted(z, MixedTarget.of(first, second, mixing))
    assert type(loss) is torch.Tensor
    assert torch.equal(loss, F.cross_entropy(z, first))
    assert not mixing.has_mixed_loss


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize(
    "name", ["cross entropy", "weight", "focal by gather", "scatter", "masked"]
)
def test_a_gpu_gives_the_same(name):
    first, second = labels(BATCH)
    z = drawn(BATCH, CLASSES).requires_grad_()
    expected = apart(ALL[name], z, first, second, 0.3)
    with torch.device("cuda"):
        there = z.detach().cuda().requires_grad_()
        weight = WEIGHT.cuda()
        function = {"weight": lambda z, y: F.cross_entropy(z, y, weight=weight)}.get(
            name, ALL[name]
        )
        found = proxied(function, there, first.cuda(), second.cuda(), 0.3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-10, atol=1e-12)
