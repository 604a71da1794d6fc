r"""How far the learning rate has gone to the one of an averaging phase.

.. math:: \eta_{used} = \eta + a(t)\,(\eta_{average} - \eta),

where η is what the user's schedule says and t the epochs since the phase began, fractions included.
"""

from __future__ import annotations

import math

__all__ = ["annealed_share", "cyclic_share"]


def annealed_share(epochs: float, *, anneal_epochs: float) -> float:
    """Return a(t) of a rate that goes over once and stays: half a cosine from 0 to 1.

    Args:
        epochs: t, at least 0.
        anneal_epochs: length of the way, at least 0.

    Example:
        >>> [round(annealed_share(t, anneal_epochs=4), 3) for t in (0, 1, 2, 4, 9)]
        [0.0, 0.146, 0.5, 1.0, 1.0]
    """
    if epochs >= anneal_epochs:
        return 1.0
    return (1 - math.cos(math.pi * epochs / anneal_epochs)) / 2


def cyclic_share(epochs: float, *, cycle: float) -> float:
    """Return a(t) of a rate that falls in a straight line within each cycle, from 0 to 1.

    A cycle ends with its last step, at 1; the next begins after it.

    Args:
        epochs: t, positive.
        cycle: length of a cycle, positive.

    Example:
        >>> [cyclic_share(t, cycle=2) for t in (0.5, 1, 2, 2.5, 4)]
        [0.25, 0.5, 1.0, 0.25, 1.0]

    References:
        P. Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*,
        UAI 2018, section 3.2.
    """
    completed = max(math.ceil(epochs / cycle - 1e-9) - 1, 0)
    return min(epochs / cycle - completed, 1.0)
