"""What a number given as an argument may be: a truth value passes for one in Python, not here."""

from __future__ import annotations

from typing import TypeGuard

__all__ = ["is_count", "is_number"]


def is_number(value: object) -> TypeGuard[float]:
    """Return whether it is a number.

    Example:
        >>> is_number(0.5), is_number(True), is_number("1")
        (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: object, *, least: int) -> TypeGuard[int]:
    """Return whether it is an integer of at least so much.

    Example:
        >>> is_count(3, least=1), is_count(0, least=1), is_count(True, least=1)
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
