"""A real browser for tests of the board, and TensorBoard to point it at."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium on the PATH and playwright from PyPI: see docs/contributing.md",
)
# No sandbox, as the tests may run as root; no requests of the browser's own.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Seen:
    """What a page did that nobody asked for.

    Attributes:
        errors: of scripts, and what the console showed as errors.
        requests: addresses of all that was asked for.
    """

    def __init__(self, page) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._hear)
        page.on("request", lambda request: self.requests.append(request.url))

    def _hear(self, message) -> None:
        """TensorBoard does not find its own font behind a path prefix."""
        if message.type == "error" and "/font-roboto/" not in message.location["url"]:
            self.errors.append(f"{message.text} {message.location['url']}")


@contextmanager
def opened_browser(*flags: str) -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*_FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tensorboard(*options: str) -> Iterator[str]:
    """The address of a TensorBoard with these options."""
    command = [sys.executable, "-m", "tensorboard.main", "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--reload_interval", "1", *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"TensorBoard \S+ at (http://\S+)", line):
                yield found[1]
                return
        raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.communicate()


def frame_of(page):
    """The tab's own frame in TensorBoard's page, once it shows panels."""
    frame = page.frame_locator("iframe")
    frame.locator("#extremes canvas").first.wait_for(timeout=30_000)
    return frame


def num_colors(locator) -> int:
    """How many colours a panel's first canvas has: one alone is a blank."""
    return locator.locator("canvas").first.evaluate(
        """canvas => {
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )


def keep(page, name: str) -> None:
    """Leave a screenshot, for whoever looks why a test failed."""
    folder = Path(__file__).parents[2] / "artefacts"
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
