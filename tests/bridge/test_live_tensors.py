"""Which tensors of a module are averaged, under which names, and where they are found."""

import math

import pytest
import torch
from torch import nn

from lightning_optkit.bridge.live_tensors import LiveTensors


class Tied(nn.Module):
    """Shares a weight, a submodule and, one level down, both again."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([self.norm, nn.Sequential(self.head, self.norm)])


def test_names_are_those_of_a_checkpoint():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ModuleDict({"a": nn.PReLU()}))
    live = LiveTensors(net)
    fractional = [name for name, value in net.state_dict().items() if value.is_floating_point()]
    assert sorted(live.names) == sorted(fractional)
    assert live.names == live.parameter_names + live.buffer_names
    assert live.buffer_names == ["1.running_mean", "1.running_var"]
    assert not live.is_sharded


def test_the_module_itself_may_hold_tensors():
    live = LiveTensors(nn.BatchNorm1d(2))
    assert live.names == ["weight", "bias", "running_mean", "running_var"]


def test_local_tensors_are_the_modules_own():
    net = nn.BatchNorm1d(2)
    live = LiveTensors(net)
    for name, tensor in live.local().items():
        assert tensor is getattr(net, name)
    assert list(live.local(["bias"])) == ["bias"]


def test_shared_ones_are_there_once_and_whole_under_each_name():
    net = Tied()
    live = LiveTensors(net)
    assert len(live.names) == len({id(tensor) for tensor in live.local().values()})
    assert live.names[0] == "embedding.weight"
    assert live.parameter_names == [name for name, _ in net.named_parameters()]
    assert live.buffer_names == ["norm.running_mean", "norm.running_var"]
    whole = live.whole(live.local())
    state = {name: v for name, v in net.state_dict().items() if v.is_floating_point()}
    assert set(whole) == set(state)
    for name, value in whole.items():
        assert value.data_ptr() == state[name].data_ptr()


def test_of_values_left_out_no_alias_is_made():
    live = LiveTensors(Tied())
    whole = live.whole(live.local(["norm.running_var"]))
    assert set(whole) == {
        "norm.running_var",
        "layers.0.running_var",
        "layers.1.1.running_var",
    }


def test_shards_are_of_known_first_names():
    live = LiveTensors(Tied())
    values = {"head.weight": torch.ones(5, 3), "head.bias": torch.ones(5), "gone": torch.ones(1)}
    assert set(live.shards(values)) == {"head.bias"}
    assert live.shards(values)["head.bias"] is values["head.bias"]


class Buffers(nn.Module):
    """Has a buffer of each kind."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("brief", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("turn", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("scalar", torch.tensor(1.0))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        self.register_buffer("unknown", torch.tensor(math.nan))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("missing", None)
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.register_buffer("one_row", torch.zeros(2).as_strided((1, 2), (0, 1)))
        self.register_buffer("rows", torch.zeros(2).expand(3, 2))
        self.register_parameter("absent", None)


def test_buffers_that_have_something_between_them_are_averaged():
    live = LiveTensors(Buffers())
    averaged = ["mean", "brief", "turn", "scalar", "empty", "mask", "unknown", "one_row"]
    assert live.parameter_names == ["weight"]
    assert live.buffer_names == averaged
    assert live.masks() == ["mask", "unknown"]


def test_masks_are_those_of_now():
    net = Buffers()
    live = LiveTensors(net)
    net.unknown = torch.tensor(1.0)
    net.mean[0] = math.inf
    assert live.masks() == ["mean", "mask"]


def test_a_parameter_is_no_mask():
    net = nn.Linear(2, 2)
    nn.init.constant_(net.bias, -math.inf)
    live = LiveTensors(net)
    assert live.masks() == []
    assert live.names == ["weight", "bias"]


def test_tensors_that_are_replaced_are_found():
    net = nn.BatchNorm1d(2)
    live = LiveTensors(net)
    net.running_mean = torch.full((2,), 5.0)
    net.weight = nn.Parameter(torch.full((2,), 6.0))
    assert live.local()["running_mean"] is net.running_mean
    assert live.local()["weight"] is net.weight
    net.double()
    assert {value.dtype for value in live.local().values()} == {torch.float64}


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "1.weight"),
        (nn.LazyBatchNorm1d(affine=False), "running_mean"),
    ],
)
def test_what_is_not_there_yet_is_refused(net, name):
    with pytest.raises(ValueError, match=f"`{name}` must be initialized before training .* lazy"):
        LiveTensors(net)


def test_a_lazy_layer_that_has_seen_a_batch_is_one_like_others():
    net = nn.LazyLinear(2)
    net(torch.ones(1, 3))
    assert LiveTensors(net).local()["weight"].shape == (2, 3)


def test_a_compiled_submodule_has_the_names_of_its_checkpoint():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0] = torch.compile(net[0], backend="eager")
    live = LiveTensors(net)
    assert live.parameter_names[0] == "0._orig_mod.weight"
    assert set(live.names) == set(net.state_dict()) - {"1.num_batches_tracked"}


def test_what_is_parametrized_is_averaged_where_it_is_trained():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    live = LiveTensors(net)
    assert set(live.names) == set(net.state_dict())
    assert all(isinstance(tensor, nn.Parameter) for tensor in live.local().values())


def test_spectral_norm_keeps_its_vectors_with_its_weight():
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
    live = LiveTensors(net)
    assert set(live.names) == set(net.state_dict())
    assert set(live.buffer_names) == {
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    }


def test_frozen_parameters_are_there():
    net = nn.Linear(2, 2).requires_grad_(False)
    assert LiveTensors(net).parameter_names == ["weight", "bias"]


def test_a_module_without_tensors_has_none():
    live = LiveTensors(nn.ReLU())
    assert (live.names, live.local(), live.whole({}), live.is_sharded) == ([], {}, {}, False)
