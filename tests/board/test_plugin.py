"""The server's side of the tab: what it answers, and what it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from lightning_optkit.board import schema
from lightning_optkit.board.page import STATIC
from lightning_optkit.board.payload import decode_run
from lightning_optkit.board.plugin import OptkitLoader, OptkitPlugin
from tests.board.recorded import ARRAYS, PLANE, SCALARS, Recorder, record

EVIL = '<img src=x onerror="hacked()">'


def plugin_of(folder):
    multiplexer = EventMultiplexer(size_guidance={"tensors": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    return OptkitLoader().load(TBContext(data_provider=provider))


@pytest.fixture(scope="module")
def apps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    record(folder / "one")
    record(folder / EVIL, range(0, 30, 10))
    record(folder / "theirs", scalars={"loss": float}, arrays={}, event=False)
    plugin = plugin_of(folder)
    assert plugin.is_active()
    return plugin.get_plugin_apps()


def answer(apps, route, **query):
    return Client(apps[route]).get(route, query_string=query)


def read(apps, route, **query):
    response = answer(apps, route, **query)
    assert response.status_code == 200, response.text
    return response.data


def test_every_file_of_the_page_has_a_route_and_no_other_file_has(apps):
    pages = {route for route in apps if "." in route}
    files = {f"/{f.relative_to(STATIC).as_posix()}" for f in STATIC.rglob("*.js")}
    assert pages == {*files, "/style.css"}
    response = answer(apps, "/index.js")
    assert response.data == (STATIC / "index.js").read_bytes()
    assert response.mimetype == "application/javascript"
    assert answer(apps, "/style.css").mimetype == "text/css"


def test_runs_with_something_to_show_have_their_place_and_a_stamp(apps):
    listed = json.loads(read(apps, "/runs"))
    assert {run["name"] for run in listed} == {"one", EVIL}
    assert len({run["index"] for run in listed}) == 2
    assert max(run["index"] for run in listed) <= 2  # among three runs
    stamps = {run["name"]: run["stamp"] for run in listed}
    assert stamps["one"] != stamps[EVIL]


def test_scalars_come_with_names_and_arrays_are_listed(apps):
    run = decode_run(read(apps, "/scalars", run="one"))
    assert set(run.scalars) == {*SCALARS, "optkit-events/warmup"}
    assert set(run.arrays) == {"optkit-gradient/layer_names"}
    assert set(run.listed) == {*ARRAYS, *PLANE} - {"optkit-gradient/layer_names"}
    assert decode_run(read(apps, "/scalars", run=EVIL)).name == EVIL


def test_an_array_comes_alone(apps):
    run = decode_run(read(apps, "/array", run="one", tag="optkit-landscape/losses"))
    assert set(run.arrays) == {"optkit-landscape/losses", "optkit-gradient/layer_names"}
    assert run.scalars == {}
    losses = run.arrays["optkit-landscape/losses"].arrays[0]
    np.testing.assert_array_equal(losses, PLANE["optkit-landscape/losses"])


def test_alerts_and_what_the_page_knows_are_json(apps):
    alerts = json.loads(read(apps, "/alerts", run="one"))
    assert alerts
    assert set(alerts[0]) >= {"severity", "title", "evidence", "advice", "confidence", "step"}
    about = json.loads(read(apps, "/about"))
    hessian = about["topics"][0]
    assert hessian["name"] == "optkit-hessian"
    assert hessian["example"] == [
        "from lightning_optkit import HessianSpectrum",
        "Trainer(callbacks=[HessianSpectrum(every_n_epochs=1)])",
    ]


@pytest.mark.parametrize("route", ["/scalars", "/array", "/alerts"])
@pytest.mark.parametrize("run", ["", "theirs", "../one", "/etc/passwd", "one\0", EVIL.upper()])
def test_only_known_runs_are_answered(apps, route, run):
    response = answer(apps, route, run=run, tag="optkit-landscape/losses")
    assert response.status_code == 404
    assert response.mimetype == "text/plain"
    assert response.text == f"no run {run!r} with data of lightning-optkit"


@pytest.mark.parametrize("tag", ["", "optkit-hessian/loss", "optkit-hessian/../x", "x" * 10_000])
def test_only_known_arrays_are_answered(apps, tag):
    response = answer(apps, "/array", run="one", tag=tag)
    assert response.status_code == 404
    assert "there is none" in response.text


def test_a_wrong_array_is_told_and_an_error_is_no_dead_server(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.array("optkit-hessian/quadrature", 0, np.zeros(3, np.float32))
    recorder.close()
    plugin = plugin_of(tmp_path)
    apps = plugin.get_plugin_apps()
    response = answer(apps, "/array", run=".", tag="optkit-hessian/quadrature")
    assert response.status_code == 404
    assert "should have shape (probes, nodes, 2)" in response.text
    plugin._provider = None
    response = answer(apps, "/runs")
    assert response.status_code == 500
    assert "AttributeError" in response.text


def test_it_is_active_only_with_data(tmp_path):
    record(tmp_path / "theirs", scalars={"loss": float}, arrays={}, event=False)
    assert not plugin_of(tmp_path).is_active()
    record(tmp_path / "ours", scalars={"optkit-lr/effective/SGD": float}, arrays={}, event=False)
    assert plugin_of(tmp_path).is_active()
    broken = plugin_of(tmp_path)
    broken._provider = None
    assert not broken.is_active()
    assert OptkitLoader().load(TBContext(data_provider=None)) is None


def test_a_spectrum_at_each_step_survives_unless_the_user_says_otherwise():
    for given, kept in (({}, 1000), ({"optkit": 5}, 5)):
        flags = argparse.Namespace(samples_per_plugin=dict(given))
        OptkitLoader().fix_flags(flags)
        assert flags.samples_per_plugin == {"optkit": kept}
    OptkitLoader().fix_flags(argparse.Namespace())  # of a command that has no such flag


def test_the_viewer_needs_neither_torch_nor_lightning():
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'matplotlib', 'scipy', 'rich', 'torchmetrics'):\n"
        "    sys.modules[name] = None\n"
        "import lightning_optkit.board.plugin, lightning_optkit.board.page\n"
        "import lightning_optkit.board.report\n"
        "from lightning_optkit.diagnosis import alerts\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_its_name_is_that_of_the_data():
    assert OptkitPlugin.plugin_name == schema.PLUGIN_NAME


def test_data_of_a_newer_version_is_told_with_the_numbers(tmp_path):
    recorder = Recorder(tmp_path, content=b"2")
    recorder.all_of(0)
    recorder.close()
    run = decode_run(read(plugin_of(tmp_path).get_plugin_apps(), "/scalars", run="."))
    assert set(run.scalars) == set(SCALARS)
    assert run.listed == ()
    assert {p.tag for p in run.problems} == set(ARRAYS)
    assert all("made by a newer lightning-optkit (format 2)" in p.message for p in run.problems)
