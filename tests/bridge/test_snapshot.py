import random
from collections import deque, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_optkit.bridge.snapshot import Snapshot


class Diary:
    def __init__(self):
        self.pages = []
        self.count = 0


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.metric = MeanMetric()
        self.diary = Diary()


Pair = namedtuple("Pair", "first second")


def test_attributes_of_modules_and_objects_come_back():
    module = Holder()
    layer, diary, pages = module.layer, module.diary, module.diary.pages
    snapshot = Snapshot(module)
    module.layer = nn.Linear(3, 3)
    module.extra = 1
    module.eval()
    diary.pages = ["another list"]
    pages.append("in place")
    diary.count += 1
    del module.diary
    snapshot.restore()
    assert module.layer is layer
    assert module.diary is diary
    assert diary.pages is pages
    assert (pages, diary.count, module.training) == ([], 0, True)
    assert not hasattr(module, "extra")


@pytest.mark.parametrize(
    ("item", "change"),
    [
        ({"a": 1}, lambda d: d.update(b=2)),
        ({"a": 1, "b": 2}, lambda d: d.update(a=d.pop("a"))),  # order
        ([1, 2], lambda x: x.reverse()),
        ([[1], [2]], lambda x: x[0].append(3)),
        ({"x": [torch.ones(2)]}, lambda d: d["x"][0].zero_()),
        (({"inside a tuple": []},), lambda t: t[0]["inside a tuple"].append(1)),
        (Pair([1], 2), lambda p: p.first.clear()),
        ({1, 2}, lambda s: s.add(3)),
        (deque([1, 2], maxlen=2), lambda q: q.append(3)),
        (np.arange(3.0), lambda a: a.fill(7)),
    ],
)
def test_containers_come_back_in_place(item, change):
    before = repr(item)
    snapshot = Snapshot(item)
    change(item)
    assert repr(item) != before
    snapshot.restore()
    assert repr(item) == before


def test_tensors_come_back_even_behind_data():
    tensors = {"plain": torch.ones(2), "nan": torch.tensor([torch.nan, 1.0])}
    snapshot = Snapshot(tensors)
    tensors["plain"].data.add_(1)
    tensors["nan"].zero_()
    snapshot.restore()
    assert tensors["plain"].tolist() == [1, 1]
    assert tensors["nan"].isnan().tolist() == [True, False]


def test_tensors_that_cannot_be_written_are_left_alone():
    with torch.inference_mode():
        inference = torch.ones(2)
    items = [inference, torch.ones(1).expand(3), torch.ones(2, device="meta")]
    Snapshot(items).restore()
    assert inference.tolist() == [1, 1]


def test_metric_states_come_back():
    metric = MeanMetric()
    metric.update(3.0)
    snapshot = Snapshot(metric)
    metric.update(100.0)
    snapshot.restore()
    assert metric.compute() == 3.0


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (torch.Generator().manual_seed(0), lambda g: torch.rand(3, generator=g).tolist()),
        (random.Random(0), lambda g: g.random()),
        (np.random.default_rng(0), lambda g: g.normal()),
        (np.random.RandomState(0), lambda g: g.normal()),
    ],
)
def test_random_generators_come_back(generator, draw):
    holder = {"generator": generator}
    snapshot = Snapshot(holder)
    first = draw(generator)
    snapshot.restore()
    assert draw(generator) == first
    snapshot.restore()
    assert draw(generator) == first


def test_cycles_end():
    ring = []
    ring.append(ring)
    snapshot = Snapshot(ring)
    ring.append(1)
    snapshot.restore()
    assert len(ring) == 1


def test_undone_also_after_an_exception():
    items = [1]

    def change_and_fail():
        with Snapshot.undone(items):
            items.append(2)
            raise KeyError

    with pytest.raises(KeyError):
        change_and_fail()
    assert items == [1]
