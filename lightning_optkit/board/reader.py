"""Runs from TensorBoard's data providers: the tab and the report read by the same lines.

Only the interface that both of TensorBoard's loaders have is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.data.provider import RunTagFilter

from lightning_optkit.board.runs import ArraySeries, Problem, Run, Series
from lightning_optkit.board.schema import PLUGIN_NAME, VERSION, check_array

if TYPE_CHECKING:
    from tensorboard.context import RequestContext
    from tensorboard.data.provider import DataProvider

__all__ = ["ListedRun", "listed_runs", "read_run"]

MAX_POINTS = 10_000
"""Of a tag that are read at once; TensorBoard's loaders keep fewer, a report has them all."""

_PREFIX = "optkit-"
_EPOCH = "epoch"  # Lightning logs it beside everything else
_MAX_METRICS = 12  # of the user's own: a choice, not a second Scalars tab
_METRIC_WORDS = ("loss", "acc", "error")
ListedRun = dict[str, Any]


def listed_runs(provider: DataProvider, ctx: RequestContext, experiment: str) -> list[ListedRun]:
    """Return name, place and stamp of the runs that have something to show.

    The place is that in TensorBoard's own list, which gives a run its colour. The stamp is another
    one when there is more to read.
    """
    scalars = _listed(provider.list_scalars, ctx, experiment, "scalars")
    tensors = _listed(provider.list_tensors, ctx, experiment, PLUGIN_NAME)
    runs = provider.list_runs(ctx, experiment_id=experiment)
    order = sorted(runs, key=lambda run: (run.start_time or float("inf"), run.run_name))
    found = []
    for index, run in enumerate(order):
        ours = {
            tag: series
            for tag, series in scalars.get(run.run_name, {}).items()
            if tag.startswith(_PREFIX)
        } | dict(tensors.get(run.run_name, {}))
        if ours:
            last = max(series.max_step for series in ours.values())
            when = max(series.max_wall_time for series in ours.values())
            stamp = f"{len(ours)} {last} {when}"
            found.append({"name": run.run_name, "index": index, "stamp": stamp})
    return found


def read_run(
    provider: DataProvider,
    ctx: RequestContext,
    experiment: str,
    name: str,
    *,
    arrays: Iterable[str] | None = None,
    with_scalars: bool = True,
) -> Run:
    """Return a run. What cannot be read becomes a problem of its tag.

    Args:
        provider: of TensorBoard.
        ctx: of the request.
        experiment: ID of the experiment.
        name: of the run.
        arrays: tags of the arrays to read, names of rows aside, which always are; ``None`` reads
            all. Those not read are listed.
        with_scalars: whether to read numbers too.

    Raises:
        LookupError: if there is no such run with data of ours.
    """
    only = RunTagFilter(runs=[name])
    scalars = _listed(provider.list_scalars, ctx, experiment, "scalars", only).get(name, {})
    tensors = _listed(provider.list_tensors, ctx, experiment, PLUGIN_NAME, only).get(name, {})
    if not any(tag.startswith(_PREFIX) for tag in (*scalars, *tensors)):
        raise LookupError(f"no run {name!r} with data of lightning-optkit")
    problems: list[Problem] = []
    chosen = set(tensors if arrays is None else arrays)
    chosen |= {tag for tag in tensors if tag.endswith("_names")}
    found = _read_arrays(provider, ctx, experiment, name, tensors, chosen, problems)
    return Run(
        name,
        _read_scalars(provider, ctx, experiment, name, scalars) if with_scalars else {},
        found,
        tuple(problems),
        tuple(
            tag
            for tag, series in tensors.items()
            if tag not in chosen and series.plugin_content == VERSION
        ),
    )


def _wanted(scalars: Iterable[str]) -> list[str]:
    """Return tags of ours, the epoch, and some of the user's own metrics."""
    ours = sorted(tag for tag in scalars if tag.startswith(_PREFIX) or tag == _EPOCH)
    theirs = sorted(
        tag
        for tag in scalars
        if tag not in ours and any(word in tag.lower() for word in _METRIC_WORDS)
    )
    return ours + theirs[:_MAX_METRICS]


def _listed(
    method: Callable[..., Mapping[str, Mapping[str, Any]]],
    ctx: RequestContext,
    experiment: str,
    plugin: str,
    only: RunTagFilter | None = None,
) -> Mapping[str, Mapping[str, Any]]:
    return method(ctx, experiment_id=experiment, plugin_name=plugin, run_tag_filter=only) or {}


def _read_scalars(
    provider: DataProvider, ctx: RequestContext, experiment: str, name: str, tags: Iterable[str]
) -> dict[str, Series]:
    wanted = _wanted(tags)
    read = provider.read_scalars(
        ctx,
        experiment_id=experiment,
        plugin_name="scalars",
        downsample=MAX_POINTS,
        run_tag_filter=RunTagFilter(runs=[name], tags=wanted),
    ).get(name, {})
    return {
        tag: Series.of([(int(p.step), float(p.wall_time), float(p.value)) for p in read[tag]])
        for tag in wanted
        if tag in read
    }


def _read_arrays(
    provider: DataProvider,
    ctx: RequestContext,
    experiment: str,
    name: str,
    tensors: Mapping[str, Any],
    chosen: set[str],
    problems: list[Problem],
) -> dict[str, ArraySeries]:
    known = []
    for tag, series in tensors.items():
        if series.plugin_content != VERSION:
            problems.append(Problem(tag, None, _newer(series.plugin_content)))
        elif tag in chosen:
            known.append(tag)
    if not known:
        return {}
    read = provider.read_tensors(
        ctx,
        experiment_id=experiment,
        plugin_name=PLUGIN_NAME,
        downsample=MAX_POINTS,
        run_tag_filter=RunTagFilter(runs=[name], tags=known),
    ).get(name, {})
    found = {}
    for tag in known:
        points = []
        for point in read.get(tag, ()):
            array = np.asarray(point.numpy)
            wrong = check_array(tag.partition("/")[2], array)
            if wrong is None:
                points.append((int(point.step), float(point.wall_time), array))
            else:
                problems.append(Problem(tag, int(point.step), wrong))
        if points:
            found[tag] = ArraySeries.of(_of_one_rank(tag, points, problems))
    return found


def _of_one_rank(
    tag: str, points: list[tuple[int, float, Any]], problems: list[Problem]
) -> list[tuple[int, float, Any]]:
    """Return the arrays that can be put beside the one written last.

    A landscape that was a line, and is a plane since its run was resumed, has two ranks in one tag.
    """
    rank = max(points, key=lambda point: point[1])[2].ndim
    kept = [point for point in points if point[2].ndim == rank]
    if len(kept) < len(points):
        message = (
            f"left out: {len(points) - len(kept)} arrays that are not of {rank} dimensions, "
            "as the last one is"
        )
        problems.append(Problem(tag, None, message))
    return kept


def _newer(content: bytes) -> str:
    shown = content[:20].decode("utf-8", "replace")
    return f"made by a newer lightning-optkit (format {shown}): upgrade to see it"
