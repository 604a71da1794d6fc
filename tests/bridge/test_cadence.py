import time

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_optkit.bridge.cadence import Cadence, logger_step
from tests.modules import MODULES, DictImages


class Asks(pl.Callback):
    """Asks a cadence at every hook and notes when it was due."""

    def __init__(self, cost=0.0, **options):
        self.cadence = Cadence(**options)
        self.cost = cost
        self.due = []

    def _ask(self, trainer, due, step):
        if due:
            self.due.append(step)
            with self.cadence.measuring(step):
                time.sleep(self.cost)

    def on_train_start(self, trainer, pl_module):
        self.cadence.start()

    def on_train_batch_end(self, trainer, *_):
        step = logger_step(trainer, after_batch=True)
        self._ask(trainer, self.cadence.after_batch(trainer), step)

    def on_train_epoch_end(self, trainer, *_):
        step = logger_step(trainer, after_batch=False)
        self._ask(trainer, self.cadence.after_epoch(trainer), step)

    def on_train_end(self, trainer, *_):
        step = logger_step(trainer, after_batch=False)
        self._ask(trainer, self.cadence.at_end(trainer), step)
        self.cadence.stop()

    def state_dict(self):
        return {"cadence": self.cadence.state_dict()}

    def load_state_dict(self, state_dict):
        self.cadence.load_state_dict(state_dict["cadence"])


def train(callbacks, name="autoencoder", *, ckpt_path=None, **options):
    """Train for two epochs of 8 batches."""
    module, data = MODULES[name]()
    defaults = {"max_epochs": 2, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module, data


@pytest.mark.parametrize(
    ("name", "options", "period", "due"),
    [
        ("autoencoder", {}, {"every_n_steps": 3}, [2, 5, 8, 11, 14, 15]),
        ("autoencoder", {"accumulate_grad_batches": 2}, {"every_n_steps": 3}, [2, 5, 7]),
        # 8 batches in windows of 3: the last, incomplete window is a step too
        ("autoencoder", {"accumulate_grad_batches": 3}, {"every_n_steps": 2}, [1, 3, 5]),
        ("autoencoder", {}, {}, [7, 15]),
        ("autoencoder", {}, {"every_n_epochs": 1}, [7, 15]),
        ("autoencoder", {"max_epochs": 3}, {"every_n_epochs": 2}, [15, 23]),
        ("autoencoder", {"max_steps": 5, "max_epochs": -1}, {"every_n_steps": 2}, [1, 3, 4]),
        ("autoencoder", {"fast_dev_run": True}, {"every_n_epochs": 1}, [0]),
        ("gan", {}, {"every_n_steps": 4}, [3, 7, 11, 15]),  # two optimizer steps a batch count once
    ],
)
def test_due_points(name, options, period, due):
    asks = Asks(**period)
    train([asks], name, **options)
    assert asks.due == due


def test_validation_and_sanity_checking_do_not_count():
    asks = Asks(every_n_steps=3)
    module, data = MODULES["autoencoder"]()
    module.validation_step = lambda batch, batch_idx: None
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[asks], max_epochs=1, val_check_interval=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data, DataLoader(DictImages(), 8))
    assert asks.due == [2, 5, 7]


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable", "ignore:.*exists and is not")
def test_resume_in_the_middle_of_an_epoch_keeps_the_grid(tmp_path):
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    whole = Asks(every_n_steps=3)
    train([whole, checkpoints], enable_checkpointing=True)
    path = next(tmp_path.glob("*step=5.ckpt"))
    resumed = Asks(every_n_steps=3)
    train([resumed, checkpoints], ckpt_path=path, enable_checkpointing=True)
    assert resumed.due == [step for step in whole.due if step >= 5]


def test_a_second_fit_goes_on_counting():
    asks = Asks(every_n_steps=3)
    trainer, module, data = train([asks], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert asks.due == [2, 5, 7, 8, 11, 14, 15]


def test_due_points_are_passed_over_while_too_expensive():
    asks = Asks(every_n_steps=1, max_overhead=0.05, cost=0.2)
    train([asks])
    assert asks.due == [0, 15]  # the first costs more than the rest of the run; the end is due
    assert asks.cadence.num_passed_over == 15
    assert asks.cadence.overhead > 0.05


def test_without_a_limit_every_point_is_measured():
    asks = Asks(every_n_steps=1, max_overhead=None, cost=0.01)
    train([asks])
    assert len(asks.due) == 16


def test_overhead_is_the_share_of_wall_time():
    cadence = Cadence(every_n_steps=1)
    cadence.start()
    time.sleep(0.1)
    with cadence.measuring(0):
        time.sleep(0.1)
    assert 0.4 < cadence.overhead < 0.6
    cadence.stop()
    again = Cadence(every_n_steps=1)
    again.load_state_dict(cadence.state_dict())
    assert again.overhead == pytest.approx(cadence.overhead)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"every_n_steps": 1, "every_n_epochs": 2},
            "At most one of .* got every_n_steps=1 and every_n_epochs=2",
        ),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"every_n_epochs": True}, "`every_n_epochs` must be an integer of at least 1, got True"),
        ({"every_n_epochs": -1}, "`every_n_epochs` must be an integer of at least 1, got -1"),
        ({"every_n_steps": 1, "max_overhead": 0.0}, r"`max_overhead` must be a share.*got 0\.0"),
        ({"every_n_steps": 1, "max_overhead": 5.0}, "`max_overhead` must be a share"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Cadence(**options)
