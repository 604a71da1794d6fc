"""An intervener's turns, counted by real Trainers."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest

from lightning_optkit.bridge.turns import Turns
from tests.modules import MODULES


class Takes(pl.Callback):
    """Notes the batches before which it was its turn, counted over all epochs."""

    def __init__(self, **period):
        self.turns = Turns(**period)
        self.taken = []

    def setup(self, trainer, pl_module, stage):
        self.turns.start()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.turns.before_batch(trainer):
            self.taken.append(trainer.fit_loop.epoch_loop.total_batch_idx)

    def state_dict(self):
        return self.turns.state_dict()

    def load_state_dict(self, state_dict):
        self.turns.load_state_dict(state_dict)


def fit(callback, name="autoencoder", ckpt_path=None, **options):
    """Train for three epochs of 4 batches."""
    module, data = MODULES[name]()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 3, "limit_train_batches": 4} | options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("period", "options", "taken"),
    [
        ({}, {}, [0, 4, 8]),
        ({"every_n_epochs": 1}, {}, [0, 4, 8]),
        ({"every_n_epochs": 2}, {}, [0, 8]),
        ({"every_n_steps": 1}, {}, list(range(12))),
        ({"every_n_steps": 5}, {}, [0, 5, 10]),
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 2}, [0, 4, 8]),
        ({"every_n_steps": 1}, {"accumulate_grad_batches": 4}, [0, 4, 8]),
        ({"every_n_epochs": 1}, {"accumulate_grad_batches": 4}, [0, 4, 8]),
        ({"every_n_epochs": 1}, {"max_epochs": 1}, [0]),
        ({"every_n_steps": 3}, {"name": "gan"}, [0, 3, 6, 9]),
    ],
    ids=str,
)
def test_turns(period, options, taken):
    callback = Takes(**period)
    fit(callback, **options)
    assert callback.taken == taken


@pytest.mark.parametrize("period", [{"every_n_epochs": 1}, {"every_n_steps": 4}], ids=str)
def test_a_resumed_run_goes_on(period, tmp_path):
    fit(Takes(**period), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = Takes(**period)
    fit(resumed, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.taken == [4, 8]


def test_a_second_fit_begins_with_a_turn():
    callback = Takes(every_n_epochs=1)
    fit(callback, max_epochs=1)
    fit(callback, max_epochs=1)
    assert callback.taken == [0, 0]


def test_two_periods_are_refused():
    with pytest.raises(ValueError, match="At most one of"):
        Turns(every_n_steps=1, every_n_epochs=1)


def test_no_clock_is_in_the_state():
    assert Turns(every_n_steps=1).state_dict() == {"last": None}
