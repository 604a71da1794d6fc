"""Conditions on metrics: pure, strict, and refused where they could never hold."""

import math

import pytest
import torch

from lightning_optkit.methods.triggers import AccuracyAbove, ErrorBelow


@pytest.mark.parametrize("number", [float, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_they_hold_beyond_the_value_not_at_it(number):
    for value, below, above in ((0.79, True, False), (0.8, False, False), (0.81, False, True)):
        metrics = {"other": 0.5, "metric": number(value)}
        assert ErrorBelow("metric", 0.8)(metrics) is below
        assert AccuracyAbove("metric", 0.8)(metrics) is above


@pytest.mark.parametrize("condition", [ErrorBelow, AccuracyAbove])
def test_what_is_no_number_is_neither_below_nor_above(condition):
    assert condition("metric", 0.5)({"metric": math.nan}) is False


@pytest.mark.parametrize("condition", [ErrorBelow, AccuracyAbove])
def test_a_metric_that_is_not_there_is_named(condition):
    with pytest.raises(KeyError, match="metric"):
        condition("metric", 0.5)({"other": 1.0})


@pytest.mark.parametrize("condition", [ErrorBelow, AccuracyAbove])
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((0.8, "metric"), TypeError, "metric"),
        (("metric", "0.8"), TypeError, "value"),
        (("metric", True), TypeError, "value"),
        (("metric", math.nan), ValueError, "value"),
        (("metric", math.inf), ValueError, "value"),
    ],
)
def test_what_could_never_hold_is_refused(condition, arguments, error, name):
    with pytest.raises(error, match=f"`{name}` must be"):
        condition(*arguments)


def test_they_say_what_they_are():
    assert repr(ErrorBelow("train_error", 0.8)) == "ErrorBelow(metric='train_error', value=0.8)"
    assert str(ErrorBelow("train_error", 0.8)) == "train_error < 0.8"
    assert str(AccuracyAbove("train_acc", 0.2)) == "train_acc > 0.2"
    assert ErrorBelow("a", 1) == ErrorBelow("a", 1) != ErrorBelow("a", 2)
