"""One run as bytes: what the page gets from the server, and what a report has inside.

``OPTK``, the length of the header (uint32), the header, and numbers, all little-endian. The header
is JSON, padded with spaces so that numbers begin at a multiple of 8 bytes; it names one block for
each tag, and where its numbers lie, in bytes from the end of the header::

    {
        "version": 1,
        "run": "steady",
        "problems": [{"tag": "", "step": null, "message": "..."}],
        "blocks": [
            {
                "tag": "optkit-hessian/quadrature",
                "kind": "array",
                "count": 3,
                "shape": [4, 80, 2],
                "steps": 0,
                "times": 24,
                "values": 48,
            }
        ],
    }

``steps`` and ``times`` are float64, ``count`` of them; ``values`` are float32, ``shape`` for each.
Arrays of several shapes are padded to the largest: by NaN, and by weight 0 in a quadrature. A
``listed`` block has no points: they can be asked for. A ``names`` block has ``names`` in place of
values, pairs of a step and the names from there on.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from lightning_optkit.board.runs import ArraySeries, Problem, Run, Series
from lightning_optkit.board.tags import QUADRATURE

__all__ = ["FORMAT", "decode_run", "encode_run", "padded", "text_of", "thinned"]

FORMAT = 1
"""Version of these bytes."""

_MAGIC = b"OPTK"
_NOTHING = ArraySeries.of(())
Numbers = np.ndarray[Any, Any]


def encode_run(run: Run, *, digits: int | None = None) -> bytes:
    """Return the run as bytes.

    Args:
        run: what to encode.
        digits: significant binary digits of arrays that are kept, in ``[1, 24]``; ``None`` keeps
            all 24. Fewer pack better.

    Raises:
        ValueError: if ``digits`` is out of range.
    """
    if digits is not None and not 1 <= digits <= 24:
        raise ValueError(f"`digits` must be in [1, 24], got {digits}. Leave it out to keep all.")
    body = _Body()
    blocks = [_scalar_block(tag, series, body) for tag, series in run.scalars.items()]
    blocks += [_array_block(tag, arrays, body, digits) for tag, arrays in run.arrays.items()]
    blocks += [_block(tag, "listed", _NOTHING, body) for tag in run.listed]
    header = {
        "version": FORMAT,
        "run": run.name,
        "blocks": blocks,
        "problems": [vars(problem) for problem in run.problems],
    }
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return _MAGIC + struct.pack("<I", len(text)) + text + body.content


def decode_run(data: bytes) -> Run:
    """Return the run that :func:`encode_run` made bytes of.

    Raises:
        ValueError: if these are no such bytes, or of a newer version.
    """
    if data[:4] != _MAGIC:
        raise ValueError("`data` must begin with OPTK: these bytes are no run.")
    (length,) = struct.unpack_from("<I", data, 4)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if header["version"] != FORMAT:
        raise ValueError(
            f"`data` must be of format {FORMAT}, got {header['version']}: made by a newer "
            "lightning-optkit. Upgrade to read it."
        )
    scalars, arrays, listed = {}, {}, []
    for block in header["blocks"]:
        tag, count = block["tag"], block["count"]
        steps = np.frombuffer(body, "<f8", count, block["steps"]).astype(np.int64)
        times = np.frombuffer(body, "<f8", count, block["times"])
        if block["kind"] == "scalar":
            values = np.frombuffer(body, "<f4", count, block["values"])
            scalars[tag] = Series(steps, times, values)
        elif block["kind"] == "listed":
            listed.append(tag)
        else:
            arrays[tag] = ArraySeries(steps, times, _arrays(block, steps, body))
    problems = tuple(Problem(**problem) for problem in header["problems"])
    return Run(header["run"], scalars, arrays, problems, tuple(listed))


def thinned(run: Run, max_points: int) -> Run:
    """Return the run with at most so many points a tag, evenly chosen, both ends among them.

    Args:
        run: a run.
        max_points: at least 2.

    Returns:
        The run, with a problem for each topic that says how many points are left out.

    Raises:
        ValueError: if ``max_points`` is under 2.
    """
    if max_points < 2:
        raise ValueError(f"`max_points` must be at least 2, got {max_points}.")
    longest: dict[str, int] = {}
    counts = [(tag, len(series.steps)) for tag, series in run.scalars.items()]
    counts += [(tag, len(arrays.steps)) for tag, arrays in run.arrays.items()]
    for tag, count in counts:
        topic = tag.partition("/")[0]
        longest[topic] = max(longest.get(topic, 0), count)
    notes = tuple(
        Problem(topic, None, f"shown: {max_points:,} of {count:,} points")
        for topic, count in longest.items()
        if count > max_points and topic.startswith("optkit-")
    )
    return Run(
        run.name,
        {tag: _thin(series, max_points) for tag, series in run.scalars.items()},
        {tag: _thin_arrays(series, max_points) for tag, series in run.arrays.items()},
        run.problems + notes,
        run.listed,
    )


class _Body:
    """Numbers one after another; what is there already is not put there again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0
        self._places: dict[bytes, int] = {}

    @property
    def content(self) -> bytes:
        return b"".join(self._parts)

    def put(self, numbers: Numbers, dtype: str) -> int:
        """Return where the numbers begin. All tags of a callback share their steps."""
        data = np.ascontiguousarray(numbers, dtype).tobytes()
        key = dtype.encode() + data
        if key not in self._places:
            self._places[key] = self._length
            data += b"\0" * (-len(data) % 8)
            self._parts.append(data)
            self._length += len(data)
        return self._places[key]


def _block(tag: str, kind: str, series: Series | ArraySeries, body: _Body) -> dict[str, Any]:
    return {
        "tag": tag,
        "kind": kind,
        "count": len(series.steps),
        "shape": [],
        "steps": body.put(series.steps, "<f8"),
        "times": body.put(series.wall_times, "<f8"),
    }


def _scalar_block(tag: str, series: Series, body: _Body) -> dict[str, Any]:
    block = _block(tag, "scalar", series, body)
    return block | {"values": body.put(series.values, "<f4")}


def _array_block(tag: str, series: ArraySeries, body: _Body, digits: int | None) -> dict[str, Any]:
    if any(array.dtype.kind in "OSU" for array in series.arrays):
        return _block(tag, "names", series, body) | {"names": _changes(series)}
    values = padded(tag, series.arrays)
    if digits is not None:
        values = _rounded(values, digits)
    return _block(tag, "array", series, body) | {
        "shape": list(values.shape[1:]),
        "values": body.put(values, "<f4"),
    }


def _changes(series: ArraySeries) -> list[tuple[int, list[str]]]:
    """Return names at the steps from which they hold."""
    found: list[tuple[int, list[str]]] = []
    for step, array in zip(series.steps.tolist(), series.arrays, strict=True):
        names = [text_of(name) for name in array.reshape(-1)]
        if not found or found[-1][1] != names:
            found.append((step, names))
    return found


def text_of(name: object) -> str:
    """Return a name as text, of bytes or of text; what is no UTF-8 is marked."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def padded(tag: str, arrays: tuple[Numbers, ...]) -> Numbers:
    """Return arrays of one tag as one, a row each, of the largest of their shapes.

    Args:
        tag: whose they are; a quadrature is padded by weight 0, others by NaN.
        arrays: of one rank.

    Raises:
        ValueError: if they are of several ranks.
    """
    fill = 0.0 if tag.endswith(f"/{QUADRATURE}") else np.nan
    ranks = {array.ndim for array in arrays} or {0}
    if len(ranks) > 1:
        raise ValueError(f"arrays of one tag must have one rank, got {sorted(ranks)}")
    shape = np.max([array.shape for array in arrays], axis=0, initial=0).astype(int)
    padded = np.full((len(arrays), *shape), fill, np.float32)
    for whole, array in zip(padded, arrays, strict=True):
        whole[tuple(map(slice, array.shape))] = array
    return padded


def _rounded(values: Numbers, digits: int) -> Numbers:
    """Return numbers with so many binary digits, to the nearest; the others are zeros."""
    mantissa, exponent = np.frexp(values)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return np.ldexp(np.round(mantissa * 2**digits) / 2**digits, exponent).astype(np.float32)


def _arrays(block: dict[str, Any], steps: Numbers, body: bytes) -> tuple[Numbers, ...]:
    if block["kind"] == "array":
        size = block["count"] * int(np.prod(block["shape"], dtype=int))
        values = np.frombuffer(body, "<f4", size, block["values"])
        return tuple(values.reshape(block["count"], *block["shape"]))
    changes, names = iter([*block["names"], (np.inf, None)]), None
    following = next(changes)
    found = []
    for step in steps.tolist():
        while following[0] <= step:
            names, following = following[1], next(changes)
        found.append(np.array([name.encode() for name in names or ()], dtype=object))
    return tuple(found)


def _chosen(count: int, max_points: int) -> Numbers:
    if count <= max_points:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, max_points).round().astype(int))


def _thin(series: Series, max_points: int) -> Series:
    kept = _chosen(len(series.steps), max_points)
    return Series(series.steps[kept], series.wall_times[kept], series.values[kept])


def _thin_arrays(series: ArraySeries, max_points: int) -> ArraySeries:
    kept = _chosen(len(series.steps), max_points)
    arrays = tuple(series.arrays[i] for i in kept)
    return ArraySeries(series.steps[kept], series.wall_times[kept], arrays)
