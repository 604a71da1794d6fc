"""Evidence to verdict: what a run's numbers say, how sure that is, and what to do."""

from __future__ import annotations

from lightning_optkit.board.runs import Run
from lightning_optkit.diagnosis.alert import SEVERITIES, Alert
from lightning_optkit.diagnosis.evidence import ARRAYS as EVIDENCE
from lightning_optkit.diagnosis.evidence import Evidence
from lightning_optkit.diagnosis.rules import RULES

__all__ = ["EVIDENCE", "SEVERITIES", "Alert", "alerts"]


def alerts(run: Run) -> list[Alert]:
    """Return what is to be said of a run, the worst first.

    Where no rule finds anything, one alert says what was looked at: silence could mean anything.

    Args:
        run: what was logged; of arrays, :data:`EVIDENCE` is enough.
    """
    evidence = Evidence(run)
    found = [alert for rule in RULES if (alert := rule(evidence)) is not None]
    found += [
        Alert("info", "newer_format", "Data of a newer version", f"{p.tag}: {p.message}", "Upgrade "
              "lightning-optkit where you look at it.", "certified", p.step, (p.tag,))
        for p in run.problems
        if "newer" in p.message
    ]  # fmt: skip
    if not any(alert.severity != "info" for alert in found):
        found.append(_all_clear(evidence))
    return sorted(found, key=lambda alert: SEVERITIES.index(alert.severity))


def _all_clear(evidence: Evidence) -> Alert:
    topics = [topic.removeprefix("optkit-") for topic in evidence.topics()]
    return Alert(
        "info",
        "all_clear",
        "Nothing wrong found",
        f"Looked at {len(RULES)} rules; logged: {', '.join(topics) or 'nothing of this package'}.",
        "A rule without its numbers is silent: `HessianSpectrum`, `Stability` and "
        "`GradientMonitor` give most of them.",
        "hint",
    )
