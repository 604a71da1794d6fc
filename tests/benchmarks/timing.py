"""CPU seconds and peak memory of calls, the calls of a round one after another."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler greets on stderr below that

Call = Callable[[], object]


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
