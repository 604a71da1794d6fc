r"""The learning rate for another batch than the one it was found for.

With k = batch size / reference batch size, a scheduled rate η is used as

.. math:: \eta_{used} = s(k)\,\eta, \qquad s(k) = k, \sqrt{k} \text{ or } 1,

and on the way there, over the first n steps, as a rate between η and s η.
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["ScalingRule", "corrected_momentum", "gradual_factor", "scaling_factor"]

ScalingRule = Literal["linear", "sqrt", "none"]
"""How the learning rate grows with the batch."""


def scaling_factor(batch_size: int, reference: int, *, rule: ScalingRule) -> float:
    r"""Return s(k): what the learning rate is multiplied by for a batch that is k times as large.

    Linear, s = k: k steps at the rate η, taken as one at kη (SGD, with momentum too). Square root,
    s = √k: the noise of a step stays as it was (adaptive optimizers, whose step does not grow with
    the gradient). None, s = 1.

    Args:
        batch_size: samples in one optimizer step, over all devices; positive.
        reference: samples in a step for which the rate was found; positive.
        rule: ``"linear"``, ``"sqrt"`` or ``"none"``.

    Raises:
        ValueError: for another rule.

    Example:
        >>> [scaling_factor(8192, 256, rule=rule) for rule in ("linear", "none")]
        [32.0, 1.0]
        >>> scaling_factor(1024, 256, rule="sqrt")
        2.0

    References:
        P. Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017, section
        2.1 (linear). A. Krizhevsky, *One weird trick for parallelizing convolutional neural
        networks*, 2014, section 5 (both). S. Malladi et al., *On the SDEs and Scaling Rules for
        Adaptive Gradient Algorithms*, NeurIPS 2022 (square root; they scale Adam's betas and
        epsilon as well).
    """
    match rule:
        case "linear":
            return batch_size / reference
        case "sqrt":
            return math.sqrt(batch_size / reference)
        case "none":
            return 1.0
    raise ValueError(
        f"`rule` must be 'linear', 'sqrt' or 'none', got {rule!r}. Write 'linear' for SGD, 'sqrt' "
        "for Adam and its like."
    )


def gradual_factor(step: float, factor: float, *, num_steps: int) -> float:
    r"""Return what a step of the warmup is multiplied by, from 1 to the factor s.

    .. math:: 1 + (s - 1)\,\frac{t + 1}{n}, \quad t < n, \qquad \text{and then } s.

    The first step already grows by one part, and step n − 1 is the first at the full rate. A factor
    of at most 1 needs no warmup: it holds at once.

    Args:
        step: t, steps made before this one.
        factor: s, positive.
        num_steps: n, at least 0; 0 is no warmup.

    Example:
        >>> [gradual_factor(t, 5.0, num_steps=4) for t in range(6)]
        [2.0, 3.0, 4.0, 5.0, 5.0, 5.0]

    References:
        P. Goyal et al., 2017, section 2.2, gradual warmup: from η to kη over 5 epochs, by a
        constant amount at each iteration.
    """
    if factor <= 1 or step + 1 >= num_steps:
        return factor
    return 1 + (factor - 1) * (step + 1) / num_steps


def corrected_momentum(momentum: float, rate: float, previous: float | None) -> float:
    r"""Return the momentum of a step at a new rate, where the velocity holds the rate.

    .. math:: v \leftarrow m\,\frac{\eta_t}{\eta_{t-1}}\,v + \eta_t\,g, \qquad w \leftarrow w - v,

    is, for any sequence of rates, the same as :math:`u \leftarrow m u + g`,
    :math:`w \leftarrow w - \eta_t u`, which needs no correction: :math:`v = \eta u`.

    Args:
        momentum: m.
        rate: of the step to make.
        previous: rate of the step before it; ``None`` before the first. After a rate of 0 the
            velocity is 0, and nothing is corrected.

    Example:
        >>> corrected_momentum(0.9, 0.2, 0.1), corrected_momentum(0.9, 0.2, None)
        (1.8, 0.9)

    References:
        P. Goyal et al., 2017, section 3, on momentum: equations (9) and (10).
    """
    return momentum * (rate / previous) if previous else momentum
