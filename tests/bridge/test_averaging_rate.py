"""The learning rate of an averaging phase, step by step against its closed form."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optkit.bridge.averaging_rate import AveragingRate


class Seen(torch.optim.SGD):
    """Notes the rates that it steps with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([float(group["lr"]) for group in self.param_groups])
        super().step(closure)


def optimizer_of(*lrs):
    return Seen([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs])


def trainer_of(*optimizers):
    return SimpleNamespace(optimizers=list(optimizers))


def stepped(rate, optimizers, epochs):
    """Step all optimizers once at each of these points; return the rates of each."""
    for each in epochs:
        rate.epochs = each
        for optimizer in optimizers:
            optimizer.step()
    return [optimizer.seen for optimizer in optimizers]


def test_before_the_phase_the_schedule_holds():
    optimizer, rate = optimizer_of(0.1, 0.2), AveragingRate(0.01, anneal_epochs=0, cycle=None)
    rate.attach(trainer_of(optimizer))
    assert rate.of_last_step is None
    assert stepped(rate, [optimizer], [None, None]) == [[[0.1, 0.2]] * 2]
    assert rate.of_last_step == 0.1


@pytest.mark.parametrize("anneal_epochs", [0, 0.5, 2, 3.5])
@pytest.mark.parametrize("lr", [0.0, 0.01, 0.4], ids=str)
def test_it_goes_over_along_half_a_cosine(anneal_epochs, lr):
    optimizer = optimizer_of(0.1, 0.2)
    rate = AveragingRate(lr, anneal_epochs=anneal_epochs, cycle=None)
    rate.attach(trainer_of(optimizer))
    epochs = [i / 4 for i in range(1, 20)]
    (found,) = stepped(rate, [optimizer], epochs)
    for t, (first, second) in zip(epochs, found, strict=True):
        angle = math.pi * min(t / anneal_epochs, 1) if anneal_epochs else math.pi
        share = math.sin(angle / 2) ** 2
        assert first == pytest.approx(0.1 + share * (lr - 0.1), abs=1e-15)
        assert second == pytest.approx(0.2 + share * (lr - 0.2), abs=1e-15)
    assert found[-1] == [lr, lr]  # without rounding
    assert rate.of_last_step == lr
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_it_falls_along_a_line_in_each_cycle(cycle):
    optimizer, rate = optimizer_of(0.1), AveragingRate(0.02, anneal_epochs=99, cycle=cycle)
    rate.attach(trainer_of(optimizer))
    length = 4 * cycle  # in steps
    (found,) = stepped(rate, [optimizer], [i / 4 for i in range(1, 3 * length + 1)])
    line = [0.1 - 0.08 * (i + 1) / length for i in range(length)]
    assert [group for (group,) in found] == pytest.approx(line * 3, abs=1e-15)
    assert [found[i * length - 1] for i in (1, 2, 3)] == [[0.02]] * 3


def test_it_follows_the_schedule_on_the_way():
    optimizer, rate = optimizer_of(0.1), AveragingRate(0.02, anneal_epochs=2, cycle=None)
    rate.attach(trainer_of(optimizer))
    stepped(rate, [optimizer], [1.0])
    optimizer.param_groups[0]["lr"] = 0.5
    stepped(rate, [optimizer], [1.0, 2.0])
    assert [group for (group,) in optimizer.seen] == pytest.approx([0.06, 0.26, 0.02], abs=1e-15)


def test_each_group_of_all_optimizers_has_its_own():
    optimizers = [optimizer_of(0.1, 0.2), optimizer_of(0.3)]
    rate = AveragingRate([0.01, 0.02, 0.03], anneal_epochs=2, cycle=None)
    rate.attach(trainer_of(*optimizers))
    first, second = stepped(rate, optimizers, [1.0, 5.0])
    assert first[0] == pytest.approx([0.055, 0.11], abs=1e-15)
    assert second[0] == pytest.approx([0.165], abs=1e-15)
    assert (first[1], second[1]) == ([0.01, 0.02], [0.03])


@pytest.mark.parametrize("to", [0, 1])
def test_a_group_that_is_added_later_keeps_the_schedule_and_moves_no_other(to):
    """Also where it comes before groups of another optimizer."""
    optimizers = [optimizer_of(0.1, 0.2), optimizer_of(0.3)]
    rate = AveragingRate([0.01, 0.02, 0.03], anneal_epochs=0, cycle=None)
    rate.attach(trainer_of(*optimizers))
    optimizers[to].add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
    expected = [[0.01, 0.02], [0.03]]
    expected[to].append(0.7)
    assert stepped(rate, optimizers, [1.0]) == [[each] for each in expected]


def test_a_group_that_is_added_later_has_the_one_number():
    for lr in (0.01, [0.01]):
        optimizer, rate = optimizer_of(0.1), AveragingRate(lr, anneal_epochs=0, cycle=None)
        rate.attach(trainer_of(optimizer))
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
        assert stepped(rate, [optimizer], [1.0]) == [[[0.01, 0.01]]]


def test_it_leaves_and_comes_again():
    optimizer, rate = optimizer_of(0.1), AveragingRate([0.01], anneal_epochs=0, cycle=None)
    trainer = trainer_of(optimizer)
    for _ in range(2):
        rate.attach(trainer)
        rate.attach(trainer)  # once more counts once
        stepped(rate, [optimizer], [1.0])
        rate.detach()
        rate.detach()
        assert "step" not in vars(optimizer)
        stepped(rate, [optimizer], [1.0])
    assert optimizer.seen == [[0.01], [0.1]] * 2
    other = optimizer_of(0.1, 0.2)
    with pytest.raises(MisconfigurationException):
        AveragingRate([0.01] * 3, anneal_epochs=0, cycle=None).attach(trainer_of(other))
    assert "step" not in vars(other)


def test_groups_of_an_earlier_run_are_forgotten():
    first, second = optimizer_of(0.1, 0.2), [optimizer_of(0.1), optimizer_of(0.2)]
    rate = AveragingRate([0.01, 0.02], anneal_epochs=0, cycle=None)
    rate.attach(trainer_of(first))
    rate.detach()
    rate.attach(trainer_of(*second))
    second[0].add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
    assert stepped(rate, second, [1.0]) == [[[0.01, 0.7]], [[0.02]]]


def test_it_can_be_pickled_when_it_has_left():
    optimizer, rate = optimizer_of(0.1), AveragingRate([0.01], anneal_epochs=2, cycle=None)
    rate.attach(trainer_of(optimizer))
    stepped(rate, [optimizer], [1.0])
    rate.detach()
    copy, another = pickle.loads(pickle.dumps(rate)), optimizer_of(0.1)
    copy.attach(trainer_of(another))
    assert stepped(copy, [another], [1.0]) == [optimizer.seen]


@pytest.mark.parametrize("lr", [-0.1, math.nan, True, "0.1", [], [0.1, -0.1], [0.1, None], None])
def test_what_is_no_rate_is_refused(lr):
    with pytest.raises(ValueError, match="`lr` must be a number of at least 0, or a list of one"):
        AveragingRate(lr, anneal_epochs=0, cycle=None)


@pytest.mark.parametrize(("num_rates", "num_groups"), [(2, 1), (2, 3), (3, 2)])
def test_another_number_of_rates_than_groups_is_refused(num_rates, num_groups):
    rate = AveragingRate([0.1] * num_rates, anneal_epochs=0, cycle=None)
    text = f"one for each of the {num_groups} parameter groups, got {num_rates}"
    with pytest.raises(MisconfigurationException, match=text):
        rate.attach(trainer_of(optimizer_of(*[0.1] * num_groups)))
