"""Which parameters are scaled and decayed, and which are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_optkit.optim import LAMB, LARS, lars_param_groups


class Net(nn.Module):
    """Something of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(7, 6)
        self.position = nn.Parameter(torch.zeros(1, 5, 6))
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.layer_norm = nn.LayerNorm([5, 6])  # of two dimensions
        self.root = nn.RMSNorm(6)
        self.group_norm = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.relative_bias = nn.Parameter(torch.zeros(2, 3))
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight  # tied
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


SCALED = [
    "position",
    "conv.weight",
    "embedding.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]


def names_of(module, groups):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def test_matrices_and_filters_are_scaled_and_decayed_and_nothing_else():
    net = Net()
    groups = lars_param_groups(net, weight_decay=0.01)
    scaled, plain = names_of(net, groups)
    assert scaled == SCALED
    wanted = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert plain == [name for name in wanted if name not in SCALED]
    assert {"norm.weight", "layer_norm.weight", "attention.bias_k", "relative_bias"} < {*plain}
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == [
        {"weight_decay": 0.01, "layerwise": True},
        {"weight_decay": 0.0, "layerwise": False},
    ]


def test_a_parameter_that_a_norm_layer_shares_is_left_alone():
    first, norm = nn.Linear(4, 4, bias=False), nn.LayerNorm([4, 4], bias=False)
    first.weight = norm.weight
    for net in (nn.Sequential(first, norm), nn.Sequential(norm, first)):
        scaled, plain = lars_param_groups(net, weight_decay=0.1)
        assert scaled["params"] == []
        assert [p is norm.weight for p in plain["params"]] == [True]


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["embedding.weight"], ["embedding.weight"]),
        (["head.weight"], ["embedding.weight"]),  # its other name
        ("pos*", ["position"]),
        (["attention.*", "conv.*"], [n for n in SCALED if n[:4] in ("atte", "conv")]),
        (["*"], SCALED),
        ([], []),
    ],
    ids=str,
)
def test_more_can_be_excluded_by_name(exclude, gone):
    net = Net()
    scaled, plain = names_of(net, lars_param_groups(net, weight_decay=0.1, exclude=exclude))
    assert scaled == [name for name in SCALED if name not in gone]
    assert {*gone} <= {*plain}


def test_the_order_is_that_of_the_module():
    """Else a checkpoint's state would be another parameter's."""
    net = Net()
    groups = [lars_param_groups(module, weight_decay=0.1) for module in (net, copy.deepcopy(net))]
    order = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    for names in names_of(net, groups[0]):
        assert names == sorted(names, key=order.__getitem__)
    for one, other in zip(*groups, strict=True):
        assert [p.shape for p in one["params"]] == [p.shape for p in other["params"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: LARS(groups, lr=1.0),
        LAMB,
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        lambda groups: torch.optim.AdamW(groups, lr=0.1),
        lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    ],
    ids=["LARS", "LAMB", "SGD", "AdamW", "fused"],
)
def test_optimizers_take_the_groups_as_they_are(make):
    """Those that do not know `layerwise` too, and keep it in their state."""
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = make(lars_param_groups(net, weight_decay=0.3))
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert [group["layerwise"] for group in state["param_groups"]] == [True, False]
    again = make(lars_param_groups(net, weight_decay=0.0))
    again.load_state_dict(state)
    decays = [(group["weight_decay"], group["layerwise"]) for group in again.param_groups]
    assert decays == [(0.3, True), (0.0, False)]


def test_a_net_of_one_kind_has_an_empty_group():
    net = nn.Linear(3, 2, bias=False)
    scaled, plain = lars_param_groups(net, weight_decay=0.1)
    assert (len(scaled["params"]), plain["params"]) == (1, [])
    net(torch.ones(1, 3)).sum().backward()
    optimizer = LARS([scaled, plain], lr=1.0)
    optimizer.step()
    assert optimizer.last_trust_ratios().shape == (1,)
    scaled, plain = lars_param_groups(nn.BatchNorm1d(3), weight_decay=0.1)
    assert (scaled["params"], len(plain["params"])) == ([], 2)


def test_what_has_nothing_to_train_is_refused():
    for module in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(ValueError, match=r"`module` must have a parameter that requires"):
            lars_param_groups(module, weight_decay=0.1)


def test_lazy_layers_are_refused_until_they_have_a_shape():
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(ValueError, match=r"of a shape, got `0.weight` without one\. Run a batch"):
        lars_param_groups(net, weight_decay=0.1)
    net(torch.ones(2, 5))
    assert len(lars_param_groups(net, weight_decay=0.1)[0]["params"]) == 1


def test_flattened_parameters_are_refused():
    net = nn.Linear(3, 2)
    net.weight._fsdp_flattened = True  # as FSDP1 marks them
    with pytest.raises(ValueError, match=r"got `weight`, part of a flattened one\. Use FSDP2"):
        lars_param_groups(net, weight_decay=0.1)
    for kind in (LARS, LAMB):
        with pytest.raises(ValueError, match=r"`params` must have their own shapes, .* Use FSDP2"):
            kind(net.parameters(), lr=0.1)
        kind(net.parameters(), lr=0.1, layerwise=False)  # needs no norms


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": nn.Linear(1, 1).parameters()}, TypeError, "`module` must be .*got generator"),
        ({"weight_decay": -0.1}, ValueError, r"`weight_decay` must be a number of at least 0, got"),
        ({"weight_decay": True}, ValueError, r"`weight_decay` must be .* got True"),
        (
            {"exclude": ["wieght"]},
            ValueError,
            r"`exclude` must hold patterns .* got 'wieght', which fits none\. .*: bias, weight",
        ),
    ],
    ids=range(4),
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        lars_param_groups(**{"module": nn.Linear(2, 1), "weight_decay": 0.1} | arguments)


def test_a_word_is_a_bias_and_not_a_part_of_one():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unbiased_weight = nn.Parameter(torch.ones(2, 2))
            self.in_proj_bias = nn.Parameter(torch.ones(2, 2))
            self.bias_k = nn.Parameter(torch.ones(1, 1, 2))

    odd = Odd()
    scaled, plain = lars_param_groups(odd, weight_decay=0.1)
    assert [id(p) for p in scaled["params"]] == [id(odd.unbiased_weight)]
    assert [id(p) for p in plain["params"]] == [id(odd.in_proj_bias), id(odd.bias_k)]
