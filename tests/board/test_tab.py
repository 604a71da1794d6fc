"""The page in a real browser: in TensorBoard, and from a file."""

from __future__ import annotations

import csv
import io
import re
import time

import pytest

from lightning_optkit.board.report import html_report, read_folders
from tests.board.browser import (
    Seen,
    frame_of,
    keep,
    needs_browser,
    num_colors,
    opened_browser,
    tensorboard,
)
from tests.board.recorded import SCALARS, STEPS, Recorder, record

pytestmark = needs_browser

EVIL = "<img src=x onerror=document.title='hacked'>"
PANELS = {  # in their order; those with a canvas, and those without
    "verdict": False, "spectrum": True, "density": True, "extremes": True, "minimum_ratio": True,
    "loss": True, "sharpness": True, "landscape": True, "layers": True, "noise": True,
    "steps": True, "schedule": True, "mixing": True, "averaging": True, "events": False,
    "cost": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as found:
        yield found


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    record(folder / "steady")
    worse = {tag: (lambda t, value=value: value(t) * 1.5) for tag, value in SCALARS.items()}
    record(folder / EVIL, scalars=worse | {"epoch": SCALARS["epoch"]})
    return folder


@pytest.fixture(scope="module")
def server(logs):
    with tensorboard("--logdir", str(logs)) as address:
        yield address


@pytest.fixture(scope="module")
def report(logs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_report(read_folders([logs])), encoding="utf-8")
    return f"file://{path}"


@pytest.fixture
def opened(browser):
    """Open a page, and see at the end that nothing went wrong in it."""
    pages = []

    def opened(address, width=1400, height=1000, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        seen = Seen(page)
        pages.append((page, seen))
        page.goto(address)
        return page

    yield opened
    for page, seen in pages:
        page.close()
        assert seen.errors == []
        assert all(re.match(r"file://|http://(127\.0\.0\.1|localhost):|data:|blob:", url)
                   for url in seen.requests), seen.requests  # fmt: skip


def in_report(page):
    page.locator("#extremes canvas").first.wait_for()
    return page


def readout(view, panel="extremes"):
    return view.locator(f"#{panel} .readout").inner_text().replace("\n", " ")


def wait(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("where", ["tab", "report"])
def test_every_panel_shows_something(where, opened, server, report):
    page = opened(f"{server}#optkit" if where == "tab" else report)
    view = frame_of(page) if where == "tab" else in_report(page)
    assert view.locator("section").evaluate_all("all => all.map(one => one.id)") == list(PANELS)
    for panel, has_canvas in PANELS.items():
        section = view.locator(f"#{panel}")
        if has_canvas:
            wait(lambda section=section: section.locator("canvas").count() > 0)
            wait(lambda section=section: num_colors(section) > 3)
            assert section.locator(".plot").first.get_attribute("aria-label")
            assert readout(view, panel)
    assert "Nothing wrong found" in view.locator("#verdict").inner_text()
    assert "end of warmup" in view.locator("#events").inner_text()
    assert "steady λmax 2.9 [2.85, 2.95]" in readout(view)  # 1 + 190 / 100 ± 0.05
    assert "steady 0.99 [0.94, 1.04]" in readout(view, "minimum_ratio")
    assert "least conv1" in readout(view, "layers")
    assert "loss 0 to 8" in readout(view, "landscape")
    keep(page, where)


def test_a_run_named_like_markup_is_shown_as_that_text(opened, server, report):
    page = opened(report)
    chips = in_report(page).locator(".chip")
    assert EVIL in chips.all_inner_texts()
    assert page.locator("img").count() == 0
    assert page.title() == f"Optkit: {EVIL}, steady"
    view = frame_of(opened(f"{server}#optkit"))
    assert EVIL in view.locator(".chip").all_inner_texts()
    assert view.locator("img").count() == 0


def test_one_cursor_for_all_panels(opened, report):
    page = in_report(opened(report))
    before = readout(page, "minimum_ratio")
    plot = page.locator("#extremes .plot")
    plot.hover()
    wait(lambda: readout(page, "minimum_ratio") != before)
    assert readout(page, "density").startswith(f"{EVIL} step ")
    page.locator("h1").hover()  # away: back where it was
    wait(lambda: readout(page, "minimum_ratio") == before)
    plot.click()
    page.locator("h1").hover()
    wait(lambda: readout(page, "minimum_ratio") != before)  # a click stays
    assert "optkit=" in page.url


def test_keys_move_pin_and_switch(opened, report):
    page = in_report(opened(report))
    page.keyboard.press("Home")
    wait(lambda: "steady λmax 1 [0.95, 1.05]" in readout(page))
    page.keyboard.press("ArrowRight")
    wait(lambda: "steady λmax 1.1 [1.05, 1.15]" in readout(page))
    wait(lambda: page.locator("[aria-live]").inner_text() == "step 10")
    page.keyboard.press("p")
    page.keyboard.press("Shift+ArrowRight")
    wait(lambda: "steady λmax 1.1 [1.05, 1.15] → 2.1 [2.05, 2.15]" in readout(page))
    assert "step 10 → 110" in page.locator("header").inner_text().replace("\n", " ")
    page.keyboard.press("e")
    wait(lambda: "epoch" in page.locator("header .help").inner_text())
    assert "steady λmax 1.1" in readout(page)
    page.keyboard.press("Escape")
    wait(lambda: "→" not in readout(page))
    page.keyboard.press("r")
    wait(lambda: page.get_by_role("button", name="ridges").get_attribute("aria-pressed") == "true")
    wait(lambda: num_colors(page.locator("#spectrum")) > 3)
    page.locator("#extremes select").first.focus()
    page.keyboard.press("End")  # of the choice, not of the run
    wait(lambda: '"extremes.scale"' in page.evaluate("decodeURIComponent(location.hash)"))


def test_a_link_restores_the_view(opened, report, server):
    page = in_report(opened(report))
    for key in ("Home", "ArrowRight", "p", "End", "ArrowLeft", "r"):
        page.keyboard.press(key)
    page.get_by_role("button", name=EVIL).click()
    page.locator("#sharpness select").first.select_option("epsilon")
    wait(lambda: "ε-sharpness" in readout(page, "sharpness"))
    page.locator("h1").hover()
    again = in_report(opened(page.url))
    for panel in ("extremes", "sharpness", "density"):
        wait(lambda panel=panel: readout(again, panel) == readout(page, panel))
    assert "→" in readout(again)
    assert EVIL not in readout(again)
    page = opened(f"{server}#optkit")
    frame_of(page).locator("#extremes .plot").press("Home")
    wait(lambda: "optkit=" in page.url)
    view = frame_of(opened(page.url))  # TensorBoard keeps the tab, and what we wrote
    wait(lambda: "steady λmax 1 [0.95, 1.05]" in readout(view))


def test_a_link_that_was_cut_or_forged_shows_the_page_as_it_begins(opened, report):
    for text in ("%7B%22at", "%7B%22at%22%3A%22x%22%2C%22off%22%3A5%7D", "null", "%ff"):
        page = in_report(opened(f"{report}#optkit={text}"))
        wait(lambda page=page: "steady λmax 2.9" in readout(page))


def test_a_report_in_a_frame_of_others_is_no_blank_page(opened, report, tmp_path):
    (tmp_path / "frame.html").write_text(
        f'<iframe sandbox="allow-scripts" src="{report}"></iframe>'
    )
    page = opened(f"file://{tmp_path}/frame.html")
    frame = page.frame_locator("iframe")
    frame.locator("#extremes canvas").first.wait_for()
    frame.locator("#extremes .plot").press("Home")
    wait(lambda: "steady λmax 1 [0.95, 1.05]" in readout(frame))


def test_runs_are_switched_off_on_and_alone(opened, report):
    page = in_report(opened(report))
    chip = page.get_by_role("button", name=EVIL)
    chip.click()
    wait(lambda: EVIL not in readout(page))
    assert chip.get_attribute("aria-pressed") == "false"
    chip.click(modifiers=["Alt"])
    wait(lambda: "steady" not in readout(page))
    assert EVIL in readout(page)


def test_day_and_night(opened, server, report):
    page = opened(f"{server}#optkit")
    view = frame_of(page)
    background = "getComputedStyle(document.body).backgroundColor"
    light = view.locator("body").evaluate(f"() => {background}")
    page.evaluate("document.body.classList.toggle('dark-mode')")
    wait(lambda: view.locator("body").evaluate(f"() => {background}") != light)
    keep(page, "dark")
    page.evaluate("document.body.classList.toggle('dark-mode')")
    wait(lambda: view.locator("body").evaluate(f"() => {background}") == light)
    dark = in_report(opened(report, color_scheme="dark"))
    assert dark.evaluate(background) != light


@pytest.mark.parametrize("width", [390, 820, 3840])
def test_it_fits_the_window(width, opened, report):
    page = in_report(opened(report, width=width, height=900))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.evaluate("getComputedStyle(document.querySelector('main')).gridTemplateColumns")
    count = len(columns.split())
    assert count == 1 if width == 390 else count >= (6 if width == 3840 else 2)
    keep(page, f"width_{width}")


def test_exports(opened, report):
    page = in_report(opened(report))
    with page.expect_download() as download:
        page.locator("#minimum_ratio").get_by_text("CSV").click()
    assert download.value.suggested_filename == "minimum_ratio.csv"
    text = download.value.path().read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["run"] == "steady"]
    assert [int(row["step"]) for row in rows] == list(STEPS)
    for row in rows:
        step = int(row["step"])
        for key, name in (("value", ""), ("lower", "_lower"), ("upper", "_upper")):
            value = SCALARS[f"optkit-hessian/minimum_ratio{name}"](step)
            assert float(row[key]) == pytest.approx(value, rel=1e-6)
    panels = list(PANELS)
    for some in (panels[:8], panels[8:]):  # a browser stops a page after ten downloads
        page = in_report(opened(report))
        for panel in some:
            with page.expect_download() as download:
                page.locator(f"#{panel}").get_by_text("CSV", exact=True).click()
            assert download.value.path().stat().st_size > 60
            assert page.locator(f"#{panel}").get_by_text("PNG").count() == PANELS[panel]
    with page.expect_download() as download:
        page.locator("#spectrum").get_by_text("PNG").click()
    assert download.value.path().read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert download.value.path().stat().st_size > 10_000


def test_a_live_run_grows_and_the_cursor_stays(opened, tmp_path):
    recorder = Recorder(tmp_path / "run")
    for step in (0, 10, 20):
        recorder.all_of(step)
    recorder.flush()
    with tensorboard("--logdir", str(tmp_path)) as server:
        view = frame_of(opened(f"{server}#optkit"))
        wait(lambda: "λmax 1.2 " in readout(view))
        view.locator("#extremes .plot").press("ArrowLeft")
        wait(lambda: "λmax 1.1 " in readout(view))
        for step in (30, 40):
            recorder.all_of(step)
        recorder.close()
        record(tmp_path / "later")
        wait(lambda: view.locator(".chip").count() == 2, 30)
        view.locator("header").get_by_text("later").click()
        assert "run λmax 1.1 " in readout(view)  # where it was
        view.locator("#extremes .plot").press("Escape")
        wait(lambda: "run λmax 1.4 " in readout(view))  # and the end is a later one


def test_panels_without_data_say_how_to_fill_them_and_broken_data_is_told(opened, tmp_path):
    record(tmp_path / "few", scalars={"optkit-hessian/loss": lambda t: 1.0}, arrays={}, event=False)
    newer = Recorder(tmp_path / "newer", content=b"9")
    newer.all_of(0)
    newer.close()
    path = tmp_path / "report.html"
    path.write_text(html_report(read_folders([tmp_path])), encoding="utf-8")
    page = opened(f"file://{path}")
    page.locator("#loss canvas").first.wait_for()
    mixing = page.locator("#mixing").inner_text()
    page.get_by_role("button", name="newer").click()
    wait(lambda: "from lightning_optkit import Mixup" in page.locator("#mixing").inner_text())
    assert "Trainer(callbacks=[Mixup(alpha=0.2)])" in page.locator("#mixing").inner_text()
    assert "from lightning_optkit" not in mixing
    page.get_by_role("button", name="newer").click()
    wait(lambda: "made by a newer lightning-optkit (format 9)"
         in page.locator("#spectrum").inner_text())  # fmt: skip


def test_a_dead_server_is_told(opened, tmp_path, browser):
    record(tmp_path / "run")
    with tensorboard("--logdir", str(tmp_path)) as server:
        page = browser.new_page()
        page.goto(f"{server}#optkit")
        view = frame_of(page)
    wait(lambda: view.locator("#verdict [role=alert]").count() == 1)
    assert "steady" not in readout(view)
    assert "λmax 2.9" in readout(view)  # what was read is still shown
    page.close()


@pytest.mark.parametrize(
    "options",
    [["--load_fast", "false", "--path_prefix", "/some/prefix"], ["--load_fast", "true"]],
    ids=["slow loader, prefix", "fast loader"],
)
def test_both_loaders_and_a_prefix(options, opened, logs):
    with tensorboard("--logdir", str(logs), *options) as server:
        view = frame_of(opened(f"{server}#optkit"))
        wait(lambda: num_colors(view.locator("#spectrum")) > 3)
        assert "steady λmax 2.9 [2.85, 2.95]" in readout(view)


def test_logdir_spec(opened, logs):
    with tensorboard("--logdir_spec", f"mine:{logs / 'steady'}") as server:
        view = frame_of(opened(f"{server}#optkit"))
        wait(lambda: "mine/. λmax 2.9" in readout(view))
