"""Inputs and targets in batches of any form: found, replaced, and nothing else touched."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.batch_fields import BatchFields

X, Y, Z = torch.ones(4, 3), torch.arange(4), torch.zeros(4)
NEW_X, NEW_Y = torch.full((4, 3), 7.0), torch.full((4,), 8)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


Named = namedtuple("Named", "label index image")


@dataclass
class Data:
    image: torch.Tensor
    label: torch.Tensor
    meta: dict = field(default_factory=dict)
    num_made: int = 0

    def __post_init__(self):
        self.num_made += 1


@dataclass(frozen=True)
class Frozen:
    inputs: torch.Tensor
    targets: torch.Tensor


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Encoding(UserDict):
    """A mapping that is no dict, as tokenizers return it."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError
        return self.data[name]


def with_setter(batch, inputs, targets):
    return {"packed": (inputs, targets)}


BATCHES = {
    "tuple": ((X, Y), {}),
    "list": ([X, Y], {}),
    "three": ((X, Y, Z), {}),
    "mapping of inputs": (({"a": X, "b": Z}, Y), {}),
    "namedtuple": (Pair(X, Y), {}),
    "namedtuple by name": (Named(Y, Z, X), {}),
    "dict": ({"image": X, "label": Y, "index": Z}, {}),
    "ordered dict": (OrderedDict(x=X, y=Y), {}),
    "default dict": (defaultdict(list, input=X, target=Y), {}),
    "no dict": (Encoding({"pixel_values": X, "labels": Y}), {}),
    "dataclass": (Data(X, Y), {}),
    "frozen dataclass": (Frozen(X, Y), {}),
    "slots": (Slotted(X, Y), {}),
    "last index": ((Z, Y, X), {"input_key": 2, "target_key": 1}),
    "own names": ({"a": X, "b": Y}, {"input_key": "a", "target_key": "b"}),
    "one own name": ({"image": X, "digit": Y}, {"target_key": "digit"}),
    "names of a namedtuple": (Named(Y, Z, X), {"input_key": "image", "target_key": "label"}),
    "path": (
        {"view": {"image": X, "other": Z}, "truth": [Z, Y]},
        {"input_key": "view.image", "target_key": "truth.1"},
    ),
    "path as a list": (
        {"a.b": [X], 3: (Z, {"y": Y})},
        {"input_key": ["a.b", 0], "target_key": (3, 1, "y")},
    ),
    "integer keys": ({0: X, 1: Y}, {"input_key": 0, "target_key": "1"}),
    "attributes in a tuple": (
        (Z, Data(X, Z, {"y": Y})),
        {"input_key": "1.image", "target_key": "1.meta.y"},
    ),
    "getters": (
        {"packed": (X, Y)},
        {
            "input_key": lambda batch: batch["packed"][0],
            "target_key": lambda batch: batch["packed"][1],
            "setter": with_setter,
        },
    ),
    "one getter": (
        {"packed": (X, Y)},
        {
            "input_key": lambda batch: batch["packed"][0],
            "target_key": "packed.1",
            "setter": with_setter,
        },
    ),
}


def places(batch):
    """Return a nest of plain containers with the same things in it."""
    if isinstance(batch, torch.Tensor):
        return id(batch)
    if isinstance(batch, (dict, UserDict)):
        return [(key, places(value)) for key, value in batch.items()]
    if isinstance(batch, (tuple, list)):
        return [places(item) for item in batch]
    if hasattr(batch, "__slots__"):
        return [places(batch.x), places(batch.y)]
    return places(vars(batch)) if hasattr(batch, "__dict__") else batch


@pytest.mark.parametrize("name", BATCHES)
def test_found_and_replaced_in_a_copy(name):
    batch, keys = BATCHES[name]
    fields = BatchFields(**keys)
    before = places(batch)
    inputs, targets = fields.of(batch)
    assert (inputs["a"] if isinstance(inputs, dict) else inputs) is X
    assert targets is Y
    found = fields.replaced(batch, NEW_X, NEW_Y)
    assert fields.of(found)[0] is NEW_X
    assert fields.of(found)[1] is NEW_Y
    assert type(found) is type(batch)
    assert places(batch) == before
    expected = str(before).replace(str(id(X)), str(id(NEW_X))).replace(str(id(Y)), str(id(NEW_Y)))
    if not isinstance(inputs, dict):
        assert str(places(found)) == expected


def test_other_parts_are_the_same_objects():
    batch = {"image": X, "label": Y, "meta": {"names": ["a"]}}
    found = BatchFields().replaced(batch, NEW_X, NEW_Y)
    assert found["meta"] is batch["meta"]
    made = BatchFields().replaced(Data(X, Y), NEW_X, NEW_Y)
    assert made.num_made == 1  # copied, not made again


def test_a_batch_without_targets():
    fields = BatchFields()
    for batch in (X, [X], {"image": X}):
        assert fields.of(batch, with_target=False) == (X, None)
        found = fields.replaced(batch, NEW_X, None, with_target=False)
        assert fields.of(found, with_target=False)[0] is NEW_X
    assert BatchFields("0").of((X, Y, Z))[1] is Y


@pytest.mark.parametrize(
    ("batch", "key", "text"),
    [
        ({"image": X, "x": X, "label": Y}, "input_key", "got a batch of dict with 'image', 'x', "),
        ({"image": X, "y": Y, "target": Y}, "target_key", "dict with 'image', 'y', 'target'"),
        ({"a": X, "b": Y}, "input_key", "dict with 'a', 'b'"),
        ([(X, Y), (X, Y)], "input_key", r"list\(tuple, tuple\)"),
        ({"one": (X, Y), "two": (X, Y)}, "input_key", "dict with 'one', 'two'"),
        ((X, "names"), "target_key", r"tuple\(tensor\(4, 3\), str\)"),
        ((X,), "target_key", r"tuple\(tensor\(4, 3\)\)"),
        (X, "target_key", r"a batch of tensor\(4, 3\)"),
        (None, "input_key", "a batch of NoneType"),
        ("text", "input_key", "a batch of str"),
    ],
    ids=str,
)
def test_what_is_ambiguous_or_missing_is_refused_with_what_is_there(batch, key, text):
    with pytest.raises(MisconfigurationException, match=f"`{key}` must say where the .*{text}"):
        BatchFields().of(batch)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"input_key": 3}, r"got 3, which is not in tuple\(tensor\(4, 3\), tensor\(4,\)\)"),
        ({"input_key": "image"}, "got 'image', which is not in tuple"),
        ({"target_key": "1.y"}, r"`target_key` must lead to .* got 'y', which is not in tensor"),
        ({"input_key": "0.a.b"}, "got 'a', which is not in tensor"),
    ],
)
def test_keys_that_lead_nowhere_are_refused(keys, text):
    with pytest.raises(MisconfigurationException, match=text):
        BatchFields(**keys).of((X, Y))


@pytest.mark.parametrize("key", [-1, 1.5, True, [], [1.5], {"a"}, [True]], ids=str)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match=r"`target_key` must be an index of at least 0.*, got "):
        BatchFields(target_key=key)


def test_functions_come_with_a_setter():
    with pytest.raises(ValueError, match="`setter` must be given where a key is a function"):
        BatchFields(lambda batch: batch)
    with pytest.raises(ValueError, match="`setter` must be given where a key is a function"):
        BatchFields(lambda batch: batch, setter="set")
    with pytest.raises(ValueError, match="`setter` must come with a function"):
        BatchFields("image", setter=with_setter)


def test_it_survives_a_copy():
    fields = copy.deepcopy(BatchFields("a", "b"))
    assert fields.of({"a": X, "b": Y})[1] is Y
