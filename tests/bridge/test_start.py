"""When an averaging phase begins."""

import re
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.start import Start

tried = settings(derandomize=True, deadline=None, print_blob=True, database=None)


def trainer(max_epochs: int | None = None, max_steps: int = -1) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def at(epoch: int = 0, step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(current_epoch=epoch, global_step=step)


def first_epoch(start: Start, end: int = 2000) -> int:
    return next(epoch for epoch in range(end) if start.is_reached(at(epoch)))


def first_step(start: Start, end: int = 20_000) -> int:
    return next(step for step in range(end) if start.is_reached(at(0, step)))


@pytest.mark.parametrize(
    ("share", "epochs", "first"),
    [
        (0.0, 10, 0),
        (0, 10, 0),
        (0.75, 40, 30),
        (0.75, 10, 7),
        (0.75, 1, 0),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (0.58, 100, 58),
        (0.7, 10, 7),
        (0.999, 1000, 999),
        (np.float64(0.75), 8, 6),
    ],
)
def test_a_share_of_epochs(share, epochs, first):
    start = Start(share)
    start.resolve(trainer(epochs))
    assert first_epoch(start) == first
    assert not start.is_reached(at(first - 1, 10**9))


@tried
@given(st.integers(1, 500), st.data())
def test_a_share_that_is_a_whole_number_of_epochs_is_that_one(epochs, data):
    first = data.draw(st.integers(0, epochs - 1))
    start = Start(first / epochs)
    start.resolve(SimpleNamespace(fast_dev_run=False, max_epochs=epochs, max_steps=-1))
    assert first_epoch(start) == first


@tried
@given(st.floats(0, 1, exclude_max=True).filter(lambda x: x < 1 - 1e-6), st.integers(1, 1000))
def test_a_share_lies_in_the_epoch_in_which_it_is_reached(share, epochs):
    start = Start(share)
    start.resolve(SimpleNamespace(fast_dev_run=False, max_epochs=epochs, max_steps=-1))
    first = first_epoch(start)
    assert 0 <= first < epochs
    assert first <= share * epochs + 1e-8
    assert share * epochs < first + 1


def test_a_share_of_steps():
    start = Start(0.29)
    start.resolve(trainer(-1, max_steps=100))
    assert first_step(start) == 29
    assert not start.is_reached(at(10**6, 28))


def test_a_share_of_both_is_reached_by_the_first():
    start = Start(0.5)
    start.resolve(trainer(10, max_steps=100))
    assert first_epoch(start) == 5
    assert first_step(start) == 50


@pytest.mark.parametrize("when", [3, "3ep", "03ep"])
@pytest.mark.parametrize("options", [{"max_epochs": 4}, {"max_epochs": -1}, {"max_steps": 50}])
def test_an_epoch(when, options):
    start = Start(when)
    start.resolve(trainer(**options))
    assert first_epoch(start) == 3
    assert not start.is_reached(at(2, 10**9))


@pytest.mark.parametrize("when", ["1200st", "1_200st"])
@pytest.mark.parametrize("options", [{"max_steps": 1201}, {"max_epochs": -1}, {"max_epochs": 5}])
def test_a_step(when, options):
    start = Start(when)
    start.resolve(trainer(**options))
    assert first_step(start) == 1200
    assert not start.is_reached(at(10**6, 1199))


@pytest.mark.parametrize("when", [0, 0.0, "0ep", "0st"])
def test_from_the_very_beginning(when):
    start = Start(when)
    start.resolve(trainer(1, max_steps=1))
    assert start.is_reached(at(0, 0))


def test_a_share_is_held_against_each_run_anew():
    start = Start(0.5)
    start.resolve(trainer(10))
    start.resolve(trainer(100))
    assert first_epoch(start) == 50
    start.resolve(trainer(-1, max_steps=8))
    assert first_step(start) == 4
    assert not start.is_reached(at(10**6, 0))


ENDLESS = "`start` must be an epoch or a step where training has no end, got the share 0.75. Write"


@pytest.mark.parametrize("share", [0.75, 0.01])
def test_a_share_of_a_run_without_an_end_is_refused(share):
    message = re.escape(ENDLESS.replace("0.75", str(share)))
    with pytest.raises(MisconfigurationException, match=message):
        Start(share).resolve(trainer(-1))


@pytest.mark.parametrize(
    ("when", "options", "end"),
    [
        (10, {"max_epochs": 10}, 10),
        ("11ep", {"max_epochs": 10}, 10),
        ("50st", {"max_steps": 50}, 50),
        (0, {"max_epochs": 0}, 0),
        (0.75, {"max_epochs": 0}, 0),
        ("0st", {"max_steps": 0}, 0),
    ],
)
def test_a_start_after_the_end_is_refused(when, options, end):
    message = f"`start` must lie before the end of training, at {end}, got {when!r}. Write an"
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        Start(when).resolve(trainer(**options))


RULE = (
    "`start` must be a share of the run in [0, 1), an epoch, or a string such as '120ep' or "
    "'5000st', got {!r}."
)


MISSPELT = ["", "ep", "12", "-1ep", "1.5ep", "12 ep", "12ep ", "_1ep", "12EP", "75%", "12ep\n"]


@pytest.mark.parametrize(
    "when",
    [1.0, -0.1, 1.5, float("nan"), float("inf"), -1, -5, *MISSPELT],
)
def test_values_out_of_range_are_refused(when):
    with pytest.raises(ValueError, match=re.escape(RULE.format(when))):
        Start(when)


@pytest.mark.parametrize("when", [True, False, None, [3], b"3ep", 1j, np.int64(3)])
def test_other_types_are_refused(when):
    with pytest.raises(TypeError, match=re.escape(RULE.format(when))):
        Start(when)


@pytest.mark.parametrize("when", [0.75, 30, "120ep", "5000st"])
def test_a_trial_run_of_one_batch_begins_at_once_and_a_real_one_after_it_when_it_should(when):
    start = Start(when)
    start.resolve(pl.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False))
    assert start.is_reached(at())
    start.resolve(trainer(200, 10_000))
    assert not start.is_reached(at())
