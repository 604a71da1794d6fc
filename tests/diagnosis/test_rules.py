"""Each rule on numbers where it must speak, and on numbers where it must not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_optkit.board import tags
from lightning_optkit.board.runs import ArraySeries, Problem, Run, Series
from lightning_optkit.board.schema import names_array
from lightning_optkit.diagnosis import SEVERITIES, alerts
from lightning_optkit.diagnosis.evidence import Evidence
from lightning_optkit.diagnosis.rules import RULES

FALLING = [4.0, 3.0, 2.5, 2.0, 1.5, 1.0]
RISING = [1.0, 1.1, 1.3, 1.6, 2.0, 2.6]
NAN, INF = math.nan, math.inf


def run_of(arrays=None, problems=(), every=10, **scalars):
    """A run from lists by tag; a double underscore stands for the slash."""
    series = {
        f"optkit-{tag.replace('__', '/')}" if "__" in tag else tag: Series.of(
            [(every * i, float(every * i), value) for i, value in enumerate(values)]
        )
        for tag, values in scalars.items()
    }
    return Run("run", series, arrays or {}, tuple(problems))


def updates(*ratios, names=None):
    """Arrays of layers whose updates have these ratios, at each of three points."""
    table = np.full((len(ratios), 6), 1.0, np.float32)
    table[:, 4] = ratios
    names = names or [f"layer{i}" for i in range(len(ratios))]
    points = range(0, 30, 10)
    return {
        "optkit-gradient/layer_steps": ArraySeries.of([(t, t, table) for t in points]),
        "optkit-gradient/layer_names": ArraySeries.of([(t, t, names_array(names)) for t in points]),
    }


SPEAKS = {
    "loss_is_not_a_number": run_of(hessian__loss=[1.0, 2.0, NAN, NAN]),
    "unstable": run_of(stability__ratio=[0.5, 1.3, 1.5, 2.4, 1.2, 0.9], gradient__loss=RISING),
    "edge_of_stability": run_of(stability__ratio=[0.5, 0.9, 1.1, 1, 1, 1], hessian__loss=FALLING),
    "at_a_saddle": run_of(hessian__kind=[0, 2], hessian__negative_ratio_lower=[0, 0.03]),
    "loss_rose": run_of(hessian__loss=[4, 1, 1, 1, 2.2, 2.3, 2.4]),
    "dead_units": run_of(gradient__dead=[0.1, 0.6]),
    "saturated_units": run_of(gradient__saturated=[0.1, 0.95]),
    "layers_stand_still": run_of(updates(1e-3, 2e-3, 1e-7, 1e-3), gradient__loss=FALLING),
    "exploding_gradient": run_of(gradient__gradient_norm=[1, 2, 1, 150, 1e3, 1e5]),
    "rate_far_below_the_limit": run_of(stability__ratio=[1e-4, 2e-3, 1e-3]),
    "step_size": run_of(gradient__update_ratio=[0.01, 0.2, 0.3, 0.5]),
    "nothing_averaged": run_of(averaging__num_averaged=[0, 0]),
    "nothing_mixed": run_of(mixing__share=[0, 0]),
    "batch_against_noise": run_of(
        gradient__noise_scale=[3000.0], gradient__noise_scale_standard_error=[100.0],
        gradient__batch_size=[64],
    ),
    "gaps_in_the_landscape": run_of(landscape__num_gaps=[3]),
    "costly_diagnostics": run_of(hessian__seconds=[5.0] * 10, hessian__loss=FALLING + [1] * 4),
}  # fmt: skip

IS_SILENT = {
    "exploding_gradient": [
        run_of(gradient__gradient_norm=[1, 2, 1, 90, 90, 90]),
        run_of(gradient__gradient_norm=[1, 2, 1, 1e5, 1, 1]),  # one batch
        run_of(gradient__gradient_norm=[1, 1, 1e5, 1e5, 1e5]),  # too few
        run_of(gradient__gradient_norm=[0, 0, 0, 1, 1, 1]),
        run_of(gradient__gradient_norm=[NAN] * 6),
    ],
    "rate_far_below_the_limit": [
        run_of(stability__ratio=[1e-4, 0.02, 1e-4]),  # a schedule
        run_of(stability__ratio=[1e-3] * 2),
        run_of(stability__ratio=[NAN] * 3),
        run_of(stability__ratio=[-1.0] * 3),  # curving down everywhere
    ],
    "loss_is_not_a_number": [run_of(hessian__loss=FALLING), run_of(hessian__trace=[NAN])],
    "unstable": [
        run_of(stability__ratio=[1.3, 1.5, 0.9, 1.5, 1.2, 0.9], gradient__loss=RISING),  # two a row
        run_of(stability__ratio=[1.5] * 6, gradient__loss=FALLING),
        run_of(stability__ratio=[1.05] * 6, gradient__loss=RISING),
        run_of(stability__ratio=[1.5] * 6),
        run_of(stability__ratio=[NAN] * 6, gradient__loss=RISING),
    ],
    "edge_of_stability": [
        run_of(stability__ratio=[1.0] * 6, hessian__loss=RISING),
        run_of(stability__ratio=[0.5] * 6, hessian__loss=FALLING),
    ],
    "at_a_saddle": [
        run_of(hessian__kind=[2], hessian__negative_ratio_lower=[0.0]),  # may be none at all
        run_of(hessian__kind=[0], hessian__negative_ratio_lower=[0.3]),  # anywhere in training
        run_of(hessian__kind=[2, 1], hessian__negative_ratio_lower=[0.3, 0.3]),
    ],
    "loss_rose": [
        run_of(hessian__loss=FALLING),
        run_of(hessian__loss=[4, 1, 1, 1, 1.5, 1.6, 1.7]),
        run_of(hessian__loss=[4, 1, 1, 1, 1, 1, 9]),  # one point
        run_of(hessian__loss=[1, 1, 1, 1, 1, NAN]),
    ],
    "dead_units": [run_of(gradient__dead=[0.9, 0.4])],
    "saturated_units": [run_of(gradient__saturated=[0.4])],
    "layers_stand_still": [
        run_of(updates(1e-3, 2e-3, 1e-5)),
        run_of(updates(1e-3, 2e-3, NAN)),
        run_of(updates(NAN, NAN)),
        run_of(updates(1e-3, 1e-9, names=["one"])),  # names that do not fit
    ],
    "step_size": [
        run_of(gradient__update_ratio=[1e-3] * 3),
        run_of(gradient__update_ratio=[0.5, 1e-3, 1e-3, 1e-3]),
        run_of(gradient__update_ratio=[0.5] * 2),
    ],
    "nothing_averaged": [run_of(averaging__num_averaged=[0, 1])],
    "nothing_mixed": [run_of(mixing__share=[0, 0.5])],
    "batch_against_noise": [
        run_of(
            gradient__noise_scale=[3000.0], gradient__noise_scale_standard_error=[1500.0],
            gradient__batch_size=[64],
        ),
        run_of(
            gradient__noise_scale=[64.0], gradient__noise_scale_standard_error=[1.0],
            gradient__batch_size=[64],
        ),
        run_of(gradient__noise_scale=[3000.0], gradient__batch_size=[64]),
    ],
    "gaps_in_the_landscape": [run_of(landscape__num_gaps=[3, 0])],
    "costly_diagnostics": [
        run_of(hessian__seconds=[0.4] * 10),
        run_of(hessian__seconds=[5.0] * 5),  # of 40 seconds: the first and the last are due
    ],
}  # fmt: skip


def said_by(name, run):
    (rule,) = [
        rule for rule in RULES if rule.__name__ in (name, f"{name.split('_units')[0]}_units")
    ]
    return rule(Evidence(run))


def test_each_rule_has_both_cases_and_says_where_it_comes_from():
    names = [rule.__name__ for rule in RULES]
    assert set(names) == set(SPEAKS) == set(IS_SILENT)
    assert all(rule.__doc__ for rule in RULES)


@pytest.mark.parametrize("name", SPEAKS)
def test_it_speaks(name):
    alert = said_by(name, SPEAKS[name])
    assert alert is not None
    assert alert.rule == name
    assert alert.severity in SEVERITIES
    assert alert.advice.endswith(".")
    found = alerts(SPEAKS[name])
    assert alert in found
    assert [SEVERITIES.index(a.severity) for a in found] == sorted(
        SEVERITIES.index(a.severity) for a in found
    )


@pytest.mark.parametrize(
    ("name", "i"), [(name, i) for name, runs in IS_SILENT.items() for i in range(len(runs))]
)
def test_it_is_silent(name, i):
    assert said_by(name, IS_SILENT[name][i]) is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_without_numbers_it_is_silent(rule):
    assert rule(Evidence(run_of())) is None
    empty = {tag.name: Series.of([]) for topic in tags.TOPICS for tag in topic.scalars}
    logged = {f"{t.name}/{name}": series for t in tags.TOPICS for name, series in empty.items()}
    assert rule(Evidence(Run("run", logged))) is None


def test_numbers_of_the_evidence():
    unstable = said_by("unstable", SPEAKS["unstable"])
    assert unstable.step == 10
    assert "up to 2.4 times" in unstable.evidence
    assert "4 points in a row" in unstable.evidence
    assert "from 1.1 to 2" in unstable.evidence
    assert "Divide the learning rate by 2" in unstable.advice
    assert "layer2" in said_by("layers_stand_still", SPEAKS["layers_stand_still"]).evidence
    assert "3.00%" in said_by("at_a_saddle", SPEAKS["at_a_saddle"]).evidence
    rose = said_by("loss_rose", SPEAKS["loss_rose"])
    assert "was 1 at step 20 and is 2.3 now" in rose.evidence
    assert said_by("loss_is_not_a_number", SPEAKS["loss_is_not_a_number"]).step == 20
    small = said_by("step_size", run_of(gradient__update_ratio=[1e-8] * 3))
    assert small.title == "Steps are very small"
    large = run_of(
        gradient__noise_scale=[3.0], gradient__noise_scale_standard_error=[0.1],
        gradient__batch_size=[64],
    )  # fmt: skip
    assert "larger than it needs" in said_by("batch_against_noise", large).title


def test_a_loss_that_is_infinite_or_the_users_own_counts():
    assert said_by("loss_is_not_a_number", run_of(train_loss=[1.0, INF])) is not None
    rising = run_of(stability__ratio=[1.5] * 6, train_loss=RISING, val_loss=FALLING)
    assert said_by("unstable", rising).tags == ("optkit-stability/ratio", "train_loss")


@pytest.mark.parametrize("name", ["loss_step", "val_loss", "train/loss", "val_loss_epoch"])
def test_a_loss_by_any_of_lightnings_names_counts_wherever_it_is_no_number(name):
    run = Run("run", {name: Series.of([(0, 0.0, 1.0), (10, 1.0, NAN), (20, 2.0, 1.0)])})
    alert = said_by("loss_is_not_a_number", run)
    assert alert.step == 10
    assert "is nan at step 10, and no number at 1 of 3 points" in alert.evidence
    assert said_by("loss_is_not_a_number", Run("run", {"val_losses": run.scalars[name]})) is None


def test_a_callback_with_a_name_of_its_own_is_heard():
    run = Run("run", {"optkit-stability-slow/ratio": Series.of([(0, 0.0, 2.0)])})
    assert Evidence(run).last(tags.STABILITY, "ratio") == (0, 2.0)
    assert Evidence(run).topics() == [tags.STABILITY]


def test_silence_is_told_from_health():
    (nothing,) = alerts(run_of())
    assert nothing.rule == "all_clear"
    assert "logged: nothing of this package" in nothing.evidence
    well = alerts(run_of(hessian__loss=FALLING))
    assert [alert.rule for alert in well] == ["all_clear"]
    assert "logged: hessian" in well[0].evidence
    assert "all_clear" in [a.rule for a in alerts(SPEAKS["edge_of_stability"])]
    assert "all_clear" not in [a.rule for a in alerts(SPEAKS["unstable"])]


def test_data_of_a_newer_version_is_told():
    problem = Problem("optkit-hessian/quadrature", None, "made by a newer lightning-optkit")
    assert "newer_format" in [alert.rule for alert in alerts(run_of(problems=[problem]))]


@pytest.mark.parametrize(("num_losses", "is_unfinished"), [(27, True), (81, False), (300, False)])
def test_a_landscape_that_was_not_finished_is_told(num_losses, is_unfinished):
    losses = ArraySeries.of([(0, 0.0, np.zeros((9, 9), np.float32))])
    run = run_of({"optkit-landscape/losses": losses}, landscape__num_losses=[num_losses])
    found = [a for a in alerts(run) if a.rule == "gaps_in_the_landscape"]
    assert [a.title for a in found] == ["The last landscape was not finished"] * is_unfinished
    assert not found or "27 of its 81 points" in found[0].evidence
