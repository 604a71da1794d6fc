"""Checkpoints of modules with other layers than their class makes."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optkit.bridge.swapped_checkpoint import (
    StateDictFit,
    load_swapped,
    record_of,
    save_record,
)
from lightning_optkit.methods.norm_swap import swap_norms
from lightning_optkit.methods.normalization import NormRule


class Net(pl.LightningModule):
    def __init__(self, width=4, depth=2, affine=True):
        super().__init__()
        self.save_hyperparameters()
        norms = [nn.BatchNorm2d(width, affine=affine) for _ in range(depth)]
        self.net = nn.Sequential(nn.Conv2d(3, width, 1), *norms)
        self.loaded = []

    def forward(self, x):
        return self.net(x)

    def on_load_checkpoint(self, checkpoint):
        self.loaded.append(sorted(checkpoint))


class Late(Net):
    """Makes its layers in `configure_model`."""

    def __init__(self, width=4):
        super().__init__(width)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net(self.hparams["width"]).net


def told_apart(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module


def swapped(module, *rules):
    """Swap by each rule, and return the records of it."""
    records = []
    for rule in rules:
        report = swap_norms(module, rule.source, rule.target, target_options=rule.target_options)
        records.append(record_of(rule, [layer.name for layer in report.of("swapped")]))
    return records


def written(module, records, path, *, in_callbacks=False):
    checkpoint = {
        "pytorch-lightning_version": pl.__version__,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "callbacks": {f"NormSwap[{i}]": r for i, r in enumerate(records)} if in_callbacks else {},
    }
    for record in [] if in_callbacks else records:
        save_record(record, checkpoint)
    torch.save(checkpoint, path)
    return path


GROUP = NormRule()
GHOST = NormRule("batch", "ghost", target_options={"chunk_size": 3})
RENORM = NormRule("batch", "batch_renorm", target_options={"r_max": float("inf")})
NONE = NormRule("batch", "none")


@pytest.mark.parametrize("in_callbacks", [False, True], ids=["weights alone", "callbacks"])
@pytest.mark.parametrize(
    "rules",
    [[GROUP], [GHOST], [RENORM], [NONE], [GROUP, NormRule("group", "batch_renorm")]],
    ids=["group", "ghost", "renorm", "none", "two"],
)
def test_a_module_is_made_with_the_layers_of_the_checkpoint(rules, in_callbacks, tmp_path):
    module = Net(width=8)
    records = swapped(module, *rules)
    path = written(told_apart(module), records, tmp_path / "a.ckpt", in_callbacks=in_callbacks)
    again = load_swapped(Net, path)
    assert repr(again) == repr(module)
    assert list(again.state_dict()) == list(module.state_dict())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert len(again.loaded) == 1


def test_what_else_load_from_checkpoint_takes(tmp_path):
    module = Net(width=8)
    path = written(told_apart(module), swapped(module, GROUP), tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.0\.weight"):
        load_swapped(Net, path, width=4)
    assert load_swapped(Net, path, map_location="cpu").net[1].num_groups == 8
    with pytest.raises(RuntimeError, match="Missing key"):
        load_swapped(Net, path, depth=3)
    again = load_swapped(Net, path, depth=3, strict=False)
    assert [type(layer).__name__ for layer in again.net[1:]] == [
        "GroupNorm",
        "GroupNorm",
        "BatchNorm2d",
    ]


def test_layers_made_in_configure_model(tmp_path):
    module = Late(width=8)
    module.configure_model()
    path = written(told_apart(module), swapped(module, GROUP), tmp_path / "a.ckpt")
    again = load_swapped(Late, path)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(again(x), module(x))


def test_a_module_that_swaps_by_itself_is_left_as_it_is(tmp_path):
    class Swapping(Net):
        def __init__(self, width=4):
            super().__init__(width)
            swap_norms(self)

    module = Swapping(8)
    record = record_of(GROUP, ["net.1", "net.2"])
    path = written(told_apart(module), [record], tmp_path / "a.ckpt")
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(load_swapped(Swapping, path)(x), module(x))


def test_what_cannot_be_loaded_says_why(tmp_path):
    path = written(Net(), [], tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError, match=r"of a run with `NormSwap`, got .*plain.ckpt.*Use `Net.lo"
    ):
        load_swapped(Net, path)
    module = Net(depth=3)
    path = written(module, swapped(module, GROUP), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"`cls` must make the module .* to replace at net\.3\. P"):
        load_swapped(Net, path, depth=2)


# -- weights that were trained with other layers ------------------------------------------------


def loaded(module, state_dict, *, trains=True):
    fit = StateDictFit(module, trains=trains)
    try:
        return module.load_state_dict(state_dict, strict=True)
    finally:
        fit.remove()


@pytest.fixture
def said(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        yield caplog


def test_running_statistics_of_batch_norm_are_dropped_and_said(said):
    old, module = told_apart(Net()), Net()
    swap_norms(module)
    state_dict = old.state_dict()
    loaded(module, state_dict)
    assert list(state_dict) == list(old.state_dict())  # the file's is as it was
    for name, value in module.state_dict().items():
        assert torch.equal(value, old.state_dict()[name])
    assert "drops running statistics of net.1, net.2. All else is taken" in said.text
    with pytest.raises(RuntimeError, match="Unexpected key"):  # without the fit
        module.load_state_dict(state_dict)


def test_running_statistics_begin_anew_and_it_is_said(said):
    old = Net()
    swap_norms(old)
    told_apart(old)
    module = Net()
    swap_norms(module)
    swap_norms(module, "group", "batch")
    told_apart(module, seed=1)
    module.net[1].num_batches_tracked.fill_(9)
    loaded(module, old.state_dict())
    assert torch.equal(module.net[1].weight, old.net[1].weight)
    assert module.net[1].running_mean.tolist() == [0.0] * 4
    assert module.net[1].running_var.tolist() == [1.0] * 4
    assert module.net[1].num_batches_tracked == 0
    assert "begins new running statistics of net.1, net.2. All" in said.text


@pytest.mark.parametrize("rule", [GHOST, RENORM, NormRule("batch", "sync")], ids=str)
def test_what_has_the_same_state_takes_it_without_a_word(rule, said):
    old, module = told_apart(Net()), Net()
    swap_norms(module, rule.source, rule.target)
    loaded(module, old.state_dict())
    assert torch.equal(module.net[1].running_var, old.net[1].running_var)
    assert said.text == ""


def test_a_statistic_that_is_not_saved_is_not_asked_for():
    module = Net()
    swap_norms(module, "batch", "ghost")
    module.net[1]._non_persistent_buffers_set.add("running_mean")
    loaded(module, module.state_dict())
    assert "net.1.running_mean" not in module.state_dict()


def test_layers_that_nobody_replaced_are_held_to_their_state():
    module = Net()
    state_dict = module.state_dict()
    del state_dict["net.1.running_mean"]
    swap_norms(module, where=["net.2"])
    with pytest.raises(RuntimeError, match=r"Missing key.* \"net.1.running_mean\""):
        loaded(module, state_dict)
    shared = Net()
    shared.again = shared.net[1]
    old = told_apart(Net())
    old.again = old.net[1]
    swap_norms(shared)
    loaded(shared, old.state_dict())  # by both names
    assert torch.equal(shared.again.weight, old.again.weight)


@pytest.mark.parametrize("has", [True, False], ids=["surplus", "missing"])
def test_an_optimizer_cannot_go_on_with_other_parameters(has, said):
    old, module = told_apart(Net(affine=has)), Net(affine=not has)
    swap_norms(module)
    text = f"got one {'with' if has else 'without'} γ and β of net.1, net.2. Load the weights alone"
    with pytest.raises(MisconfigurationException, match=text):
        loaded(module, old.state_dict())
    told_apart(module, seed=1)
    loaded(module, old.state_dict(), trains=False)
    if not has:
        assert module.net[1].weight.tolist() == [1.0] * 4
        assert module.net[1].bias.tolist() == [0.0] * 4
    assert ("drops γ and β" if has else "begins new γ and β") in said.text
