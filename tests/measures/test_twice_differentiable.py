"""Layers whose usual kernels cannot be differentiated twice, against differences of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_optkit.measures import HessianOperator
from lightning_optkit.measures.twice_differentiable import twice_differentiable
from tests.quadratics import flatten

Loss = Callable[[dict[str, Tensor]], Tensor]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Tied(nn.Module):
    """One matrix to embed and to read out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.readout = nn.Linear(3, 5, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.embedding(tokens).tanh())


class Checkpointed(nn.Module):
    plain = False

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.inside(x).sin()
        return checkpoint(self.inside, x, use_reentrant=False).sin()


class Last(nn.Module):
    """The output sequence of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def batch_norm() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten())
    net[1].running_mean += 0.3
    net[1].running_var *= 2.0
    return net.eval()


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


TOKENS = torch.tensor([[0, 3, 3, 1], [4, 2, 0, 0]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), uniform(5, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.SiLU()), uniform(3, 1, 4, 4)),
    "conv transposed": (lambda: nn.ConvTranspose1d(2, 2, 3), uniform(2, 2, 3)),
    "batch norm in eval": (batch_norm, uniform(3, 1, 4, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), uniform(3, 4)),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)), uniform(3, 2, 4)),
    "lstm": (lambda: Last(nn.LSTM(2, 2, batch_first=True)), uniform(2, 3, 2)),
    "gru": (lambda: Last(nn.GRU(2, 2, num_layers=2, bidirectional=True)), uniform(3, 2, 2)),
    "rnn": (lambda: Last(nn.RNN(2, 3)), uniform(3, 2, 2)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), TOKENS),
    "sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=0, sparse=True), nn.Tanh()),
        TOKENS,
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        uniform(2, 3, 4),
    ),
    "transformer, smooth, in eval": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", norm_first=True).eval(),
        uniform(3, 2, 4),
    ),
    "tied": (Tied, TOKENS),
    "checkpoint": (Checkpointed, uniform(5, 4)),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(4, 3)), uniform(5, 4)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), uniform(5, 4)),
    "weight norm of a conv": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), nn.Tanh()),
        uniform(2, 2, 4),
    ),
    "spectral norm in eval": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
        uniform(5, 4),
    ),
}


def loss_of(net: nn.Module, x: Tensor) -> Loss:
    def loss(params: dict[str, Tensor]) -> Tensor:
        out = functional_call(net, params, (x,))
        target = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return (out.sin() - target).square().mean()

    return loss


def difference_of_gradients(loss: Loss, params: dict[str, Tensor], v: Tensor) -> Tensor:
    """Return ``H v`` from four first derivatives, with an error of the fourth power of the step."""

    def gradient(step: float) -> Tensor:
        pieces = v.split([p.numel() for p in params.values()])
        moved = {
            name: (p.detach() + step * piece.view(p.shape)).requires_grad_()
            for (name, p), piece in zip(params.items(), pieces, strict=True)
        }
        found = torch.autograd.grad(loss(moved), tuple(moved.values()))
        return torch.cat([g.to_dense().reshape(-1) for g in found])

    # Truncation h^4 = 1e-12 and rounding eps / h = 1e-13 leave 1e-8 of the product, with room.
    h = 1e-3
    return (8 * (gradient(h) - gradient(-h)) - (gradient(2 * h) - gradient(-2 * h))) / (12 * h)


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
@pytest.mark.parametrize("layer", LAYERS)
def test_products_of_layers(layer, graphs):
    build, x = LAYERS[layer]
    net = seeded(build)
    params = dict(net.named_parameters())
    loss = loss_of(net, x)
    op = HessianOperator(loss, params, graphs=graphs)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(op.shape[0], 2, generator=generator, dtype=torch.float64)
    v = v / v.norm(dim=0)
    reference = seeded(build)
    reference.plain = True  # a checkpoint recomputes with the module's own parameters, unmoved
    for vector, product in zip(v.T, (op @ v).T, strict=True):
        truth = difference_of_gradients(loss_of(reference, x), params, vector)
        assert float(truth.norm()) > 1e-3
        assert float((product - truth).norm()) <= 1e-8 * float(truth.norm())
        single = op @ vector
        assert float((single - truth).norm()) <= 1e-8 * float(truth.norm())


@pytest.mark.parametrize("layer", ["old weight norm", "weight norm"])
def test_weight_norm_against_the_dense_hessian_of_its_formula(layer):
    build, x = LAYERS[layer]
    net = seeded(build)
    params = dict(net.named_parameters())
    loss = loss_of(net, x)
    bias, g, v = params.values()  # in this order under both interfaces
    assert [tuple(p.shape) for p in (bias, g, v)] == [(3,), (3, 1), (3, 4)]

    def plain(vector: Tensor) -> Tensor:
        bias, g, v = vector[:3], vector[3:6, None], vector[6:].view(3, 4)
        weight = v * g / v.square().sum(1, keepdim=True).sqrt()
        out = x @ weight.T + bias
        target = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return (out.sin() - target).square().mean()

    at = flatten(params).detach()
    torch.testing.assert_close(plain(at), loss(params).detach(), rtol=1e-12, atol=0)
    truth = torch.autograd.functional.hessian(plain, at)
    op = HessianOperator(loss, params)
    torch.testing.assert_close(op.dense(), truth, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_do_not_change(layer):
    build, x = LAYERS[layer]
    net = seeded(build)
    loss = loss_of(net, x)

    def loss_and_gradient() -> Tensor:
        params = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
        value = loss(params)
        gradients = torch.autograd.grad(value, tuple(params.values()))
        return torch.cat([value.detach()[None], *(g.to_dense().reshape(-1) for g in gradients)])

    plain = loss_and_gradient()
    with twice_differentiable():
        replaced = loss_and_gradient()
    torch.testing.assert_close(replaced, plain, rtol=1e-12, atol=1e-14)


class CudnnWatch(TorchFunctionMode):
    """Notes whether cuDNN was enabled when a function was called, from inside the replacements."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled: dict[str, bool] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.enabled[getattr(func, "__name__", str(func))] = torch.backends.cudnn.enabled
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.LSTM(2, 2), "lstm"),
        (nn.GRU(2, 2), "gru"),
        (nn.RNN(2, 2), "rnn_tanh"),
        (nn.RNN(2, 2, nonlinearity="relu"), "rnn_relu"),
    ],
    ids=["lstm", "gru", "tanh", "relu"],
)
def test_recurrent_layers_run_without_cudnn_and_only_they(layer, name):
    assert torch.backends.cudnn.enabled
    with CudnnWatch() as watch, twice_differentiable():
        layer(torch.ones(3, 1, 2))[0].tanh()
    assert watch.enabled[name] is False
    assert watch.enabled["tanh"] is True
    assert torch.backends.cudnn.enabled


def test_cudnn_comes_back_after_an_error():
    with twice_differentiable(), pytest.raises(RuntimeError):
        nn.LSTM(2, 2)(torch.ones(3, 1, 5))
    with twice_differentiable(), pytest.raises(TypeError):
        torch.lstm(torch.ones(2))
    assert torch.backends.cudnn.enabled


def test_a_sparse_embedding_has_a_dense_gradient_inside_and_the_same_options():
    weight = torch.ones(3, 2, requires_grad=True)
    tokens = torch.tensor([0, 1, 1])
    with twice_differentiable():
        out = embedding(tokens, weight, padding_idx=0, scale_grad_by_freq=True, sparse=True)
    out.sum().backward()
    assert weight.grad.layout == torch.strided
    assert weight.grad.tolist() == [[0, 0], [1, 1], [0, 0]]
