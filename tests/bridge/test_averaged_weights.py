"""A module's weights and their average: who is where, and what a checkpoint needs of both."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_optkit.bridge.averaged_weights import AveragedWeights
from lightning_optkit.methods.averaging import RunningAverage, exponential_share, uniform_share
from tests.benchmarks.timing import peak_memory


class Net(nn.Module):
    """Ties, freezes and normalizes; has a mask, a counter and a norm layer under two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([self.norm])
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        self.register_buffer("passing", torch.ones(2), persistent=False)


STATISTICS = ("norm.running_mean", "norm.running_var")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def perturb(net: nn.Module, generator: torch.Generator) -> None:
    """Move what training moves."""
    moved = [p for p in net.parameters() if p.requires_grad]
    with torch.no_grad():
        for tensor in [*moved, net.norm.running_mean, net.norm.running_var]:
            tensor.add_(torch.rand(tensor.shape, generator=generator))
    net.norm.num_batches_tracked += 1


def averaged(
    net: nn.Module, n: int = 3, *, apart=(), share=uniform_share, seed: int = 0
) -> AveragedWeights:
    weights = AveragedWeights(net, RunningAverage(share), apart=apart)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        perturb(net, generator)
        assert weights.take(thorough=True)
    if apart:
        weights.statistics = {name: torch.full((3,), 7.0).to(like_of(net)) for name in apart}
    perturb(net, generator)
    return weights


def like_of(net: nn.Module) -> torch.dtype:
    return net.embedding.weight.dtype


def new_net(dtype=torch.float32, *, seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def cloned(tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(found, truth) -> None:
    assert list(found) == list(truth)
    for name, value in truth.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# -- in and out --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [(), STATISTICS])
def test_in_the_module_is_the_average_and_then_the_weights_again(dtype, apart):
    net = new_net(dtype)
    weights = averaged(net, apart=apart)
    own = cloned(net.state_dict())
    average = cloned(weights.average.tensors)
    with weights.in_module():
        assert weights.is_in_module
        inside = net.state_dict()
        for name, value in average.items():
            assert torch.equal(inside[name], value.to(dtype))
        for name in apart:
            assert inside[name].tolist() == [7, 7, 7]
        assert inside["norm.num_batches_tracked"] == own["norm.num_batches_tracked"]
        assert torch.equal(inside["mask"], own["mask"])
        assert torch.equal(inside["head.weight"], inside["embedding.weight"])
    assert not weights.is_in_module
    assert_equal(net.state_dict(), own)
    assert_equal(weights.average.tensors, average)


def test_the_average_is_the_mean_of_what_was_taken():
    net = new_net(torch.float64)
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    taken, generator = [], torch.Generator().manual_seed(0)
    for _ in range(5):
        perturb(net, generator)
        weights.take(thorough=False)
        taken.append(cloned(net.state_dict()))
    assert weights.num_averaged == 5
    assert "mask" not in weights.average.tensors
    assert "head.weight" not in weights.average.tensors  # once, as embedding.weight
    for name, value in weights.average.tensors.items():
        mean = torch.stack([each[name] for each in taken]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-12, atol=0)


def test_what_is_apart_is_not_averaged():
    weights = averaged(new_net(), apart=STATISTICS)
    assert not set(STATISTICS) & set(weights.average.tensors)
    assert weights.averaged_buffers() == []
    assert len(averaged(new_net()).averaged_buffers()) == 2


def test_an_error_inside_puts_the_weights_back():
    net = new_net()
    weights = averaged(net)
    own = cloned(net.state_dict())
    with pytest.raises(KeyboardInterrupt), weights.in_module():
        raise KeyboardInterrupt
    assert not weights.is_in_module
    assert_equal(net.state_dict(), own)


def test_within_itself_it_stays():
    net = new_net()
    weights = averaged(net)
    with weights.in_module():
        inside = cloned(net.state_dict())
        with weights.in_module():
            assert_equal(net.state_dict(), inside)
        assert weights.is_in_module
        assert_equal(net.state_dict(), inside)
    assert not weights.is_in_module


def test_statistics_that_blew_up_do_not_stay_in_the_module():
    net = new_net()
    weights = averaged(net, apart=STATISTICS)
    weights.statistics["norm.running_var"].fill_(math.nan)
    own = cloned(net.state_dict())
    with weights.in_module():
        assert net.norm.running_var.isnan().all()
    assert_equal(net.state_dict(), own)


def test_a_model_that_is_not_finite_is_left_out():
    net = new_net()
    weights = averaged(net)
    before = cloned(weights.average.tensors)
    with torch.no_grad():
        net.head.bias.fill_(math.nan)
    assert not weights.take(thorough=False)
    assert weights.num_averaged == 3
    assert_equal(weights.average.tensors, before)


def test_weights_that_share_memory_by_hand_come_back():
    """Tied through ``.data``: two parameters on one memory."""
    net = nn.Module()
    net.first, net.second = nn.Linear(2, 2), nn.Linear(2, 2)
    net.second.weight.data = net.first.weight.data
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    weights.take(thorough=True)
    with torch.no_grad():
        net.first.weight.add_(1)
    own = cloned(net.state_dict())
    with weights.in_module():
        raw = weights.state(average_is_in_state_dict=True)["raw"]
        assert_equal({name: raw[name] for name in own}, own)
    assert_equal(net.state_dict(), own)


def test_distance_is_relative_and_of_parameters():
    net = nn.BatchNorm1d(2)
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    weights.take(thorough=True)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([4.0, 5.0]))
        net.running_mean.fill_(1e6)
    assert weights.distance() == pytest.approx(math.sqrt((9 + 16) / (16 + 25)), rel=1e-6)


def test_memory_is_one_copy_of_parameters_and_float_buffers():
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(16)], nn.BatchNorm1d(64))
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    copy_of_all = sum(v.nbytes for v in net.state_dict().values() if v.is_floating_point())
    one = net[0].weight.nbytes
    assert copy_of_all <= peak_memory(lambda: weights.take(thorough=True)) <= copy_of_all + 2 * one
    assert peak_memory(lambda: weights.take(thorough=False)) < one
    buffers = 2 * net[-1].running_mean.nbytes
    assert peak_memory(weights.swap) <= 2 * one + buffers
    assert peak_memory(weights.swap) <= 2 * one


def test_the_average_follows_the_module_to_its_device():
    net = nn.BatchNorm1d(2)
    weights = AveragedWeights(net, RunningAverage(uniform_share), apart=["running_mean"])
    weights.take(thorough=True)
    weights.statistics = {"running_mean": torch.ones(2)}
    net.to("meta")
    weights.follow_devices()
    assert {value.device.type for value in weights.average.tensors.values()} == {"meta"}
    assert weights.statistics["running_mean"].device.type == "meta"


def test_an_average_with_a_device_of_its_own_stays_there():
    net = nn.Linear(2, 2)
    weights = AveragedWeights(net, RunningAverage(uniform_share, device="cpu"))
    weights.take(thorough=True)
    net.to("meta")
    weights.follow_devices()
    assert {value.device.type for value in weights.average.tensors.values()} == {"cpu"}


# -- other tensors than before -----------------------------------------------------------------


def test_layers_that_change_under_an_average_are_refused():
    net = new_net()
    weights = averaged(net)
    net.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"must stay the same .* extra\.bias, extra\.weight\. Ch"):
        weights.look_again()
    del net.extra, net.frozen
    with pytest.raises(ValueError, match=r"got changes in frozen\.bias, frozen\.weight"):
        weights.look_again()


def test_layers_that_change_before_the_first_model_are_followed():
    net = nn.Sequential(nn.Linear(2, 2))
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    net.append(nn.BatchNorm1d(2))
    weights.look_again()
    weights.take(thorough=True)
    assert "1.running_mean" in weights.average.tensors
    with weights.in_module():
        net[1].running_mean.fill_(5)  # as a buffer, it keeps what is written
    assert net[1].running_mean.tolist() == [5, 5]


def test_a_layer_in_the_place_of_another_is_found():
    net = nn.Sequential(nn.Linear(2, 2))
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    weights.take(thorough=True)
    first = net[0].weight.detach().clone()
    net[0] = nn.Linear(2, 2)
    weights.look_again()
    weights.take(thorough=True)
    expected = (first + net[0].weight.detach()) / 2
    torch.testing.assert_close(weights.average.tensors["0.weight"], expected)


def test_a_buffer_that_becomes_finite_or_ceases_to_be_is_no_change_of_layers():
    """The best score so far begins at minus infinity; statistics of a bad batch are NaN."""
    net = new_net()
    net.register_buffer("best", torch.tensor(-math.inf))
    weights = averaged(net)
    net.best = torch.tensor(0.5)
    net.norm.running_mean.fill_(math.nan)
    weights.look_again()
    assert not weights.take(thorough=False)  # for the statistics, not for the score
    net.norm.running_mean.fill_(0)
    weights.look_again()
    assert weights.take(thorough=True)
    assert "best" not in weights.average.tensors
    with weights.in_module():
        assert net.best == 0.5


def test_what_is_finite_before_the_first_model_is_averaged():
    net = new_net()
    net.register_buffer("best", torch.tensor(-math.inf))
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    net.best = torch.tensor(0.5)
    weights.look_again()
    weights.take(thorough=True)
    assert weights.average.tensors["best"] == 0.5


# -- checkpoints -------------------------------------------------------------------------------

ROUNDS = list(itertools.product([False, True], [False, True], DTYPES, [(), STATISTICS]))


def stored(
    weights: AveragedWeights, path, *, in_module: bool, of_average: bool
) -> tuple[dict[str, Tensor], dict]:
    """Return a checkpoint's ``state_dict`` and the state beside it, through a file."""
    if of_average:
        weights.swap()
    state_dict = cloned(weights.module.state_dict())
    if in_module != of_average:
        weights.swap()
    state = weights.state(average_is_in_state_dict=of_average)  # shares memory: stored at once
    torch.save((state_dict, state), path)
    if weights.is_in_module:
        weights.swap()
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(("in_module", "of_average", "dtype", "apart"), ROUNDS)
def test_a_checkpoint_gives_back_both(tmp_path, in_module, of_average, dtype, apart):
    net = new_net(dtype)
    weights = averaged(net, apart=apart)
    own, average = cloned(net.state_dict()), cloned(weights.average.tensors)
    file = tmp_path / "state.pt"
    state_dict, state = stored(weights, file, in_module=in_module, of_average=of_average)
    assert_equal(net.state_dict(), own)  # storing leaves no trace

    resumed = new_net(dtype, seed=4)
    resumed.load_state_dict(state_dict)
    again = AveragedWeights(resumed, RunningAverage(uniform_share), apart=apart)
    again.load(state)
    assert_equal(resumed.state_dict(), own)
    assert_equal(again.average.tensors, average)
    assert_equal(again.statistics, weights.statistics)
    assert again.num_averaged == weights.num_averaged
    assert not again.is_in_module

    for each in (weights, again):  # both go on alike
        perturb(each.module, torch.Generator().manual_seed(9))
        assert each.take(thorough=True)
    assert_equal(again.average.tensors, weights.average.tensors)
    with weights.in_module(), again.in_module():
        assert_equal(resumed.state_dict(), net.state_dict())
    assert_equal(resumed.state_dict(), net.state_dict())


@pytest.mark.parametrize("in_module", [False, True])
def test_beside_an_average_only_what_it_does_not_say_is_stored(in_module):
    """Frozen parameters are their own average, and an average in float32 is in the file."""
    weights = averaged(new_net())
    if in_module:
        weights.swap()
    state = weights.state(average_is_in_state_dict=True)
    trained = {"embedding.weight", "head.weight", "head.bias", "norm.weight", "norm.bias"}
    doubled = {f"{layer}.{name}" for layer in ("norm", "layers.0") for name in ("weight", "bias")}
    doubled |= {name.replace("norm", "layers.0") for name in STATISTICS} | set(STATISTICS)
    assert set(state["raw"]) == trained | doubled
    assert state["average"] == {}
    assert state["left_out"] == ["mask"]


def test_frozen_parameters_in_half_precision_are_stored():
    """Their average is in float32, and as good as the same, but not by dtype."""
    state = averaged(new_net(torch.bfloat16)).state(average_is_in_state_dict=True)
    assert state["average"]["frozen.weight"].dtype == torch.float32
    assert "frozen.weight" in state["raw"]


def test_a_parameter_that_was_frozen_late_is_stored():
    net = new_net()
    weights = averaged(net)
    net.head.bias.requires_grad_(False)
    own = net.head.bias.detach().clone()
    state = weights.state(average_is_in_state_dict=True)
    assert torch.equal(state["raw"]["head.bias"], own)


def test_beside_the_weights_the_average_is_stored_under_each_name():
    weights = averaged(new_net(), apart=STATISTICS)
    state = weights.state(average_is_in_state_dict=False)
    assert state["raw"] == {}
    names = set(weights.module.state_dict()) - {"mask"}
    assert set(state["average"]) == {n for n in names if "num_batches_tracked" not in n}
    assert state["average"]["layers.0.running_var"].tolist() == [7, 7, 7]
    assert state["statistics"] == list(STATISTICS)


def test_a_state_before_the_first_model():
    net = new_net()
    weights = AveragedWeights(net, RunningAverage(uniform_share))
    state = copy.deepcopy(weights.state(average_is_in_state_dict=False))
    assert (state["num_averaged"], state["raw"], state["average"]) == (0, {}, {})
    own = cloned(net.state_dict())
    again = AveragedWeights(net, RunningAverage(uniform_share))
    again.load(state)
    assert again.num_averaged == 0
    assert again.average.tensors == {}
    assert_equal(net.state_dict(), own)


def test_what_was_left_out_stays_left_out_when_resumed(tmp_path):
    """A score that is finite by then must not join an average that began without it."""
    net = new_net()
    net.register_buffer("best", torch.tensor(-math.inf))
    weights = averaged(net)
    net.best = torch.tensor(0.5)
    state_dict, state = stored(weights, tmp_path / "state.pt", in_module=False, of_average=False)
    resumed = new_net()
    resumed.register_buffer("best", torch.tensor(-math.inf))
    resumed.load_state_dict(state_dict)
    again = AveragedWeights(resumed, RunningAverage(uniform_share))
    again.load(state)
    again.look_again()
    assert_equal(again.average.tensors, weights.average.tensors)


@pytest.mark.parametrize("of_average", [False, True])
def test_statistics_that_are_no_longer_refreshed_are_averaged_on(tmp_path, of_average):
    weights = averaged(new_net(), apart=STATISTICS)
    file = tmp_path / "state.pt"
    state_dict, state = stored(weights, file, in_module=False, of_average=of_average)
    resumed = new_net()
    resumed.load_state_dict(state_dict)
    again = AveragedWeights(resumed, RunningAverage(uniform_share))
    again.load(state)
    assert again.statistics == {}
    assert again.average.tensors["norm.running_mean"].tolist() == [7, 7, 7]
    assert again.take(thorough=True)


def test_the_weights_of_training_can_be_written_alone():
    net = new_net()
    weights = AveragedWeights(net, RunningAverage(partial(exponential_share, decay=0.9)))
    place = net.head.bias.data_ptr()
    weights.write({"head.bias": torch.full((5,), 4.0), "head.weight": torch.ones(5, 3), "x": 0})
    assert net.head.bias.tolist() == [4] * 5
    assert net.head.bias.data_ptr() == place
    assert net.head.bias.grad_fn is None
    assert not torch.equal(net.embedding.weight, torch.ones(5, 3))  # known by its first name
