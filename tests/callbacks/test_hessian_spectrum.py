"""HessianSpectrum in a real Trainer."""

from __future__ import annotations

import pytest

from lightning_optkit import HessianSpectrum
from tests.contracts import assert_observer
from tests.modules import MODULES


def every_step(**options) -> HessianSpectrum:
    defaults = {"every_n_epochs": None, "every_n_steps": 1, "max_overhead": None, "num_batches": 2}
    return HessianSpectrum(**defaults | {"num_matvecs": 4, "num_probes": 1} | options)


@pytest.mark.parametrize("module_name", MODULES)
def test_training_is_bit_identical(module_name, tmp_path):
    assert_observer(every_step, module_name, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
    ],
)
def test_training_is_bit_identical_under(options, tmp_path):
    assert_observer(every_step, "classifier", tmp_path, **options)


def test_training_is_bit_identical_in_train_mode(tmp_path):
    assert_observer(lambda: every_step(mode="train"), "classifier", tmp_path)
