"""What the variants of BatchNorm share: recomputation, statistics passes, compilation."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_optkit.methods.batch_norm import BatchNorm
from lightning_optkit.methods.batch_renorm import BatchRenorm
from lightning_optkit.methods.ghost_batch_norm import GhostBatchNorm
from lightning_optkit.methods.norm_statistics import refresh_norm_statistics, tracking_layers

AT_ONCE = {"relax_from": 0, "r_max_at": 0, "d_max_at": 0}
VARIANTS = [partial(BatchRenorm, **AT_ONCE), partial(GhostBatchNorm, chunk_size=3)]


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def net_of(norm, seed=0):
    """Return a net with two norm layers, and weights that do not depend on its class."""
    net = nn.Sequential(nn.Linear(4, 5), norm(5), nn.Tanh(), nn.Linear(5, 3), norm(3)).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed + i) / 5
    return net


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_equal(left, right, **tolerances):
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerances)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 2), (2, 3, 2, 3, 2)], ids=str)
def test_batch_norm_of_any_number_of_dimensions_is_torchs(shape):
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    layer, torchs = BatchNorm(3).double(), kind(3).double()
    for seed in range(2):
        assert torch.equal(layer(drawn(*shape, seed=seed)), torchs(drawn(*shape, seed=seed)))
    assert_equal(layer.state_dict(), torchs.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`input` must have the shape \(N, C, ...\)"):
        layer(torch.zeros(3))


# -- recomputation -----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("norm", VARIANTS, ids=["renorm", "ghost"])
def test_recomputation_counts_nothing_and_gives_the_same_gradients(norm, reentrant):
    plain, frugal = net_of(norm), net_of(norm)
    for step in range(3):
        x = drawn(7, 4, seed=10 + step).requires_grad_()
        again = x.detach().clone().requires_grad_()
        plain(x).pow(2).sum().backward()
        checkpoint(frugal, again, use_reentrant=reentrant).pow(2).sum().backward()
        assert torch.equal(x.grad, again.grad)
    assert_equal(state(plain), state(frugal), rtol=0, atol=0)
    for p, q in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert frugal[1].num_batches_tracked == 3


# -- statistics of the data --------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True], ids=["at once", "layerwise"])
@pytest.mark.parametrize("norm", VARIANTS, ids=["renorm", "ghost"])
def test_a_statistics_pass_finds_what_it_finds_for_batch_norm(norm, layerwise):
    net, plain = net_of(norm), net_of(nn.BatchNorm1d)
    assert list(tracking_layers(net)) == ["1", "4"]
    batches = [drawn(9, 4, seed=1), drawn(7, 4, seed=2)]
    for each in (net, plain):
        each.train()
        each(drawn(9, 4, seed=3))  # statistics that are none of the data
        each.eval()
        names = refresh_norm_statistics(
            each, lambda each=each: [partial(each, x) for x in batches], layerwise=layerwise
        )
        assert names == ["1", "4"]
    assert_equal(
        {n: b for n, b in net.named_buffers() if "running" in n},
        {n: b for n, b in plain.named_buffers() if "running" in n},
        rtol=1e-12,
        atol=1e-12,
    )
    values = torch.cat([net[0](x) for x in batches])
    torch.testing.assert_close(net[1].running_mean, values.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net[1].running_var, values.var(0), rtol=1e-12, atol=1e-12)
    assert [net[i].plain for i in (1, 4)] == [False, False]
    assert net[1].num_batches_tracked == 1
    x = drawn(9, 4, seed=4)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-10)


class Interrupted(BatchRenorm):
    def forward(self, input):
        assert self.plain
        raise KeyboardInterrupt


def test_an_interrupted_pass_leaves_the_layers_as_they_were():
    net = net_of(Interrupted)
    before = state(net)
    with pytest.raises(KeyboardInterrupt):
        refresh_norm_statistics(net, lambda: [lambda: net(drawn(9, 4))])
    assert_equal(before, state(net), rtol=0, atol=0)
    assert not net[1].plain


# -- compilation -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", VARIANTS, ids=["renorm", "ghost"])
def test_a_compiled_net_is_the_same_in_one_graph(norm):
    plain, net = net_of(norm), net_of(norm)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for step in range(3):
        x = drawn(7, 4, seed=step)
        for each in (plain, compiled):
            each(x).pow(2).sum().backward()
    assert_equal(state(plain), state(net), rtol=0, atol=0)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
