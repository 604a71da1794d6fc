"""Reports of folders, and the summary in a terminal."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib

import numpy as np
import pytest
from rich.console import Console

from lightning_optkit.board import report
from lightning_optkit.board.payload import decode_run
from lightning_optkit.board.report import html_report, json_report, read_folders
from lightning_optkit.board.runs import ArraySeries, Run, Series
from lightning_optkit.cli import main
from lightning_optkit.run_summary import Condition, sparkline, summary_table, verdicts
from tests.board.recorded import SCALARS, quadrature, record

EVIL = "[bold]<img src=x onerror=alert(1)>[nothing]"


def embedded(page):
    (text,) = re.findall(r'id="optkit-data">(.*?)</script>', page, flags=re.DOTALL)
    data = json.loads(text)
    runs = [decode_run(zlib.decompress(base64.b64decode(run["payload"]))) for run in data["runs"]]
    return data, runs


def test_a_report_holds_the_runs_of_several_folders(tmp_path):
    for name in ("first", "second"):
        record(tmp_path / name / "run")
    out = tmp_path / "deep" / "report.html"
    arguments = ["report", str(tmp_path / "first"), str(tmp_path / "second"), "-o", str(out)]
    assert main(arguments) == 0
    data, runs = embedded(out.read_text(encoding="utf-8"))
    assert [run.name for run in runs] == ["first/run", "second/run"]
    loss = runs[0].scalars["optkit-hessian/loss"]
    np.testing.assert_array_equal(
        loss.values, np.float32([SCALARS["optkit-hessian/loss"](t) for t in loss.steps])
    )
    found = runs[0].arrays["optkit-hessian/quadrature"].arrays[3]
    np.testing.assert_allclose(found, quadrature(30), rtol=2.0**-12)
    assert data["about"]["notes"] == ["2 runs, at most 200 points of a tag"]
    assert data["runs"][0]["alerts"]


def large_run(name, points):
    """Spectra that do not pack: 4 probes of 80 nodes, as the callback logs by default."""
    rng = np.random.default_rng(points)
    arrays = rng.lognormal(size=(points, 4, 80, 2)).astype(np.float32)
    values = rng.normal(size=points)
    return Run(
        name,
        {f"{tag}{i}": Series.of([(t, t, values[t]) for t in range(points)])
         for tag in SCALARS for i in range(2)},
        {"optkit-hessian/quadrature": ArraySeries.of([(t, t, a) for t, a in enumerate(arrays)])},
    )  # fmt: skip


def test_three_runs_of_200_points_stay_under_two_megabytes():
    page = html_report([large_run(name, 200) for name in "abc"])
    assert 500_000 < len(page) < 2_000_000
    _, runs = embedded(page)
    assert all(len(run.arrays["optkit-hessian/quadrature"].steps) == 200 for run in runs)
    assert all(run.problems == () for run in runs)


def test_beyond_that_points_are_left_out_and_the_page_says_so(monkeypatch):
    run = large_run("a", 300)
    _, (shown,) = embedded(html_report([run], max_points=100))
    assert {p.message for p in shown.problems} == {"shown: 100 of 300 points"}
    monkeypatch.setattr(report, "MAX_BYTES", 600_000)
    page = html_report([run], max_points=300)
    data, (shown,) = embedded(page)
    count = len(shown.scalars[f"{next(iter(SCALARS))}0"].steps)
    assert len(page) <= 600_000
    assert 25 <= count < 300
    assert data["about"]["notes"] == [f"1 run, at most {count} points of a tag"]


def test_json_has_last_numbers_and_verdicts_even_where_json_has_no_such_number(tmp_path, capsys):
    record(tmp_path, scalars=SCALARS | {"optkit-hessian/trace": lambda t: math.nan})
    assert main(["report", "--json", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["last"]["optkit-hessian/trace"] == {"step": 190, "value": "NaN"}
    assert run["last"]["optkit-hessian/lambda_max"]["value"] == pytest.approx(2.9)
    assert run["alerts"][0]["rule"]
    infinite = Run("r", {"a": Series.of([(0, 0, math.inf)]), "b": Series.of([(0, 0, -math.inf)])})
    last = json_report([infinite])["runs"][0]["last"]
    assert [last[tag]["value"] for tag in "ab"] == ["Infinity", "-Infinity"]


@pytest.mark.parametrize("command", ["report", "summary"])
def test_nothing_to_read_is_told(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "no")]) == 2
    assert "must be a folder of logs" in " ".join(capsys.readouterr().err.split())
    assert main([command, str(tmp_path)]) == 2
    assert "must hold what a callback of lightning-optkit logged" in capsys.readouterr().err
    with pytest.raises(LookupError):
        read_folders([tmp_path])


def test_an_output_that_cannot_be_written_is_told(tmp_path, capsys):
    record(tmp_path / "run")
    assert main(["report", str(tmp_path), "-o", str(tmp_path)]) == 2  # a folder
    assert "`--out` must be a file that can be written" in capsys.readouterr().err


# -- summary ---------------------------------------------------------------------------------------


def printed(renderable, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(renderable)
    return console.export_text()


def test_a_row_a_run(tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b", scalars={"optkit-averaging/num_averaged": lambda t: 0}, arrays={})
    runs = read_folders([tmp_path])
    text = printed(summary_table(runs))
    first, second = [line.split() for line in text.splitlines()[3:5]]
    # run, step, loss, trend, ratio and its bounds, λmax, of the limit, sharpness
    assert first[:3] == ["a", "190", "0.0431"]
    assert first[4:] == ["0.990", "0.94", "to", "1.04", "2.9", "1.16", "0.3"]
    assert second == ["b", "190", "–", "–", "–", "–", "–"]
    assert "sharpness" not in printed(summary_table(runs, width=80), width=80)
    lines = verdicts(runs)
    assert any("Nothing was averaged" in line for line in lines)


def test_names_are_shown_as_they_are(capsys):
    run = Run(EVIL, {"optkit-hessian/loss": Series.of([(0, 0.0, 1.0)])})
    assert EVIL in printed(summary_table([run]))
    assert EVIL in printed("\n".join(verdicts([run])))


def test_a_last_value_that_is_no_number_is_shown():
    points = Series.of([(0, 0.0, 60.0), (10, 1.0, math.nan)])
    row = printed(summary_table([Run("r", {"optkit-stability/lambda_max": points})]))
    assert row.splitlines()[3].split() == ["r", "10", "–", "–", "nan", "–", "–"]


def test_sparkline_is_as_high_as_numbers_are():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparkline([-1.0, 1.0, -1.0]) == "▁█▁"
    assert sparkline([5.0] * 3) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([math.nan, math.inf]) == "··"
    assert len(sparkline(list(range(1000)))) == 12


@pytest.mark.parametrize(
    ("conditions", "status", "said"),
    [
        (["lambda_max>50"], 0, ""),
        (["lambda_max > 2.8"], 1, "run: optkit-hessian/lambda_max is 2.9 at step 190"),
        (["optkit-stability/ratio>=1"], 1, "optkit-stability/ratio is 1.16"),
        (["lambda_min<0", "tol==1"], 1, "optkit-hessian/lambda_min is -0.1"),
        (["lambda_min != -0.1"], 1, "lambda_min"),  # float32 is not quite -0.1
        (["batch_size<=63"], 0, ""),
        (["critical>0"], 0, ""),
        (["info>=0"], 1, "alerts, info>=0"),
        (["trace>1e9"], 1, "optkit-hessian/trace is nan"),  # never passes silently
        (["lambda_maximum>5"], 2, "must name something that was logged, got 'lambda_maximum'"),
        (["lambda_max"], 2, "must be a name, one of"),
        (["lambda_max>many"], 2, "must be a name, one of"),
        (["lambda_max>nan"], 2, "must be a name, one of"),  # which could never hold
    ],
)
def test_conditions_give_the_exit_status(conditions, status, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    record(tmp_path / "run", scalars=SCALARS | {"optkit-hessian/trace": lambda t: math.nan})
    options = [word for text in conditions for word in ("--fail-on", text)]
    assert main(["summary", str(tmp_path), *options]) == status
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_short_name_means_the_first_topic_that_has_it_with_any_callbacks_name():
    run = Run(
        "r",
        {
            "optkit-sharpness/lambda_max": Series.of([(0, 0.0, 9.0)]),
            "optkit-hessian-slow/lambda_max": Series.of([(0, 0.0, 1.0)]),
        },
    )
    assert Condition.of("lambda_max>5").failures(run) == []
    assert Condition.of("optkit-sharpness/lambda_max>5").failures(run) != []
    assert Condition.of("info==1").failures(run) == ["r: 1 alert, info==1"]


def test_summary_as_json_is_that_alone(tmp_path, capsys):
    record(tmp_path / "run")
    assert main(["summary", "--json", str(tmp_path), "--fail-on", "lambda_max>1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failures"] == ["run: optkit-hessian/lambda_max is 2.9 at step 190, lambda_max>1"]
    assert found["runs"][0]["name"] == "run"
