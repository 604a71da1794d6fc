import pytest
import torch

from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.measures.operators import HessianOperator

A = torch.tensor([[3.0, 1.0, 0.0], [1.0, -2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
HERE = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor([[-1.0]]).double()}
AWAY = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def quadratic(scale):
    def loss(p):
        w = torch.cat([p["a"], p["b"].reshape(-1)])
        return scale * (w @ A @ w) / 2

    return loss


@pytest.mark.parametrize("offset", [None, AWAY], ids=["here", "away"])
@pytest.mark.parametrize("kind", [LossSurface, HessianOperator])
def test_loss_and_gradient_are_those_of_the_weighted_mean(kind, offset):
    surface = kind([quadratic(1.0), quadratic(4.0)], HERE, weights=[3, 1])  # 7/4 of the first
    w = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    w = w if offset is None else w + offset
    loss, gradient = 7 / 4 * w @ A @ w / 2, 7 / 4 * A @ w
    both = surface.loss_and_gradient(offset)
    torch.testing.assert_close(surface.loss(offset), loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(surface.gradient(offset), gradient, rtol=1e-14, atol=0)
    torch.testing.assert_close(both, (loss, gradient), rtol=1e-14, atol=0)
    assert not both[1].requires_grad
    assert torch.equal(HERE["a"], torch.tensor([1.0, 2.0]).double())


def test_a_loss_alone_needs_no_gradient_of_its_layers():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("a gradient was taken")

    surface = LossSurface(lambda p: NoBackward.apply(p["a"]).sum(), {"a": torch.ones(2)})
    assert float(surface.loss()) == 2.0
    with pytest.raises(AssertionError, match="a gradient was taken"):
        surface.gradient()


def test_what_other_processes_have_is_added():
    def from_two(tensor):  # another process with the same batch and weight
        return 2 * tensor

    one = LossSurface(quadratic(1.0), HERE)
    two = LossSurface(quadratic(1.0), HERE, weights=[5], reduce=from_two)
    assert two.total_weight == 10
    torch.testing.assert_close(two.loss_and_gradient(AWAY), one.loss_and_gradient(AWAY))


def test_a_surface_has_names_and_sizes():
    surface = LossSurface(quadratic(1.0), HERE)
    assert (surface.names, surface.num_parameters, surface.dtype) == (["a", "b"], 3, torch.float64)
    with pytest.raises(TypeError, match=r"`params\['c'\]` must be real"):
        LossSurface(quadratic(1.0), HERE | {"c": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="`weights` must be positive"):
        LossSurface(quadratic(1.0), HERE, weights=[0])
