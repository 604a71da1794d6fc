"""PyHessian's interface: the same script, one import changed, against it and against the truth."""

import math
import random
import statistics
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.compat.pyhessian import hessian

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    installed = pytest.importorskip("pyhessian").hessian

# PyHessian's own way to a second derivative, of which torch warns.
pytestmark = pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")


def mlp(dtype=torch.float32):
    return seeded(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batchnorm(dtype=torch.float32):
    net = seeded(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    ).to(dtype)
    net.train()(inputs(dtype))  # running statistics that are not 0 and 1
    return net


def seeded(*layers):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(*layers)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.7
    return net


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(30, 4, generator=generator).to(dtype)


def batch(dtype=torch.float32):
    x = inputs(dtype)
    return x, (x[:, 0] * 2 + x[:, 1]).long().remainder(3)


def uneven(dtype=torch.float32):
    x, y = batch(dtype)
    return [(x[:21], y[:21]), (x[21:], y[21:])]


def dense(net, loss=cross_entropy, data=None):
    """Return the Hessian of the loss on the whole batch, in float64, by torch.func."""
    net = net.double().eval()
    x, y = data or batch(torch.float64)
    params = dict(net.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def of_vector(vector):
        pieces = vector.split(sizes)
        named = {n: v.view(p.shape) for (n, p), v in zip(params.items(), pieces, strict=True)}
        return loss(functional_call(net, named, (x,)), y)

    return torch.func.hessian(of_vector)(torch.cat([p.detach().flatten() for p in params.values()]))


def flat(pieces):
    return torch.cat([piece.flatten() for piece in pieces])


def standard_error(samples):
    return statistics.stdev(samples) / math.sqrt(len(samples))


def script(library, make, source):
    """Return what an old script gets from the library, at tolerances that mean the same to both."""
    given = {"data": batch()} if source == "data" else {"dataloader": uneven()}
    torch.manual_seed(0)
    module = library(make(), cross_entropy, **given, cuda=False)
    values, vectors = module.eigenvalues(maxIter=3000, tol=1e-7, top_n=2)
    return values, vectors, module.trace(maxIter=400, tol=-math.inf)


@pytest.mark.parametrize("source", ["data", "dataloader"])
@pytest.mark.parametrize("make", [mlp, batchnorm])
def test_same_script_gives_the_same_numbers(make, source):
    values, vectors, traces = script(hessian, make, source)
    old_values, old_vectors, old_traces = script(installed, make, source)
    assert values == pytest.approx(old_values, rel=1e-4)
    for new, old in zip(vectors, old_vectors, strict=True):
        assert [piece.shape for piece in new] == [piece.shape for piece in old]
        assert abs(float(flat(new) @ flat(old))) > 0.999
    matrix = dense(make())
    for samples in (traces, old_traces):
        assert len(samples) == 400
        difference = statistics.fmean(samples) - float(matrix.trace())
        assert abs(difference) < 4 * standard_error(samples)


@pytest.mark.parametrize("given", ["data", "dataloader"])
@pytest.mark.parametrize("make", [mlp, batchnorm])
def test_eigenpairs_are_those_of_the_dense_hessian(make, given):
    source = {"data": batch(torch.float64), "dataloader": uneven(torch.float64)}
    module = hessian(make(torch.float64), cross_entropy, cuda=False, **{given: source[given]})
    values, vectors = module.eigenvalues(tol=1e-9, top_n=4)
    matrix = dense(make(torch.float64))
    truth = torch.linalg.eigvalsh(matrix)
    truth = truth[truth.abs().argsort(descending=True)][:4]
    assert values == pytest.approx(truth.tolist(), rel=1e-5)
    for value, vector in zip(values, vectors, strict=True):
        u = flat(vector)
        assert float(u.norm()) == pytest.approx(1)
        assert float((matrix @ u - value * u).norm()) < 1e-4 * abs(value)
        rayleigh, product = module.dataloader_hv_product(vector)
        assert rayleigh == pytest.approx(value, rel=1e-6)
        torch.testing.assert_close(flat(product), matrix @ u)


def moments(nodes, weights):
    theta, w = torch.tensor(nodes).double(), torch.tensor(weights).double()
    return (w * theta).sum(1), (w * theta.square()).sum(1)


def test_density_has_the_moments_of_the_spectrum_and_of_pyhessian(monkeypatch):
    def old_eig(matrix, eigenvectors):
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    monkeypatch.setattr(torch, "eig", old_eig)
    torch.manual_seed(0)
    truth = torch.linalg.eigvalsh(dense(mlp()))
    for library in (hessian, installed):
        module = library(mlp(), cross_entropy, data=batch(), cuda=False)
        nodes, weights = module.density(iter=10, n_v=100)
        assert len(nodes) == len(weights) == 100
        assert {len(row) for row in nodes + weights} == {10}
        assert [sum(row) for row in weights] == pytest.approx([1.0] * 100, rel=1e-5)
        for found, exact in zip(moments(nodes, weights), (truth, truth.square()), strict=True):
            error = float(found.std()) / 10
            assert abs(float(found.mean() - exact.mean())) < 4 * error


def test_density_at_full_length_holds_every_eigenvalue():
    module = hessian(mlp(torch.float64), cross_entropy, data=batch(torch.float64), cuda=False)
    truth = torch.linalg.eigvalsh(dense(mlp(torch.float64)))
    nodes, weights = module.density(iter=len(truth) + 5)
    seen = torch.tensor(nodes[0], dtype=torch.float64)[torch.tensor(weights[0]) > 1e-12]
    assert len(nodes[0]) == len(truth) + 5  # rectangular, as scripts that draw it expect
    visible = truth[truth.abs() > 1e-3 * truth.abs().max()]
    for value in visible:
        assert float((seen - value).abs().min()) < 1e-8
    assert max(nodes[0]) == pytest.approx(float(truth.max()))


class Product(nn.Module):
    """The lecture's surface, (1 - a'b)^2 at the origin: eigenvalues 2 and -2, each repeated."""

    def __init__(self, pairs):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(pairs)), nn.Parameter(torch.zeros(pairs))

    def forward(self, x):
        return (self.a @ self.b) * x


@pytest.mark.parametrize("pairs", [1, 3])
def test_opposite_eigenvalues_are_told_apart_where_power_iteration_is_not(pairs):
    data = torch.ones(1, 1), torch.ones(1, 1)
    new = hessian(Product(pairs), mse_loss, data=data, cuda=False)
    values, _ = new.eigenvalues(top_n=2 * pairs, tol=1e-6)
    assert sorted(values) == pytest.approx([-2.0] * pairs + [2.0] * pairs)
    torch.manual_seed(0)
    old = installed(Product(pairs), mse_loss, data=data, cuda=False)
    assert abs(old.eigenvalues()[0][0]) < 1.9  # a mean of both
    assert abs(statistics.fmean(new.trace())) < 4 * 4 * pairs / 10  # of spread 4 each, 100 probes


def test_tiny_eigenvalues_are_right_where_pyhessians_vectors_are_too_short():
    net = nn.Linear(2, 1, bias=False)
    data = torch.tensor([[1e-3, 0.0], [0.0, 5e-4]]), torch.zeros(2, 1)
    torch.manual_seed(0)
    old = installed(net, mse_loss, data=data, cuda=False).eigenvalues(top_n=2)[0]
    assert old == pytest.approx([1e-6, 1e-6], rel=0.01)
    new = hessian(net, mse_loss, data=data, cuda=False).eigenvalues(top_n=2)[0]
    assert new == pytest.approx([1e-6, 2.5e-7])


def test_everything_is_as_before():
    net = batchnorm()
    net.train()
    net[1].eval()  # a mixture that neither eval() nor train() would bring back
    loader = DataLoader(
        TensorDataset(*batch()),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator().manual_seed(5),
    )
    cross_entropy(net(inputs()), batch()[1]).backward()
    gradients = [p.grad for p in net.parameters()]
    kept = [grad.clone() for grad in gradients]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    streams = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    order = loader.generator.get_state()

    module = hessian(net, cross_entropy, dataloader=loader, cuda=False)
    module.eigenvalues()
    module.trace(maxIter=5)
    module.density(iter=5, n_v=2)

    assert [module.training for module in net.modules()] == modes
    for p, grad, copy in zip(net.parameters(), gradients, kept, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, copy)
        assert p.requires_grad
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert str(np.random.get_state()) == streams[2]  # noqa: NPY002
    assert torch.equal(loader.generator.get_state(), order)


def test_a_forward_that_fails_leaves_the_modes_too():
    net = batchnorm().train()
    module = hessian(net, cross_entropy, data=(torch.ones(5, 9), torch.ones(5).long()), cuda=False)
    with pytest.raises(RuntimeError, match="shapes"):
        module.trace()
    assert all(module.training for module in net.modules())


class Augmented(TensorDataset):
    """Adds noise to each sample as it is read, from all three random streams."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(4) * 0.3 + random.random() * 0.3 + np.random.rand() * 0.3, y  # noqa: NPY002


def test_all_products_are_of_one_matrix_whatever_the_loader_does():
    state = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    loader = DataLoader(Augmented(*batch()), batch_size=8, shuffle=True)
    module = hessian(mlp(), cross_entropy, dataloader=loader, cuda=False)
    assert (random.getstate(), str(np.random.get_state())) == state  # noqa: NPY002
    ones = [torch.ones_like(p) for p in module.params]
    first, _ = module.dataloader_hv_product(ones)
    assert module.dataloader_hv_product(ones)[0] == first


def test_batches_that_can_be_read_only_once_will_do():
    once = hessian(mlp(), cross_entropy, dataloader=iter(uneven()), cuda=False)
    held = hessian(mlp(), cross_entropy, dataloader=uneven(), cuda=False)
    assert once.trace(maxIter=4) == held.trace(maxIter=4)


class Restless(nn.Module):
    """Random in eval mode too, and counting its calls."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        return self.net(x + torch.randn_like(x))


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
def test_layers_that_are_random_or_count_in_eval_mode(graphs):
    net = Restless()
    module = hessian(net, cross_entropy, data=batch(), cuda=False, graphs=graphs)
    ones = [torch.ones_like(p) for p in module.params]
    first, _ = module.dataloader_hv_product(ones)
    torch.rand(1)  # the global stream goes on
    assert module.dataloader_hv_product(ones)[0] == first
    assert net.num_calls == 0


class Headless(nn.Module):
    """With a parameter that takes no part, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.unused = nn.Parameter(torch.ones(2))
        self.net[0].weight.requires_grad_(False)

    def forward(self, x):
        return self.net(x)


def test_unused_and_frozen_parameters_are_right_where_pyhessian_fails():
    net = Headless()
    with pytest.raises((TypeError, AssertionError)):  # of torch, by its version
        installed(net, cross_entropy, data=batch(), cuda=False).eigenvalues()
    module = hessian(net, cross_entropy, data=batch(), cuda=False)
    values, vectors = module.eigenvalues(tol=1e-6)
    free = slice(24, None)  # what follows the frozen weight
    truth = torch.linalg.eigvalsh(dense(mlp())[free, free])
    assert values[0] == pytest.approx(float(truth.abs().max()), rel=1e-5)
    assert [piece.shape for piece in vectors[0]] == [p.shape for p in module.params]
    assert net.net[0].weight not in set(module.params)


def test_follows_the_weights():
    net = mlp()
    module = hessian(net, cross_entropy, data=batch(), cuda=False)
    before = module.eigenvalues()[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    cross_entropy(net(inputs()), batch()[1]).backward()
    optimizer.step()
    fresh = hessian(net, cross_entropy, data=batch(), cuda=False).eigenvalues(tol=1e-6)[0]
    assert module.eigenvalues(tol=1e-6)[0] == pytest.approx(fresh, rel=1e-5)
    assert before != pytest.approx(fresh, rel=1e-2)


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="aot_eager")])
def test_wrapped_models_are_unwrapped(wrap):
    plain = hessian(mlp(), cross_entropy, data=batch(), cuda=False)
    wrapped = hessian(wrap(mlp()), cross_entropy, data=batch(), cuda=False)
    assert wrapped.eigenvalues()[0] == plain.eigenvalues()[0]


def test_repeated_calls_draw_new_probes_and_a_new_object_the_same():
    module, again = (hessian(mlp(), cross_entropy, data=batch(), cuda=False) for _ in range(2))
    first, second = module.trace(maxIter=3), module.trace(maxIter=3)
    assert first != second
    assert again.trace(maxIter=3) == first
    other = torch.Generator().manual_seed(7)
    seeded = hessian(mlp(), cross_entropy, data=batch(), cuda=False, generator=other)
    assert seeded.trace(maxIter=3) != first


def test_trace_ends_at_its_standard_error():
    module = hessian(mlp(), cross_entropy, data=batch(), cuda=False)
    samples = module.trace(maxIter=10_000, tol=0.2)
    assert standard_error(samples) <= 0.2 * statistics.fmean(samples)
    assert standard_error(samples[:-16]) > 0.2 * statistics.fmean(samples[:-16])
    assert abs(statistics.fmean(samples) / float(dense(mlp()).trace()) - 1) < 4 * 0.2
    assert len(module.trace(maxIter=20, tol=0)) == 20


def test_diagonal_hessian():
    net = nn.Linear(2, 1, bias=False)
    data = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
    module = hessian(net, mse_loss, data=data, cuda=False)
    assert module.trace() == pytest.approx([10.0] * 16)  # signs alone, and enough of them
    (nodes,), (weights,) = module.density(iter=5)
    assert nodes == pytest.approx([1.0, 9.0, 9.0, 9.0, 9.0])  # nothing that is no eigenvalue
    assert weights[2:] == [0.0] * 3


def test_trace_of_a_negative_hessian_goes_on():
    def upside_down(outputs, targets):
        return -cross_entropy(outputs, targets)

    torch.manual_seed(0)
    assert len(installed(mlp(), upside_down, data=batch(), cuda=False).trace()) <= 2
    module = hessian(mlp(), upside_down, data=batch(), cuda=False)
    assert len(module.trace()) == 100


def test_what_has_not_converged_is_said():
    module = hessian(mlp(), cross_entropy, data=batch(), cuda=False)
    with pytest.warns(UserWarning, match=r"2 of 2 eigenvalues have not converged .* 2 products"):
        module.eigenvalues(maxIter=1, tol=1e-6, top_n=2)


def make(**changes):
    settings = {"model": mlp(), "criterion": cross_entropy, "data": batch(), "cuda": False}
    return hessian(**(settings | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_default_of_a_gpu_is_refused_without_one():
    with pytest.raises(ValueError, match=r"`cuda` must be False .* Pass `cuda=False`"):
        hessian(mlp(), cross_entropy, data=batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader": uneven()}, "Exactly one of `data` and `dataloader` .* got both"),
        ({"data": None}, "Exactly one of `data` and `dataloader` .* got neither"),
        ({"data": None, "dataloader": []}, "`dataloader` must yield at least one batch, got none"),
        ({"data": inputs()}, r"`data` must be a pair .* got Tensor"),
        ({"data": (inputs(),)}, r"`data` must be a pair .* got tuple of length 1"),
        ({"data": None, "dataloader": [inputs()]}, r"`dataloader` must yield a pair .* got Tensor"),
        ({"data": ([1.0], [1.0])}, "The inputs of `data` must be a tensor, got list"),
        ({"model": mlp().to("meta")}, "`model` must be on cpu with `cuda=False`, got '0.weight'"),
        ({"model": nn.Identity()}, "`params` must hold at least one parameter"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda module: module.eigenvalues(top_n=0), "top_n"),
        (lambda module: module.eigenvalues(maxIter=0), "maxIter"),
        (lambda module: module.trace(maxIter=0), "maxIter"),
        (lambda module: module.density(iter=0), "iter"),
        (lambda module: module.density(n_v=0), "n_v"),
    ],
)
def test_counts_are_checked(call, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        call(make())


def test_distributed_module_is_refused(monkeypatch):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", nn.Sequential)
    with pytest.raises(TypeError, match=r"got DistributedDataParallel. Pass `model.module`"):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_numbers_on_a_gpu():
    truth = hessian(mlp(), cross_entropy, dataloader=uneven(), cuda=False)
    module = hessian(mlp().cuda(), cross_entropy, dataloader=uneven())
    expected = truth.eigenvalues(top_n=2, tol=1e-6)[0]
    assert module.eigenvalues(top_n=2, tol=1e-6)[0] == pytest.approx(expected, rel=1e-4)
    assert module.trace(maxIter=8) == pytest.approx(truth.trace(maxIter=8), rel=1e-3)
