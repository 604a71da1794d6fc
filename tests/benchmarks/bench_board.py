"""What the tab adds to TensorBoard's start, and how it bears 50 runs of 1,000 steps.

Run with ``python -m tests.benchmarks.bench_board``: some three minutes; needs Chromium and
playwright. Starts with and without the plugin take turns. The page's own time stamps
(``performance.measure``) tell how long it takes to draw.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from tensorboard import version as tensorboard_version

from tests.benchmarks.page import machine, markdown_table, write_section
from tests.board.browser import frame_of, opened_browser, tensorboard
from tests.board.recorded import SCALARS, Recorder

ROUNDS = 9
RUNS, STEPS, SPECTRA = 50, 1000, 4
TAGS = (
    "epoch", "optkit-hessian/lambda_max", "optkit-hessian/lambda_min", "optkit-hessian/loss",
    "optkit-hessian/minimum_ratio", "optkit-hessian/minimum_ratio_lower",
    "optkit-hessian/minimum_ratio_upper", "optkit-hessian/tol", "optkit-hessian/seconds",
    "optkit-stability/threshold", "optkit-gradient/gradient_norm", "optkit-lr/effective/SGD",
)  # fmt: skip
WITHOUT = (
    "import sys, tensorboard.default as d; found = d._iter_entry_points; "
    "d._iter_entry_points = lambda group: [e for e in found(group) if 'optkit' not in e.name]; "
    "from tensorboard.main import run_main; sys.exit(run_main())"
)
FRAMES = """
() => {
  window.frames_seen = [];
  const look = (now) => { window.frames_seen.push(now); requestAnimationFrame(look); };
  requestAnimationFrame(look);
}
"""


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        starts = start_times(Path(folder))
        console.print({name: f"{statistics.median(times):.2f} s" for name, times in starts.items()})
        console.print(f"writing {RUNS} runs of {STEPS:,} steps ...")
        write_runs(Path(folder))
        numbers = page_numbers(Path(folder))
    console.print(numbers)
    write_section("board", section(starts, numbers))


def start_times(folder: Path) -> dict[str, list[float]]:
    """Seconds until TensorBoard says where it serves."""
    commands = {"without": ["-c", WITHOUT], "with": ["-m", "tensorboard.main"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, *command, "--logdir", str(folder), "--port", "0"],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert process.stderr is not None
            next(line for line in process.stderr if re.search("TensorBoard .* at http", line))
            times[name].append(time.monotonic() - began)
            process.terminate()
            process.communicate()
    return times


def write_runs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = np.sort(rng.lognormal(-2, 2, (4, 80)), axis=-1)
    for run in range(RUNS):
        recorder = Recorder(folder / f"run_{run:02}")
        factor = 1 + run / RUNS
        for step in range(STEPS):
            for tag in TAGS:
                value = SCALARS[tag](step) * (1 if tag == "epoch" else factor)
                recorder.scalar(tag, step, value + 0.05 * rng.normal() * (tag != "epoch"))
            if run < SPECTRA:
                rule = np.stack([nodes * (1 + step / STEPS), np.full((4, 80), 1 / 80)], axis=-1)
                recorder.array("optkit-hessian/quadrature", step, rule.astype(np.float32))
        recorder.close()


def page_numbers(folder: Path) -> dict[str, float]:
    with (
        opened_browser("--enable-precise-memory-info") as browser,
        tensorboard("--logdir", str(folder)) as server,
    ):
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        time.sleep(60)  # TensorBoard reads the files
        page.goto(f"{server}#optkit")
        view = frame_of(page)
        body = view.locator("body")
        while body.evaluate("() => performance.getEntriesByName('optkit-first-data').length === 0"):
            page.wait_for_timeout(500)
        page.wait_for_timeout(8000)  # for the spectra
        numbers = dict(body.evaluate(_FIRST_PAINT))
        plot = view.locator("#extremes .plot")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        assert box is not None
        body.evaluate(FRAMES)
        for i in range(300):
            share = 0.15 + 0.8 * abs((i % 100) / 50 - 1)
            page.mouse.move(box["x"] + share * box["width"], box["y"] + 60)
        numbers |= dict(body.evaluate(_CURSOR))
    return numbers


_FIRST_PAINT = """() => {
  const read = performance.getEntriesByType("resource").filter(e => e.name.includes("/scalars?"));
  const drawn = performance.getEntriesByName("optkit-data");
  const after = (when) => drawn.find(e => e.startTime >= when);
  const ends = read.map(e => e.responseEnd).filter(after);  // what has been drawn by now
  const [first, last] = [Math.min(...ends), Math.max(...ends)];
  const end = (entry) => entry.startTime + entry.duration;
  return {
    "first data to first picture, s": (end(after(first)) - first) / 1000,
    "last data to the picture of all, s": (end(after(last)) - last) / 1000,
    "data, MB": read.reduce((sum, e) => sum + e.decodedBodySize, 0) / 1e6,
  };
}"""
_CURSOR = """() => {
  const times = window.frames_seen;
  const all = performance.getEntriesByName("optkit-cursor");
  const drawn = all.map(e => e.duration).sort((a, b) => a - b);
  return {
    "cursor: frames a second": 1000 * (times.length - 1) / (times[times.length - 1] - times[0]),
    "cursor: drawing, median ms": drawn[Math.floor(drawn.length / 2)],
    "cursor: drawing, 95 % ms": drawn[Math.floor(drawn.length * 0.95)],
    "memory of the page, MB": performance.memory.usedJSHeapSize / 1e6,
  };
}"""


def section(starts: dict[str, list[float]], numbers: dict[str, float]) -> str:
    without, with_it = (statistics.median(starts[name]) for name in ("without", "with"))
    rows = [[name, f"{value:.3g}"] for name, value in numbers.items()]
    return f"""\
## The board

TensorBoard {tensorboard_version.VERSION} says where it serves after {without:.2f} s without the
plugin and {with_it:.2f} s with it: {with_it / without:.3f} x (target 1.10), medians of {ROUNDS}
starts in turn. {RUNS} runs of {STEPS:,} steps with {len(TAGS)} quantities each, {SPECTRA} of them
with a spectrum at each step, in headless Chromium, by the page's own time stamps (targets: a
picture within 2 s of its data, 30 frames a second):

{markdown_table(["measured", "value"], rows)}

{machine()}
"""


if __name__ == "__main__":
    main()
