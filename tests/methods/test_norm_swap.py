"""Norm layers of modules replaced in place."""

import copy
import pickle
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic import BNReLU2d
from torch.nn.utils import parametrize, prune

from lightning_optkit.methods.norm_swap import SwapPlan, described, named_layers, swap_norms
from lightning_optkit.methods.normalization import NormRule


def net_of(norm=nn.BatchNorm2d, channels=8):
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, channels, 3, bias=False),
            norm=norm(channels),
            relu=nn.ReLU(),
            block=nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(2, 2), norm(channels)])}),
        )
    )


def told_apart(net):
    for i, parameter in enumerate(net.parameters()):
        generator = torch.Generator().manual_seed(i)
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    return net


def notes(report):
    return {layer.name: (layer.status, layer.note) for layer in report.layers}


# -- places ------------------------------------------------------------------------------------


def test_names_places_and_everything_else_stay():
    net = told_apart(net_of())
    names, others = [n for n, _ in net.named_modules()], [net.conv, net.relu, net.block]
    parameters = dict(net.named_parameters())
    report = swap_norms(net)
    assert [n for n, _ in net.named_modules()] == names
    assert [net.conv, net.relu, net.block] == others
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert list(net.state_dict()) == list(parameters)
    assert type(net.norm) is type(net.block["inner"][1]) is nn.GroupNorm
    assert [layer.name for layer in report.of("swapped")] == ["norm", "block.inner.1"]
    assert str(report).splitlines() == [
        "name           layer           becomes          note",
        "norm           BatchNorm2d(8)  GroupNorm(8, 8)  without running statistics",
        "block.inner.1  BatchNorm2d(8)  GroupNorm(8, 8)  without running statistics",
    ]
    assert report.summary == "2 BatchNorm2d replaced by GroupNorm."


def test_a_round_trip_keeps_gamma_and_beta_to_the_bit_and_gives_the_class_back():
    net = told_apart(net_of())
    before = {name: value.clone() for name, value in net.named_parameters()}
    for source, target in [
        ("batch", "group"),
        ("group", "batch"),
        ("batch", "batch_renorm"),
        ("batch_renorm", "instance"),
        ("instance", "ghost"),
        ("ghost", "batch"),
        ("batch", "layer"),
        ("group", "sync"),
        ("sync", "batch"),
    ]:
        swap_norms(net, source, target)
    assert type(net.norm) is nn.BatchNorm2d
    assert list(net.state_dict()) == list(net_of().state_dict())
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name])


def test_a_second_swap_changes_nothing():
    net = net_of(channels=72)
    swap_norms(net)
    layers = [net.norm, net.block["inner"][1]]
    report = swap_norms(net)
    assert [net.norm, net.block["inner"][1]] == layers
    assert notes(report) == {
        "norm": ("done", "as wanted already"),
        "block.inner.1": ("done", "as wanted already"),
    }
    assert report.summary == "2 as wanted already."
    for target in ("none", "instance", "layer", "batch_renorm", "ghost", "sync"):
        net = net_of()
        assert len(swap_norms(net, "batch", target).of("swapped")) == 2
        assert len(swap_norms(net, "batch", target).of("done")) == 2


def test_what_came_last_counts_and_nothing_of_it_is_left():
    net = net_of()
    swap_norms(net)
    swap_norms(net, "group", "instance")
    assert not {"num_groups", "num_channels"} & set(vars(net.norm))
    assert net.norm.swapped_from == ("BatchNorm2d", "GroupNorm")
    assert len(swap_norms(net, "group", "instance").of("done")) == 2
    with pytest.raises(ValueError, match="got 'batch'"):
        swap_norms(net, "batch", "instance")


def test_another_number_of_groups_is_another_layer():
    net = net_of(lambda c: nn.GroupNorm(4, c))
    report = swap_norms(net, "group", "group", num_groups=2)
    assert net.norm.num_groups == 2
    assert len(report.of("swapped")) == 2
    with pytest.raises(ValueError, match=r"got 'batch'\. Its norm layers: norm GroupNorm"):
        swap_norms(net, num_groups=2)


def test_a_dry_run_changes_nothing():
    net = net_of()
    before = pickle.dumps(net)
    report = swap_norms(net, dry_run=True)
    assert pickle.dumps(net) == before
    assert len(report.of("swapped")) == 2
    assert not swap_norms(nn.Linear(2, 2), dry_run=True).layers
    assert str(swap_norms(nn.Linear(2, 2), dry_run=True)) == "No norm layers."


class Held(nn.Module):
    """Holds layers by two names, in a list, a dict and a tuple that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(4)
        self.again = self.first
        self.pair = nn.Sequential(self.first, nn.BatchNorm1d(4))
        self.listed = [self.first, self.pair[1]]
        self.by_name = {"second": self.pair[1]}
        self.both = (self.first, self.pair[1])
        object.__setattr__(self, "hidden", self.first)

    def forward(self, x):
        for layer in (self.first, self.again, self.pair, *self.listed, *self.both):
            x = layer(x)
        return self.hidden(self.by_name["second"](x))


def test_a_shared_layer_is_replaced_once_and_everywhere():
    net = Held()
    report = swap_norms(net, channels_per_group=2)
    assert [layer.name for layer in report.layers] == ["first", "pair.1"]
    first, second = net.first, net.pair[1]
    assert [net.again, net.pair[0], net.listed[0], net.both[0], net.hidden] == [first] * 5
    assert [net.listed[1], net.by_name["second"], net.both[1]] == [second] * 3
    assert Counter(type(module) for module in net.modules())[nn.GroupNorm] == 2
    assert [names for _, names in named_layers(net)] == [
        ["first", "again", "pair.0"],
        ["pair.1"],
    ]
    x = torch.randn(3, 4)
    assert torch.equal(net(x)[:1], net(x[:1]))  # no BatchNorm is left in it


def test_a_parameter_that_layers_share_is_shared_after_it():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    net[1].weight = net[0].weight
    swap_norms(net)
    assert net[1].weight is net[0].weight
    assert len(list(net.parameters())) == 3


# -- what a layer carries ----------------------------------------------------------------------


def test_flags_dtype_device_and_marks_are_kept():
    net = nn.Sequential(nn.BatchNorm2d(4, eps=0.5), nn.BatchNorm2d(4)).to(torch.bfloat16)
    net[0].eval()
    net[0].weight.requires_grad_(False)
    net[1].no_weight_decay = True
    swap_norms(net)
    assert [layer.training for layer in net] == [False, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert net[0].weight.dtype == torch.bfloat16
    assert net[0].eps == 0.5
    assert net[1].no_weight_decay
    assert net[1].swapped_from == ("BatchNorm2d",)


@pytest.mark.parametrize("target", ["group", "batch_renorm", "instance", "ghost", "none", "sync"])
def test_layers_without_memory_stay_so(target):
    with torch.device("meta"):
        net = net_of()
    swap_norms(net, "batch", target)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}
    net.to_empty(device="cpu")
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}


def test_new_tensors_are_made_where_the_others_are():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)))
    net[0].float()
    net[1].double()
    net[1].register_parameter("table", nn.Parameter(torch.zeros(2).long(), requires_grad=False))
    with torch.device("meta"):  # which is not where the layers are
        swap_norms(net, "instance", "batch")
    assert net[1][1].weight.dtype == net[1][1].running_var.dtype == torch.float64
    assert net[1][1].weight.device.type == net[1][1].running_var.device.type == "cpu"


def test_hooks_are_kept_and_their_handles_remove_them():
    net = net_of().double()
    seen = []
    layer = net.norm
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(("pre", module))),
        layer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(("forward", module)), with_kwargs=True
        ),
        layer.register_full_backward_hook(lambda module, *_: seen.append(("backward", module))),
        layer.register_full_backward_pre_hook(lambda module, _: seen.append(("before", module))),
        layer.register_state_dict_post_hook(lambda module, *_: seen.append(("state", module))),
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("load", module))),
    ]
    gamma = layer.weight.register_hook(lambda gradient: seen.append(("gamma", None)))
    swap_norms(net)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    net[:2](x).sum().backward()
    net.load_state_dict(net.state_dict())
    expected = ["pre", "forward", "before", "backward", "gamma", "state", "load"]
    assert sorted(kind for kind, _ in seen) == sorted(expected)
    assert {module for kind, module in seen if kind != "gamma"} == {net.norm}
    for handle in [*handles, gamma]:
        handle.remove()
    seen.clear()
    net[:2](x).sum().backward()
    net.load_state_dict(net.state_dict())
    assert seen == []


def test_guards_go_with_the_layers_that_need_them():
    net = nn.Sequential(nn.BatchNorm1d(4))
    swap_norms(net, channels_per_group=1)
    with pytest.raises(ValueError, match="more than one value a group"):
        net(torch.randn(3, 4))
    swap_norms(net, "group", "batch")
    assert net(torch.randn(3, 4)).shape == (3, 4)
    assert not net[0]._forward_pre_hooks
    assert not net[0]._forward_pre_hooks_with_kwargs
    net = nn.Sequential(nn.LayerNorm(4))
    swap_norms(net, "layer", "batch")
    swap_norms(net, "batch", "group")
    assert len(net[0]._forward_pre_hooks) == 1
    again = copy.deepcopy(pickle.loads(pickle.dumps(net)))
    with pytest.raises(ValueError, match=r"must get inputs of shape \(N, C\)"):
        again(torch.randn(3, 4, 4))
    swap_norms(again, "group", "layer")
    assert type(again[0]) is nn.LayerNorm
    assert again(torch.randn(3, 4, 4)).shape == (3, 4, 4)


def test_an_optimizer_goes_on_with_the_same_parameters():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    swap_norms(net)
    before = net.norm.weight.clone()
    (net[:2](torch.randn(2, 3, 5, 5)).pow(3)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.norm.weight, before)


def test_the_random_stream_is_left_alone():
    before = torch.get_rng_state()
    for target in ("group", "batch_renorm", "none"):
        swap_norms(net := nn.Sequential(nn.BatchNorm2d(4)), "batch", target)
        assert net[0].swapped_from
    assert torch.equal(torch.get_rng_state(), before)


# -- what is left alone ------------------------------------------------------------------------


class Fused(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def pruned():
    layer = nn.BatchNorm2d(4)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def parametrized():
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def patched():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def compiled_in_place():
    layer = nn.BatchNorm2d(4)
    layer._compiled_call_impl = layer._call_impl  # what `layer.compile()` sets
    return layer


LEFT = {
    "a subclass": (Fused(4), "a subclass of BatchNorm2d, which may do more than normalise"),
    "lazy": (nn.LazyBatchNorm2d(), "lazy: pass a batch through the module before the swap"),
    "pruned": (pruned(), "it has state of its own (weight_mask, weight_orig)"),
    "parametrized": (parametrized(), "a subclass of BatchNorm2d"),
    "patched": (patched(), "its `forward` was replaced or compiled"),
    "compiled": (compiled_in_place(), "its `forward` was replaced or compiled"),
    "of torch.ao": (torch.ao.nn.quantized.BatchNorm2d(4), "not torch's own BatchNorm"),
}


@pytest.mark.parametrize("case", LEFT)
def test_layers_that_do_more_are_reported_and_left_alone(case):
    layer, text = LEFT[case]
    net = nn.Sequential(layer, nn.BatchNorm2d(4))
    report = swap_norms(net)
    assert net[0] is layer
    assert report.layers[0].status == "left"
    assert report.layers[0].note.startswith(text)
    assert type(net[1]) is nn.GroupNorm
    assert f"Left alone: 0, {type(layer).__name__}: {text}" in report.summary
    with pytest.raises(ValueError, match="Its norm layers: 0 "):
        swap_norms(nn.Sequential(layer))


def test_layers_fused_with_others_are_left_alone():
    fused = BNReLU2d(nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(fused, nn.BatchNorm2d(4))
    report = swap_norms(net)
    assert type(fused[0]) is nn.BatchNorm2d
    assert notes(report)["0.0"] == ("left", "a part of BNReLU2d, which expects it")


def test_layer_norms_that_torch_computes_by_itself_are_left_alone():
    net = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)
    with pytest.raises(ValueError, match="TransformerEncoderLayer computes it as LayerNorm in eva"):
        swap_norms(net, "layer", "none")
    outer = nn.ModuleDict({"part": nn.TransformerDecoderLayer(4, 1, 4)})
    assert len(swap_norms(outer, "layer", "none").of("swapped")) == 3


def test_inside_a_compiled_module_layers_are_replaced_and_a_compiled_layer_is_not():
    inner = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    layer = torch.compile(nn.BatchNorm2d(8), backend="eager")
    net = nn.Sequential(torch.compile(inner, backend="eager"), layer)
    x = torch.randn(2, 3, 4, 4)
    net[0](x)  # compiled with BatchNorm
    report = swap_norms(net)
    assert notes(report)["0._orig_mod.1"][0] == "swapped"
    assert notes(report)["1._orig_mod"] == (
        "left",
        "it is compiled by itself; compile after the swap",
    )
    assert type(inner[1]) is nn.GroupNorm
    expected = nn.functional.group_norm(inner[0](x), 8, inner[1].weight, inner[1].bias)
    torch.testing.assert_close(net[0](x), expected)


def test_norm_layers_of_any_kind_are_told_by_their_names():
    class FrozenBN(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3))
            self.act = nn.ReLU()

    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(3)

    others = nn.Identity(), nn.Linear(2, 2)
    net = nn.Sequential(FrozenBN(), PreNorm(), *others, nn.LocalResponseNorm(2))
    found = [described(layer) for layer, _ in named_layers(net)]
    assert found == ["FrozenBN()", "RMSNorm(3)", "LocalResponseNorm()"]


# -- chosen layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [["block.*"], ["*inner*"], lambda name, layer: name.startswith("block"), ["block.inner.1"]],
    ids=["below", "inside", "function", "name"],
)
def test_where_chooses_layers(where):
    net = net_of()
    report = swap_norms(net, where=where)
    assert notes(report)["norm"] == ("other", "not in `where`")
    assert type(net.norm) is nn.BatchNorm2d
    assert type(net.block["inner"][1]) is nn.GroupNorm


def test_any_name_of_a_layer_chooses_it():
    net = Held()
    assert len(swap_norms(net, where=["again"]).of("swapped")) == 1
    assert type(net.first) is nn.GroupNorm


def test_layers_of_another_are_left_apart():
    net = net_of()
    plan = SwapPlan(net, NormRule(), apart=["norm"])
    plan.carry_out()
    assert notes(plan.report)["norm"] == ("other", "replaced by another")
    assert plan.names == ["block.inner.1"]
    assert type(net.norm) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"source": "layer", "target": "group"},
            ValueError,
            r"`source` must be a kind of norm layer that the module has, got 'layer'. Its norm "
            r"layers: norm BatchNorm2d\(8\) \(not of source='layer'\); block.inner.1 Batch",
        ),
        ({"where": ["nothing"]}, ValueError, r"that the module has in where=\['nothing'\], got"),
        (
            {"where": ["norm", "blok.*"]},
            ValueError,
            r"Each pattern of `where` must match a norm layer, got 'blok.\*'. They are: norm, bl",
        ),
        ({"where": "norm"}, TypeError, r"got the string 'norm'. Write `where=\['norm'\]`"),
        ({"where": [1]}, TypeError, "`where` must be a list of glob patterns, or a function"),
        ({"where": 3}, TypeError, "`where` must be a list of glob patterns, or a function"),
        (
            {"divisor": "error", "num_groups": 3},
            ValueError,
            "got 'error' and: norm, its 8 channels cannot be put into 3 groups; block.inner.1, its",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_changes(options, error, text):
    net = net_of()
    with pytest.raises(error, match=text):
        swap_norms(net, **options)
    assert [type(net.norm), type(net.block["inner"][1])] == [nn.BatchNorm2d] * 2


def test_a_norm_layer_by_itself_has_no_place():
    with pytest.raises(ValueError, match=r"`module` must hold the layers, got the layer BatchNorm"):
        swap_norms(nn.BatchNorm2d(3))


def test_a_module_without_norm_layers_says_so():
    with pytest.raises(ValueError, match=r"got 'batch'\. Its norm layers: none"):
        swap_norms(nn.Sequential(nn.Linear(2, 2)))
