"""`optkit.npz`: where no logger takes arrays, nothing is lost."""

from __future__ import annotations

import csv
import gc
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_optkit import EMA, GradientMonitor
from lightning_optkit.board.npz_file import FILE_NAME, read_npz
from lightning_optkit.bridge import run_file
from lightning_optkit.bridge.run_file import RunFile
from tests.modules import MODULES


def fit(logger, *callbacks, folder, **options):
    module, data = MODULES["classifier"]()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=logger,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 2, "limit_train_batches": 4} | options,
    )
    trainer.fit(module, data)
    return trainer


def test_two_callbacks_share_a_file_beside_the_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = GradientMonitor(every_n_steps=2, max_overhead=None)
    fit(logger, monitor, EMA(decay=0.9), folder=tmp_path)
    (path,) = tmp_path.rglob(FILE_NAME)
    assert path.parent == Path(logger.log_dir)
    run = read_npz(path, name="run")
    norms = run.scalars["optkit-gradient/gradient_norm"]
    with (path.parent / "metrics.csv").open() as file:
        logged = [row["optkit-gradient/gradient_norm"] for row in csv.DictReader(file)]
    np.testing.assert_allclose(norms.values, [float(value) for value in logged if value])
    assert len(norms.values) > 2
    assert run.scalars["optkit-averaging/num_averaged"].steps.tolist() == list(range(8))
    assert run.scalars["epoch"].values.tolist() == [0.0] * 4 + [1.0] * 4
    layers = run.arrays["optkit-gradient/layer_steps"]
    assert layers.steps.tolist() == norms.steps.tolist()
    names = run.arrays["optkit-gradient/layer_names"].arrays[-1]
    assert len(names) == len(layers.arrays[-1])


def test_without_a_logger_each_trainer_has_a_new_folder(tmp_path):
    for _ in range(2):
        fit(False, EMA(decay=0.9), folder=tmp_path)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(FILE_NAME))
    assert found == [f"optkit_logs/version_{n}/{FILE_NAME}" for n in (0, 1)]


def test_beside_tensorboard_there_is_no_file(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    fit(loggers, GradientMonitor(every_n_steps=2), folder=tmp_path)
    assert not list(tmp_path.rglob(FILE_NAME))


def test_writes_are_rare_and_the_last_points_are_there(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        run_file, "write_npz", lambda path, run: written.append(len(run.scalars["a"].steps))
    )
    file = RunFile(tmp_path / FILE_NAME)
    for step in range(100):
        file.add(step, {"a": 1.0}, {})
    assert written == [1]  # and then not for ten seconds
    file.write()
    file.write()  # nothing new
    assert written == [1, 100]
    monkeypatch.setattr(run_file.time, "monotonic", iter([file._due, 5.0, 6.0]).__next__)
    file.add(100, {"a": 1.0}, {})
    assert written == [1, 100, 101]
    assert file._due == 6.0 + 50.0  # a second of writing: at most a fiftieth of the time


def test_what_was_not_written_is_when_the_trainer_goes(tmp_path):
    class Reports(pl.Callback):  # of its own, without `teardown`
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            run_file.run_file_of(trainer).add(batch_idx, {"a": float(batch_idx)}, {})

    trainer = fit(False, Reports(), folder=tmp_path, max_epochs=1)
    (path,) = tmp_path.rglob(FILE_NAME)
    assert read_npz(path, name="").scalars["a"].steps.tolist() == [0]
    del trainer
    gc.collect()
    assert read_npz(path, name="").scalars["a"].steps.tolist() == [0, 1, 2, 3]


def test_a_resumed_run_goes_on_from_the_step_it_resumes_at(tmp_path):
    path = tmp_path / FILE_NAME
    first = RunFile(path)
    for step in (0, 10, 20, 30):
        first.add(step, {"a": 1.0}, {"b/path": np.full((2, 2), step, np.float32)})
    first.write()
    second = RunFile(path)
    for step in (20, 25):
        second.add(step, {"a": 2.0}, {"b/path": np.full((2, 2), -step, np.float32)})
    second.write()
    run = read_npz(path, name="")
    assert run.scalars["a"].steps.tolist() == [0, 10, 20, 25]
    assert run.scalars["a"].values.tolist() == [1, 1, 2, 2]
    assert [float(a[0, 0]) for a in run.arrays["b/path"].arrays] == [0, 10, -20, -25]


def test_arrays_may_change_after_they_were_reported(tmp_path):
    file, array = RunFile(tmp_path / FILE_NAME), np.zeros((2, 2), np.float32)
    file.add(0, {}, {"b/path": array})
    array += 1
    file._is_written = False
    file.write()
    assert read_npz(file.path, name="").arrays["b/path"].arrays[0].tolist() == [[0, 0], [0, 0]]


def test_an_exception_in_training_loses_nothing(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                raise RuntimeError("no")

    monitor = GradientMonitor(every_n_steps=1, max_overhead=None)
    with pytest.raises(RuntimeError, match="no"):
        fit(CSVLogger(tmp_path), monitor, Fails(), folder=tmp_path)
    (path,) = tmp_path.rglob(FILE_NAME)
    assert read_npz(path, name="").scalars["optkit-gradient/gradient_norm"].steps[-1] == 4


def test_a_run_that_leaves_no_logs_leaves_no_file(tmp_path):
    fit(False, EMA(decay=0.9), folder=tmp_path, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_written_one_warning_says_so_and_training_goes_on(tmp_path, monkeypatch):
    (tmp_path / "optkit_logs").write_text("a file in the way")
    warnings: list[str] = []
    monkeypatch.setattr(run_file, "rank_zero_warn", warnings.append)
    trainer = fit(False, EMA(decay=0.9), folder=tmp_path)
    (warning,) = warnings
    assert "cannot be written" in warning
    assert trainer.global_step == 8
    (tmp_path / "optkit_logs").unlink()
    run_file.close_run_file(trainer)  # now it can
    (path,) = tmp_path.rglob(FILE_NAME)
    assert len(read_npz(path, name="").scalars["optkit-averaging/num_averaged"].steps) == 8


@pytest.mark.parametrize("format_", [None, 2])
def test_a_file_that_cannot_be_continued_is_moved_aside(format_, tmp_path):
    path = tmp_path / FILE_NAME
    if format_ is None:
        path.write_bytes(b"PK\3\4 cut short")
    else:
        np.savez(path, optkit_format=np.array(format_))
    before = path.read_bytes()
    file = RunFile(path)
    with pytest.warns(UserWarning, match="cannot be continued"):
        file.add(0, {"a": 1.0}, {})
    assert read_npz(path, name="").scalars["a"].values.tolist() == [1]
    (aside,) = tmp_path.glob(f"{FILE_NAME}.*")
    assert aside.read_bytes() == before


def test_a_line_that_is_a_plane_from_now_on_begins_anew(tmp_path):
    file = RunFile(tmp_path / FILE_NAME)
    file.add(0, {}, {"optkit-landscape/losses": np.zeros(3, np.float32)})
    file.add(1, {}, {"optkit-landscape/losses": np.zeros((3, 3), np.float32)})
    file.write()
    arrays = read_npz(file.path, name="").arrays["optkit-landscape/losses"]
    assert [array.shape for array in arrays.arrays] == [(3, 3)]
