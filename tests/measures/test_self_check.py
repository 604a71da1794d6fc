"""Wrong second derivatives are refused by name; right ones, kinks included, are not."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures import CurvatureError, HessianOperator, hessian_spectrum
from lightning_optkit.measures import self_check as module
from lightning_optkit.measures.lanczos import rounding_noise
from tests.distributed import run_in_new_process
from tests.quadratics import Quadratic, random_params, symmetric


class OpaqueSquare(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class DetachedSquare(OpaqueSquare):
    """A square whose backward detaches, and so says nothing when it is differentiated."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g


class HonestSquare(OpaqueSquare):
    """A square that is written as it should be, without a forward-mode formula."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class WrongBackward(OpaqueSquare):
    """Its gradient is no gradient of anything: its Jacobian is not symmetric."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.cat([x.flip(0)[:1] * 3, x[1:]])


NET = {"w": torch.linspace(-1, 1, 12).view(3, 4), "v": torch.linspace(1, 2, 6).view(2, 3)}
INPUTS = torch.linspace(0.1, 1.0, 20).view(5, 4)


def middle(square):
    return lambda p: (square(INPUTS.to(p["w"]) @ p["w"].T) @ p["v"].T).tanh().square().mean()


def loss_layer(square):
    return lambda p: square((INPUTS.to(p["w"]) @ p["w"].T).tanh() @ p["v"].T).mean()


def params(dtype=torch.float64):
    return {name: p.to(dtype) for name, p in NET.items()}


def ones(op: HessianOperator) -> Tensor:
    return torch.ones(op.shape[0], dtype=op.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [middle, loss_layer])
@pytest.mark.parametrize("function", [OpaqueSquare, DetachedSquare])
def test_an_opaque_function_is_refused_by_name(function, place, dtype):
    op = HessianOperator(place(function.apply), params(dtype))
    with pytest.raises(CurvatureError, match="once_differentiable"):
        op @ ones(op)


@pytest.mark.parametrize("place", [middle, loss_layer])
def test_a_refused_operator_stays_refused(place):
    op = HessianOperator(place(DetachedSquare.apply), params())
    for _ in range(2):
        with pytest.raises(CurvatureError, match="once_differentiable"):
            op @ ones(op)


def test_an_opaque_loss_is_refused_where_a_random_direction_does_not_meet_it():
    """Its own curvature is lost, so products of random vectors avoid it; the gradient does not."""
    w = torch.tensor([3.0, 1.0], dtype=torch.float64)
    op = HessianOperator(lambda p: OpaqueSquare.apply(p["w"][0]) + p["w"][1].square(), {"w": w})
    with pytest.raises(CurvatureError, match="once_differentiable"):
        op @ ones(op)


def test_the_check_measures_the_noise_of_products():
    """Cancellation costs digits: what products then carry goes into the tolerance."""
    rounding = rounding_noise(torch.float32)
    clean = HessianOperator(lambda p: p["w"].pow(2).sum(), {"w": torch.linspace(1, 2, 5)})
    assert clean.noise == rounding
    clean @ torch.ones(5)
    assert clean.noise == rounding

    x = torch.linspace(-1, 1, 12).view(4, 3) + torch.eye(4, 3)
    y = torch.tensor([0, 1, 2, 2])
    logits = torch.linalg.pinv(x) @ (16.0 * torch.eye(3)[y])  # a loss near 1e-6: mostly cancelled
    op = HessianOperator(lambda p: cross_entropy(x @ p["w"], y), {"w": logits})
    found = hessian_spectrum(op, tol_rel=0)
    truth = HessianOperator(
        lambda p: cross_entropy(x.double() @ p["w"], y), {"w": logits.double()}
    ).dense()
    error = float((op.dense() - truth).norm() / truth.norm())
    assert error > rounding
    assert op.noise > rounding
    assert found.tol == pytest.approx(4 * op.noise * found.spectral_radius, rel=1e-6)
    unchecked = HessianOperator(lambda p: p["w"].sum(), {"w": logits}, self_check=False)
    assert unchecked.noise == rounding


def test_the_opaque_loss_is_wrong_without_a_word_from_torch():
    """Why the check is there: `self_check=False` measures a wrong matrix."""
    wrong = HessianOperator(loss_layer(OpaqueSquare.apply), params(), self_check=False)
    right = HessianOperator(loss_layer(torch.square), params())
    assert float((wrong.dense() - right.dense()).norm()) > 0.1 * float(right.dense().norm())
    assert wrong.num_matvecs == 18  # and no product for a check


def test_products_that_are_not_symmetric_are_refused():
    op = HessianOperator(
        lambda p: WrongBackward.apply(p["w"]).sum(), {"w": torch.tensor([1.0, 2.0, 3.0])}
    )
    with pytest.raises(CurvatureError, match="not symmetric: a layer computes wrong second"):
        op @ torch.ones(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [middle, loss_layer])
def test_an_honest_custom_function_is_accepted(place, dtype):
    op = HessianOperator(place(HonestSquare.apply), params(dtype))
    truth = HessianOperator(place(torch.square), params(dtype)) @ ones(op)
    # both round in the same dtype, over sums of some hundred terms
    bound = 100 * torch.finfo(dtype).eps * float(truth.norm())
    assert float((op @ ones(op) - truth).norm()) <= bound


class Restless:
    """A loss that is another one at each call, as with dropout or a batch drawn anew."""

    def __init__(self, spread: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.spread = spread

    def __call__(self, p: dict[str, Tensor]) -> Tensor:
        noise = torch.rand(p["w"].shape, generator=self.generator, dtype=p["w"].dtype)
        return ((1 + self.spread * noise) * p["w"].pow(4)).sum()


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_a_loss_that_changes_from_call_to_call_is_refused(spread, graphs):
    op = HessianOperator(Restless(spread), {"w": torch.linspace(1, 2, 6)}, graphs=graphs)
    with pytest.raises(CurvatureError, match="random or changes from call to call"):
        op @ torch.ones(6)


def test_the_message_names_the_way_around():
    op = HessianOperator(Restless(1.0), {"w": torch.linspace(1, 2, 6)})
    with pytest.raises(CurvatureError, match=r"by \d+\.\d%.*`self_check=False` measures all the"):
        op @ torch.ones(6)
    unchecked = HessianOperator(Restless(1.0), {"w": torch.linspace(1, 2, 6)}, self_check=False)
    assert bool((unchecked @ torch.ones(6) > 0).all())


def relu_net(dtype, seed: int, *, width: int = 40):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        ).to(dtype)
        x, y = torch.randn(200, 8).to(dtype), torch.randint(3, (200,))
    return lambda p: cross_entropy(functional_call(net, p, (x,)), y), dict(net.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_kinks_are_not_mistaken_for_wrong_derivatives(seed, dtype):
    op = HessianOperator(*relu_net(dtype, seed))
    assert bool(torch.isfinite(op @ ones(op)).all())


def test_kinks_are_not_mistaken_without_forward_mode_either(monkeypatch):
    """torch's own layers without a forward-mode formula: differences meet the kinks."""

    def no_forward_mode(self: HessianOperator, vector: Tensor) -> Tensor:
        raise NotImplementedError("Trying to use forward AD with some_operator")

    monkeypatch.setattr(HessianOperator, "forward_mode_product", no_forward_mode)
    for seed in range(2):
        op = HessianOperator(*relu_net(torch.float32, seed))
        assert bool(torch.isfinite(op @ ones(op)).all())


def test_a_kink_at_the_point_itself_is_left_in_peace(monkeypatch):
    """No step is short enough here: torch's own operators are believed, custom ones are not."""

    def no_forward_mode(self: HessianOperator, vector: Tensor) -> Tensor:
        raise NotImplementedError("Trying to use forward AD with some_operator")

    w = torch.full((4,), 1e-12, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(HessianOperator, "forward_mode_product", no_forward_mode)
        op = HessianOperator(lambda p: (p["w"].abs() + p["w"].square() / 2).sum(), {"w": w})
        assert (op @ ones(op)).tolist() == [1, 1, 1, 1]
    custom = HessianOperator(
        lambda p: (p["w"].abs() + HonestSquare.apply(p["w"]) / 2).sum(), {"w": w}
    )
    with pytest.raises(CurvatureError, match="from a finite difference by"):
        custom @ ones(custom)


def test_a_float32_net_near_a_minimum_is_not_refused():
    """Gradients near zero next to a large curvature: the check must scale by the product."""
    w = torch.full((50,), 1e-4)
    op = HessianOperator(lambda p: (1e4 * p["w"].square().sum()).cosh(), {"w": w})
    assert bool(torch.isfinite(op @ ones(op)).all())


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_the_scale_of_the_loss_does_not_matter(scale):
    matrix = symmetric([-1.0, 0.5, 2.0, 3.0])
    op = HessianOperator(Quadratic(scale * matrix), random_params((4,)))
    torch.testing.assert_close(op @ ones(op), scale * matrix @ ones(op), rtol=1e-12, atol=0)
    wrong = HessianOperator(lambda p: scale * loss_layer(DetachedSquare.apply)(p), params())
    with pytest.raises(CurvatureError, match="once_differentiable"):
        wrong @ ones(wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("exact_below", [0, 100])
def test_a_loss_that_is_not_finite_is_an_error_that_says_so(value, self_check, exact_below):
    matrix = symmetric([1.0, 2.0, 3.0])
    op = HessianOperator(
        lambda p: value * Quadratic(matrix)(p), random_params((3,)), self_check=self_check
    )
    with pytest.raises(CurvatureError, match=r"NaN or infinite\. Is the loss itself finite"):
        hessian_spectrum(op, exact_below=exact_below)


def test_a_loss_that_diverges_between_products_is_an_error_too():
    w = torch.ones(3, dtype=torch.float64)
    op = HessianOperator(lambda p: p["w"].log().sum(), {"w": w})
    hessian_spectrum(op)
    w.zero_()
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        hessian_spectrum(op)


def test_the_check_happens_once_and_costs_what_it_says():
    loss = Quadratic(symmetric([1.0, 2.0, 3.0]))
    op = HessianOperator(loss, random_params((3,)))
    op @ ones(op)
    assert (op.num_matvecs, loss.calls) == (2 + 1, 1 + 1)  # its graph, and one in forward mode
    op @ ones(op)
    assert (op.num_matvecs, loss.calls) == (2 + 2, 1 + 1)


def test_a_loss_without_forward_mode_costs_two_gradients_at_least():
    calls = []

    def loss(p):
        calls.append(None)
        return HonestSquare.apply(p["w"]).sum()

    op = HessianOperator(loss, {"w": torch.ones(3, dtype=torch.float64)})
    assert (op @ ones(op)).tolist() == [2, 2, 2]
    assert len(calls) == 1 + 1 + 2  # its graph, forward mode in vain, two gradients


def test_out_of_memory_in_the_check_is_not_swallowed(monkeypatch):
    def out_of_memory(self: HessianOperator, vector: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("forward mode")

    monkeypatch.setattr(HessianOperator, "forward_mode_product", out_of_memory)
    op = HessianOperator(Quadratic(symmetric([1.0])), random_params((1,)))
    with pytest.raises(torch.OutOfMemoryError):
        op @ ones(op)


def test_forward_mode_is_compared_even_where_warnings_are_errors():
    """torch compiles its forward-mode formulas on first use with a deprecated part of itself."""
    run_in_new_process(uses_forward_mode_first)


def uses_forward_mode_first():
    warnings.simplefilter("error", DeprecationWarning)
    operator = HessianOperator(
        lambda p: p["w"].sigmoid().prod(), {"w": torch.ones(3)}, self_check=False
    )
    other = operator.forward_mode_product(torch.ones(3))
    assert torch.allclose(other, operator @ torch.ones(3))


def test_slopes_are_compared_at_shorter_and_shorter_steps(monkeypatch):
    """A custom function with kinks at the first step's distance passes at a shorter one."""
    steps = []
    original = HessianOperator.gradient

    def gradient(self, offset=None):
        if offset is not None:
            steps.append(float(offset.norm()))
        return original(self, offset)

    monkeypatch.setattr(HessianOperator, "gradient", gradient)
    w = torch.full((4,), 1e-6, dtype=torch.float64)

    def loss(p):  # the kink is at zero, 1e-6 away; the first step is 6e-6 long
        return (HonestSquare.apply(p["w"]) * (p["w"].detach().sign() + 2)).sum() + (
            1e-5 * p["w"].abs().sum()
        )

    module.check_products(HessianOperator(loss, {"w": w}, self_check=False))
    assert len(steps) >= 4
    assert steps[2] == pytest.approx(steps[0] / 10)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_rounding_near_convergence_is_noise_and_no_wrong_layer(activation):
    """Softmax cancels most digits at a loss of 1e-6: shares must allow for it, not be refused."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 4))
        x = torch.randn(60, 8)
        y = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.2)

    def loss(p):
        return cross_entropy(functional_call(net, p, (x.to(p["0.bias"]),)), y)

    for _ in range(4000):
        optimizer.zero_grad()
        value = loss(dict(net.named_parameters()))
        value.backward()
        optimizer.step()
        if value.item() < 2e-6:
            break
    params = {name: p.detach() for name, p in net.named_parameters()}
    found = hessian_spectrum(HessianOperator(loss, params))
    exact = torch.linalg.eigvalsh(
        HessianOperator(loss, {n: p.double() for n, p in params.items()}).dense()
    )
    for share, truth in (
        (found.positive, exact > found.tol),
        (found.negative, exact < -found.tol),
        (found.zero, exact.abs() <= found.tol),
    ):
        assert share.lower <= float(truth.double().mean()) <= share.upper
    assert abs(found.lambda_max - float(exact[-1])) <= found.noise


@pytest.mark.parametrize("scale", [8, 9, 10, 12, 20])
def test_curvature_that_is_lost_in_rounding_is_not_blamed_on_a_layer(scale):
    """At a loss of zero to all digits softmax leaves nothing to differentiate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(3).repeat(3, 1) @ torch.randn(3, 6, generator=generator)
    labels = torch.arange(3).repeat(3)
    weight = 2 * scale * torch.linalg.pinv(x[:3].double()).T.float()
    operator = HessianOperator(lambda p: cross_entropy(x @ p["w"].T, labels), {"w": weight})
    with pytest.raises(CurvatureError, match="lost in rounding") as caught:
        operator @ ones(operator)
    assert type(caught.value) is CurvatureError  # not WrongDerivativesError, which would stay
