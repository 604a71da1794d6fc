"""The pictures of docs/board.md, taken of TensorBoard in a real browser: `make screenshots`."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_optkit.board.report import html_report, read_folders
from tests.board.browser import frame_of, opened_browser, tensorboard


def main(logs: str, out: str) -> None:
    folder = Path(out)
    with opened_browser() as browser, tensorboard("--logdir", logs) as server:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{server}#optkit")
        view = frame_of(page)
        page.wait_for_timeout(3000)  # for the spectra, and a look at the last step
        page.screenshot(path=folder / "board.png")
        view.locator("#extremes .plot").press("Home")
        for _ in range(4):
            view.locator("#extremes .plot").press("ArrowRight")
        view.locator("#extremes .plot").press("p")
        for _ in range(8):
            view.locator("#extremes .plot").press("ArrowRight")
        page.evaluate("document.body.classList.add('dark-mode')")
        view.locator("#spectrum").scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "board_dark.png")
        page.evaluate("document.body.classList.remove('dark-mode')")
        view.locator("#landscape").scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        view.locator("#landscape").screenshot(path=folder / "board_landscape.png")
        page.goto(f"{server}#custom_scalars")
        page.wait_for_timeout(3000)
        page.screenshot(path=folder / "board_custom_scalars.png")
        report = folder / "report.html"
        report.write_text(html_report(read_folders([logs])), encoding="utf-8")
        phone = browser.new_page(viewport={"width": 390, "height": 844})
        phone.goto(report.resolve().as_uri())
        phone.locator("#extremes canvas").first.wait_for()
        phone.wait_for_timeout(1000)
        phone.screenshot(path=folder / "board_phone.png")
        report.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
