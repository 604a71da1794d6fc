"""`GaussNewtonOperator` against J' H J written out with torch.func, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_nll_loss,
    kl_div,
    log_softmax,
    mse_loss,
    nll_loss,
)

from lightning_optkit.measures import (
    CurvatureError,
    GaussNewtonOperator,
    HessianOperator,
    critical_point,
    hessian_spectrum,
    layer_spectra,
    top_eigenpairs,
)

Params = dict[str, Tensor]
GRAPHS = ["cached", "lockstep"]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


def brute_force(
    outputs_of: Callable[[Params], Tensor], loss_of: Callable[[Tensor], Tensor], params: Params
) -> Tensor:
    """Return J' H J from the dense Jacobian of the outputs and the dense Hessian of the loss."""
    params = {name: p.detach() for name, p in params.items()}
    flat = lambda p: outputs_of(p).reshape(-1)  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        z = outputs_of(params)
        jacobian = torch.cat([j.flatten(1) for j in jacrev(flat)(params).values()], dim=1)
    curvature = torch.autograd.functional.hessian(lambda v: loss_of(v.view_as(z)), z.reshape(-1))
    return jacobian.T @ curvature @ jacobian


def assert_same(operator: HessianOperator, truth: Tensor) -> None:
    size = float(truth.abs().max())
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-10, atol=1e-13 * size)


LABELS = torch.tensor([0, 2, 1, 1, 0, 2, -100])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda z: cross_entropy(z, LABELS),
    "label smoothing": lambda z: cross_entropy(z, LABELS, label_smoothing=0.2),
    "class weights": lambda z: cross_entropy(z, LABELS, weight=WEIGHTS),
    "ignored index": lambda z: cross_entropy(z, LABELS.clamp_min(0), ignore_index=2),
    "sum": lambda z: cross_entropy(z, LABELS, reduction="sum"),
    "by keyword": lambda z: cross_entropy(target=LABELS, input=z),
    "soft targets": lambda z: cross_entropy(z, normal(7, 3, seed=5).softmax(1)),
    "module": lambda z: nn.CrossEntropyLoss(weight=WEIGHTS)(z, LABELS),
    "nll of log_softmax": lambda z: nll_loss(log_softmax(z, 1), LABELS),
    "nll of a method": lambda z: nll_loss(z.log_softmax(1), LABELS),
    "nll of torch": lambda z: nll_loss(torch.log_softmax(z, 1), LABELS),
    "nll of modules": lambda z: nn.NLLLoss()(nn.LogSoftmax(1)(z), LABELS),
    "kl": lambda z: kl_div(log_softmax(z, 1), normal(7, 3, seed=5).softmax(1), reduction="sum"),
    "mse": lambda z: mse_loss(z, normal(7, 3, seed=4)),
    "bce with logits": lambda z: binary_cross_entropy_with_logits(
        z, normal(7, 3, seed=5).sigmoid(), pos_weight=WEIGHTS
    ),
    "bce": lambda z: functional.binary_cross_entropy(z.sigmoid(), normal(7, 3, seed=5).sigmoid()),
    "huber": lambda z: functional.huber_loss(z, normal(7, 3, seed=4)),
    "smooth l1": lambda z: functional.smooth_l1_loss(z, normal(7, 3, seed=4)),
    "poisson": lambda z: functional.poisson_nll_loss(z, normal(7, 3, seed=4).abs()),
    "soft margin": lambda z: functional.soft_margin_loss(z, normal(7, 3, seed=4).sign()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_torchs_losses_against_brute_force(name):
    net, x = mlp(), normal(7, 4)
    params, loss = dict(net.named_parameters()), LOSSES[name]
    outputs_of = lambda p: functional_call(net, p, (x,))  # noqa: E731
    operator = GaussNewtonOperator(lambda p: loss(outputs_of(p)), params)
    if name == "bce":  # its argument is the outputs: probabilities
        truth = brute_force(
            lambda p: outputs_of(p).sigmoid(),
            lambda q: functional.binary_cross_entropy(q, normal(7, 3, seed=5).sigmoid()),
            params,
        )
    else:
        truth = brute_force(outputs_of, loss, params)
    assert_same(operator, truth)
    assert float(torch.linalg.eigvalsh(truth)[0]) >= -1e-12 * float(truth.norm())
    hessian = HessianOperator(lambda p: loss(outputs_of(p)), params)
    assert torch.equal(operator.gradient(), hessian.gradient())
    assert torch.equal(operator.loss(), hessian.loss())
    assert float((hessian.dense() - truth).norm()) > 1e-3 * float(truth.norm())  # not the Hessian


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x, x, need_weights=False)[0].mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution with batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
        ).eval(),
        (7, 1, 4, 4),
    ),
    "lstm": (Recurrent, (7, 3, 4)),
    "attention": (Attention, (7, 3, 4)),
    "in-place activation": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.SiLU(inplace=True), nn.Linear(5, 3)),
        (7, 4),
    ),
}


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("name", NETS)
def test_layers_against_brute_force(name, graphs):
    build, shape = NETS[name]
    net, x = seeded(build), normal(*shape)
    params = dict(net.named_parameters())
    outputs_of = lambda p: functional_call(net, p, (x,))  # noqa: E731
    loss = lambda z: cross_entropy(z, LABELS)  # noqa: E731
    operator = GaussNewtonOperator(lambda p: loss(outputs_of(p)), params, graphs=graphs)
    assert_same(operator, brute_force(outputs_of, loss, params))


def test_a_linear_model_has_no_other_curvature():
    net, x = seeded(lambda: nn.Linear(4, 3)), normal(7, 4)
    loss = lambda p: cross_entropy(functional_call(net, p, (x,)), LABELS)  # noqa: E731
    params = dict(net.named_parameters())
    assert_same(GaussNewtonOperator(loss, params), HessianOperator(loss, params).dense())


def test_a_parameter_may_be_the_output_itself():
    operator = GaussNewtonOperator(
        lambda p: mse_loss(p["w"], torch.zeros(4).double()), {"w": normal(4)}
    )
    assert_same(operator, torch.eye(4, dtype=torch.float64) / 2)


# -- several heads, own outputs, penalties ------------------------------------------------------


def test_two_losses_are_two_heads():
    net, x = mlp(5), normal(7, 4)
    params = dict(net.named_parameters())

    def total(z: Tensor) -> Tensor:
        return cross_entropy(z[:, :3], LABELS) + 3 * mse_loss(z[:, 3:], normal(7, 2, seed=3))

    operator = GaussNewtonOperator(lambda p: total(functional_call(net, p, (x,))), params)
    assert_same(operator, brute_force(lambda p: functional_call(net, p, (x,)), total, params))


def test_one_output_with_two_losses_is_counted_once():
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())

    def total(z: Tensor) -> Tensor:
        return cross_entropy(z, LABELS) + 2 * mse_loss(z, normal(7, 3, seed=3))

    operator = GaussNewtonOperator(lambda p: total(functional_call(net, p, (x,))), params)
    assert_same(operator, brute_force(lambda p: functional_call(net, p, (x,)), total, params))


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: [z], lambda z: (z,)])
def test_a_loss_of_ones_own_returns_its_outputs(wrap):
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())
    focal = lambda z: (z.logsumexp(1) - z[:, 0]).pow(1.5).mean()  # noqa: E731

    def loss(p: Params) -> Any:
        z = functional_call(net, p, (x,))
        return focal(z), wrap(z)

    truth = brute_force(lambda p: functional_call(net, p, (x,)), focal, params)
    assert_same(GaussNewtonOperator(loss, params), truth)
    # a Hessian of the same function takes the loss alone
    hessian = HessianOperator(lambda p: loss(p)[0], params)
    assert torch.equal(HessianOperator(loss, params).dense(), hessian.dense())


def test_returned_outputs_go_before_those_that_were_seen():
    """With the parameters themselves as outputs it is the Hessian of a loss linear in nothing."""
    w = {"w": normal(3)}
    loss = lambda p: mse_loss(p["w"].exp(), torch.zeros(3).double())  # noqa: E731
    operator = GaussNewtonOperator(lambda p: (loss(p), p["w"]), w)
    assert_same(operator, HessianOperator(loss, w).dense())


def test_a_penalty_on_the_weights_has_no_part():
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())
    plain = lambda p: cross_entropy(functional_call(net, p, (x,)), LABELS)  # noqa: E731
    penalised = lambda p: plain(p) + sum(v.square().sum() for v in p.values())  # noqa: E731
    without, with_penalty = (GaussNewtonOperator(f, params) for f in (plain, penalised))
    assert_same(with_penalty, without.dense())
    assert not torch.equal(with_penalty.gradient(), without.gradient())  # of the whole loss


def test_outputs_that_the_loss_is_linear_in_have_no_curvature():
    net, x = mlp(), normal(7, 4)
    operator = GaussNewtonOperator(
        lambda p: (lambda z: (z.sum(), z))(functional_call(net, p, (x,))),
        dict(net.named_parameters()),
    )
    assert operator.dense().count_nonzero() == 0


def test_parameters_without_a_part_give_zero_rows():
    params = {"used": normal(3), "unused": normal(4)}
    for k in (1, 3, 4):
        operator = GaussNewtonOperator(lambda p: mse_loss(p["used"], normal(3)), params)
        product = operator @ torch.ones(7, k, dtype=torch.float64)
        assert product[3:].count_nonzero() == 0
        assert product[:3].flatten().tolist() == pytest.approx([2 / 3] * 3 * k)


# -- as any other operator ----------------------------------------------------------------------


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("batched_below", [0, 20_000], ids=["loop", "batched"])
def test_weighted_batches_and_blocks_of_vectors(monkeypatch, batched_below, graphs):
    monkeypatch.setattr("lightning_optkit.measures.gradient_graph._BATCHED_BELOW", batched_below)
    net, x = mlp(), normal(17, 4)
    y = torch.arange(17) % 3
    params, cuts = dict(net.named_parameters()), [0, 10, 14, 17]
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    losses = [lambda p, s=s: cross_entropy(functional_call(net, p, (x[s],)), y[s]) for s in parts]
    operator = GaussNewtonOperator(losses, params, weights=[10, 4, 3], graphs=graphs)
    truth = brute_force(
        lambda p: functional_call(net, p, (x,)), lambda z: cross_entropy(z, y), params
    )
    v = normal(operator.shape[0], 5, seed=8)
    torch.testing.assert_close(operator @ v, truth @ v, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(operator @ v[:, 0], truth @ v[:, 0], rtol=1e-10, atol=1e-13)
    assert operator.num_matvecs == 6 + 2
    assert operator.works_in_blocks == (graphs == "lockstep")


def test_reduce_sums_over_processes():
    """Two processes with the same batch: each sees half of the weight, and the sum is doubled."""
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())
    loss = lambda p: cross_entropy(functional_call(net, p, (x,)), LABELS)  # noqa: E731
    alone = GaussNewtonOperator(loss, params, weights=[7])
    together = GaussNewtonOperator(loss, params, weights=[7], reduce=lambda t: 2 * t)
    assert together.total_weight == 14
    assert_same(together, alone.dense())


def test_the_forward_mode_product_is_the_same_product():
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())
    operator = GaussNewtonOperator(
        lambda p: cross_entropy(functional_call(net, p, (x,)), LABELS), params
    )
    v = normal(operator.shape[0], seed=9)
    torch.testing.assert_close(operator.forward_mode_product(v), operator @ v)


def test_parameters_that_moved_are_measured_where_they_are():
    w = nn.Parameter(torch.tensor([2.0]).double())
    operator = GaussNewtonOperator(
        lambda p: mse_loss(p["w"].square(), torch.zeros(1).double()), {"w": w}
    )
    one = torch.ones(1).double()
    assert (operator @ one).tolist() == [2 * 16]  # (2 w)^2 times 2
    with torch.no_grad():
        w.mul_(2)
    assert (operator @ one).tolist() == [2 * 64]
    assert w.grad is None


def test_every_measure_takes_it():
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())
    outputs_of = lambda p: functional_call(net, p, (x,))  # noqa: E731
    loss = lambda z: cross_entropy(z, LABELS)  # noqa: E731
    operator = GaussNewtonOperator(lambda p: loss(outputs_of(p)), params)
    truth = brute_force(outputs_of, loss, params)
    eigenvalues = torch.linalg.eigvalsh(truth)
    top = top_eigenpairs(operator, 2, rtol=1e-9)
    assert top.values.tolist() == pytest.approx(eigenvalues[-2:].flip(0).tolist(), rel=1e-8)
    spectrum = hessian_spectrum(operator)
    assert spectrum.negative_ratio == 0
    assert spectrum.trace == pytest.approx(float(truth.trace()), rel=1e-10)
    assert critical_point(operator, spectrum).descent is None
    layers = layer_spectra(operator)
    assert layers["2"].lambda_max == pytest.approx(
        float(torch.linalg.eigvalsh(truth[25:, 25:])[-1]), rel=1e-10
    )
    assert type(operator.restricted(["2.weight"])) is GaussNewtonOperator


def test_float32_is_off_by_rounding_only():
    net, x = mlp(), normal(7, 4)
    params = dict(net.named_parameters())
    truth = brute_force(
        lambda p: functional_call(net, p, (x,)), lambda z: cross_entropy(z, LABELS), params
    )
    net = net.float()
    operator = GaussNewtonOperator(
        lambda p: cross_entropy(functional_call(net, p, (x.float(),)), LABELS),
        dict(net.named_parameters()),
    )
    error = torch.linalg.matrix_norm(operator.dense() - truth, 2)
    assert float(error) <= operator.noise * float(torch.linalg.matrix_norm(truth, 2))


# -- refusals -----------------------------------------------------------------------------------


def refused(loss: Callable[[Params], Any], message: str, params: Params | None = None) -> None:
    operator = GaussNewtonOperator(loss, params or {"w": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(CurvatureError, match=message):
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)


def test_a_loss_without_a_known_loss_function_is_refused():
    refused(lambda p: p["w"].square().sum(), r"calls none of binary_cross_entropy.*measure the H")


def test_a_loss_function_called_on_data_alone_is_refused():
    refused(lambda p: p["w"].sum() + mse_loss(torch.zeros(3), torch.ones(3)), "calls none of")
    refused(lambda p: (p["w"].sum(), {"logits": p["w"]}), "a sequence of tensors, got dict")
    refused(lambda p: (p["w"].sum(), torch.ones(3)), "calls none of")
    refused(lambda p: (p["w"].sum(), []), "calls none of")


def test_outputs_are_found_wherever_a_loss_function_takes_them():
    w, y = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), torch.ones(3).double()
    right = GaussNewtonOperator(lambda p: mse_loss(p["w"].sin(), y), {"w": w}).dense()
    swapped = GaussNewtonOperator(lambda p: mse_loss(y, p["w"].sin()), {"w": w}).dense()
    torch.testing.assert_close(swapped, right, rtol=1e-12, atol=0)
    # mean and variance both come from the net: all of the Hessian in them counts
    both = GaussNewtonOperator(
        lambda p: gaussian_nll_loss(p["w"][:1] * 1.0, y[:1], p["w"][2:] * 1.0), {"w": w}
    )
    exact = HessianOperator(lambda p: gaussian_nll_loss(p["w"][:1], y[:1], p["w"][2:]), {"w": w})
    torch.testing.assert_close(both.dense(), exact.dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "loss", [nll_loss, lambda q, y: kl_div(q, q.detach().exp(), reduction="sum")]
)
def test_a_linear_loss_of_anything_but_log_softmax_is_refused(loss):
    refused(
        lambda p: loss(p["w"].reshape(1, 3).softmax(1).log(), torch.tensor([1])),
        "linear in their input.*log_softmax",
    )


@pytest.mark.parametrize(
    "second", [lambda z: z * 2, lambda z: z.clone(), lambda z: z.sum(0, keepdim=True)]
)
def test_an_output_that_depends_on_another_is_refused(second):
    def loss(p: Params) -> Any:
        z = p["w"].sin()
        other = second(z)
        return z.square().sum() + other.square().sum(), (z, other)

    refused(loss, "depends on another.*counts it twice")

    def turned(p: Params) -> Any:
        total, outputs = loss(p)
        return total, outputs[::-1]

    refused(turned, "depends on another")


def test_losses_that_no_operator_takes_are_refused_here_too():
    refused(lambda p: mse_loss(p["w"], torch.zeros(3).double(), reduction="none"), "scalar")
    refused(lambda p: mse_loss(p["w"].detach(), torch.zeros(3).double()), "does not depend")
    for params, error in (
        ({"w": torch.ones(2).half()}, TypeError),
        ({"w": torch.ones(2, dtype=torch.cfloat)}, TypeError),
        ({"w": torch.eye(2).to_sparse()}, TypeError),
        ({}, ValueError),
    ):
        with pytest.raises(error):
            GaussNewtonOperator(lambda p: mse_loss(p["w"], torch.zeros(2)), params)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


def test_a_once_differentiable_layer_on_every_path_is_refused():
    loss = lambda p: mse_loss(OnceDifferentiable.apply(p["w"]), torch.zeros(3).double())  # noqa: E731
    refused(loss, "second derivative", {"w": torch.tensor([1.0, 2.0, 3.0]).double()})


def test_a_once_differentiable_layer_on_one_path_is_refused():

    def loss(p: Params) -> Tensor:
        return mse_loss(OnceDifferentiable.apply(p["w"]) + p["w"], torch.zeros(3).double())

    refused(loss, "second derivative", {"w": torch.tensor([1.0, 2.0, 3.0]).double()})


def test_a_sparse_embedding_and_weight_norm_take_part():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = nn.Embedding(5, 4, sparse=True).double()
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    params = {f"t.{n}": p for n, p in table.named_parameters()}
    params |= {f"l.{n}": p for n, p in layer.named_parameters()}
    tokens = torch.tensor([0, 1, 2, 3, 1, 0, 2])

    def outputs_of(p: Params) -> Tensor:
        hidden = functional_call(table, {n[2:]: v for n, v in p.items() if n[0] == "t"}, (tokens,))
        return functional_call(layer, {n[2:]: v for n, v in p.items() if n[0] == "l"}, (hidden,))

    def by_formula(p: Params) -> Tensor:
        g, v = p["l.parametrizations.weight.original0"], p["l.parametrizations.weight.original1"]
        weight = g * v / v.norm(dim=1, keepdim=True)
        return p["t.weight"][tokens] @ weight.T + p["l.bias"]

    loss = lambda z: cross_entropy(z, LABELS)  # noqa: E731
    operator = GaussNewtonOperator(lambda p: loss(outputs_of(p)), params)
    assert_same(operator, brute_force(by_formula, loss, params))


def test_a_loss_that_is_not_finite_is_an_error():
    refused(lambda p: mse_loss(p["w"] * math.nan, torch.zeros(3).double()), "NaN or infinite")
