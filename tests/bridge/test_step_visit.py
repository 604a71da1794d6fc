"""The parameters before a step and after it, with optimizers that are stepped by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_optkit.bridge.optimizer_steps import RateInStep
from lightning_optkit.bridge.step_visit import StepVisit, gradient_scale
from tests.contracts import assert_same


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()

    def set_gradients(self, value=1.0):
        for parameter in self.parameters():
            parameter.grad = torch.full_like(parameter, value)


def trainer_of(*optimizers, scaler=None):
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all=True: decision)
    return SimpleNamespace(
        optimizers=list(optimizers),
        precision_plugin=SimpleNamespace(scaler=scaler),
        strategy=strategy,
    )


def gradients(parameters, scale):
    return {name: p.grad.clone() / scale for name, p in parameters.items()}


def changes(optimizer, parameters, copies):
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return {name: p.detach() - copies[name] for name, p in parameters.items()} | {"rates": rates}


def visit_of(before=gradients, after=changes, is_chosen=lambda name: True):
    return StepVisit(before, after, is_chosen=is_chosen)


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1} | options)


def test_a_step_is_met_before_and_after():
    net = Net()
    optimizer = sgd(net)
    trainer, visit = trainer_of(optimizer), visit_of()
    visit.start(trainer, net)
    assert not visit.is_complete
    assert visit.found == []
    net.set_gradients(2.0)
    visit.before_step(trainer, optimizer)
    optimizer.step()
    net.set_gradients(7.0)  # what comes later is nothing to it
    visit.after_batch(trainer)
    assert visit.is_complete
    ((before, after),) = visit.found
    names = [name for name, _ in net.named_parameters()]
    assert list(before) == names
    assert all(bool((gradient == 2.0).all()) for gradient in before.values())
    assert after.pop("rates") == [0.1]
    for change in after.values():
        torch.testing.assert_close(change, torch.full_like(change, -0.2))


def test_only_what_is_chosen_and_trained_is_met():
    net, stranger = Net(), nn.Parameter(torch.ones(1))
    net.first.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([*net.parameters(), stranger], lr=0.1)
    visit = visit_of(is_chosen=lambda name: "bias" in name or name.startswith("first"))
    trainer = trainer_of(optimizer)
    visit.start(trainer, net)
    assert list(visit.parameters(optimizer)) == ["first.weight", "second.bias"]
    none = visit_of(is_chosen=lambda name: False)
    none.start(trainer, net)
    assert none.is_complete


def test_nothing_is_left_behind_and_no_bit_changes():
    nets = [Net(), Net()]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]
    trainer, visit = trainer_of(optimizers[1]), visit_of()
    for step in range(3):
        visit.start(trainer, nets[1])
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.set_gradients(step + 1.0)
            if net is nets[1]:
                visit.before_step(trainer, optimizer)
            optimizer.step()
        visit.after_batch(trainer)
    assert_same(nets[0].state_dict(), nets[1].state_dict())
    assert_same(optimizers[0].state_dict(), optimizers[1].state_dict())
    assert vars(optimizers[0]).keys() == vars(optimizers[1]).keys()
    assert not optimizers[1]._optimizer_step_post_hooks
    assert not visit._visits  # nor copies


def test_the_first_of_several_steps_in_a_batch_is_met():
    net = Net()
    optimizer = sgd(net)
    trainer, visit = trainer_of(optimizer), visit_of()
    visit.start(trainer, net)
    for step in range(3):
        net.set_gradients(step + 1.0)
        visit.before_step(trainer, optimizer)
        optimizer.step()
    visit.after_batch(trainer)
    ((before, after),) = visit.found
    assert float(before["first.bias"][0]) == 1.0
    assert float(after["first.bias"][0]) == pytest.approx(-0.1)
    visit.before_step(trainer, optimizer)  # its turn is over
    assert not visit._visits


def test_each_optimizer_is_waited_for():
    net = Net()
    optimizers = [sgd(net.first), sgd(net.second, lr=0.2)]
    trainer, visit = trainer_of(*optimizers), visit_of()
    visit.start(trainer, net)
    for optimizer, complete in zip(reversed(optimizers), (False, True), strict=True):
        net.set_gradients()
        visit.before_step(trainer, optimizer)
        optimizer.step()
        visit.after_batch(trainer)
        assert visit.is_complete is complete
    assert [list(before) for before, _ in visit.found] == [
        ["first.weight", "first.bias"],
        ["second.weight", "second.bias"],
    ]
    assert [after["rates"] for _, after in visit.found] == [[0.1], [0.2]]
    visit.before_step(trainer, sgd(net))  # of nobody
    visit.start(trainer, net)
    assert visit.found == []


def test_the_rate_is_that_which_was_used():
    net = Net()
    optimizer = sgd(net)
    trainer, visit = trainer_of(optimizer), visit_of()
    rule = RateInStep(lambda optimizer, group, rate: rate / 4)
    rule.attach(trainer)
    visit.start(trainer, net)
    net.set_gradients()
    visit.before_step(trainer, optimizer)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 9.0  # a scheduler moves on
    visit.after_batch(trainer)
    rule.detach()
    assert visit.found[0][1]["rates"] == [0.025]


class Twice(torch.optim.SGD):
    """Calls ``super().step()``, for which torch runs hooks too, and goes on."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(1.0)


class Hookless(torch.optim.SGD):
    """Runs no hooks, as optimizers that wrap others may."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.step = self.plain_step

    def plain_step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(0.1 * parameter.grad)


@pytest.mark.parametrize(("kind", "change"), [(Twice, -1.1), (Hookless, -0.1)])
def test_optimizers_with_hooks_that_run_twice_or_not_at_all(kind, change):
    net = Net()
    optimizer = kind(net.parameters()) if kind is Hookless else kind(net.parameters(), lr=0.1)
    trainer, visit = trainer_of(optimizer), visit_of()
    visit.start(trainer, net)
    net.set_gradients()
    visit.before_step(trainer, optimizer)
    optimizer.step()
    visit.after_batch(trainer)
    assert float(visit.found[0][1]["first.bias"][0]) == pytest.approx(change)


def test_a_step_that_was_not_made_is_none_and_the_next_is_met_instead():
    net = Net()
    optimizer = sgd(net)
    trainer, visit = trainer_of(optimizer), visit_of()
    visit.start(trainer, net)
    for value, is_made in ((1.0, False), (2.0, False), (None, False), (3.0, True)):
        net.set_gradients(value or 0.0)
        if value is None:  # a training step that skips the batch; torch steps over such parameters
            optimizer.zero_grad()
        visit.before_step(trainer, optimizer)
        if is_made or value is None:
            optimizer.step()
        visit.after_batch(trainer)
        assert visit.is_complete is is_made
    assert float(visit.found[0][0]["first.bias"][0]) == 3.0


def test_a_step_with_a_rate_of_zero_is_one():
    net = Net()
    optimizer = sgd(net, lr=0.0)
    trainer, visit = trainer_of(optimizer), visit_of()
    visit.start(trainer, net)
    net.set_gradients()
    visit.before_step(trainer, optimizer)
    optimizer.step()
    visit.after_batch(trainer)
    assert float(visit.found[0][1]["first.bias"].abs().max()) == 0.0


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_and_gradients_that_it_scales(fused):
    net = Net().float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer, visit = trainer_of(optimizer, scaler=scaler), visit_of()
    visit.start(trainer, net)
    for factor in (float("inf"), 3.0):
        optimizer.zero_grad()
        scaler.scale(factor * net.first.bias.sum() + 0 * net.second.bias.sum()).backward()
        for parameter in net.parameters():
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        assert gradient_scale(trainer) == scaler.get_scale()
        if not fused:  # as Lightning does before its hook
            scaler.unscale_(optimizer)
        visit.before_step(trainer, optimizer)
        scaler.step(optimizer)
        scaler.update()
        visit.after_batch(trainer)
        assert visit.is_complete is (factor == 3.0)
    ((before, after),) = visit.found
    assert before["first.bias"].tolist() == [3.0, 3.0]
    assert after["first.bias"].tolist() == pytest.approx([-0.3, -0.3])


def test_without_a_scaler_nothing_is_scaled():
    optimizer = sgd(Net())
    off = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=False)
    for trainer in (trainer_of(optimizer), trainer_of(optimizer, scaler=off)):
        assert gradient_scale(trainer) == gradient_scale(trainer, optimizer) == 1.0


def test_closures_that_are_called_again_are_one_step():
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=5)
    trainer, visit, values = trainer_of(optimizer), visit_of(), []

    def closure():
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in net.parameters())
        loss.backward()
        visit.before_step(trainer, optimizer)
        values.append(net.first.bias.grad.clone())
        return loss

    visit.start(trainer, net)
    start = net.first.bias.detach().clone()
    optimizer.step(closure)
    end = net.first.bias.detach().clone()
    net.first.bias.data.add_(1.0)  # what comes later is no part of the step
    visit.after_batch(trainer)
    assert len(values) > 2
    ((before, after),) = visit.found
    assert torch.equal(before["first.bias"], values[0])
    assert torch.equal(after["first.bias"], end - start)


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_function_that_fails_is_heard_of_after_the_batch_and_not_again(at):
    def fails(*_):
        raise KeyError(at)

    net = Net()
    optimizer = sgd(net)
    trainer, visit = trainer_of(optimizer), visit_of(**{at: fails})
    visit.start(trainer, net)
    net.set_gradients()
    visit.before_step(trainer, optimizer)
    optimizer.step()
    with pytest.raises(KeyError, match=at):
        visit.after_batch(trainer)
    assert not optimizer._optimizer_step_post_hooks
    assert visit.is_complete
    assert visit.found == []


def test_it_leaves_when_it_is_closed():
    net = Net()
    optimizer = sgd(net)
    trainer, visit = trainer_of(optimizer), visit_of()
    visit.start(trainer, net)
    net.set_gradients()
    visit.before_step(trainer, optimizer)
    assert optimizer._optimizer_step_post_hooks
    visit.close()
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
    visit.after_batch(trainer)
    assert visit.found == []
