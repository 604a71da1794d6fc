"""The one place around a training step: who stands where, who goes past, and that all leave."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_optkit.bridge.interceptor import ROLES, StepInterceptor
from lightning_optkit.bridge.probe import probing


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch, batch_idx))
        return batch * 10

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


class WithoutIndex(Net):
    def training_step(self, batch):
        self.seen.append(batch)
        return batch * 10


class WithLoader(Net):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return super().training_step(batch, batch_idx)


class Fetching(Net):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


def training(module, *, is_training=True):
    module._trainer = SimpleNamespace(training=is_training)
    return module


def adding(number, **role):
    """Return an interceptor that adds to the batch, and to what comes of it."""
    return StepInterceptor(lambda step, batch: step(batch + number) + number, **role)


def passes(number):
    return adding(number, role="passes")


def mixing(number):
    return adding(number, role="mixing")


def test_it_takes_the_place_of_the_step_and_gives_it_back():
    module = training(Net())
    interceptor = mixing(1)
    interceptor.attach(module)
    assert module.training_step(5, 3) == 61
    assert module.training_step(batch=5, batch_idx=3) == 61
    assert module.training_step(5, batch_idx=3) == 61
    assert module.seen == [(6, 3)] * 3
    interceptor.detach()
    interceptor.detach()  # once more does nothing
    assert "training_step" not in vars(module)
    assert module.training_step(5, 3) == 50


def test_the_batch_may_have_any_name():
    class Other(Net):
        def training_step(self, data, index):
            return data * 10

    module = training(Other())
    mixing(1).attach(module)
    assert module.training_step(data=5, index=3) == 61


@pytest.mark.parametrize("order", [0, 1])
def test_the_order_is_that_of_roles_whoever_comes_first(order):
    module, seen = training(Net()), []

    def noting(role):
        def around(step, batch):
            seen.append(role)
            return step(batch)

        return StepInterceptor(around, role=role)

    assert ROLES == ("passes", "mixing")
    both = [noting(role) for role in ROLES]
    for interceptor in both[:: -1 if order else 1]:
        interceptor.attach(module)
    module.training_step(1, 0)
    assert seen == ["passes", "mixing"]
    both[order].detach()
    module.training_step(1, 0)
    assert seen[2:] == [ROLES[1 - order]]
    both[1 - order].detach()
    assert "training_step" not in vars(module)


def test_several_calls_of_the_step_each_pass_through_those_within():
    module = training(Net())
    StepInterceptor(lambda step, batch: step(batch) + step(batch), role="passes").attach(module)
    mixing(1).attach(module)
    assert module.training_step(5, 0) == 122


def test_two_of_a_role_are_refused_and_the_first_stays():
    module = training(Net())
    mixing(1).attach(module)
    with pytest.raises(MisconfigurationException, match=r"one callback for mixing.*`MixupOr"):
        mixing(2).attach(module)
    assert module.training_step(5, 0) == 61
    with pytest.raises(ValueError, match="`role` must be one of 'passes', 'mixing', got 'other'"):
        adding(1, role="other")


def test_one_that_is_attached_again_stands_there_once():
    module, other = training(Net()), training(Net())
    interceptor = mixing(1)
    for _ in range(2):
        interceptor.attach(module)
    assert module.training_step(5, 0) == 61
    interceptor.attach(other)
    assert "training_step" not in vars(module)
    assert other.training_step(5, 0) == 61


def test_validation_and_measurements_go_past_it():
    module = training(Net(), is_training=False)
    mixing(1).attach(module)
    assert module.validation_step(5, 0) == 50
    assert module.training_step(5, 0) == 50
    training(module)
    with probing():
        assert module.training_step(5, 0) == 50
    assert module.training_step(5, 0) == 61
    module._trainer = None
    assert module.training_step(5, 0) == 50


@pytest.mark.parametrize("make", [Net, WithoutIndex, WithLoader])
def test_lightning_sees_the_signature_of_the_user(make):
    module, plain = training(make()), make()
    mixing(1).attach(module)
    for param, options in (
        ("batch_idx", {"min_args": 2}),
        ("dataloader_idx", {}),
        ("dataloader_iter", {"explicit": True}),
    ):
        expected = is_param_in_hook_signature(plain.training_step, param, **options)
        assert is_param_in_hook_signature(module.training_step, param, **options) == expected
    assert is_overridden("training_step", module)
    assert module.training_step.__name__ == "training_step"


def test_steps_that_fetch_their_batches_are_refused():
    module = training(Fetching())
    with pytest.raises(MisconfigurationException, match="one that takes `dataloader_iter`"):
        mixing(1).attach(module)
    assert "training_step" not in vars(module)


def test_a_copy_runs_its_own_step():
    module = training(Net())
    mixing(1).attach(module)
    module._trainer = None
    duplicate = copy.deepcopy(module)
    assert duplicate.training_step(5, 0) == 50
    assert (module.seen, duplicate.seen) == ([], [(5, 0)])
    training(duplicate)
    assert duplicate.training_step(5, 0) == 50  # also while it trains
    interceptor = mixing(2)
    interceptor.attach(duplicate)
    assert duplicate.training_step(5, 0) == 72
    assert training(module).training_step(5, 0) == 61
    interceptor.detach()
    assert duplicate.training_step(5, 0) == 50
    assert module.seen == [(6, 0)]


def test_a_step_that_someone_put_on_the_instance_is_kept():
    module = training(Net())
    module.training_step = lambda batch, batch_idx: batch + 100
    interceptor = mixing(1)
    interceptor.attach(module)
    assert module.training_step(5, 0) == 107
    interceptor.detach()
    assert module.training_step(5, 0) == 105


def test_a_step_that_someone_wrapped_since_does_nothing_more():
    module = training(Net())
    interceptor = mixing(1)
    interceptor.attach(module)
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: inner(batch, batch_idx) + 1000
    interceptor.detach()
    assert module.training_step(5, 0) == 1050
    again = mixing(2)
    again.attach(module)
    assert module.training_step(5, 0) == 1072
    again.detach()
    assert module.training_step(5, 0) == 1050


def test_a_step_that_raises_leaves_it_in_place():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no")

    module = training(Fails())
    interceptor = mixing(1)
    interceptor.attach(module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            module.training_step(5, 0)
    interceptor.detach()
    assert "training_step" not in vars(module)


def test_a_compiled_step_is_called_and_put_back():
    module = training(Net())
    module.training_step = torch.compile(module.training_step, backend="eager")
    compiled = module.training_step
    interceptor = mixing(1)
    interceptor.attach(module)
    assert module.training_step(torch.tensor(5.0), 0) == 61
    interceptor.detach()
    assert module.training_step is compiled
