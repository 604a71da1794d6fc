"""Names of rates, as LearningRateMonitor has them, and the monitor made true."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from lightning_optkit.bridge.effective_rates import EffectiveRates, group_names, optimizer_names
from lightning_optkit.bridge.optimizer_steps import RateInStep


def of(kind, *names, lr=0.1):
    """Return an optimizer with a group for each name; `None` = without one."""
    groups = [{"params": [nn.Parameter(torch.ones(1))]} for _ in names or [None]]
    for group, name in zip(groups, names, strict=False):
        group |= {} if name is None else {"name": name}
    return kind(groups, lr=lr)


def trainer_of(*optimizers, callbacks=(), scheduled=(), names=()):
    """Return what stands for a Trainer; `scheduled` are indices of optimizers."""
    configs = [
        LRSchedulerConfig(ExponentialLR(optimizers[i], 0.5), name=name)
        for i, name in zip(scheduled, names or [None] * len(scheduled), strict=True)
    ]
    return SimpleNamespace(
        optimizers=list(optimizers),
        lr_scheduler_configs=configs,
        callbacks=list(callbacks),
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: None)],
        callback_metrics={},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        _logger_connector=SimpleNamespace(should_update_logs=True),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )


SGD, Adam = torch.optim.SGD, torch.optim.Adam

CASES = {
    "one": ([of(SGD)], {}),
    "groups": ([of(SGD, None, None)], {}),
    "named groups": ([of(SGD, "body", None, "head")], {}),
    "one named group": ([of(SGD, "body")], {}),
    "several": ([of(Adam), of(SGD), of(Adam, None, None), of(Adam)], {}),
    "scheduled first": ([of(Adam), of(SGD), of(Adam)], {"scheduled": [2]}),
    "all scheduled": ([of(Adam), of(Adam)], {"scheduled": [1, 0]}),
    "named": ([of(Adam), of(Adam)], {"scheduled": [0], "names": ["generator"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_names_are_those_of_the_monitor(case):
    optimizers, options = CASES[case]
    trainer, monitor = trainer_of(*optimizers, **options), LearningRateMonitor()
    monitor.on_train_start(trainer)
    names = [name for of_one in group_names(trainer) for name in of_one]
    assert sorted(names) == sorted(name.removeprefix("lr-") for name in monitor.lrs)
    for rate, optimizer in enumerate(optimizers):  # and each for the same group
        for group in optimizer.param_groups:
            group["lr"] = 1.0 + rate
    seen = monitor._extract_stats(trainer, "any")
    for i, of_one in enumerate(group_names(trainer)):
        for name in of_one:
            assert seen.get(name, seen.get(f"lr-{name}")) == 1.0 + i
            assert name.startswith(optimizer_names(trainer)[i])


def test_groups_of_one_name_are_numbered():
    """Which the monitor refuses."""
    assert group_names(trainer_of(of(SGD, "a", "a"))) == [["SGD/pg1", "SGD/pg2"]]


def ruled(trainer, factor, optimizers=None):
    ruling = RateInStep(lambda i, j, rate: rate * factor)
    rates = EffectiveRates(ruling)
    ruling.attach(trainer, optimizers)
    rates.attach(trainer, optimizers)
    return ruling, rates


def stepped(*optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones(1)
        optimizer.step()


def test_rates_are_those_of_the_last_step():
    first, second = of(SGD, None, None, lr=0.5), of(Adam, lr=0.25)
    trainer = trainer_of(first, second)
    _, rates = ruled(trainer, 0.5)
    assert rates.scalars() == {}
    stepped(first)
    expected = {"optkit-lr/effective/SGD/pg1": 0.25, "optkit-lr/effective/SGD/pg2": 0.25}
    assert rates.scalars() == expected
    stepped(second)
    assert rates.scalars() == expected | {"optkit-lr/effective/Adam": 0.125}
    first.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1.0})  # has no name
    stepped(first)
    assert rates.scalars() == expected | {"optkit-lr/effective/Adam": 0.125}


def test_optimizers_that_are_not_ruled_are_not_reported():
    first, second = of(SGD), of(Adam)
    _, rates = ruled(trainer_of(first, second), 0.5, [1])
    stepped(first, second)
    assert list(rates.scalars()) == ["optkit-lr/effective/Adam"]


def test_two_who_rule_one_optimizer_report_its_rate_once():
    first, second = of(SGD, lr=1.0), of(Adam, lr=1.0)
    trainer = trainer_of(first, second)
    _, half = ruled(trainer, 0.5, [0])
    both, third = ruled(trainer, 0.25)
    stepped(first, second)
    assert half.scalars() == {"optkit-lr/effective/SGD": 0.125}  # the other's factor included
    assert third.scalars() == {"optkit-lr/effective/Adam": 0.25}
    half.detach()
    assert half.scalars() == {}
    third.attach(trainer)  # as in the next run
    assert sorted(third.scalars()) == ["optkit-lr/effective/Adam", "optkit-lr/effective/SGD"]
    third.detach()
    both.detach()


def monitored(monitor, trainer, hook):
    """Return what the monitor reads in this hook."""
    monitor.on_train_start(trainer)
    getattr(monitor, hook)(trainer, None)
    return {name: found[-1] for name, found in monitor.lrs.items() if found}


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_start"])
@pytest.mark.parametrize("leaving", [(0, 1), (1, 0)], ids=str)
def test_the_monitor_reads_the_coming_rates_until_the_last_has_left(hook, leaving):
    first, second, monitor = of(SGD, lr=1.0), of(Adam, lr=1.0), LearningRateMonitor("step")
    monitor.logging_interval = "step" if hook == "on_train_batch_start" else "epoch"
    trainer = trainer_of(first, second, callbacks=[monitor])
    pairs = [ruled(trainer, 0.5, [0]), ruled(trainer, 0.25)]
    assert monitored(monitor, trainer, hook) == {"lr-SGD": 0.125, "lr-Adam": 0.25}
    assert [o.param_groups[0]["lr"] for o in (first, second)] == [1.0, 1.0]
    left = {0: {"lr-SGD": 0.25, "lr-Adam": 0.25}, 1: {"lr-SGD": 0.5, "lr-Adam": 1.0}}
    for number, i in enumerate(leaving):
        ruling, rates = pairs[i]
        rates.detach()
        rates.detach()
        ruling.detach()
        expected = left[i] if number == 0 else {"lr-SGD": 1.0, "lr-Adam": 1.0}
        assert monitored(monitor, trainer, hook) == expected
    assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(monitor))


def test_a_hook_that_others_replaced_is_given_back():
    monitor, calls = LearningRateMonitor("step"), []
    vars(monitor)["on_train_batch_start"] = lambda *_: calls.append(1)
    before = dict(vars(monitor))
    optimizer = of(SGD, lr=1.0)
    trainer = trainer_of(optimizer, callbacks=[monitor])
    ruling, rates = ruled(trainer, 0.5)
    monitor.on_train_batch_start(trainer, None)
    assert calls == [1]
    rates.detach()
    assert vars(monitor) == before

    rates.attach(trainer)
    wrapped = monitor.on_train_batch_start  # by others, in the meantime
    vars(monitor)["on_train_batch_start"] = later = partial(wrapped)
    rates.detach()
    assert vars(monitor)["on_train_batch_start"] is later
    monitor.on_train_batch_start(trainer, None)
    assert calls == [1, 1]
    ruling.detach()
