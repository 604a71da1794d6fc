"""Every example runs, as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
FASTER = {  # what a study leaves out to be an example
    "minimum_ratio": ["--nets", "20"],
    "swa_vs_sgd": ["--seeds", "2", "--epochs", "2"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    result = subprocess.run(
        [sys.executable, str(path), *FASTER.get(path.stem, [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_sharpness_ends_below_the_limit_of_the_step(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "without_lightning")
    lines = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    for line in lines:
        limit, sharpness = float(line.split()[1]), float(line.split()[3])
        assert 0.8 * limit < sharpness < 1.05 * limit  # gradient descent hovers at 2 / step


def test_critical_points_at_low_losses_have_more_positive_eigenvalues(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "minimum_ratio")
    command = [sys.executable, str(path), "--nets", "40", "--out", str(tmp_path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = text.split("high losses")[1].split("Picture")[0].strip().splitlines()
    assert len(rows) == 3
    for row in rows:
        correlation, low, high = map(float, row.split()[1:])
        assert correlation < -0.6
        assert low > high + 0.1
    assert (tmp_path / "minimum_ratio.png").stat().st_size > 10_000


def test_swa_needs_its_statistics_pass_and_beats_sgd_on_wrong_labels(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "swa_vs_sgd")
    options = ["--seeds", "3", "--epochs", "12", "--out", str(tmp_path)]
    text = subprocess.run(
        [sys.executable, str(path), *options], capture_output=True, text=True, check=True
    ).stdout
    rows = text.split("test error in %")[1].split("Change")[0].strip().splitlines()
    error, loss = {}, {}
    for row in rows:
        name, _, loss_and_spread, error_and_spread = re.split(r"\s{2,}", row.strip())
        loss[name] = float(loss_and_spread.split(" ± ")[0])
        error[name] = float(error_and_spread.split(" ± ")[0])
    averaged = error["SWA, statistics pass"]
    assert averaged < error["SWA, averaged statistics"] - 0.5
    assert averaged < error["SWA, statistics of the last model"] - 5
    assert averaged < error["SGD, rate falls to 0"] - 1
    assert averaged < error["SGD, rate stays up, statistics pass"] - 3
    assert error["SGD, rate stays up, statistics pass"] < error["SGD, rate stays up"] - 3
    assert loss["SWA, statistics pass"] < min(
        value for name, value in loss.items() if name != "SWA, statistics pass"
    )
    changes = re.findall(r"^([+-][\d.]+) ±", text, flags=re.MULTILINE)
    before = "SWA, averaged statistics", "SGD, rate falls to 0"
    for change, name in zip(changes, before, strict=True):
        assert abs(float(change) - (averaged - error[name])) < 0.16  # three roundings to 0.1
    assert (tmp_path / "swa_vs_sgd.png").stat().st_size > 10_000
