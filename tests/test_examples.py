"""Every example runs, as a reader would run it."""

import re
from pathlib import Path

import pytest

from tests.distributed import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"
# What these print is looked at: below, and of the escape in tests/callbacks/test_saddle_escape.py.
READ = {"minimum_ratio", "mixup", "saddle_escape", "swa_vs_sgd", "without_lightning"}
FASTER = {  # what a study leaves out to be an example
    "board_tour": ["--epochs", "2", "--samples", "64", "--resolution", "5", "--runs", "mixed"],
    "large_batch": ["--seeds", "2", "--epochs", "6", "--samples", "400"],
    "norm_swap": ["--epochs", "1", "--samples", "200"],
    "sharp_minima": ["--seeds", "2", "--epochs", "1"],
    "warmup": ["--length", "0.2"],
}


def printed(stem, folder, *options):
    """Return what an example prints that is run in a folder."""
    return run_script(EXAMPLES / f"{stem}.py", *options, folder=folder)


@pytest.mark.parametrize("stem", sorted({path.stem for path in EXAMPLES.glob("*.py")} - READ))
def test_example_runs(stem, tmp_path):
    assert printed(stem, tmp_path, *FASTER.get(stem, []))


def test_sharpness_ends_below_the_limit_of_the_step(tmp_path):
    _, *lines = printed("without_lightning", tmp_path).splitlines()
    assert len(lines) == 3
    for line in lines:
        limit, sharpness = float(line.split()[1]), float(line.split()[3])
        assert 0.8 * limit < sharpness < 1.05 * limit  # gradient descent hovers at 2 / step


def test_critical_points_at_low_losses_have_more_positive_eigenvalues(tmp_path):
    text = printed("minimum_ratio", tmp_path, "--nets", "40", "--out", str(tmp_path))
    rows = text.split("high losses")[1].split("Picture")[0].strip().splitlines()
    assert len(rows) == 3
    for row in rows:
        correlation, low, high = map(float, row.split()[1:])
        assert correlation < -0.6
        assert low > high + 0.1
    assert (tmp_path / "minimum_ratio.png").stat().st_size > 10_000


def test_swa_needs_its_statistics_pass_and_beats_sgd_on_wrong_labels(tmp_path):
    text = printed("swa_vs_sgd", tmp_path, "--seeds", "2", "--epochs", "12")
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
    assert (tmp_path / "optkit_logs" / "swa_vs_sgd.png").stat().st_size > 10_000


def test_mixing_keeps_a_net_from_learning_wrong_labels_and_makes_it_doubt(tmp_path):
    text = printed("mixup", tmp_path, "--seeds", "2", "--epochs", "26")
    rows = text.split("calibration error")[1].split("Change")[0].strip().splitlines()
    error, doubt = {}, {}
    for row in rows:
        name, errors, _, calibration = re.split(r"\s{2,}", row.strip())
        error[name] = float(errors.split(" ± ")[0])
        doubt[name] = float(calibration.split(" ± ")[0])
    for name in ("Mixup", "CutMix"):
        assert error[name] < error["plain"] - 2
        assert doubt[name] > doubt["plain"] + 5
    assert (tmp_path / "optkit_logs" / "mixup.png").stat().st_size > 10_000
