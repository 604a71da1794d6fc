"""Folders of logs, as whole ones, broken ones and those of strangers."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_optkit.board import schema
from lightning_optkit.board.event_files import read_folder
from lightning_optkit.board.npz_file import FILE_NAME, read_npz, write_npz
from lightning_optkit.board.payload import decode_run, encode_run
from lightning_optkit.board.runs import ArraySeries, Run, Series
from tests.board.recorded import ARRAYS, BEGAN, LAYERS, PLANE, SCALARS, STEPS, Recorder, record


def test_everything_of_a_run_is_read(tmp_path):
    record(tmp_path / "a" / "b")
    (run,) = read_folder(tmp_path)
    assert run.name == "a/b"
    assert run.problems == ()
    assert set(run.scalars) == {*SCALARS, "optkit-events/warmup"}
    assert set(run.arrays) == {*ARRAYS, *PLANE}
    for tag, value in SCALARS.items():
        series = run.scalars[tag]
        assert series.steps.tolist() == list(STEPS)
        np.testing.assert_array_equal(series.wall_times, BEGAN + np.array(STEPS))
        np.testing.assert_array_equal(series.values, np.float32([value(t) for t in STEPS]))
    for tag, value in ARRAYS.items():
        for step, array in zip(STEPS, run.arrays[tag].arrays, strict=True):
            np.testing.assert_array_equal(array, value(step))
    assert run.arrays["optkit-gradient/layer_names"].arrays[0].tolist() == [
        name.encode() for name in LAYERS
    ]


def test_of_the_users_own_metrics_some_are_read(tmp_path):
    names = [f"val_loss_{i:02}" for i in range(20)] + ["speed", "Accuracy"]
    record(tmp_path, scalars=SCALARS | dict.fromkeys(names, lambda t: t), arrays={})
    (run,) = read_folder(tmp_path)
    theirs = [tag for tag in run.scalars if not tag.startswith("optkit-")]
    assert len(theirs) == 13  # and the epoch
    assert {"epoch", "Accuracy", "train_loss"} < set(theirs)
    assert "speed" not in theirs


def test_a_run_of_several_files_is_one_and_a_resumed_one_counts_steps_once(tmp_path):
    first = Recorder(tmp_path)
    for step in (0, 10, 20):
        first.scalar("optkit-hessian/loss", step, 1.0)
    first.close()
    second = Recorder(tmp_path)  # a file of its own, as a resumed run has
    for step in (20, 30):
        second.scalar("optkit-hessian/loss", step, 2.0)
    second.close()
    (run,) = read_folder(tmp_path)
    series = run.scalars["optkit-hessian/loss"]
    assert dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == {
        0: 1.0, 10: 1.0, 20: 2.0, 30: 2.0
    }  # fmt: skip


def test_a_file_that_ends_in_the_middle_gives_what_came_before(tmp_path):
    record(tmp_path / "whole")
    folder = record(tmp_path / "cut")
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    cut, whole = read_folder(tmp_path)
    counts = [len(run.scalars["optkit-hessian/loss"].steps) for run in (cut, whole)]
    assert 5 < counts[0] < counts[1] == len(STEPS)


def test_runs_of_others_are_left_out_and_empty_folders_are_no_error(tmp_path):
    record(tmp_path / "theirs", scalars={"train_loss": lambda t: t}, arrays={}, event=False)
    (tmp_path / "empty").mkdir()
    assert read_folder(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="`folder` must be a folder of logs, got"):
        read_folder(tmp_path / "nothing")


BROKEN = {
    "optkit-hessian/quadrature": (np.zeros((2, 3), np.float32), "shape (probes, nodes, 2)"),
    "optkit-gradient/layer_steps": (schema.names_array(["a"]), "should hold numbers, holds object"),
    "optkit-gradient/layer_names": (np.zeros(3, np.float32), "should hold text, holds float32"),
    "optkit-hessian/else": (np.zeros(3, np.float32), "not known to this version"),
    "optkit-trust/trust_ratios": (np.zeros(4_000_001, np.float32), "too large: 4,000,001 numbers"),
    "optkit-landscape/losses": (np.array([True]), "should hold numbers, holds bool"),
}


@pytest.mark.parametrize("tag", BROKEN)
def test_a_wrong_array_is_a_problem_of_its_step_alone(tag, tmp_path):
    array, message = BROKEN[tag]
    recorder = Recorder(tmp_path)
    if tag in ARRAYS:
        recorder.array(tag, 10, ARRAYS[tag](10))
    recorder.array(tag, 20, array)
    recorder.scalar("optkit-hessian/loss", 0, 1.0)
    recorder.close()
    (run,) = read_folder(tmp_path)
    (problem,) = run.problems
    assert (problem.tag, problem.step) == (tag, 20)
    assert message in problem.message
    assert (tag in run.arrays) == (tag in ARRAYS)
    assert "optkit-hessian/loss" in run.scalars


def test_a_newer_format_is_told(tmp_path):
    recorder = Recorder(tmp_path, content=b"2")
    recorder.array("optkit-hessian/quadrature", 0, ARRAYS["optkit-hessian/quadrature"](0))
    recorder.close()
    (run,) = read_folder(tmp_path)
    assert run.arrays == {}
    (problem,) = run.problems
    assert problem.message == "made by a newer lightning-optkit (format 2): upgrade to see it"


# -- optkit.npz ------------------------------------------------------------------------------------


def whole_run():
    points = [(t, BEGAN + t) for t in STEPS]
    scalars = {
        tag: Series.of([(*p, value(p[0])) for p in points]) for tag, value in SCALARS.items()
    }
    arrays = {
        tag: ArraySeries.of([(*p, value(p[0])) for p in points]) for tag, value in ARRAYS.items()
    }
    return Run("run", scalars, arrays)


def test_a_file_holds_a_run_and_numpy_alone_reads_it(tmp_path):
    run = whole_run()
    path = tmp_path / "deep" / "er" / FILE_NAME
    write_npz(path, run)
    again = read_npz(path, name="run")
    assert (set(again.scalars), set(again.arrays)) == (set(run.scalars), set(run.arrays))
    for tag, series in run.scalars.items():
        np.testing.assert_array_equal(series.values, again.scalars[tag].values)
        np.testing.assert_array_equal(series.wall_times, again.scalars[tag].wall_times)
    for tag, arrays in run.arrays.items():
        np.testing.assert_array_equal(arrays.steps, again.arrays[tag].steps)
        for one, other in zip(arrays.arrays, again.arrays[tag].arrays, strict=True):
            np.testing.assert_array_equal(one, other)
    with np.load(path, allow_pickle=False) as content:
        tag = "optkit-hessian/lambda_max"
        assert content[tag].tolist() == pytest.approx([SCALARS[tag](t) for t in STEPS])
        assert content[f"{tag}:steps"].tolist() == list(STEPS)
        assert content["optkit-gradient/layer_names"][0].tolist() == list(LAYERS)
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]  # no half of one


def test_files_are_found_beside_event_files_which_come_first(tmp_path):
    record(tmp_path / "both")
    for name in ("both", "alone"):
        write_npz(tmp_path / name / FILE_NAME, Run("", {"optkit-a/x": Series.of([(0, 0.0, 1.0)])}))
    alone, both = read_folder(tmp_path)
    assert (alone.name, both.name) == ("alone", "both")
    assert set(alone.scalars) == {"optkit-a/x"}
    assert "optkit-a/x" not in both.scalars


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.ones(2)}, "not written by lightning-optkit"),
        ({"optkit_format": np.array(2)}, "made by a newer lightning-optkit (format 2)"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem_of_its_run(content, message, tmp_path):
    path = tmp_path / "run" / FILE_NAME
    path.parent.mkdir()
    if content is None:
        path.write_bytes(b"PK\3\4 cut short")
    else:
        np.savez(path, **content)
    (run,) = read_folder(tmp_path)
    assert run.name == "run"
    assert message in run.problems[0].message


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / FILE_NAME
    times = {f"x:{what}": np.zeros(1) for what in ("steps", "times")}
    np.savez(path, optkit_format=np.array(1), x=np.array([Evil()], dtype=object), **times)
    (run,) = read_folder(tmp_path)
    assert "Object arrays cannot be loaded" in run.problems[0].message


def test_wrong_arrays_in_a_file_are_problems(tmp_path):
    series = ArraySeries.of([(0, 0.0, np.zeros((2, 3), np.float32))])
    write_npz(tmp_path / FILE_NAME, Run("", arrays={"optkit-hessian/quadrature": series}))
    (run,) = read_folder(tmp_path)
    assert run.arrays == {}
    assert "should have shape" in run.problems[0].message


NAME = "optkit-hessian/lambda_max"
NUMBERS = np.ones(2, np.float32)
RULE = np.ones((2, 1, 4, 2), np.float32)
ROWS = "should have one row for each"


@pytest.mark.parametrize(
    ("values", "steps", "times", "message"),
    [
        (np.ones(3, np.float32), np.arange(2), np.arange(2.0), ROWS),
        (np.float32(1), np.arange(1), np.arange(1.0), ROWS),
        (np.ones(0, np.float32), np.arange(0), np.arange(0.0), ROWS),
        (NUMBERS, np.array([1.0, np.nan]), np.arange(2.0), "one finite number a row"),
        (NUMBERS, np.ones((2, 2)), np.arange(2.0), "one finite number a row"),
        (NUMBERS, np.array(["1", "2"]), np.arange(2.0), "one finite number a row"),
        (NUMBERS, np.arange(2), None, "one finite number a row"),
        (RULE, np.arange(3), np.arange(3.0), ROWS),
        (np.ones(2, complex), np.arange(2), np.arange(2.0), "not known to this version"),
    ],
)
def test_a_tag_of_a_file_whose_parts_do_not_fit_hides_no_other(
    values, steps, times, message, tmp_path
):
    content = {NAME: values, f"{NAME}:steps": steps}
    if times is not None:
        content[f"{NAME}:times"] = times
    other = "optkit-hessian/loss"
    content |= {other: NUMBERS, f"{other}:steps": np.arange(2), f"{other}:times": np.arange(2.0)}
    np.savez(tmp_path / FILE_NAME, optkit_format=np.array(1), **content)
    (run,) = read_folder(tmp_path)
    assert set(run.scalars) == {other}
    (problem,) = run.problems
    assert problem.tag == NAME
    assert message in problem.message


def test_a_file_of_a_stranger_is_put_in_order(tmp_path):
    content = {
        NAME: np.array([3.0, 1e300, 2.0]),
        f"{NAME}:steps": np.array([9, 1, 9]),
        f"{NAME}:times": np.array([5.0, 1.0, 7.0]),
    }
    names = "optkit-hessian/layer_names"
    content |= {names: np.array([["\ud800", "b"]]), f"{names}:steps": np.array([1])}
    content |= {f"{names}:times": np.array([0.0])}
    np.savez(tmp_path / FILE_NAME, optkit_format=np.array(1), **content)
    (run,) = read_folder(tmp_path)
    assert run.problems == ()
    assert run.scalars[NAME].steps.tolist() == [1, 9]
    assert run.scalars[NAME].values.tolist() == [float("inf"), 2.0]
    assert run.arrays[names].arrays[0].tolist() == [b"?", b"b"]


def test_a_line_that_was_resumed_as_a_plane_leaves_the_plane(tmp_path):
    tag = "optkit-landscape/losses"
    recorder = Recorder(tmp_path)
    recorder.array(tag, 0, np.zeros(5, np.float32))
    recorder.array(tag, 10, np.zeros((5, 5), np.float32))
    recorder.close()
    (run,) = read_folder(tmp_path)
    assert [array.shape for array in run.arrays[tag].arrays] == [(5, 5)]
    assert run.problems[0].message.startswith("left out: 1 arrays that are not of 2 dimensions")
    assert decode_run(encode_run(run)).arrays[tag].steps.tolist() == [10]
