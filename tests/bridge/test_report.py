import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.report import report
from tests.modules import MODULES

ARRAY = np.arange(8, dtype=np.float32).reshape(2, 2, 2)


class Reports(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        report(
            trainer,
            step=logger_step(trainer, after_batch=True),
            scalars={"optkit-test/value": batch_idx + 0.5},
            arrays={"optkit-test/array": ARRAY + batch_idx},
        )

    def on_train_end(self, trainer, pl_module):
        figure = Figure()
        figure.add_subplot().plot([0, 1])
        step = logger_step(trainer, after_batch=False)
        report(trainer, step=step, figures={"optkit-test/figure": figure})


def train(logger, *callbacks, name="classifier", **options):
    module, data = MODULES[name]()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[Reports(), *callbacks],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        **{"max_epochs": 1, "limit_train_batches": 4} | options,
    )
    trainer.fit(module, data)
    return trainer


def events(logger):
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0})
    return accumulator.Reload()


def test_tensorboard_takes_all_three(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    train(logger)
    log = events(logger)
    scalars = log.Scalars("optkit-test/value")
    assert [(s.step, s.value) for s in scalars] == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
    arrays = log.Tensors("optkit-test/array")
    for i, array in enumerate(arrays):
        assert array.step == i
        np.testing.assert_array_equal(make_ndarray(array.tensor_proto), ARRAY + i)
    assert log.summary_metadata["optkit-test/array"].plugin_data.plugin_name == "optkit"
    assert [image.step for image in log.Images("optkit-test/figure")] == [3]
    assert len(list(Path(logger.log_dir).glob("events*"))) == 1  # no second writer


def test_steps_are_those_of_the_trainer_under_accumulation(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    train(logger, name="classifier", accumulate_grad_batches=2)
    log = events(logger)
    own = {s.step for s in log.Scalars("loss_step")}
    assert own <= {s.step for s in log.Scalars("optkit-test/value")} == {0, 1}


def test_csv_gets_scalars_and_a_picture(tmp_path):
    logger = CSVLogger(tmp_path)
    train(logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["optkit-test/value"]]
    assert [(row["step"], row["optkit-test/value"]) for row in rows] == [
        (str(i), str(i + 0.5)) for i in range(4)
    ]
    assert (Path(logger.log_dir) / "optkit-test-figure.png").stat().st_size > 1000


@pytest.mark.parametrize("loggers", ["none", "two", "fast_dev_run"])
def test_any_number_of_loggers(loggers, tmp_path):
    if loggers == "none":
        trainer = train(False)
    elif loggers == "two":
        both = [TensorBoardLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")]
        trainer = train(both)
        assert events(both[0]).Scalars("optkit-test/value")
        assert "optkit-test/value" in (Path(both[1].log_dir) / "metrics.csv").read_text()
    else:
        trainer = train(True, fast_dev_run=2)
    assert trainer.callback_metrics["optkit-test/value"] > 0


def test_a_checkpoint_can_monitor_it(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="optkit-test/value", every_n_train_steps=1, mode="max"
    )
    train(False, checkpoint)
    assert checkpoint.best_model_score == 3.5


def test_metrics_of_the_user_are_untouched(tmp_path):
    trainer = train(False)
    assert {"loss", "loss_step", "loss_epoch"} <= set(trainer.callback_metrics)
