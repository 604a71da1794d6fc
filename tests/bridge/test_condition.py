"""Conditions on the metrics of a Trainer; two processes are in `test_lr_warmup_ddp.py`."""

from types import SimpleNamespace

import pytest
import torch

from lightning_optkit import AccuracyAbove, ErrorBelow
from lightning_optkit.bridge.condition import Condition


def trainer_of(**metrics):
    return SimpleNamespace(
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_it_reads_what_is_logged_now():
    condition = Condition(ErrorBelow("error", 0.8))
    for value, holds in ((0.9, False), (0.7, True), (0.8, False)):
        assert condition.holds(trainer_of(error=value, other=0.1)) is holds
        assert condition.missing is None


def test_it_names_the_metric_that_is_missing_and_goes_on():
    condition = Condition(AccuracyAbove("accuracy", 0.2))
    assert not condition.holds(trainer_of(loss=1.0))
    assert condition.missing == "accuracy"
    assert condition.holds(trainer_of(accuracy=0.3))
    assert condition.missing is None


def test_any_function_of_metrics_is_one():
    seen = []

    def both(metrics):
        seen.append((sorted(metrics), len(metrics), metrics.get("c", 7.0), "a" in metrics))
        return metrics["a"] < metrics["b"]

    assert Condition(both).holds(trainer_of(a=1.0, b=2.0)) is True
    assert seen == [(["a", "b"], 2, 7.0, True)]
    assert isinstance(Condition(lambda m: torch.tensor(1)).holds(trainer_of()), bool)


def test_a_mistake_in_it_is_not_taken_for_a_missing_metric():
    with pytest.raises(KeyError, match="own"):
        Condition(lambda metrics: {}["own"]).holds(trainer_of(a=1.0))
