"""What a setting of an optimizer may be, and what to write instead."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

__all__ = ["check_flags", "check_number", "check_rate", "require"]


def require(condition: bool, name: str, rule: str, value: object, advice: str) -> None:
    """Raise a ValueError in the house's form unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}. {advice}")


def check_rate(rate: object) -> None:
    """Refuse a learning rate that is neither a number of at least 0 nor a tensor of one."""
    if isinstance(rate, Tensor):
        shape = tuple(rate.shape)
        rule = "a number, or a tensor of one element"
        require(rate.numel() == 1, "lr", rule, shape, "Write `torch.tensor(0.1)`.")
        return  # its value is not looked at: that would wait for its device
    rule = "a number of at least 0, or a tensor of one"
    require(_is_number(rate, least=0.0), "lr", rule, rate, "Write `lr=0.1`.")


def check_number(
    name: str, value: object, advice: str, *, least: float = 0.0, below: float = math.inf
) -> None:
    """Refuse a value that is no number in [``least``, ``below``)."""
    bounds = f"in [{least:g}, {below:g})" if below < math.inf else f"a number of at least {least:g}"
    require(_is_number(value, least=least, below=below), name, bounds, value, advice)


def check_flags(group: dict[str, Any], *names: str) -> None:
    """Refuse a setting that is not a truth value; ``foreach`` may be ``None`` too."""
    for name in names:
        value = group[name]
        require(isinstance(value, bool), name, "True or False", value, "Write it without quotes.")
    foreach = group["foreach"]
    is_known = foreach is None or isinstance(foreach, bool)
    require(is_known, "foreach", "None, True or False", foreach, "None is the fastest.")


def _is_number(value: object, *, least: float, below: float = math.inf) -> bool:
    """Return whether it is a number within bounds: a truth value passes for one in Python."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value < below
