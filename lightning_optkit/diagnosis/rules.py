"""Why does a run not converge? One rule a function, from numbers to a finding or to nothing.

Each rule says in its docstring where its threshold comes from. A rule that lacks its numbers finds
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lightning_optkit.board import tags
from lightning_optkit.board.runs import Series
from lightning_optkit.diagnosis.alert import Alert
from lightning_optkit.diagnosis.evidence import ARRAYS, Evidence

__all__ = ["RULES", "Rule"]

Rule = Callable[[Evidence], "Alert | None"]

_IN_A_ROW = 3  # once may be chance; three measured points in a row are not
_SADDLE = 2  # of `kind`, as `board.tags` says
_LOSSES = {
    f"{stage}loss{when}"
    for stage in ("", "train_", "val_")
    for when in ("", "_step", "_epoch")  # as Lightning forks names
}


def loss_is_not_a_number(evidence: Evidence) -> Alert | None:
    """A loss that is NaN or infinite: no threshold, nothing after it means anything."""
    for tag, series in evidence.run.scalars.items():
        if tag.rpartition("/")[2] not in _LOSSES:
            continue
        broken = np.flatnonzero(~np.isfinite(series.values))
        if len(broken):
            step = int(series.steps[broken[0]])
            return Alert(
                "critical",
                "loss_is_not_a_number",
                "The loss is not a number",
                f"`{tag}` is {series.values[broken[0]]} at step {step:,}, and no number at "
                f"{len(broken):,} of {len(series.values):,} points.",
                "Look at the steps before it: a learning rate too high, a division or a logarithm "
                "of zero, or half precision without scaling. "
                "`Trainer(detect_anomaly=True)` names the operation.",
                "certified",
                step,
                (tag,),
            )
    return None


def unstable(evidence: Evidence) -> Alert | None:
    """λmax above the optimizer's threshold at three points in a row while the loss rises.

    Above 1 a quadratic grows along the sharpest direction at each step; 1.1 leaves room for the
    error of λmax and for oscillation about the edge. Source: Cohen, Kaur, Li, Kolter and Talwalkar,
    "Gradient descent on neural networks typically occurs at the edge of stability", 2021, § 2.
    """
    ratio, loss = evidence.series(tags.STABILITY, "ratio"), evidence.loss()
    if ratio is None or loss is None:
        return None
    for begin, end in _runs_of(ratio.values > 1.1):
        before, after = _value_at(loss[1], ratio.steps[begin]), _value_at(loss[1], ratio.steps[end])
        if after > 1.1 * before:
            worst = float(ratio.values[begin : end + 1].max())
            return Alert(
                "critical",
                "unstable",
                "Training is unstable",
                f"λmax is up to {worst:.3g} times the largest eigenvalue at which the optimizer is "
                f"stable, at {end - begin + 1} points in a row from step {ratio.steps[begin]:,}, "
                f"and the loss rose from {before:.3g} to {after:.3g}.",
                f"Divide the learning rate by {max(2, round(worst))}, or warm it up with "
                "`LRWarmup`; clipping the gradient hides it.",
                "likely",
                int(ratio.steps[begin]),
                (tags.tag(tags.STABILITY, "ratio"), loss[0]),
            )
    return None


def edge_of_stability(evidence: Evidence) -> Alert | None:
    """λmax within a fifth of the threshold at three points in a row while the loss falls.

    Source: Cohen et al., 2021 (see :func:`unstable`), § 3: that is where full-batch training
    settles, and it is no fault.
    """
    ratio, loss = evidence.series(tags.STABILITY, "ratio"), evidence.loss()
    if ratio is None or loss is None:
        return None
    for begin, end in _runs_of(np.abs(ratio.values - 1) < 0.2):
        before, after = _value_at(loss[1], ratio.steps[begin]), _value_at(loss[1], ratio.steps[end])
        if after < before:
            return Alert(
                "info",
                "edge_of_stability",
                "At the edge of stability",
                f"λmax stays within 20 % of the threshold at {end - begin + 1} points in a row "
                f"from step {ratio.steps[begin]:,}, while the loss falls from {before:.3g} to "
                f"{after:.3g}.",
                "Nothing: the learning rate is as high as the surface bears. A higher one makes it "
                "flatter or fails.",
                "likely",
                int(ratio.steps[begin]),
                (tags.tag(tags.STABILITY, "ratio"), loss[0]),
            )
    return None


def at_a_saddle(evidence: Evidence) -> Alert | None:
    """A critical point with negative curvature that is certified.

    The kind is told from the gradient's size and noise by ``measures.critical_point``; here the
    lower bound of the share of negative eigenvalues must exceed zero. Source: Dauphin et al.,
    "Identifying and attacking the saddle point problem", 2014.
    """
    kind = evidence.last(tags.HESSIAN, "kind")
    share = evidence.last(tags.HESSIAN, "negative_ratio_lower")
    lowest = evidence.last(tags.HESSIAN, "lambda_min")
    if kind is None or share is None or kind[1] != _SADDLE or not share[1] > 0:
        return None
    curvature = "" if lowest is None else f", the lowest being {lowest[1]:.3g}"
    return Alert(
        "warning",
        "at_a_saddle",
        "At a saddle",
        f"The gradient is small and at least {share[1]:.2%} of the eigenvalues are negative"
        f"{curvature}.",
        "Put `SaddleEscape(every_n_epochs=1)` beside your callbacks: it steps down along that "
        "curvature if the loss falls. Momentum or smaller batches get away too, later.",
        "certified",
        kind[0],
        (tags.tag(tags.HESSIAN, "kind"), tags.tag(tags.HESSIAN, "negative_ratio_lower")),
    )


def loss_rose(evidence: Evidence) -> Alert | None:
    """A loss that ends at more than twice its lowest value.

    Twice, of medians over three points: below that it is noise of batches.
    """
    loss = evidence.loss()
    if loss is None or len(loss[1].values) < 2 * _IN_A_ROW or not np.isfinite(loss[1].values).all():
        return None
    tag, series = loss
    smooth = np.array(
        [np.median(series.values[max(0, i - 2) : i + 1]) for i in range(len(series.values))]
    )
    lowest = int(np.argmin(smooth))
    if not smooth[-1] > 2 * smooth[lowest] or smooth[lowest] <= 0:
        return None
    return Alert(
        "warning",
        "loss_rose",
        "The loss has risen",
        f"`{tag}` was {smooth[lowest]:.3g} at step {series.steps[lowest]:,} and is "
        f"{smooth[-1]:.3g} now.",
        "Lower the learning rate, or let it fall in time, and keep the checkpoint with the lowest "
        "loss. `Stability` tells whether the rate is the reason.",
        "likely",
        int(series.steps[lowest]),
        (tag,),
    )


def dead_units(evidence: Evidence) -> Alert | None:
    """Half of the units of ReLUs give zero on a whole batch.

    Half is a rule of thumb: sparse activations are common, but what is zero on every sample of a
    batch has no gradient. Source: Lu, Shin, Su and Karniadakis, "Dying ReLU and initialization",
    2019.
    """
    return _share_of_units(
        evidence,
        "dead",
        "Units are dead",
        "of the units of ReLUs are zero on the whole batch, and learn nothing from it",
        "Lower the learning rate or warm it up; check the scale of inputs and initialization; "
        "LeakyReLU or GELU cannot die.",
    )


def saturated_units(evidence: Evidence) -> Alert | None:
    """Half of the values of sigmoids and tanhs lie near an asymptote.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010, § 3.
    """
    return _share_of_units(
        evidence,
        "saturated",
        "Units are saturated",
        "of the values of sigmoids and tanhs lie near an asymptote, where their gradient vanishes",
        "Scale the weights at the start (`nn.init.xavier_uniform_`), normalize the inputs, or put "
        "a norm layer before them.",
    )


def layers_stand_still(evidence: Evidence) -> Alert | None:
    """Layers whose weights change by less than a thousandth of what the others change by.

    Relative to the median layer, at the last three points: what matters is that the layers move
    together. Source: You, Gitman and Ginsburg, "Large batch training of convolutional networks",
    2017, § 4, who scale layers for that reason.
    """
    series = evidence.array(tags.GRADIENT, tags.LAYER_STEPS)
    if series is None or len(series.arrays) < _IN_A_ROW:
        return None
    names = evidence.names(tags.GRADIENT, tags.LAYER_NAMES)
    latest = [array[:, 4] for array in series.arrays[-_IN_A_ROW:]]  # update / weights
    if len({len(ratios) for ratios in latest} | {len(names)}) > 1:
        return None
    if not all(np.isfinite(ratios).any() for ratios in latest):
        return None
    still = np.all([ratios < 1e-3 * np.nanmedian(ratios) for ratios in latest], axis=0)
    if not still.any():
        return None
    slow = [name for name, is_still in zip(names, still, strict=True) if is_still]
    return Alert(
        "warning",
        "layers_stand_still",
        "Layers stand still",
        f"{len(slow)} of {len(names)} layers change by less than a thousandth of what the median "
        f"layer does: {', '.join(slow[:3])}{', ...' if len(slow) > 3 else ''}.",
        "Vanishing gradients: look at the layer heatmap. Normalization, residual connections or "
        "`TrustRatio()` bring them to life; frozen layers are not meant.",
        "likely",
        int(series.steps[-1]),
        ARRAYS,
    )


def step_size(evidence: Evidence) -> Alert | None:
    """An update of more than a tenth, or less than a millionth, of the weights.

    About 1e-3 is usual: Karpathy, CS231n notes, "Ratio of weights:updates", 2016. A factor of 100
    to 1000 from it is a sign, not a proof.
    """
    series = evidence.series(tags.GRADIENT, "update_ratio")
    if series is None or len(series.values) < _IN_A_ROW:
        return None
    ratio = float(np.median(series.values[-_IN_A_ROW:]))
    if not (ratio > 0.1 or ratio < 1e-6):
        return None
    large = ratio > 0.1
    return Alert(
        "warning",
        "step_size",
        "Steps are very large" if large else "Steps are very small",
        f"A step changes the weights by {ratio:.2g} of their norm; about 1e-3 is usual.",
        "Divide the learning rate by 10."
        if large
        else "Multiply the learning rate by 10, or see whether a schedule has brought it to zero.",
        "hint",
        int(series.steps[-1]),
        (tags.tag(tags.GRADIENT, "update_ratio"),),
    )


def exploding_gradient(evidence: Evidence) -> Alert | None:
    """A gradient a hundred times longer at the last three points than it was at the median before.

    A hundred: within a run norms vary by tens, with the batch and the phase of training. Source:
    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
    § 2.
    """
    series = evidence.series(tags.GRADIENT, "gradient_norm")
    if series is None or len(series.values) < 2 * _IN_A_ROW:
        return None
    usual = float(np.median(series.values[:-_IN_A_ROW]))
    latest = float(np.median(series.values[-_IN_A_ROW:]))
    if not (usual > 0 and latest > 100 * usual):
        return None
    return Alert(
        "warning",
        "exploding_gradient",
        "The gradient explodes",
        f"Its norm is {latest:.3g} at the last {_IN_A_ROW} points, and was {usual:.3g} before.",
        "Clip it (`Trainer(gradient_clip_val=1.0)`), lower the learning rate, and see in the layer "
        "heatmap where it begins.",
        "likely",
        int(series.steps[-_IN_A_ROW]),
        (tags.tag(tags.GRADIENT, "gradient_norm"),),
    )


def rate_far_below_the_limit(evidence: Evidence) -> Alert | None:
    """λmax never above a hundredth of what the optimizer is stable at.

    Of the whole run, so that a warmup or a decay does not count. Full-batch training drives the
    ratio to 1, small batches keep it below by a factor that depends on them: a hundredth is a hint.
    Source: Cohen et al., 2021 (see :func:`unstable`), § 3.
    """
    ratio = evidence.series(tags.STABILITY, "ratio")
    if ratio is None or len(ratio.values) < _IN_A_ROW:
        return None
    highest = float(ratio.values.max())  # NaN, where the optimizer's limit is not known, is silent
    if not 0 < highest < 0.01:
        return None
    return Alert(
        "info",
        "rate_far_below_the_limit",
        "The learning rate is far below what the surface bears",
        f"λmax has been at most {highest:.2g} of the threshold.",
        "Try a rate 3 to 10 times as high, warmed up with `LRWarmup`.",
        "hint",
        int(ratio.steps[np.argmax(ratio.values)]),
        (tags.tag(tags.STABILITY, "ratio"),),
    )


def batch_against_noise(evidence: Evidence) -> Alert | None:
    """A batch more than ten times smaller or larger than the gradient's noise scale.

    Beyond two standard errors of the scale. Source: McCandlish, Kaplan, Amodei and the OpenAI Dota
    team, "An empirical model of large-batch training", 2018, § 2.2: at the scale itself, time and
    samples are in balance.
    """
    scale = evidence.last(tags.GRADIENT, "noise_scale")
    error = evidence.last(tags.GRADIENT, "noise_scale_standard_error")
    batch = evidence.last(tags.GRADIENT, "batch_size")
    if scale is None or error is None or batch is None:
        return None
    low, high = scale[1] - 2 * error[1], scale[1] + 2 * error[1]
    if low > 10 * batch[1]:
        title, advice = (
            "Steps are mostly noise",
            "A larger batch (or `accumulate_grad_batches`) with a higher rate saves time; an "
            "average of weights (`EMA`) takes out noise at no cost.",
        )
    elif 0 < high < batch[1] / 10:
        title, advice = (
            "The batch is larger than it needs to be",
            "A smaller batch reaches the same loss with fewer samples.",
        )
    else:
        return None
    return Alert(
        "info",
        "batch_against_noise",
        title,
        f"The noise scale is {scale[1]:,.0f} ± {error[1]:,.0f} samples, the batch {batch[1]:,.0f}.",
        advice,
        "likely",
        scale[0],
        (tags.tag(tags.GRADIENT, "noise_scale"), tags.tag(tags.GRADIENT, "batch_size")),
    )


def nothing_averaged(evidence: Evidence) -> Alert | None:
    """An average that holds no model at the end: arithmetic."""
    models = evidence.last(tags.AVERAGING, "num_averaged")
    if models is None or models[1] > 0:
        return None
    return Alert(
        "warning",
        "nothing_averaged",
        "Nothing was averaged",
        f"No model has entered the average by step {models[0]:,}.",
        "Let it start earlier: `SWA(start=0.5)` or `EMA(start_step=0)`.",
        "certified",
        models[0],
        (tags.tag(tags.AVERAGING, "num_averaged"),),
    )


def nothing_mixed(evidence: Evidence) -> Alert | None:
    """No batch of the last epoch was mixed: arithmetic."""
    share = evidence.last(tags.MIXING, "share")
    if share is None or share[1] > 0:
        return None
    return Alert(
        "warning",
        "nothing_mixed",
        "Nothing was mixed",
        f"No batch of the epoch had been mixed by step {share[0]:,}.",
        "See whether `probability` is zero, or `stop_epoch` has passed.",
        "certified",
        share[0],
        (tags.tag(tags.MIXING, "share"),),
    )


def gaps_in_the_landscape(evidence: Evidence) -> Alert | None:
    """Points of the loss landscape that are no numbers, or were not computed: arithmetic."""
    picture, spent = (
        evidence.array(tags.LANDSCAPE, tags.LANDSCAPE_LOSSES),
        evidence.last(tags.LANDSCAPE, "num_losses"),
    )
    if picture is not None and spent is not None and spent[1] < picture.arrays[-1].size:
        return Alert(
            "info",
            "gaps_in_the_landscape",
            "The last landscape was not finished",
            f"{spent[1]:,.0f} of its {picture.arrays[-1].size:,} points were computed; blocks have "
            "the loss of the nearest.",
            "Let the run end, or draw fewer points: a smaller `resolution`.",
            "certified",
            spent[0],
            (tags.tag(tags.LANDSCAPE, "num_losses"),),
        )
    gaps = evidence.last(tags.LANDSCAPE, "num_gaps")
    if gaps is None or gaps[1] == 0:
        return None
    return Alert(
        "info",
        "gaps_in_the_landscape",
        "The loss is not defined everywhere around the weights",
        f"{gaps[1]:,.0f} points of the landscape are NaN or infinite.",
        "Draw it closer: a smaller `span`.",
        "certified",
        gaps[0],
        (tags.tag(tags.LANDSCAPE, "num_gaps"),),
    )


def costly_diagnostics(evidence: Evidence) -> Alert | None:
    """Diagnostics that took more than twice the 5 % that callbacks keep to by default.

    In runs of a minute or more: the first and the last point are measured in any case.
    """
    spent, elapsed = evidence.seconds(), evidence.elapsed()
    if elapsed < 60 or spent < 0.1 * elapsed:
        return None
    return Alert(
        "info",
        "costly_diagnostics",
        "Diagnostics take much of the time",
        f"{spent:.0f} of {elapsed:.0f} seconds, {spent / elapsed:.0%}.",
        "Give `max_overhead=0.05`, measure less often, or with fewer `num_matvecs`.",
        "certified",
    )


RULES: tuple[Rule, ...] = (
    loss_is_not_a_number,
    unstable,
    at_a_saddle,
    loss_rose,
    dead_units,
    saturated_units,
    layers_stand_still,
    exploding_gradient,
    step_size,
    nothing_averaged,
    nothing_mixed,
    edge_of_stability,
    rate_far_below_the_limit,
    batch_against_noise,
    gaps_in_the_landscape,
    costly_diagnostics,
)
"""All rules; findings of one severity come in this order."""


def _share_of_units(
    evidence: Evidence, name: str, title: str, what: str, advice: str
) -> Alert | None:
    found, series = evidence.last(tags.GRADIENT, name), evidence.series(tags.GRADIENT, name)
    if found is None or series is None or found[1] < 0.5:
        return None
    finite = series.values[np.isfinite(series.values)]
    seen = int(np.argmin(np.append(finite[::-1] >= 0.5, False)))  # at so many points on end
    return Alert(
        "critical" if found[1] > 0.9 else "warning",
        f"{name}_units",
        title,
        f"{found[1]:.0%} {what}; half or more at the last {seen} point{'s' * (seen > 1)}.",
        advice,
        "likely" if seen >= _IN_A_ROW else "hint",
        found[0],
        (tags.tag(tags.GRADIENT, name),),
    )


def _runs_of(holds: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Yield first and last index of each stretch where it holds, if that is long enough."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], holds, [False]]).astype(int)))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin >= _IN_A_ROW:
            yield int(begin), int(end) - 1


def _value_at(series: Series, step: int) -> float:
    """Return the value at the measured point nearest to a step."""
    return float(series.values[np.argmin(np.abs(series.steps - step))])
