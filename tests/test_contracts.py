"""The contracts themselves: what is right passes, what is wrong does not."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from tests.contracts import assert_resumes

OPTIONS = [
    {},
    {"precision": "bf16-mixed"},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.1},
    {"limit_train_batches": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("module_name", ["classifier", "autoencoder"])
def test_lightning_alone_resumes(module_name, options, tmp_path):
    assert_resumes(pl.Callback, module_name, tmp_path, **options)


def test_lightning_alone_resumes_manual_optimization(tmp_path):
    assert_resumes(pl.Callback, "gan", tmp_path)


class Shrinks(pl.Callback):
    """Shrinks weights a little more with every batch that it has seen."""

    def __init__(self):
        self.num_batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.num_batches += 1
        with torch.no_grad():
            for p in pl_module.parameters():
                p.mul_(1 - 1e-4 * self.num_batches)


class ShrinksAndRemembers(Shrinks):
    def state_dict(self):
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state_dict):
        self.num_batches = state_dict["num_batches"]


class RemembersTooMuch(ShrinksAndRemembers):
    """Acts alike, and ends in another state."""

    num_starts = 0

    def on_train_start(self, trainer, pl_module):
        self.num_starts += 1

    def state_dict(self):
        return super().state_dict() | {"num_starts": self.num_starts}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.num_starts = state_dict["num_starts"]


class ActsWhenSaved(ShrinksAndRemembers):
    """Counts a batch too many with each checkpoint."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.num_batches += 1


@pytest.mark.parametrize("moment", ["epoch end", "mid-epoch"])
@pytest.mark.parametrize("module_name", ["classifier", "gan"])
def test_an_intervener_that_remembers_passes_and_one_that_forgets_fails(
    module_name, moment, tmp_path
):
    assert_resumes(ShrinksAndRemembers, module_name, tmp_path, at=(moment,))
    with pytest.raises(AssertionError, match=rf"resumed at {moment}\['weights and buffers'\]"):
        assert_resumes(Shrinks, module_name, tmp_path, at=(moment,))
    with pytest.raises(AssertionError, match=r"\['callbacks'\]\[0\]\['num_starts'\]"):
        assert_resumes(RemembersTooMuch, module_name, tmp_path, at=(moment,))


def test_an_intervener_that_a_checkpoint_changes_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"resumed at mid-epoch\['weights and buffers'\]"):
        assert_resumes(ActsWhenSaved, "autoencoder", tmp_path)


def test_a_run_that_is_over_before_it_would_be_cut_proves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="did not come to: mid-epoch"):
        assert_resumes(pl.Callback, "autoencoder", tmp_path, max_epochs=1)
