"""MixedAccuracy against its definition, and against torchmetrics where labels are plain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import one_hot
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_optkit import MixedAccuracy
from lightning_optkit.methods.mixing import Mixed, mixup

CLASSES = 4


def batch(n=50, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n, *shape), generator=generator)
    return torch.randn(n, CLASSES, *shape, generator=generator), labels


def mixed_of(n=50, *, per_sample=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return mixup(torch.ones(n, 1), 1.0, per_sample=per_sample, generator=generator)


def accuracy(logits, target, **options):
    metric = MulticlassAccuracy(CLASSES, average="micro", **options)
    return float(metric(logits, target))


@pytest.mark.parametrize("shape", [(), (7,), (3, 3)])
def test_plain_labels_give_plain_accuracy(shape):
    logits, labels = batch(50, *shape)
    for options in ({}, {"ignore_index": 2}, {"ignore_index": -100}):
        labels = labels.clone()
        labels[:5] = options.get("ignore_index", 0)
        for preds in (logits, logits.argmax(1)):
            metric = MixedAccuracy(**options)
            assert float(metric(preds, labels)) == pytest.approx(
                accuracy(logits, labels, **options), abs=1e-7
            )


@pytest.mark.parametrize("shape", [(), (7,)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixed_labels_count_as_both(per_sample, shape):
    metric, right, total = MixedAccuracy(), 0.0, 0
    for seed in range(3):
        logits, labels = batch(50, *shape, seed=seed)
        mixed = mixed_of(per_sample=per_sample, seed=seed)
        found = float(metric(logits, mixed.target(labels)))
        weight = torch.as_tensor(mixed.mixing, dtype=torch.float64).expand(50)
        weight = weight.view(50, *[1] * len(shape))
        hits = [(logits.argmax(1) == target).double() for target in (labels, mixed.second(labels))]
        expected = weight * hits[0] + (1 - weight) * hits[1]
        assert found == pytest.approx(float(expected.mean()), abs=1e-7)
        right, total = right + float(expected.sum()), total + expected.numel()
    assert float(metric.compute()) == pytest.approx(right / total, abs=1e-7)
    assert type(metric.right) is torch.Tensor


def test_it_is_the_formula_of_accuracies():
    logits, labels = batch()
    mixed = mixed_of()
    a, b = (accuracy(logits, target) for target in (labels, mixed.second(labels)))
    expected = mixed.mixing * a + (1 - mixed.mixing) * b
    assert float(MixedAccuracy()(logits, mixed.target(labels))) == pytest.approx(expected, abs=1e-7)


def test_class_probabilities_give_the_same():
    logits, labels = batch(50, 6)
    for per_sample in (False, True):
        mixed = mixed_of(per_sample=per_sample)
        soft = mixed.soft(labels, CLASSES, dtype=torch.float64)
        expected = float(MixedAccuracy()(logits, mixed.target(labels)))
        assert float(MixedAccuracy()(logits, soft)) == pytest.approx(expected, abs=1e-7)
    hot = one_hot(labels, CLASSES).movedim(-1, 1).float()
    assert float(MixedAccuracy()(logits, hot)) == pytest.approx(accuracy(logits, labels), abs=1e-7)


def test_ignored_labels_count_in_neither():
    logits, labels = batch()
    labels[:20] = 3
    mixed = Mixed(None, torch.arange(49, -1, -1), 0.3)
    metric = MixedAccuracy(ignore_index=3)
    metric.update(logits, mixed.target(labels))
    pairs = []
    for target in (labels, mixed.second(labels)):
        counts = target != 3
        pairs.append((float(((logits.argmax(1) == target) & counts).sum()), float(counts.sum())))
    (right_a, total_a), (right_b, total_b) = pairs
    expected = (0.3 * right_a + 0.7 * right_b) / (0.3 * total_a + 0.7 * total_b)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-7)


def test_in_a_collection_and_as_a_copy():
    logits, labels = batch()
    target = mixed_of().target(labels)
    collection = MetricCollection({"mixed": MixedAccuracy(), "again": MixedAccuracy()})
    collection.update(logits, target)
    alone = MixedAccuracy()
    alone.update(logits, target)
    values = collection.compute()
    assert values["mixed"] == values["again"] == alone.compute()
    assert copy.deepcopy(alone).compute() == alone.compute()
    alone.reset()
    alone.update(logits, labels)
    assert float(alone.compute()) == pytest.approx(accuracy(logits, labels), abs=1e-7)


def test_targets_that_do_not_fit_are_refused():
    metric = MixedAccuracy()
    with pytest.raises(ValueError, match=r"`target` must be labels or class probabilities, got fl"):
        metric.update(torch.ones(4, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"one prediction for each label, got the shapes \(4,\)"):
        metric.update(torch.ones(4, 3), torch.ones(5).long())
