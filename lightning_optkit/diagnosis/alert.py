"""What is to be said of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SEVERITIES", "Alert", "Confidence", "Severity"]

Severity = Literal["critical", "warning", "info"]
Confidence = Literal["certified", "likely", "hint"]

SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")
"""The worst first."""


@dataclass(frozen=True)
class Alert:
    """One finding.

    Attributes:
        severity: how bad it is.
        rule: name of the rule that found it.
        title: in a few words.
        evidence: the numbers it rests on.
        advice: what to do, as one would say it to a colleague.
        confidence: ``"certified"`` where bounds or arithmetic leave no doubt; ``"likely"`` where it
            was seen several times; ``"hint"`` where it is a rule of thumb.
        step: where to look; ``None`` where there is no such place.
        tags: what it rests on.
    """

    severity: Severity
    rule: str
    title: str
    evidence: str
    advice: str
    confidence: Confidence
    step: int | None = None
    tags: tuple[str, ...] = ()
