"""Runs as bytes, and back."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from lightning_optkit.board.payload import FORMAT, decode_run, encode_run, thinned
from lightning_optkit.board.runs import ArraySeries, Problem, Run, Series
from lightning_optkit.board.schema import names_array

FLOATS = st.floats(width=32)  # NaN and infinity among them


def same(first, second):
    np.testing.assert_array_equal(first.steps, second.steps)
    np.testing.assert_array_equal(first.wall_times, second.wall_times)
    if isinstance(first, Series):
        np.testing.assert_array_equal(first.values, second.values)
        assert second.values.dtype == np.float32
    else:
        for one, other in zip(first.arrays, second.arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def header_of(data):
    (length,) = struct.unpack_from("<I", data, 4)
    return json.loads(data[8 : 8 + length]), 8 + length


@st.composite
def runs(draw):
    count = draw(st.integers(0, 5))
    steps = draw(st.lists(st.integers(0, 2**53), min_size=count, max_size=count, unique=True))
    points = [(step, 1.5 * i) for i, step in enumerate(sorted(steps))]
    scalars = Series.of([(*point, draw(FLOATS)) for point in points])
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 3)))
    tables = ArraySeries.of(
        [(*point, draw(arrays_of.arrays(np.float32, shape, elements=FLOATS))) for point in points]
    )
    texts = st.lists(st.text(), min_size=1, max_size=3)
    names = ArraySeries.of([(*point, names_array(draw(texts))) for point in points])
    arrays = {"a/layers": tables, "a/layer_names": names} if count else {}
    return Run(
        draw(st.text()),
        {"a/x": scalars},
        arrays,
        (Problem(draw(st.text()), draw(st.none() | st.integers(0, 9)), "<b>"),),
        ("a/quadrature",),
    )


@given(runs())
def test_what_is_encoded_is_decoded(run):
    again = decode_run(encode_run(run))
    assert (again.name, again.problems, again.listed) == (run.name, run.problems, run.listed)
    assert set(again.scalars) == set(run.scalars)
    assert set(again.arrays) == set(run.arrays)
    for tag, series in run.scalars.items():
        same(series, again.scalars[tag])
    for tag, series in run.arrays.items():
        same(series, again.arrays[tag])


def test_numbers_lie_at_multiples_of_eight_and_shared_steps_lie_there_once():
    points = [(t, float(t), t / 3) for t in range(7)]
    run = Run("r", {f"a/{i}": Series.of(points) for i in range(3)})
    header, body = header_of(encode_run(run))
    assert body % 8 == 0
    places = [block[key] for block in header["blocks"] for key in ("steps", "times", "values")]
    assert all(place % 8 == 0 for place in places)
    assert len(set(places)) == 2  # steps and times are the same numbers here; values alike, once


def test_arrays_of_several_shapes_are_padded_by_what_says_nothing():
    small, large = np.ones((1, 2, 2), np.float32), np.ones((1, 3, 2), np.float32)
    series = ArraySeries.of([(0, 0.0, small), (1, 1.0, large)])
    run = Run("r", arrays={"a/quadrature": series, "a/path": series})
    again = decode_run(encode_run(run)).arrays
    assert again["a/quadrature"].arrays[0][0, 2].tolist() == [0.0, 0.0]  # weight 0
    assert np.isnan(again["a/path"].arrays[0][0, 2]).all()
    np.testing.assert_array_equal(again["a/path"].arrays[1], large)


@pytest.mark.parametrize("digits", [1, 8, 12, 24])
def test_fewer_digits_round_to_the_nearest(digits):
    values = np.random.default_rng(0).lognormal(0, 20, (1, 500, 2)).astype(np.float32)
    values[0, 0] = np.nan, np.inf
    run = Run("r", arrays={"a/path": ArraySeries.of([(0, 0.0, values[0])])})
    found = decode_run(encode_run(run, digits=digits)).arrays["a/path"].arrays[0]
    assert np.isnan(found[0, 0])
    assert found[0, 1] == np.inf
    error = np.abs(found[1:] / values[0, 1:] - 1)
    assert error.max() <= 2.0**-digits  # half a unit of the last digit, of a mantissa in [1/2, 1)
    if digits == 12:
        assert error.max() > 2.0**-14


def test_wrong_bytes_digits_and_a_newer_format_are_told():
    data = encode_run(Run("r"))
    with pytest.raises(ValueError, match="these bytes are no run"):
        decode_run(b"<html>" + data)
    newer = data.replace(f'"version": {FORMAT}'.encode(), f'"version": {FORMAT + 1}'.encode())
    with pytest.raises(ValueError, match="made by a newer lightning-optkit"):
        decode_run(newer)
    with pytest.raises(ValueError, match=r"`digits` must be in \[1, 24\], got 0"):
        encode_run(Run("r"), digits=0)


def test_thinning_keeps_both_ends_and_says_so():
    points = [(10 * t, float(t), float(t)) for t in range(1001)]
    tables = [(10 * t, float(t), np.full((1, 2), t, np.float32)) for t in range(1001)]
    run = Run(
        "r", {"optkit-hessian/loss": Series.of(points)}, {"optkit-a/path": ArraySeries.of(tables)}
    )
    few = thinned(run, 200)
    steps = few.scalars["optkit-hessian/loss"].steps
    assert (len(steps), steps[0], steps[-1]) == (200, 0, 10_000)
    assert set(np.diff(steps)) <= {50, 60}  # even, up to a point
    np.testing.assert_array_equal(few.scalars["optkit-hessian/loss"].values * 10, steps)
    assert [float(a[0, 0]) for a in few.arrays["optkit-a/path"].arrays] == (steps / 10).tolist()
    assert {p.message for p in few.problems} == {"shown: 200 of 1,001 points"}
    assert thinned(run, 2).scalars["optkit-hessian/loss"].steps.tolist() == [0, 10_000]
    assert thinned(run, 1001).problems == ()
    with pytest.raises(ValueError, match="`max_points` must be at least 2, got 1"):
        thinned(run, 1)


def test_a_step_written_again_counts_once_and_the_last_holds():
    series = Series.of([(0, 0.0, 1.0), (5, 1.0, 2.0), (9, 2.0, 3.0), (5, 7.0, 4.0), (6, 8.0, 5.0)])
    assert series.steps.tolist() == [0, 5, 6, 9]
    assert series.values.tolist() == [1.0, 4.0, 5.0, 3.0]
