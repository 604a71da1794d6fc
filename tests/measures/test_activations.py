"""Dead units and saturated values of nets in which they can be counted."""

import math
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_optkit.measures.activations import ActivationRecorder, Activations


def seen(net, *inputs, names=None, **options):
    """Return what is seen of a net's forward pass."""
    modules = dict(net.named_modules())
    with ActivationRecorder(names or modules) as recorder:
        net(*inputs)
    return recorder.activations(**options)


def linear(rows, bias=None):
    """Return a linear layer with these weights."""
    weight = torch.tensor(rows, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(torch.zeros(len(rows)) if bias is None else torch.tensor(bias))
    return layer


# Units 0 and 2 are dead on positive inputs.
HALF_DEAD = [[-1.0], [1.0], [-2.0], [3.0]]
COLUMN = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)


def test_a_unit_is_dead_if_it_is_zero_on_every_sample():
    net = nn.Sequential(linear(HALF_DEAD), nn.ReLU())
    found = seen(net, COLUMN)
    assert found == Activations(("1",), (4,), (2,), (0,), (0,))
    assert found.dead == 0.5
    assert math.isnan(found.saturated)
    assert found.rows["1"][0] == 0.5
    assert math.isnan(found.rows["1"][1])
    assert seen(net, torch.cat([COLUMN, -COLUMN])).dead == 0.0  # each lives on one of them
    assert seen(net, 0 * COLUMN).dead == 1.0


class Called(nn.Module):
    """Calls functions on the output of a linear layer."""

    def __init__(self, *functions, layer=None):
        super().__init__()
        self.layer = layer or linear(HALF_DEAD)
        self.functions = functions

    def forward(self, x):
        x = self.layer(x)
        return [function(x.clone()) for function in self.functions]


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        torch.relu_,
        F.relu_,
        torch.Tensor.relu,
        torch.Tensor.relu_,
        F.relu6,
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.hardtanh(x, 0.0, 4.0),
        lambda x: F.hardtanh(x, max_val=4.0, min_val=0.0),
    ],
)
def test_a_relu_is_seen_however_it_is_called(function):
    found = seen(Called(function), COLUMN)
    assert (found.num_units, found.num_dead) == ((4,), (2,))
    (name,) = found.names
    assert name in ("relu", "relu6", "hardtanh")  # of the module that calls it


@pytest.mark.parametrize(
    ("function", "edge"),
    [
        (torch.sigmoid, math.log(19)),  # sigmoid(log 19) = 0.95
        (torch.Tensor.sigmoid_, math.log(19)),
        (torch.special.expit, math.log(19)),
        (nn.Sigmoid(), math.log(19)),
        (F.sigmoid, math.log(19)),
        (torch.tanh, math.atanh(0.9)),  # 5 % of the range of 2
        (torch.Tensor.tanh, math.atanh(0.9)),
        (nn.Tanh(), math.atanh(0.9)),
        (F.hardtanh, 1.0),  # at the limit itself
        (nn.Hardtanh(-2.0, 2.0), 2.0),
        (F.hardsigmoid, 3.0),
        (nn.Hardsigmoid(), 3.0),
    ],
)
def test_values_near_an_asymptote_are_saturated(function, edge):
    inside, outside = edge * (1 - 1e-6), edge * (1 + 1e-6)
    x = torch.tensor([[inside], [outside], [-outside], [-inside], [0.0]], dtype=torch.float64)
    found = seen(Called(function, layer=linear([[1.0], [1.0]])), x)
    assert (found.num_values, found.num_saturated) == ((10,), (4,))
    assert found.saturated == 0.4
    assert math.isnan(found.dead)


def test_what_has_no_limit_is_not_seen():
    functions = (F.gelu, F.silu, F.leaky_relu, F.elu, F.softplus, torch.exp, F.softmax)
    net = Called(*functions[:-1], lambda x: F.softmax(x, 1))
    assert seen(net, COLUMN).names == ()
    assert math.isnan(seen(net, COLUMN).dead)


def constant(layer):
    """Return a layer whose outputs are its bias, in four channels of which the second is dead."""
    nn.init.zeros_(layer.weight)
    layer.bias.data.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(1, 4), (5, 1)),
        (nn.Linear(1, 4), (1,)),  # not batched
        (nn.Linear(1, 4), (5, 3, 1)),  # a sequence
        (nn.Linear(1, 4), (5, 3, 2, 1)),  # an image, channels last
        (nn.LayerNorm(4), (5, 3, 2, 4)),
        (nn.Conv1d(1, 4, 1), (5, 1, 6)),
        (nn.Conv2d(1, 4, 1), (5, 1, 6, 7)),
        (nn.Conv2d(1, 4, 1, padding=1, padding_mode="circular"), (5, 1, 6, 7)),
        (nn.Conv3d(1, 4, 1), (5, 1, 2, 2, 2)),
        (nn.ConvTranspose1d(1, 4, 1), (5, 1, 6)),
        (nn.ConvTranspose2d(1, 4, 1), (5, 1, 6, 7)),
        (nn.ConvTranspose3d(1, 4, 1), (5, 1, 2, 2, 2)),
        (nn.GroupNorm(1, 4), (5, 4, 6)),
        (nn.BatchNorm1d(4), (5, 4, 6)),
        (nn.InstanceNorm1d(4, affine=True), (5, 4, 6)),
    ],
    ids=str,
)
def test_units_are_channels(layer, shape):
    found = seen(nn.Sequential(constant(layer), nn.ReLU()), torch.ones(shape))
    assert (found.num_units, found.num_dead) == ((4,), (1,))


def test_units_after_a_convolution_that_is_flattened_are_numbers():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.ReLU())
    assert seen(net, torch.ones(3, 1, 4, 5)).num_units == (40,)
    assert seen(nn.ReLU(), torch.ones(3, 7, 4, 5)).num_units == (7,)  # no layer says which
    assert seen(nn.ReLU(), torch.ones(3, 4, 5)).num_units == (5,)


class Block(nn.Module):
    """One activation module that a forward pass calls twice, as residual nets are written."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(HALF_DEAD), linear([[-1.0] * 4, [1.0] * 4])
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))))


def test_what_is_called_twice_in_one_forward_pass_is_two_places():
    assert seen(Block(), COLUMN).rows.keys() == {"relu", "relu#2"}
    assert seen(Block(), COLUMN).num_dead == (2, 1)
    assert seen(Called(F.relu, F.relu, torch.tanh), COLUMN).names == ("relu", "relu#2", "tanh")
    nested = nn.Sequential(Block())
    assert seen(nested, COLUMN).names == ("0.relu", "0.relu#2")


def test_widths_that_differ_are_told_apart():
    relu = nn.ReLU()
    with ActivationRecorder({"relu": relu}) as recorder:
        for width in (3, 5, 3):
            relu(torch.ones(2, width))
    found = recorder.activations()
    assert found.names == ("relu (3 units)", "relu (5 units)")
    assert list(found.rows) == list(found.names)


class Critic(nn.Module):
    """A module that is applied to two batches."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(linear(HALF_DEAD), nn.ReLU(), linear([[1.0] * 4]), nn.Tanh())

    def forward(self, real, fake):
        return self.critic(real) - self.critic(fake)


def test_what_is_called_again_adds_to_its_places():
    found = seen(Critic(), COLUMN, -COLUMN)
    assert found.names == ("critic.1", "critic.3")
    assert (found.num_dead, found.num_values) == ((0, 0), (0, 6))


class Fresh(nn.Module):
    """Makes an activation module in each forward pass, which has no name."""

    def __init__(self):
        super().__init__()
        self.layer = linear(HALF_DEAD)

    def forward(self, x):
        return nn.ReLU()(self.layer(x))


def test_a_module_without_a_name_belongs_to_the_one_that_calls_it():
    assert seen(nn.Sequential(Fresh()), COLUMN).names == ("0.relu",)


def test_calls_outside_the_modules_are_passed_over():
    net = nn.Sequential(linear(HALF_DEAD), nn.ReLU())

    def step():
        F.relu(1 - net(COLUMN))  # a hinge loss
        nn.Sigmoid()(COLUMN)

    with ActivationRecorder(dict(net.named_modules())) as recorder:
        step()
    assert recorder.activations().names == ("1",)
    only = {"body": net[0]}
    with ActivationRecorder(only) as recorder:
        net(COLUMN)
    assert recorder.activations().names == ()


def test_what_is_left_out_is_passed_over_with_all_that_it_calls():
    net = nn.Sequential(linear(HALF_DEAD), nn.Sequential(nn.Sequential(nn.ReLU()), Plain()))
    with ActivationRecorder(dict(net.named_modules()), but={"1.0"}) as recorder:
        net(COLUMN)
    assert recorder.activations().names == ("1.1.relu",)


class Plain(nn.Module):
    def forward(self, x):
        return F.relu(x)


def test_processes_are_summed():
    """A unit is dead if it is dead on all of them."""
    net = nn.Sequential(linear(HALF_DEAD), nn.ReLU(), linear([[9.0] * 4]), nn.Tanh())
    modules = dict(net.named_modules())
    recorders = []
    for x in (COLUMN, torch.cat([COLUMN, -COLUMN])[2:4]):
        with ActivationRecorder(modules) as recorder:
            net(x)
        recorders.append(recorder)
    assert recorders[0].places == recorders[1].places == [("1", 4), ("3", 0)]
    rows = []
    for recorder in recorders:
        recorder.activations(lambda flat: rows.append(flat) or flat)
    found = recorders[0].activations(lambda flat: rows[0] + rows[1])
    together = seen(net, torch.cat([COLUMN, torch.cat([COLUMN, -COLUMN])[2:4]]))
    assert found == together
    assert found.num_values == (0, 5)


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(linear([[1.0]]), nn.ReLU())
    recorder = ActivationRecorder(dict(net.named_modules()))

    def fails(*_):
        raise KeyError("x")

    handle = net[1].register_forward_hook(fails)
    with pytest.raises(KeyError), recorder:
        net(COLUMN)
    handle.remove()
    before = recorder.activations()
    assert before.names == ("1",)
    net(COLUMN)
    assert recorder.activations() == before
    kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    assert not any(getattr(each, name) for each in net.modules() for name in kept)
    with recorder:  # again, and a failure has not left it inside a module
        net(COLUMN)
    assert recorder.activations().names == ("1",)


class Tries(nn.Module):
    """Goes on where a part of it fails."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(7, 7)

    def forward(self, x):
        with suppress(RuntimeError):
            self.part(x)
        return F.relu(x)


def test_a_part_that_fails_is_left_behind():
    assert seen(Tries(), COLUMN).names == ("relu",)


def test_a_value_that_is_not_a_number_is_alive():
    net = nn.Sequential(linear([[1.0], [-1.0]]), nn.ReLU())
    assert seen(net, torch.full((2, 1), math.nan, dtype=torch.float64)).dead == 0.0


def test_an_empty_batch_says_nothing():
    net = nn.Sequential(linear([[1.0]]), nn.ReLU())
    assert seen(net, COLUMN[:0]).names == ()
