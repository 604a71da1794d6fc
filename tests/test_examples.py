"""Every example runs, as a reader would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
FASTER = {"minimum_ratio": ["--nets", "20"]}  # what a study leaves out to be an example


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
