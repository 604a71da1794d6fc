import itertools
from contextlib import ExitStack

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_optkit import is_probing
from lightning_optkit.bridge.probe import Probe, ProbeError, select_parameters
from tests.contracts import assert_same, public_state, rng_state
from tests.modules import GAN, MODULES, Classifier, DictAutoencoder, images


def trainer_for(module: pl.LightningModule) -> pl.Trainer:
    """Return a Trainer as the probe finds it, without training."""
    trainer = pl.Trainer(accelerator="cpu", logger=True, enable_checkpointing=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.strategy._lightning_module = module
    optimizers = module.configure_optimizers()
    optimizers = optimizers[0] if isinstance(optimizers, tuple) else [optimizers]
    trainer.strategy.optimizers = optimizers
    return trainer


def loss_of(module, batch, parameters=None, **options):
    with Probe(trainer_for(module), module, **options) as probe:
        chosen = probe.parameters(list(select_parameters(module)))
        leaves = {name: p.requires_grad_() for name, p in chosen.items()}
        return probe.loss_fn(batch)(leaves | (parameters or {}))


class Plain(pl.LightningModule):
    def __init__(self, step=lambda self, batch: self.net(batch).sum()):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.step = step

    def training_step(self, batch):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_loss_is_that_of_the_step_in_eval_mode():
    module = Classifier()
    x, y = images(8)
    module.training_step = lambda batch, batch_idx: cross_entropy(module(batch[0]), batch[1])
    loss = loss_of(module, (x, y))
    module.eval()
    torch.testing.assert_close(loss, cross_entropy(module(x), y), rtol=1e-6, atol=0)


def test_loss_is_a_function_of_the_parameters_it_is_given():
    module = Plain()
    batch = torch.ones(4, 3)
    moved = {"net.weight": torch.full((1, 3), 2.0), "net.bias": torch.ones(1)}
    assert loss_of(module, batch, moved) == 4 * (6 + 1)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_call_gives_the_same_loss(mode):
    module = Classifier()
    with Probe(trainer_for(module), module, mode=mode) as probe:
        loss = probe.loss_fn(images(8))
        leaves = {n: p.requires_grad_() for n, p in probe.parameters(["head.weight"]).items()}
        first, second = loss(leaves), loss(leaves)
        assert torch.equal(first, second)


def test_modes_differ():
    module = Classifier()
    batch = images(8)
    assert loss_of(module, batch, mode="eval") != loss_of(module, batch, mode="train")


@pytest.mark.parametrize("make", [Classifier, GAN])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_left_behind(make, mode):
    module = make()
    trainer = trainer_for(module)
    batch = images(8)

    def state():
        return {
            "weights": {k: v.clone() for k, v in module.state_dict().items()},
            "gradients": [p.grad for p in module.parameters()],
            "attributes": public_state(module),
            "rng": rng_state(),
            "batch": [t.clone() for t in batch],
            "names": sorted(vars(module)),
            "loggers": [id(logger) for logger in trainer.loggers],
            "dtype": torch.get_default_dtype(),
        }

    before = state()
    with Probe(trainer, module, mode=mode) as probe:
        leaves = {
            n: p.requires_grad_()
            for n, p in probe.parameters(list(select_parameters(module))).items()
        }
        probe.loss_fn(batch)(leaves).backward()
    assert_same(before, state())


def test_nothing_is_left_behind_by_a_step_that_raises():
    def step(self, batch):
        self.calls = 1
        torch.rand(1)
        raise KeyError("broken step")

    module = Plain(step)
    before = (sorted(vars(module)), rng_state())
    with pytest.raises(KeyError, match="broken step"):
        loss_of(module, torch.ones(4, 3))
    assert_same(before[1], rng_state())
    assert set(vars(module)) - set(before[0]) <= {"_trainer"}
    assert not is_probing()


def test_backward_hooks_of_the_user_do_not_fire():
    module = Plain()
    fired = []
    module.net.register_full_backward_hook(lambda *args: fired.append(1))
    loss_of(module, torch.ones(4, 3)).backward()
    assert fired == []
    module.net(torch.ones(4, 3, requires_grad=True)).sum().backward()
    assert fired == [1]


def test_is_probing_inside_only():
    seen = []

    def step(self, batch):
        seen.append(is_probing())
        return self.net(batch).sum()

    module = Plain(step)
    loss_of(module, torch.ones(4, 3))
    assert seen == [True]
    assert not is_probing()


@pytest.mark.parametrize("index", [0, 1])
def test_manual_backward_gives_the_chosen_loss(index):
    module = GAN()
    loss = loss_of(module, images(8), loss_index=index)
    names = [n for n, p in module.named_parameters()]
    with Probe(trainer_for(module), module, loss_index=index) as probe:
        leaves = {n: p.requires_grad_() for n, p in probe.parameters(names).items()}
        value = probe.loss_fn(images(8))(leaves)
        gradients = torch.autograd.grad(value, leaves.values(), allow_unused=True)
    generator_has_part = gradients[names.index("generator.0.weight")] is not None
    assert generator_has_part == (index == 0)  # the critic's loss sees detached images
    assert loss == value


def test_loss_fn_replaces_the_step():
    module = Plain()
    loss = loss_of(module, torch.ones(4, 3), loss_fn=lambda m, batch: 3 * m.net(batch).mean())
    torch.testing.assert_close(loss, 3 * module.net(torch.ones(4, 3)).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_are_measured_in_float32(dtype):
    module = DictAutoencoder().to(dtype)
    loss = loss_of(module, {"image": images(8)[0].to(dtype)})
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda self, batch: None, "must return the loss.*got NoneType.*loss_fn="),
        (lambda self, batch: {"los": 1}, "a dict with the key 'loss'"),
        (lambda self, batch: self.net(batch), r"scalar loss, got the shape \(4, 1\)"),
        (lambda self, batch: self.net(batch).sum().detach(), "without a gradient"),
        (lambda self, batch: self.net(batch).sum().item(), "got float"),
    ],
)
def test_losses_that_cannot_be_used_are_named(step, message):
    with pytest.raises(ProbeError, match=message):
        loss_of(Plain(step), torch.ones(4, 3))


def test_manual_step_without_manual_backward_is_named():
    module = Plain(lambda self, batch: None)
    module.automatic_optimization = False
    with pytest.raises(ProbeError, match="manual_backward"):
        loss_of(module, torch.ones(4, 3))


def test_loss_index_out_of_range_is_named():
    with pytest.raises(ProbeError, match=r"`loss_index` must be below 2.*got 5"):
        loss_of(GAN(), images(8), loss_index=5)


def test_select_parameters():
    module = Classifier()
    assert set(select_parameters(module, ["head.*"])) == {"head.weight", "head.bias"}
    assert len(select_parameters(module)) == len(list(module.parameters()))
    module.head.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"must match.*'head\.\*'.*names begin with: net\.0\.weight"
    ):
        select_parameters(module, ["head.*"])
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        select_parameters(module)


def test_a_step_that_writes_into_parameters_stays_pure():
    """A target network's moving average, and the clipped weights of a Wasserstein critic."""

    class Writes(Plain):
        def __init__(self):
            super().__init__()
            self.target = nn.Linear(3, 1).requires_grad_(False)

        def training_step(self, batch):
            loss = (self.net(batch) - self.target(batch)).sum()
            self.net.weight.data.clamp_(-0.01, 0.01)
            self.target.weight.data.mul_(0.5)
            with torch.no_grad():
                self.target.bias.add_(1)
            return loss

    module = Writes()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with Probe(trainer_for(module), module) as probe:
        names = list(select_parameters(module))
        loss = probe.loss_fn(torch.ones(4, 3))
        first = loss({n: p.detach().requires_grad_() for n, p in probe.parameters(names).items()})
        second = loss({n: p.detach().requires_grad_() for n, p in probe.parameters(names).items()})
    assert first == second
    assert_same(before, {k: v.clone() for k, v in module.state_dict().items()})


def test_tied_weights_stay_tied():
    class Tied(Plain):
        def __init__(self):
            super().__init__(lambda self, batch: (self.again(self.first(batch))).sum())
            self.first = nn.Linear(3, 3, bias=False)
            self.again = nn.Linear(3, 3, bias=False)
            self.again.weight = self.first.weight

    module = Tied()
    weight = torch.full((3, 3), 0.5, requires_grad=True)
    loss = loss_of(module, torch.ones(2, 3), {"first.weight": weight})
    torch.testing.assert_close(loss, (torch.ones(2, 3) @ weight.T @ weight.T).sum())


# -- held for many points -------------------------------------------------------------------------


def held_and_called(module, batches, points, **options):
    """Return the losses of each batch at each point: held, and called one by one."""
    with Probe(trainer_for(module), module, **options) as probe:
        params = probe.parameters(list(select_parameters(module)))
        losses = [probe.loss_fn(batch, i) for i, batch in enumerate(batches)]
        held, called = [], []
        live = {name: p.clone() for name, p in params.items()}
        with torch.no_grad(), ExitStack() as stack:
            at_live = [stack.enter_context(loss.holding(live)) for loss in losses]
            for scale in points:
                for loss in at_live:
                    for name, tensor in live.items():
                        tensor.copy_(scale * params[name])
                    held.append(float(loss()))
        for scale in points:
            at = {name: scale * p for name, p in params.items()}
            called += [float(loss(at)) for loss in losses]
    return held, called


@pytest.mark.parametrize("name", ["classifier", "gan", "autoencoder", "transformer"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_held_losses_are_those_of_single_calls(name, mode):
    module, loader = MODULES[name]()
    trainer = trainer_for(module)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = sorted(vars(module)), public_state(module), rng_state()
    batches = list(itertools.islice(loader, 2))
    held, called = held_and_called(module, batches, [1.0, 0.5, 1.0], mode=mode)
    assert held == called
    assert len(set(held)) == 4  # two batches at two points
    assert_same(before, {k: v.clone() for k, v in module.state_dict().items()})
    assert_same(state[1], public_state(module))
    assert [k for k in vars(module) if k not in state[0]] in ([], ["_trainer"])
    assert module.trainer is not trainer


def test_a_held_step_starts_from_the_same_state_each_time():
    class Changes(Plain):
        """Writes into its parameters, a frozen one, buffers, attributes, and adds a parameter."""

        def __init__(self):
            super().__init__()
            self.target = nn.Linear(3, 1).requires_grad_(False)
            self.norm = nn.BatchNorm1d(1)
            self.calls, self.seen = 0, [0]

        def training_step(self, batch):
            loss = (self.norm(self.net(batch)) - self.target(batch)).square().sum()
            loss = loss + self.calls + self.seen[-1] + torch.rand(())
            batch.zero_()
            self.calls += 1
            self.seen.append(1)
            with torch.no_grad():
                self.target.bias.add_(1)
                self.norm.running_mean.add_(1)
            self.net.weight.data = self.net.weight.data.clamp(-0.01, 0.01)
            self.norm.weight = nn.Parameter(torch.zeros(1))
            return loss

    batches = [torch.ones(4, 3), torch.rand(4, 3)]
    held, called = held_and_called(Changes(), batches, [1.0, 2.0, 1.0])
    assert held == called
    assert held[:2] == held[4:] != held[2:4]


def test_a_held_step_that_raises_leaves_nothing():
    def step(self, batch):
        self.net.weight.data.zero_()
        raise KeyError("broken step")

    module = Plain(step)
    weight = module.net.weight
    before = weight.detach().clone()
    with pytest.raises(KeyError, match="broken step"):
        held_and_called(module, [torch.ones(4, 3)], [1.0])
    assert module.net.weight is weight
    assert torch.equal(weight, before)
    with Probe(trainer_for(module), module) as probe:
        loss = probe.loss_fn(torch.ones(4, 3))
        live, other = (
            {k: p.clone() for k, p in probe.parameters(["net.weight"]).items()} for _ in range(2)
        )
        with loss.holding(live), pytest.raises(RuntimeError, match="at the same tensors"):
            loss.holding(other).__enter__()
        with loss.holding(other):  # is free again
            pass
