"""What TensorBoard shows without the tab."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray

from lightning_optkit import EMA, HessianSpectrum, Sharpness
from lightning_optkit.board.runs import Run, Series
from lightning_optkit.bridge import plain_board
from lightning_optkit.bridge.plain_board import VERDICT, chart_layout, verdict_text
from tests.modules import MODULES

LAYOUT = "custom_scalars__config__"


def fit(logger, *callbacks):
    module, data = MODULES["classifier"]()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        max_epochs=2,
        limit_train_batches=2,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)


def written(logger):
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0}).Reload()
    layouts = [
        layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item())
        for event in events.Tensors(LAYOUT)
    ]
    texts = events.Tensors(f"{VERDICT}/text_summary")
    return layouts, [make_ndarray(event.tensor_proto).item().decode() for event in texts]


def observers():
    spectrum = HessianSpectrum(every_n_epochs=1, max_overhead=None, num_probes=1)
    return spectrum, Sharpness(("ball",), invariance_check=False)


def test_charts_with_bounds_and_one_verdict(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(logger, *observers())
    layouts, verdicts = written(logger)
    charts = {
        (category.title, chart.title): chart
        for category in layouts[-1].category
        for chart in category.chart
    }
    (ratio,) = charts["optkit-hessian", "minimum_ratio"].margin.series
    assert (ratio.value, ratio.lower, ratio.upper) == tuple(
        f"optkit-hessian/minimum_ratio{end}" for end in ("", "_lower", "_upper")
    )
    (ball,) = charts["optkit-sharpness", "ball"].margin.series
    assert (ball.lower, ball.upper) == ("optkit-sharpness/ball_lower", "optkit-sharpness/ball")
    assert list(charts["optkit-hessian", "trace and its error"].multiline.tag) == [
        r"^optkit\-hessian/trace$", r"^optkit\-hessian/trace_standard_error$"
    ]  # fmt: skip
    assert len(layouts) == 2  # one a callback, not one a point
    (verdict,) = verdicts
    assert verdict.startswith("| | finding | evidence |")
    assert "**info**" in verdict


def test_a_layout_of_the_users_own_stays(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
    fit(logger, *observers())
    (layout,), _ = written(logger)
    assert [category.title for category in layout.category] == ["mine"]


def test_a_layout_of_ours_grows_in_a_resumed_run(tmp_path):
    for callback in observers():
        logger = TensorBoardLogger(tmp_path, version=0)
        fit(logger, callback)
    layouts, _ = written(logger)
    assert {category.title for category in layouts[-1].category} == {"optkit-sharpness"}
    assert len(layouts) == 2


def test_a_rule_that_fails_and_an_exception_in_training_end_nothing(tmp_path, monkeypatch):
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("no")

    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(RuntimeError, match="no"):
        fit(logger, EMA(decay=0.9), Fails())
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    assert events.Tensors(f"{VERDICT}/text_summary")

    def broken(run):
        raise ZeroDivisionError

    warned = []
    monkeypatch.setattr(plain_board, "alerts", broken)
    monkeypatch.setattr(plain_board, "rank_zero_warn", warned.append)
    fit(TensorBoardLogger(tmp_path), EMA(decay=0.9))
    assert warned == ["The verdict was not written: ZeroDivisionError: "]


def test_other_loggers_do_without(tmp_path):
    fit(CSVLogger(tmp_path), *observers())


def test_layout_of_tags():
    assert chart_layout(["a/x", "a/y", "b/x_lower"]) == {}
    assert chart_layout(["a/x", "a/x_error"]) == {
        "a": {"x and its error": ("Multiline", ["^a/x$", "^a/x_error$"])}
    }


@pytest.mark.parametrize("name", ["a|b", "a\nb"])
def test_a_table_is_one_whatever_tags_are_called(name):
    run = Run("", {f"{name}/loss": Series.of([(0, 0.0, float("nan"))])})
    rows = verdict_text(run).splitlines()
    assert len(rows) == 3
    assert rows[2].replace("\\|", "").count("|") == 6
