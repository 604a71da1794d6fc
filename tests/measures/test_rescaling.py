import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optkit.measures.eigenpairs import top_eigenpairs
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.rescaling import rescale_invariance
from lightning_optkit.measures.sharpness import average_sharpness, ball_sharpness, epsilon_sharpness
from lightning_optkit.measures.spectrum import hessian_spectrum

MEASURES = {
    "lambda_max": lambda s: float(top_eigenpairs(s, 1).values[0]),
    "trace": lambda s: hessian_spectrum(s).trace,
    "epsilon": lambda s: epsilon_sharpness(s).value,
    "ball": lambda s: ball_sharpness(s).value,
    "average": lambda s: average_sharpness(s).value,
    "adaptive": lambda s: ball_sharpness(s, adaptive=True).value,
    "adaptive average": lambda s: average_sharpness(s, adaptive=True).value,
}


def surface_of(net, x, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    net = net.to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
    x = x.to(dtype)
    labels = torch.randint(0, 3, (len(x),), generator=generator)
    return HessianOperator(
        lambda p: cross_entropy(functional_call(net, p, (x,)), labels),
        dict(net.named_parameters()),
        self_check=False,
    )


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_dinh_et_al_move_moves_and_what_is_adaptive_stays(dtype):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    found = rescale_invariance(surface_of(net, rows(12, 4), dtype), MEASURES)
    assert found.pairs == (("0", "2"),)
    for name, change in found.changes.items():
        if name.startswith("adaptive"):
            assert abs(change) < (1e-9 if dtype == torch.float64 else 1e-3), name
        else:
            assert abs(change) > 0.1, name
    text = str(found)
    assert text.splitlines()[0] == "Rescaled without changing the function: 0 × 4 and 2 ÷ 4."
    assert "  adaptive: stays" in text
    assert f"  trace: moves by {found.changes['trace']:+.0%}" in text


NETS = {
    "tanh": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), ()),
    "one layer": (nn.Sequential(nn.Linear(4, 3)), ()),
    "linear": (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (("0", "1"),)),
    "pairs": (
        nn.Sequential(
            nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.LeakyReLU(),
            nn.Linear(5, 3),
        ),
        (("0", "2"), ("4", "6")),
    ),
    "dead": (nn.Sequential(nn.Linear(4, 5), nn.Threshold(1e9, 0.0), nn.Linear(5, 3)), ()),
}  # fmt: skip


@pytest.mark.parametrize(("net", "pairs"), NETS.values(), ids=NETS)
def test_pairs_are_those_whose_function_stays(net, pairs):
    found = rescale_invariance(surface_of(net, rows(12, 4)), {"loss": lambda s: float(s.loss())})
    assert found.pairs == pairs
    if pairs:
        assert abs(found.changes["loss"]) < 1e-13
    else:
        assert found.after == {}
        assert "No two layers of this net can be rescaled" in str(found)


@pytest.mark.parametrize(("mode", "pair"), [("eval", ("1", "3")), ("train", ("1", "3"))])
def test_a_norm_layer_is_rescaled_with_the_convolution_after_it(mode, pair):
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=mode == "eval"), nn.ReLU(),
        nn.Conv2d(3, 3, 2), nn.Flatten(),
    )  # fmt: skip
    net.train(mode == "train")
    found = rescale_invariance(surface_of(net, rows(8, 1, 4, 4)), {})
    assert found.pairs == (pair,)


def test_parameters_stay():
    surface = surface_of(NETS["pairs"][0], rows(12, 4))
    before = {name: p.clone() for name, p in surface.params.items()}
    rescale_invariance(surface, MEASURES)
    assert all(torch.equal(p, before[name]) for name, p in surface.params.items())
