"""Layers replaced around `configure_model`, and methods that are free again after it."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_optkit.bridge.layer_swap import LayerSwap


class Made(pl.LightningModule):
    """Makes a layer in `configure_model`, and notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(2)
        self.seen = []

    def configure_model(self):
        self.seen.append([type(layer).__name__ for layer in self.children()])
        if not hasattr(self, "second"):
            self.second = nn.BatchNorm1d(2)

    def on_save_checkpoint(self, checkpoint):
        self.seen.append(sorted(checkpoint))


class Plain(pl.LightningModule):
    """Overrides nothing."""


class Swaps:
    """Replaces BatchNorm, and notes when it was asked to."""

    def __init__(self, name="swap"):
        self.name = name
        self.asked = []
        self.layers = LayerSwap(self.swap, self.save)

    def swap(self, pl_module, last):
        self.asked.append(last)
        for name, layer in list(pl_module.named_children()):
            if isinstance(layer, nn.BatchNorm1d):
                setattr(pl_module, name, nn.GroupNorm(1, 2))

    def save(self, checkpoint):
        checkpoint.setdefault("swaps", []).append(self.name)


def test_layers_are_replaced_before_and_after_the_module_makes_more():
    module, swaps = Made(), Swaps()
    swaps.layers.attach(module)
    assert type(module.first) is nn.GroupNorm
    module.configure_model()
    assert module.seen == [["GroupNorm"]]
    assert type(module.second) is nn.GroupNorm
    assert swaps.asked == [False, False, True]
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert module.seen[1:] == [["swaps"]]
    assert checkpoint == {"swaps": ["swap"]}


def test_methods_are_free_again():
    module, swaps = Made(), Swaps()
    before = dict(vars(module))
    for _ in range(2):
        swaps.layers.attach(module)
    swaps.layers.detach()
    swaps.layers.detach()
    assert dict(vars(module)).keys() == before.keys()
    module.configure_model()
    assert type(module.second) is nn.BatchNorm1d
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {}


def test_lightning_calls_what_no_class_overrides():
    module, swaps = Plain(), Swaps()
    assert not is_overridden("configure_model", module)
    swaps.layers.attach(module)
    assert is_overridden("configure_model", module)
    module.configure_model()
    module.on_save_checkpoint({})
    assert swaps.asked == [False, False, True]
    swaps.layers.detach()
    assert not is_overridden("configure_model", module)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_several_swaps_come_in_their_order_and_leave_in_any(order):
    module, swaps = Made(), [Swaps("one"), Swaps("two")]
    for each in swaps:
        each.layers.attach(module)
    module.configure_model()
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"swaps": ["one", "two"]}
    swaps[order[0]].layers.detach()
    module.on_save_checkpoint(checkpoint := {})
    assert checkpoint == {"swaps": [swaps[order[1]].name]}
    swaps[order[1]].layers.detach()
    assert not {"configure_model", "on_save_checkpoint"} & set(vars(module))


def test_methods_of_the_instance_are_put_back():
    module, swaps, called = Made(), Swaps(), []
    own = vars(module)["configure_model"] = lambda: called.append("own")
    swaps.layers.attach(module)
    module.configure_model()
    assert called == ["own"]
    swaps.layers.detach()
    assert vars(module)["configure_model"] is own


def test_who_came_in_front_later_stays_there():
    module, swaps, called = Made(), Swaps(), []
    swaps.layers.attach(module)
    ours = module.configure_model
    vars(module)["configure_model"] = lambda: (called.append("later"), ours())
    swaps.layers.detach()
    module.configure_model()
    assert called == ["later"]
    assert swaps.asked == [False]
    assert type(module.second) is nn.BatchNorm1d


def test_who_came_in_front_later_may_be_a_method_too():
    module, swaps, later = Made(), Swaps(), Swaps("later")
    swaps.layers.attach(module)
    vars(module)["on_save_checkpoint"] = later.save
    swaps.layers.detach()
    module.on_save_checkpoint(checkpoint := {})
    assert checkpoint == {"swaps": ["later"]}


def test_a_module_can_be_copied_and_pickled_meanwhile():
    module, swaps = Made(), Swaps()
    swaps.layers.attach(module)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        again.configure_model()
        assert type(again.second) is nn.GroupNorm
    assert not hasattr(module, "second")
