"""A module's values and others change places, and nothing is lost on the way."""

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_optkit.bridge.exchange import Exchange
from tests.benchmarks.timing import peak_memory

tried = settings(derandomize=True, deadline=None, print_blob=True, max_examples=60, database=None)

REAL = [torch.float32, torch.float64, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [*itertools.product(REAL, REAL), *itertools.product(COMPLEX, COMPLEX)]


def bits(tensors) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if tensor.numel()
    }


def addresses(tensors) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def some(seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (4,), "scalar": (), "empty": (0,), "mean": (4,)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def live_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v if n == "mean" else nn.Parameter(v) for n, v in values.items()}


@pytest.mark.parametrize(("live_dtype", "other_dtype"), DTYPES)
def test_there_and_back_is_bit_identical(live_dtype, other_dtype):
    live, aside = live_of(some(1, dtype=live_dtype)), some(2, dtype=other_dtype)
    own, others, places = bits(live), bits(aside), addresses(live)
    expected = bits({name: value.to(live_dtype) for name, value in aside.items()})
    exchange = Exchange(["mean"])
    for _ in range(3):
        exchange.exchange(live, aside)
        assert exchange.is_exchanged
        assert bits(live) == expected
        assert bits(exchange.own(live, aside)) == own
        if live_dtype == other_dtype:
            assert bits(exchange.others(live, aside)) == others
        exchange.exchange(live, aside)
        assert not exchange.is_exchanged
        assert bits(live) == own
        assert bits(aside) == others
        assert addresses(live) == places
    assert all(isinstance(live[name], nn.Parameter) for name in live if name != "mean")


NUMBERS = [0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 1e-45, 3e38]


@tried
@given(
    st.lists(st.tuples(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS)), max_size=6),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_numbers_come_back_bit_for_bit(pairs, is_buffer, dtype):
    """Not a number, too: a statistic of a model that blew up must not stay in the module."""
    live = {"x": torch.tensor([a for a, _ in pairs], dtype=dtype)}
    aside = {"x": torch.tensor([b for _, b in pairs])}
    own, others = bits(live), bits(aside)
    exchange = Exchange(["x"] if is_buffer else [])
    exchange.exchange(live, aside)
    exchange.exchange(live, aside)
    assert (bits(live), bits(aside)) == (own, others)


def test_where_the_average_is_in_float32_it_stays_whole():
    """Rounded to half precision it is what the module computes with, and aside it stays itself."""
    live = {"w": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    aside = {"w": torch.tensor([1.003])}
    exchange = Exchange([])
    exchange.exchange(live, aside)
    assert live["w"].item() == 1
    assert exchange.others(live, aside)["w"].item() == pytest.approx(1.003)
    exchange.exchange(live, aside)
    assert aside["w"].item() == pytest.approx(1.003)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_what_is_written_into_a_buffer_stays(in_place, inference):
    """A validation that counts in a buffer must find its count again, next time too."""
    live, aside = live_of(some(1)), some(2, dtype=torch.float64)
    own, others = bits(live), bits(aside)
    exchange = Exchange(["mean"])
    with torch.inference_mode(inference):
        exchange.exchange(live, aside)
        if in_place:
            live["mean"][1] += 1
        else:
            live["mean"] = live["mean"] + 1
        written = live["mean"].clone()
        exchange.exchange(live, aside)
    own |= bits({"mean": written})
    others |= bits({"mean": written.double()})
    assert (bits(live), bits(aside)) == (own, others)
    exchange.exchange(live, aside)  # also where it is a tensor of inference mode now
    assert torch.equal(live["mean"], written)
    exchange.exchange(live, aside)
    assert (bits(live), bits(aside)) == (own, others)


def test_a_buffer_that_got_another_shape_keeps_it():
    live, aside = {"seen": torch.ones(2)}, {"seen": torch.ones(2)}
    exchange = Exchange(["seen"])
    exchange.exchange(live, aside)
    live["seen"] = torch.ones(5)
    exchange.exchange(live, aside)
    assert live["seen"].shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_own(dtype):
    """What writes a parameter meanwhile writes the average: training goes on from its own."""
    live, aside = live_of(some(1, dtype=dtype)), some(2)
    own = bits(live)
    exchange = Exchange(["mean"])
    exchange.exchange(live, aside)
    with torch.no_grad():
        live["weight"].add_(1)
    exchange.exchange(live, aside)
    assert bits(live) == own


def test_only_the_names_aside_are_touched():
    live, aside = live_of(some(1)), some(2)
    del aside["bias"], aside["mean"]
    own = bits(live)
    exchange = Exchange(["mean"])
    exchange.exchange(live, aside)
    kept = bits({name: live[name] for name in ("bias", "mean")})
    assert kept == {name: own[name] for name in kept}
    assert set(exchange.own(live, aside)) == set(exchange.others(live, aside)) == set(aside)
    exchange.exchange(live, aside)
    assert bits(live) == own


def test_own_and_others_before_an_exchange():
    live, aside = live_of(some(1)), some(2)
    exchange = Exchange(["mean"])
    assert bits(exchange.own(live, aside)) == bits(live)
    assert bits(exchange.others(live, aside)) == bits(aside)


# -- one memory under several names ------------------------------------------------------------


@pytest.mark.parametrize("buffer_names", [[], ["second"], ["first", "second"]])
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.float64])
def test_names_that_share_memory_are_exchanged_once(buffer_names, other_dtype):
    """Else the second finds the average where the weights of training were, and keeps it."""
    shared = torch.full((3,), 1.0)
    live = {"first": nn.Parameter(shared), "second": nn.Parameter(shared)}
    aside = {name: torch.full((3,), 5.0, dtype=other_dtype) for name in live}
    exchange = Exchange(buffer_names)
    exchange.exchange(live, aside)
    assert shared.tolist() == [5, 5, 5]
    for name in live:
        assert exchange.own(live, aside)[name].tolist() == [1, 1, 1]
        assert exchange.others(live, aside)[name].tolist() == [5, 5, 5]
    exchange.exchange(live, aside)
    assert shared.tolist() == [1, 1, 1]
    assert all(value.tolist() == [5, 5, 5] for value in aside.values())


def test_memory_that_is_no_longer_shared_is_exchanged_for_each():
    shared = torch.full((2,), 1.0)
    live = {"first": nn.Parameter(shared), "second": nn.Parameter(shared)}
    aside = {name: torch.full((2,), 5.0) for name in live}
    exchange = Exchange([])
    exchange.exchange(live, aside)
    exchange.exchange(live, aside)
    live["second"].data = torch.full((2,), 2.0)
    exchange.exchange(live, aside)
    assert live["first"].tolist() == live["second"].tolist() == [5, 5]
    exchange.exchange(live, aside)
    assert (live["first"].tolist(), live["second"].tolist()) == ([1, 1], [2, 2])


def test_a_buffer_that_ceases_to_share_while_exchanged_keeps_what_was_written():
    shared = torch.full((2,), 1.0)
    live, aside = {"a": shared, "b": shared}, {n: torch.full((2,), 5.0) for n in ("a", "b")}
    exchange = Exchange(["a", "b"])
    exchange.exchange(live, aside)
    live["b"] = live["b"] + 1
    exchange.exchange(live, aside)
    assert (live["a"].tolist(), live["b"].tolist()) == ([1, 1], [6, 6])


def test_empty_tensors_share_no_memory():
    live = {"a": torch.zeros(0), "b": torch.zeros(0)}
    aside = {name: torch.zeros(0) for name in live}
    exchange = Exchange([])
    exchange.exchange(live, aside)
    own = exchange.own(live, aside)
    assert (own["a"] is aside["a"], own["b"] is aside["b"]) == (True, True)


# -- training around it ------------------------------------------------------------------------


def test_what_is_exchanged_in_inference_mode_can_be_trained_again():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).bfloat16()
    live = dict(net.named_parameters()) | {"mean": net[1].running_mean}
    aside = {name: torch.ones_like(value, dtype=torch.float32) for name, value in live.items()}
    aside["0.weight"] = aside["0.weight"].bfloat16()  # both ways of giving back
    exchange = Exchange(["mean"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batch = torch.randn(8, 3, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        net(batch).sum().backward()
        optimizer.step()
        with torch.inference_mode():
            exchange.exchange(live, aside)
            net(batch)
            own = exchange.own(live, aside)
            exchange.exchange(live, aside)
    assert not any(v.is_inference() for v in [*live.values(), *aside.values(), *own.values()])
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_nothing_is_recorded_for_gradients():
    weight = nn.Parameter(torch.ones(2))
    loss = (weight**2).sum()
    exchange, aside = Exchange([]), {"w": torch.full((2,), 7.0)}
    exchange.exchange({"w": weight}, aside)
    exchange.exchange({"w": weight}, aside)
    loss.backward()  # a write that autograd counts would make it raise
    assert weight.grad.tolist() == [2, 2]
    assert not aside["w"].requires_grad


def test_changing_places_needs_memory_for_two_tensors_of_many():
    numel, num_tensors = 4096, 16
    live = {str(i): nn.Parameter(torch.zeros(numel)) for i in range(num_tensors)}
    aside = {name: torch.ones(numel) for name in live}
    exchange = Exchange([])
    for _ in range(2):
        assert peak_memory(lambda: exchange.exchange(live, aside)) <= 2 * 4 * numel


def test_what_was_cloned_is_let_go_when_it_is_back():
    live, aside = live_of(some(1)), some(2)
    exchange = Exchange(["mean"])
    exchange.exchange(live, aside)
    clone = weakref.ref(exchange.own(live, aside)["mean"])
    assert clone() is not None
    exchange.exchange(live, aside)
    assert clone() is None
