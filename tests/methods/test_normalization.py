"""Which layer takes the place of which, and what it makes of the same inputs."""

import math

import pytest
import torch
from torch import nn

from lightning_optkit.methods.batch_norm import BatchNorm
from lightning_optkit.methods.batch_renorm import BatchRenorm
from lightning_optkit.methods.channel_affine import ChannelAffine
from lightning_optkit.methods.ghost_batch_norm import GhostBatchNorm
from lightning_optkit.methods.normalization import NormRule, NotSwappable, class_of, groups_of

C = 6


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def told_apart(layer):
    """Give a layer γ, β and running statistics that differ from channel to channel."""
    for i, tensor in enumerate([*layer.parameters(), *layer.buffers()]):
        if tensor.is_floating_point():
            tensor.data = drawn(*tensor.shape, seed=i).abs() + 0.1
        else:
            tensor.data += 7
    return layer.double()


SOURCES = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(C, eps=0.01, momentum=0.3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(C, eps=0.01, momentum=0.3),
    "BatchNorm3d": lambda: nn.BatchNorm3d(C, eps=0.01, momentum=None),
    "BatchNorm": lambda: BatchNorm(C, eps=0.01, momentum=0.3),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(C, eps=0.01, momentum=0.3),
    "GroupNorm": lambda: nn.GroupNorm(2, C, eps=0.01),
    "LayerNorm": lambda: nn.LayerNorm(C, eps=0.01),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(C, eps=0.01, affine=True),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(C, eps=0.01, affine=True),
    "InstanceNorm3d": lambda: nn.InstanceNorm3d(C, eps=0.01, affine=True),
    "BatchRenorm": lambda: BatchRenorm(C, eps=0.01, momentum=0.3),
    "GhostBatchNorm": lambda: GhostBatchNorm(C, eps=0.01, momentum=0.3),
}
KIND = {
    "BatchNorm1d": "batch",
    "BatchNorm2d": "batch",
    "BatchNorm3d": "batch",
    "BatchNorm": "batch",
    "SyncBatchNorm": "sync",
    "GroupNorm": "group",
    "LayerNorm": "layer",
    "BatchRenorm": "batch_renorm",
    "GhostBatchNorm": "ghost",
} | {f"InstanceNorm{d}d": "instance" for d in (1, 2, 3)}
DIMS = {name: int(name[-2]) if name[-1] == "d" else 2 for name in SOURCES} | {"LayerNorm": 0}
INPUT = {dims: (5, C, *(4, 3, 2)[:dims]) for dims in range(4)}
TARGETS = {
    "batch": lambda s: f"BatchNorm{DIMS[s]}d" if s[-1] == "d" else "BatchNorm",
    "group": lambda s: "GroupNorm",
    "layer": lambda s: "GroupNorm",
    "instance": lambda s: s.replace("Batch", "Instance") if s[-2:] in ("2d", "3d") else "GroupNorm",
    "batch_renorm": lambda s: "BatchRenorm",
    "ghost": lambda s: "GhostBatchNorm",
    "sync": lambda s: "SyncBatchNorm",
}
PAIRS = [
    (source, target)
    for source in SOURCES
    for target in TARGETS
    if KIND[source] != target and not (source == "LayerNorm" and target == "instance")
]


def normalised(x, layer, dims, groups=None):
    """Return γ(x − μ)/σ + β with mean and variance over dimensions, of groups of channels."""
    values = x if groups is None else x.unflatten(1, (groups, -1))
    mean, variance = values.mean(dims, keepdim=True), values.var(dims, correction=0, keepdim=True)
    values = ((values - mean) / (variance + layer.eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return values * layer.weight.view(shape) + layer.bias.view(shape)


def closed_form(x, layer, target):
    """Return what a layer of this kind makes of an input in training."""
    spatial = list(range(2, x.ndim))
    match target:
        case "batch" | "batch_renorm" | "sync":
            return normalised(x, layer, [0, *spatial])
        case "ghost":
            chunks = [normalised(chunk, layer, [0, *spatial]) for chunk in x.split([2, 3])]
            return torch.cat(chunks)
        case "instance":
            return normalised(x, layer, spatial)
    groups = 1 if target == "layer" or x.ndim < 4 else 3
    return normalised(x, layer, [d + 1 for d in (1, *spatial)], groups)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_every_kind_in_the_place_of_every_other(source, target):
    old = told_apart(SOURCES[source]())
    options = {"chunk_size": 2} if target == "ghost" else None
    rule = NormRule(KIND[source], target, num_groups=4, target_options=options)
    assert rule.takes(old)
    assert not rule.is_done(old)
    new = rule.replacement(old).layer
    expected = "BatchNorm1d" if (source, target) == ("LayerNorm", "batch") else None
    assert type(new).__name__ == (expected or TARGETS[target](source))
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert new.eps == 0.01
    assert new.weight.dtype == torch.float64
    shape = INPUT[DIMS[source]] if source != "BatchNorm1d" or target == "instance" else INPUT[0]
    x = drawn(*shape)
    torch.testing.assert_close(new(x), closed_form(x, new, target), rtol=1e-10, atol=1e-10)
    if source.startswith(("Batch", "Sync", "Ghost")) and hasattr(new, "running_mean"):
        if target != "instance":
            assert new.momentum == old.momentum
            assert new.running_mean is old.running_mean
            assert new.num_batches_tracked is old.num_batches_tracked
    elif target in ("batch", "batch_renorm", "ghost", "sync"):
        assert new.momentum == 0.1
        assert new.num_batches_tracked == 1
        assert new.running_mean.dtype == torch.float64


def test_layer_norm_is_group_norm_of_one_group_and_instance_norm_of_one_channel():
    x = drawn(4, C, 3, 2)
    layer = NormRule("batch", "layer").replacement(nn.BatchNorm2d(C).double()).layer
    torch.testing.assert_close(layer(x), nn.LayerNorm([C, 3, 2]).double()(x))
    flat = NormRule("batch", "layer").replacement(nn.BatchNorm1d(C).double()).layer
    torch.testing.assert_close(flat(x[:, :, 0, 0]), nn.LayerNorm(C).double()(x[:, :, 0, 0]))
    instance = NormRule("group", "instance").replacement(nn.GroupNorm(2, C).double()).layer
    torch.testing.assert_close(instance(x), nn.InstanceNorm2d(C).double()(x))


def test_group_norm_of_a_sample_does_not_depend_on_the_others():
    layer = NormRule(num_groups=3).replacement(told_apart(nn.BatchNorm2d(C))).layer
    sample = drawn(1, C, 4, 4)
    alone = layer(sample)
    for seed in range(3):
        others = 100 * drawn(seed + 1, C, 4, 4, seed=seed)
        assert torch.equal(layer(torch.cat([sample, others]))[:1], alone)
        assert torch.equal(layer(torch.cat([others, sample]))[-1:], alone)
    assert torch.equal(layer.eval()(sample), alone)


def test_none_keeps_gamma_and_beta_in_any_layout():
    x = drawn(4, C, 3, 2)
    old = told_apart(nn.BatchNorm2d(C))
    new = NormRule("batch", "none").replacement(old).layer
    expected = x * old.weight.view(1, -1, 1, 1) + old.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(new(x), expected)
    torch.testing.assert_close(new(x[:, :, 0, 0]), expected[:, :, 0, 0])
    assert type(new) is ChannelAffine
    assert new.weight is old.weight
    old = told_apart(nn.LayerNorm([3, 2]))
    new = NormRule("layer", "none").replacement(old).layer
    torch.testing.assert_close(new(x), x * old.weight + old.bias)
    assert repr(new) == "ChannelAffine((3, 2), trailing=True)"
    half = x.to(torch.bfloat16)
    assert new.float()(half).dtype == torch.bfloat16
    for rule, old in [
        (NormRule("batch", "none", keep_affine=False), nn.BatchNorm2d(C)),
        (NormRule("batch", "none"), nn.BatchNorm2d(C, affine=False)),
        (NormRule("instance", "none"), nn.InstanceNorm2d(C)),
    ]:
        new = rule.replacement(old).layer
        assert type(new) is nn.Identity


# -- groups ------------------------------------------------------------------------------------


def test_groups_by_the_published_table():
    table = {72: 24, 80: 20, 100: 25, 144: 24, 200: 25, 20: 20, 3: 3, 64: 32, 97: 1, 1: 1}
    assert {c: groups_of(c) for c in table} == table


@pytest.mark.parametrize("channels_per_group", [1, 2, 7, 16, 100])
def test_groups_are_the_most_that_divide_and_are_large_enough(channels_per_group):
    for channels in range(1, 130):
        groups = groups_of(channels, channels_per_group=channels_per_group)
        fits = [
            g
            for g in range(1, channels + 1)
            if channels % g == 0 and (channels / g >= channels_per_group or g == 1)
        ]
        assert groups == max(fits)
        by_number = groups_of(channels, num_groups=channels_per_group)
        assert by_number == max(g for g in range(1, channels_per_group + 1) if channels % g == 0)


@pytest.mark.parametrize(
    ("layer", "options", "groups"),
    [
        (nn.BatchNorm2d(64), {}, 32),
        (nn.BatchNorm2d(20), {}, 20),
        (nn.BatchNorm2d(64), {"channels_per_group": 16}, 4),
        (nn.BatchNorm1d(64), {}, 4),
        (nn.BatchNorm1d(20), {}, 1),
        (nn.BatchNorm1d(40), {}, 2),
        (nn.BatchNorm1d(1024), {}, 32),
        (nn.BatchNorm1d(64), {"num_groups": 2}, 2),
        (nn.BatchNorm1d(64), {"channels_per_group": 2}, 32),
        (nn.LayerNorm(64), {"source": "layer"}, 4),
        (nn.SyncBatchNorm(64), {}, 32),
    ],
    ids=str,
)
def test_groups_of_a_layer(layer, options, groups):
    assert NormRule(**options).replacement(layer).layer.num_groups == groups


def test_an_error_where_channels_are_not_divisible_if_that_is_wanted():
    rule = NormRule(divisor="error")
    assert rule.replacement(nn.BatchNorm2d(64)).layer.num_groups == 32
    assert NormRule(divisor="error", channels_per_group=10).replacement(nn.BatchNorm2d(20))
    with pytest.raises(NotSwappable, match="its 72 channels cannot be put into 32 groups"):
        rule.replacement(nn.BatchNorm2d(72))
    with pytest.raises(NotSwappable, match="its 72 channels cannot be put into groups of 10"):
        NormRule(divisor="error", channels_per_group=10).replacement(nn.BatchNorm2d(72))


# -- γ and β -----------------------------------------------------------------------------------


def test_gamma_and_beta_begin_anew_if_they_are_not_kept():
    old = told_apart(nn.BatchNorm2d(C))
    old.bias.requires_grad_(False)
    new = NormRule(keep_affine=False).replacement(old).layer
    assert torch.equal(new.weight, torch.ones_like(old.weight))
    assert torch.equal(new.bias, torch.zeros_like(old.bias))
    assert new.weight.requires_grad
    assert not new.bias.requires_grad
    assert new.weight.dtype == torch.float64


def test_a_layer_without_gamma_and_beta_stays_so_but_for_instance_norm():
    assert NormRule().replacement(nn.BatchNorm2d(C, affine=False)).layer.weight is None
    old = nn.InstanceNorm2d(C, track_running_stats=True)
    like = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
    new = NormRule("instance", "batch").replacement(old, like=like).layer
    assert new.weight.tolist() == [1.0] * C
    assert new.bias.tolist() == [0.0] * C
    assert not new.weight.requires_grad
    assert not new.bias.requires_grad
    assert new.running_mean is not old.running_mean
    new = NormRule("instance", "group").replacement(nn.InstanceNorm2d(C), like=like).layer
    assert new.weight.dtype == torch.float64
    assert NormRule("instance", "group").replacement(old).layer.weight.requires_grad


def test_tensors_of_the_layer_itself_say_dtype_and_which_are_saved():
    old = nn.InstanceNorm2d(C, track_running_stats=True).double()
    assert NormRule("instance", "batch").replacement(old).layer.weight.dtype == torch.float64
    old = nn.BatchNorm2d(C)
    old._non_persistent_buffers_set.add("running_mean")
    new = NormRule("batch", "ghost").replacement(old).layer
    assert list(new.state_dict()) == ["weight", "bias", "running_var", "num_batches_tracked"]


def test_the_class_under_that_of_shards_counts():
    class FSDPModule:
        pass

    sharded = type("FSDPBatchNorm2d", (FSDPModule, nn.BatchNorm2d), {})
    assert class_of(sharded(C)) is nn.BatchNorm2d
    assert NormRule().takes(sharded(C))
    assert class_of(nn.GroupNorm(1, C)) is nn.GroupNorm


def test_gamma_without_beta():
    old = nn.BatchNorm2d(C).double()
    old.bias = None
    for target in ("group", "instance", "batch_renorm", "ghost", "none", "sync"):
        new = NormRule("batch", target).replacement(old).layer
        assert new.bias is None
        assert new.weight is old.weight
        assert new(drawn(4, C, 3, 2)).shape == (4, C, 3, 2)


# -- options -----------------------------------------------------------------------------------


def test_options_are_those_of_the_new_layer():
    def built(target, **options):
        return (
            NormRule("batch", target, target_options=options).replacement(nn.BatchNorm2d(C)).layer
        )

    assert built("group", eps=0.5).eps == 0.5
    assert built("batch_renorm", r_max=2, d_max=math.inf, relax_from=3, momentum=None).r_max == 2.0
    assert built("batch_renorm", momentum=None).momentum is None
    assert built("ghost", chunk_size=7, momentum=0.5).chunk_size == 7
    assert built("instance", eps=0.5).eps == 0.5


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"source": "Batch"}, ValueError, "`source` must be one of 'batch', .*, got 'Batch'"),
        ({"target": "weight"}, ValueError, "`target` must be one of 'group', .*, got 'weight'"),
        ({"divisor": "nearest"}, ValueError, "`divisor` must be one of 'largest', 'error', got"),
        ({"target": "batch"}, ValueError, "another kind than `source`, got both. Write `source='s"),
        ({"source": "layer", "target": "layer"}, ValueError, "another kind than `source`, got"),
        ({"num_groups": 0}, ValueError, "`num_groups` must be an integer of at least 1, got 0"),
        ({"num_groups": True}, ValueError, "`num_groups` must be an integer of at least 1, got T"),
        ({"channels_per_group": 1.5}, ValueError, "`channels_per_group` must be an integer of at"),
        (
            {"channels_per_group": 16, "num_groups": 8},
            ValueError,
            "At most one of `num_groups` and `channels_per_group` must be given",
        ),
        ({"target_options": ["eps"]}, TypeError, "`target_options` must be a dict, got"),
        (
            {"target_options": {"chunk_size": 3}},
            ValueError,
            r"options of target='group', got \['chunk_size'\]. It takes one of eps",
        ),
        ({"target": "none", "target_options": {"eps": 1}}, ValueError, "It takes none"),
        ({"target_options": {"eps": -1}}, ValueError, "`eps` must be a number of at least 0"),
        ({"target_options": {"eps": True}}, ValueError, "`eps` must be a number of at least 0"),
        (
            {"target": "ghost", "target_options": {"momentum": 2}},
            ValueError,
            r"`momentum` must be a share in \[0, 1\], such as 0.1, got 2",
        ),
        ({"target": "ghost", "target_options": {"chunk_size": 1}}, ValueError, "`chunk_size` must"),
        ({"target": "batch_renorm", "target_options": {"r_max": 0}}, ValueError, "`r_max` must be"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        NormRule(**options)


# -- inputs and layers that have no replacement --------------------------------------------------


def guarded(rule, old):
    found = rule.replacement(old)
    if found.guard is not None:
        found.layer.register_forward_pre_hook(found.guard, with_kwargs=True)
    return found.layer


@pytest.mark.parametrize("target", ["batch", "group", "batch_renorm", "ghost", "sync"])
def test_in_the_place_of_layer_norm_only_samples_without_positions_are_taken(target):
    new = guarded(NormRule("layer", target), nn.LayerNorm(C))
    assert new(torch.randn(4, C)).shape == (4, C)
    for shape in [(4, 5, C), (4, C, C)]:  # the second would be normalised, wrongly
        with pytest.raises(ValueError, match=r"must get inputs of shape \(N, C\), got \(4, "):
            new(torch.randn(shape))
    with pytest.raises(ValueError, match=r"must get inputs of shape \(N, C\)"):
        new(input=torch.randn(4, 5, C))


@pytest.mark.parametrize(
    ("rule", "old"),
    [
        (NormRule(channels_per_group=1), nn.BatchNorm1d(C)),
        (NormRule("batch", "instance"), nn.BatchNorm1d(C)),
        (NormRule("sync", "group"), nn.SyncBatchNorm(C)),
        (NormRule(), nn.BatchNorm2d(C)),
    ],
    ids=str,
)
def test_a_group_of_one_value_is_refused_not_made_zero(rule, old):
    new = guarded(rule, old)
    assert new.num_groups == C
    assert new(torch.randn(4, C, 5)).abs().max() > 0.1
    for shape in [(4, C), (4, C, 1, 1)]:
        with pytest.raises(ValueError, match=f"more than one value a group, got .* in {C} groups"):
            new(torch.randn(shape))


def test_groups_of_several_channels_take_samples_without_positions():
    new = guarded(NormRule(channels_per_group=3), nn.BatchNorm1d(C).double())
    x = drawn(4, C)
    torch.testing.assert_close(new(x), normalised(x, new, [2], 2))


@pytest.mark.parametrize(
    ("rule", "layer", "text"),
    [
        (NormRule("layer", "batch"), nn.LayerNorm([2, C]), r"`normalized_shape` \(2, 6\) has more"),
        (NormRule("layer", "instance"), nn.LayerNorm(C), "a channel of a sample is one value"),
        (
            NormRule("batch", "batch_renorm"),
            nn.BatchNorm2d(C, track_running_stats=False),
            "it keeps no running statistics, by which BatchRenorm normalises",
        ),
    ],
    ids=str,
)
def test_a_layer_that_has_no_such_replacement_says_why(rule, layer, text):
    with pytest.raises(NotSwappable, match=text):
        rule.replacement(layer)


def test_batch_norm_without_running_statistics_stays_without():
    old = nn.BatchNorm2d(C, track_running_stats=False)
    for target in ("ghost", "sync"):
        new = NormRule("batch", target).replacement(old).layer
        assert new.running_mean is None
        assert not new.track_running_stats
