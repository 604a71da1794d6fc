"""CPU seconds and peak memory of calls, the calls of a round one after another."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler greets on stderr below that

Call = Callable[[], object]
Task = Callable[[float], tuple[Any, int]]  # CPU time at which to give up -> answer and products


class OutOfPatience(Exception):
    """A task has run past its deadline; ``args[0]`` is the number of products so far."""


@dataclass
class Outcome:
    """The answer and products of a task, and the CPU seconds of each time that it ran."""

    answer: Any = None
    num_products: int = 0
    seconds: list[float] = field(default_factory=list)
    is_cut: bool = False  # then products and seconds are lower bounds

    def run(self, task: Task, *, patience: float = math.inf) -> None:
        begin = time.process_time()
        try:
            self.answer, self.num_products = task(begin + patience)
        except OutOfPatience as cut:
            self.num_products, self.is_cut = cut.args[0], True
        self.seconds.append(time.process_time() - begin)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def shown(self) -> str:
        return f"{'> ' * self.is_cut}{self.median:.2f}"

    def times(self, unit: float) -> str:
        return f"{'> ' * self.is_cut}{self.median / unit:.2f}"


def in_turn(
    label: str, ours: Task, peers: Mapping[str, Task], *, rounds: int, patience: float
) -> dict[str, Outcome]:
    """Run ours, then each peer, so many times, and ours once more.

    Args:
        label: of ours.
        ours: what the peers are compared with.
        peers: by label. One that was cut off is not run again.
        rounds: how often.
        patience: how many times our time a peer may take.
    """
    outcomes = {name: Outcome() for name in (label, *peers)}
    for _ in range(rounds):
        outcomes[label].run(ours)
        limit = patience * outcomes[label].median
        for name, task in peers.items():
            if not outcomes[name].is_cut:
                outcomes[name].run(task, patience=limit)
    outcomes[label].run(ours)
    return outcomes


def cpu_seconds(call: Call) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def interleaved(calls: Sequence[Call], *, min_rounds: int, seconds: float) -> list[list[float]]:
    """Return the CPU seconds of each call, one for each round.

    Args:
        calls: what to time, each once a round.
        min_rounds: rounds at least.
        seconds: wall time after which no further round begins.
    """
    for call in calls:  # warm: caches filled, kernels chosen
        call()
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(times[0]) < min_rounds or time.perf_counter() - begin < seconds:
        first = len(times[0]) % len(calls)
        for i in [*range(first, len(calls)), *range(first)]:  # nobody is always first
            times[i].append(cpu_seconds(calls[i]))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles([*values, *values[:1]], n=4, method="inclusive")
    return low, median, high


def peak_memory(call: Call) -> int:
    """Return the most bytes of tensors that ``call`` holds at once, beyond what lives already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
