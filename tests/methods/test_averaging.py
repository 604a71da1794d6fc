"""Running averages against their closed forms, and what must never enter them."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_optkit.methods.averaging import (
    RunningAverage,
    decay_of_half_life,
    exponential_share,
    polynomial_share,
    uniform_share,
)
from tests.benchmarks.timing import peak_memory

tried = settings(derandomize=True, deadline=None, print_blob=True, max_examples=60, database=None)


def models(n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Return n models that lie far from zero and from one another, in several shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (3, 4), "scalar": (), "empty": (0, 2), "vector": (5,)}
    return [
        {
            name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7).to(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(n)
    ]


def average_of(share, snapshots, **options) -> RunningAverage:
    average = RunningAverage(share, **options)
    for snapshot in snapshots:
        assert average.add(snapshot)
    return average


def weighted(snapshots, weights) -> dict[str, Tensor]:
    """Return the sum of weights times models, added up exactly."""
    return {
        name: torch.tensor(
            [
                math.fsum(w * float(x) for w, x in zip(weights, values, strict=True))
                for values in zip(*(s[name].flatten().tolist() for s in snapshots), strict=True)
            ],
            dtype=torch.float64,
        ).view(like.shape)
        for name, like in snapshots[0].items()
    }


def assert_close(found, truth, *, rtol: float) -> None:
    assert list(found) == list(truth)
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=rtol, atol=0)


# -- shares ------------------------------------------------------------------------------------


def weights_of(share, n: int) -> list[float]:
    """Return the weight of each of n models, read off averages of unit vectors."""
    unit = torch.eye(n, dtype=torch.float64)
    return average_of(share, [{"w": row} for row in unit]).tensors["w"].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 137])
def test_the_uniform_average_is_the_plain_mean(n):
    snapshots = models(n)
    found = average_of(uniform_share, snapshots)
    assert found.num_averaged == n
    assert_close(found.tensors, weighted(snapshots, [1 / n] * n), rtol=1e-12)


@pytest.mark.parametrize("eta", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 60])
def test_polynomial_weights_are_rising_factorials(eta, n):
    """(η + 1) / (t + η) as share gives model t the weight t (t + 1) ... (t + η - 1), normalized."""
    rising = [math.prod(range(t, t + eta)) for t in range(1, n + 1)]
    truth = [weight / sum(rising) for weight in rising]
    found = weights_of(partial(polynomial_share, eta=eta), n)
    assert found == pytest.approx(truth, rel=1e-12)
    snapshots = models(n)
    average = average_of(partial(polynomial_share, eta=eta), snapshots)
    assert_close(average.tensors, weighted(snapshots, truth), rtol=1e-12)


@pytest.mark.parametrize("eta", [0.5, 1.5, 3.25])
def test_polynomial_weights_of_a_power_between(eta):
    gammas = [math.exp(math.lgamma(t + eta) - math.lgamma(t)) for t in range(1, 31)]
    found = weights_of(partial(polynomial_share, eta=eta), 30)
    assert found == pytest.approx([gamma / sum(gammas) for gamma in gammas], rel=1e-11)


def test_polynomial_weights_grow_with_the_power():
    found = weights_of(polynomial_share, 400)
    assert found[399] / found[199] == pytest.approx(2**3, rel=0.01)  # eta=3 is the default


@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_polynomial_of_power_nought_is_uniform(n):
    assert polynomial_share(n, eta=0) == uniform_share(n)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("n", [1, 2, 5, 60])
def test_exponential_weights_are_powers_of_the_decay(decay, n):
    """The first model's weight is what is left: nothing from before has any."""
    truth = [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - t) for t in range(1, n)]
    assert math.fsum(truth) == pytest.approx(1, rel=1e-14)
    snapshots = models(n)
    average = average_of(partial(exponential_share, decay=decay), snapshots)
    assert_close(average.tensors, weighted(snapshots, truth), rtol=1e-12)


def test_the_decay_warms_up():
    """min(d, (1 + n) / (10 + n)), and the plain decay from where that is smaller."""
    for n in range(1, 200):
        found = 1 - exponential_share(n, decay=0.9, warmup=True)
        assert found == pytest.approx(min(0.9, (1 + n) / (10 + n)), rel=1e-14)
    assert exponential_share(79, decay=0.9, warmup=True) > 1 - 0.9
    assert exponential_share(80, decay=0.9, warmup=True) == 1 - 0.9  # 81 / 90
    assert exponential_share(3, decay=0.1, warmup=True) == 1 - 0.1
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(40)]
    truth = [(1 - decays[t]) * math.prod(decays[t + 1 :]) for t in range(40)]
    truth[0] = math.prod(decays[1:])
    found = weights_of(partial(exponential_share, decay=0.9, warmup=True), 40)
    assert found == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("half_life", [1, 2, 10, 0.5, 1234.5])
@pytest.mark.parametrize("every", [1, 3])
def test_a_weight_halves_in_its_half_life(half_life, every):
    decay = decay_of_half_life(half_life, every=every)
    assert decay ** (half_life / every) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_half_a_model_is_left_after_the_half_life_in_steps(every):
    """With a model every so many steps, ten steps still halve what a model weighs."""
    share = partial(exponential_share, decay=decay_of_half_life(10, every=every))
    average = average_of(share, [{"w": torch.ones((), dtype=torch.float64)}])
    for _ in range(0, 10, every):
        average.add({"w": torch.zeros((), dtype=torch.float64)})
    assert float(average.tensors["w"]) == pytest.approx(0.5, rel=1e-14)


SHARES = [
    uniform_share,
    polynomial_share,
    partial(exponential_share, decay=0.999),
    partial(exponential_share, decay=0.999, warmup=True),
]


@pytest.mark.parametrize("share", SHARES)
def test_the_first_model_enters_wholly(share):
    assert share(0) == 1.0
    (first,) = models(1)
    assert_close(average_of(share, [first]).tensors, first, rtol=0)


@tried
@given(st.sampled_from(SHARES), st.integers(0, 10**7))
def test_a_share_is_a_share(share, n):
    assert 0 < share(n) <= 1


@tried
@given(
    st.sampled_from(SHARES),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_an_average_lies_between_its_models(share, values, dtype):
    snapshots = [torch.tensor(value, dtype=dtype) for value in values]
    found = average_of(share, [{"w": value} for value in snapshots]).tensors["w"]
    slack = 8 * len(values) * torch.finfo(dtype).eps * float(torch.stack(snapshots).abs().max())
    assert min(snapshots) - slack <= found <= max(snapshots) + slack


@tried
@given(st.sampled_from(SHARES), st.integers(2, 12), st.floats(-4, 4), st.integers(0, 9))
def test_averaging_is_affine(share, n, factor, seed):
    snapshots = models(n, seed=seed)
    scaled = [{name: factor * value - 2 for name, value in s.items()} for s in snapshots]
    found, plain = average_of(share, scaled).tensors, average_of(share, snapshots).tensors
    for name in found:
        torch.testing.assert_close(found[name], factor * plain[name] - 2, rtol=1e-12, atol=1e-10)


# -- dtypes and devices ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    """A step of 1 - 0.999 is below the spacing of bfloat16, in which nothing would ever move."""
    share = partial(exponential_share, decay=0.999)
    stuck = torch.ones(4, dtype=dtype)
    average = average_of(share, [{"w": stuck.clone()}])
    for _ in range(1000):
        stuck.lerp_(torch.full((4,), 1.125, dtype=dtype), 1 - 0.999)
        average.add({"w": torch.full((4,), 1.125, dtype=dtype)})
    truth = 1.125 - 0.125 * 0.999**1000
    assert average.tensors["w"].dtype == torch.float32
    assert average.tensors["w"].tolist() == pytest.approx([truth] * 4, rel=1e-5)
    assert torch.equal(stuck, torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors_are_averaged(dtype):
    values = [1 + 1j, 3 - 1j, 5 + 3j]
    found = average_of(uniform_share, [{"w": torch.tensor([v], dtype=dtype)} for v in values])
    assert found.tensors["w"].dtype == dtype
    assert complex(found.tensors["w"]) == pytest.approx(3 + 1j, rel=1e-6)


MIXED = [torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float16]


def test_tensors_of_mixed_dtypes_are_each_averaged_in_their_own():
    snapshots = [{str(dtype): torch.full((2,), v, dtype=dtype) for dtype in MIXED} for v in (1, 2)]
    found = average_of(uniform_share, snapshots).tensors
    kept = [torch.float32, *MIXED[1:4], torch.float32]
    assert [tensor.dtype for tensor in found.values()] == kept
    assert all(tensor.tolist() == [1.5, 1.5] for tensor in found.values())


def test_a_guard_sees_through_mixed_dtypes():
    """1e300 is finite in float64, and must not be looked at in float32."""
    snapshot = {"a": torch.ones(2), "b": torch.full((2,), 1e300, dtype=torch.float64)}
    average = average_of(uniform_share, [snapshot, snapshot])
    assert average.num_averaged == 2


def test_empty_tensors_alone_and_nothing_at_all_are_averages_too():
    for snapshot in ({"a": torch.zeros(0), "b": torch.zeros(2, 0)}, {}):
        average = average_of(uniform_share, [snapshot] * 3)
        assert average.num_averaged == 3
        assert average.is_finite()
        assert_close(average.tensors, snapshot, rtol=0)


def test_parameters_are_averaged_without_a_graph():
    weight = torch.nn.Parameter(torch.ones(3))
    average = average_of(uniform_share, [{"w": weight}, {"w": weight}])
    assert not average.tensors["w"].requires_grad
    assert type(average.tensors["w"]) is Tensor
    assert weight.grad is None


def test_strides_are_followed():
    snapshots = models(3)
    turned = [{"w": s["matrix"].T} for s in snapshots]
    sliced = [{"w": s["vector"][::2]} for s in snapshots]
    for layout in (turned, sliced):
        truth = weighted(layout, [1 / 3] * 3)
        assert_close(average_of(uniform_share, layout).tensors, truth, rtol=1e-12)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_the_average_lives_where_it_is_told(device):
    average = RunningAverage(uniform_share, device=device)
    average.load({"w": torch.ones(2)}, num_averaged=1)
    assert average.tensors["w"].device.type == torch.device(device).type


def test_an_average_on_another_device_follows():
    """Here the average is on the CPU already: the way of unlike pairs, forced by the dtype."""
    snapshots = models(5, dtype=torch.bfloat16)
    found = average_of(uniform_share, snapshots, device="cpu").tensors
    truth = {name: value.float() for name, value in weighted(snapshots, [1 / 5] * 5).items()}
    assert_close(found, truth, rtol=1e-6)


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_copy(dtype):
    """In float32, and nothing beyond a single tensor of many while a model enters."""
    num_tensors, numel = 16, 4096
    snapshot = {str(i): torch.ones(numel, dtype=dtype) for i in range(num_tensors)}
    average = RunningAverage(partial(exponential_share, decay=0.9))
    one_tensor, copy = 4 * numel, 4 * numel * num_tensors
    first = peak_memory(lambda: average.add(snapshot))
    assert copy <= first <= copy + 2 * one_tensor
    average.add(snapshot)
    assert peak_memory(lambda: average.add(snapshot)) <= one_tensor + 1024
    assert peak_memory(lambda: average.add(snapshot, thorough=True)) <= 2 * one_tensor + 1024
    held = {tensor.untyped_storage().data_ptr() for tensor in average.tensors.values()}
    assert len(held) == num_tensors
    assert sum(t.untyped_storage().nbytes() for t in average.tensors.values()) == copy


def test_the_average_shares_no_memory_with_the_model():
    weight = torch.ones(3)
    average = average_of(uniform_share, [{"w": weight}])
    weight.fill_(9)
    assert average.tensors["w"].tolist() == [1, 1, 1]


def test_loading_copies():
    stored = {"w": torch.ones(3), "h": torch.ones(3, dtype=torch.bfloat16)}
    average = RunningAverage(uniform_share)
    average.load(stored, num_averaged=3)
    assert average.add({"w": torch.full((3,), 5.0), "h": torch.full((3,), 5.0)})
    assert average.num_averaged == 4
    assert average.tensors["w"].tolist() == average.tensors["h"].tolist() == [2, 2, 2]
    assert stored["w"].tolist() == [1, 1, 1]


def test_loading_forgets_what_was_averaged_before():
    """The pairs that were remembered are those of the old average."""
    model = {"w": torch.full((2,), 4.0)}
    average = average_of(uniform_share, [model, model])
    average.load({"w": torch.zeros(2)}, num_averaged=1)
    average.add(model)
    assert average.tensors["w"].tolist() == [2, 2]


# -- what is not finite ------------------------------------------------------------------------

NOT_FINITE = [math.nan, math.inf, -math.inf]


def bits(tensors) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("thorough", [False, True])
def test_a_model_that_is_not_finite_changes_nothing(share, bad, thorough):
    snapshots = models(4)
    average = average_of(share, snapshots[:3])
    before = bits(average.tensors)
    for name in ("matrix", "scalar", "vector"):
        broken = {**snapshots[3], name: torch.full_like(snapshots[3][name], bad)}
        assert not average.add(broken, thorough=thorough)
    assert average.num_averaged == 3
    assert bits(average.tensors) == before
    assert average.add(snapshots[3], thorough=thorough)
    assert_close(average.tensors, average_of(share, snapshots).tensors, rtol=0)


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_a_single_number_is_found_by_a_thorough_look_and_else_in_the_end(bad, dtype):
    good = torch.ones(4, dtype=dtype)
    broken = good.clone()
    broken[2] = bad
    average = average_of(uniform_share, [{"w": good}])
    assert not average.add({"w": broken}, thorough=True)
    assert average.num_averaged == 1
    assert average.is_finite()
    assert average.add({"w": broken})  # only the first number is looked at
    assert not average.is_finite()


@pytest.mark.parametrize("position", [0, 2])
def test_a_first_model_that_is_not_finite_is_refused_and_the_next_taken_wholly(position):
    broken, good = torch.ones(4), torch.full((4,), 5.0)
    broken[position] = math.nan
    average = RunningAverage(uniform_share)
    assert not average.add({"w": broken})
    assert (average.num_averaged, average.tensors) == (0, {})
    assert average.add({"w": good})
    assert average.num_averaged == 1
    assert average.tensors["w"].tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("thorough", [False, True])
def test_where_another_rank_says_no_nothing_enters(thorough):
    """All ranks are asked once for each model, whatever this one found."""
    snapshots = models(3)
    answers: list[bool] = []
    others_agree = True

    def agreed(yes: bool) -> bool:
        answers.append(yes)
        return yes and others_agree

    average = RunningAverage(uniform_share, agreed=agreed)
    others_agree = False
    assert not average.add(snapshots[0], thorough=thorough)
    assert average.num_averaged == 0
    assert average.tensors == {}
    others_agree = True
    assert average.add(snapshots[0], thorough=thorough)
    before = bits(average.tensors)
    others_agree = False
    assert not average.add(snapshots[1], thorough=thorough)
    assert average.num_averaged == 1
    assert bits(average.tensors) == before
    assert not average.is_finite()
    assert answers == [True] * 4
    broken = {name: value * math.nan for name, value in snapshots[1].items()}
    assert not average.add(broken, thorough=thorough)
    assert answers == [True] * 4 + [False]


# -- tensors that are replaced while a run goes on ---------------------------------------------


def test_a_parameter_whose_data_is_replaced_is_followed():
    weight = torch.nn.Parameter(torch.full((3,), 1.0))
    average = RunningAverage(uniform_share)
    average.add({"w": weight})
    average.add({"w": weight})
    for value in (4.0, 6.0):
        weight.data = torch.full((3,), value)
        average.add({"w": weight})
    assert average.tensors["w"].tolist() == [3, 3, 3]


def test_a_buffer_that_is_another_tensor_each_time_is_followed():
    average = RunningAverage(uniform_share)
    for value in range(9):  # freed memory comes back under the same address
        average.add({"b": torch.full((1000,), float(value))})
    assert average.tensors["b"].unique().tolist() == [4]


def test_a_replaced_tensor_is_guarded_too():
    weight = torch.nn.Parameter(torch.ones(3))
    average = average_of(uniform_share, [{"w": weight}] * 2)
    weight.data = torch.full((3,), math.nan)
    assert not average.add({"w": weight})
    assert average.tensors["w"].tolist() == [1, 1, 1]


def test_a_model_that_turns_into_half_precision_is_followed():
    weight = torch.nn.Parameter(torch.full((3,), 1.0))
    average = average_of(uniform_share, [{"w": weight}] * 2)
    weight.data = torch.full((3,), 4.0, dtype=torch.bfloat16)
    average.add({"w": weight})
    assert average.tensors["w"].dtype == torch.float32
    assert average.tensors["w"].tolist() == [2, 2, 2]


def test_names_may_come_in_another_order():
    average = average_of(uniform_share, [{"a": torch.zeros(2), "b": torch.ones(3)}] * 2)
    average.add({"b": torch.full((3,), 4.0), "a": torch.full((2,), 3.0)})
    assert average.tensors["a"].tolist() == [1, 1]
    assert average.tensors["b"].tolist() == [2, 2, 2]


# -- distance ----------------------------------------------------------------------------------


def test_squares_are_those_of_difference_and_model():
    average = average_of(uniform_share, [{"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}])
    model = {"a": torch.nn.Parameter(torch.tensor([0.0, 2.0])), "b": torch.full((2,), 99.0)}
    found = average.squares(model, ["a"])
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([13, 4], rel=1e-6)
    assert average.squares(model, []).tolist() == [0, 0]


def test_squares_of_complex_and_half_precision():
    average = average_of(
        uniform_share,
        [{"c": torch.tensor([3 + 4j]), "h": torch.tensor([2.0], dtype=torch.bfloat16)}],
    )
    model = {"c": torch.tensor([0j]), "h": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert average.squares(model, ["c", "h"]).tolist() == pytest.approx([26, 1], rel=1e-6)
