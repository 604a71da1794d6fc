r"""How much of the scheduled learning rate an optimizer step is made at.

.. math:: \eta_{used}(t) = f(t)\,\eta(t),

where η is what the user's schedule says, and t the real optimizer steps made before this one: 0 at
the first. So the first step already moves.
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = [
    "Shape",
    "constant_factor",
    "cosine_factor",
    "exponential_factor",
    "linear_factor",
    "noam_factor",
    "radam_factor",
    "untuned_factor",
    "untuned_steps",
    "warmup_end",
    "warmup_factor",
]

Shape = Literal["linear", "constant", "cosine", "exponential", "noam", "untuned", "radam"]
"""How the factor goes to 1."""


def linear_factor(step: int, *, warmup_steps: int, start_factor: float = 0.0) -> float:
    r"""Return f of a straight line.

    .. math:: f(t) = s + (1 - s)\,\frac{t + 1}{n}, \quad t < n, \qquad \text{and then } 1

    Args:
        step: t, steps made before this one.
        warmup_steps: n, at least 1. Step n − 1 is the first at the full rate.
        start_factor: s, in [0, 1].

    Example:
        >>> [linear_factor(t, warmup_steps=4) for t in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    References:
        P. Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017, section
        2.2: from s = 1/k over 5 epochs, for a batch that is k times as large.
    """
    return _risen(min((step + 1) / warmup_steps, 1.0), start_factor)


def constant_factor(step: int, *, warmup_steps: int, start_factor: float = 0.1) -> float:
    r"""Return f of a rate that is held low, and let go.

    .. math:: f(t) = s, \quad t < n, \qquad \text{and then } 1

    Args:
        step: t, steps made before this one.
        warmup_steps: n, at least 1. Step n is the first at the full rate.
        start_factor: s, in (0, 1].

    Example:
        >>> [constant_factor(t, warmup_steps=2) for t in range(4)]
        [0.1, 0.1, 1.0, 1.0]

    References:
        K. He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2: s =
        0.1 for ResNet-110, until the training error is below 80 %.
    """
    return start_factor if step < warmup_steps else 1.0


def cosine_factor(step: int, *, warmup_steps: int, start_factor: float = 0.0) -> float:
    r"""Return f of half a cosine, which leaves and arrives level.

    .. math:: f(t) = s + (1 - s)\,\frac{1 - \cos(\pi (t + 1) / n)}{2}, \quad t < n,
        \qquad \text{and then } 1

    Args:
        step: t, steps made before this one.
        warmup_steps: n, at least 1. Step n − 1 is the first at the full rate.
        start_factor: s, in [0, 1].

    Example:
        >>> [round(cosine_factor(t, warmup_steps=4), 3) for t in range(5)]
        [0.146, 0.5, 0.854, 1.0, 1.0]
    """
    part = min((step + 1) / warmup_steps, 1.0)
    return _risen(math.sin(math.pi / 2 * part) ** 2, start_factor)


def exponential_factor(step: int, *, warmup_steps: float, start_factor: float = 0.0) -> float:
    r"""Return f of a rate whose distance from the full one decays, and which never quite arrives.

    .. math:: f(t) = s + (1 - s)\,(1 - e^{-(t + 1) / n})

    Args:
        step: t, steps made before this one.
        warmup_steps: n, positive: after so many steps 63 % of the way is made.
        start_factor: s, in [0, 1].

    Example:
        >>> [round(exponential_factor(t, warmup_steps=2), 3) for t in (0, 1, 3, 20)]
        [0.393, 0.632, 0.865, 1.0]

    References:
        J. Ma, D. Yarats, *On the Adequacy of Untuned Warmup for Adaptive Optimization*, AAAI 2021,
        section 5.1.
    """
    return _risen(-math.expm1(-(step + 1) / warmup_steps), start_factor)


def noam_factor(step: int, *, warmup_steps: int, d_model: int) -> float:
    r"""Return f of the Transformer, a whole schedule: up along a line, down as an inverse root.

    .. math:: f(t) = d^{-1/2} \min((t + 1)^{-1/2}, (t + 1)\,n^{-3/2})

    It is the learning rate itself where the optimizer's is 1. The paper counts from 1: its step is
    t + 1.

    Args:
        step: t, steps made before this one.
        warmup_steps: n, at least 1. The rate is largest at step n − 1.
        d_model: d, width of the model, at least 1.

    Example:
        >>> [f"{noam_factor(t - 1, warmup_steps=4000, d_model=512):.6g}" for t in (1, 4000)]
        ['1.74693e-07', '0.000698771']

    References:
        A. Vaswani et al., *Attention Is All You Need*, NeurIPS 2017, section 5.3.
    """
    t = step + 1
    return d_model**-0.5 * min(t**-0.5, t * warmup_steps**-1.5)


def untuned_steps(beta2: float) -> float:
    r"""Return the length of a warmup that Adam needs no tuning of: :math:`2 / (1 - \beta_2)`.

    Example:
        >>> round(untuned_steps(0.999)), untuned_steps(0.75)
        (2000, 8.0)
    """
    return 2 / (1 - beta2)


def untuned_factor(step: int, *, beta2: float) -> float:
    r"""Return f of a straight line whose length Adam's memory says.

    .. math:: f(t) = \min\left(1, \frac{t + 1}{\tau}\right), \qquad \tau = \frac{2}{1 - \beta_2}

    Args:
        step: t, steps made before this one.
        beta2: β₂ of Adam or one of its like, in [0, 1).

    Example:
        >>> [untuned_factor(t, beta2=0.5) for t in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    References:
        J. Ma, D. Yarats, *On the Adequacy of Untuned Warmup for Adaptive Optimization*, AAAI 2021,
        section 5.2.
    """
    return min(1.0, (step + 1) / untuned_steps(beta2))


def radam_factor(step: int, *, beta2: float) -> float:
    r"""Return f of RAdam: what makes the variance of Adam's steps that of late training.

    .. math::
        f = \sqrt{\frac{(\rho_i - 4)(\rho_i - 2)\,\rho_\infty}
            {(\rho_\infty - 4)(\rho_\infty - 2)\,\rho_i}}, \qquad
        \rho_i = \rho_\infty - \frac{2 i \beta_2^i}{1 - \beta_2^i}, \qquad
        \rho_\infty = \frac{2}{1 - \beta_2} - 1

    RAdam counts i from 1, and has no factor while ρ is at most 4: its optimizer steps without
    Adam's denominator then. Here those i are passed over, so that f is positive from the first step
    on: i = t + 5 for β₂ = 0.999. It approaches 1 and never quite arrives.

    Args:
        step: t, steps made before this one.
        beta2: β₂ of Adam or one of its like, above 0.6: else ρ never exceeds 4.

    Raises:
        ValueError: for a smaller β₂.

    Example:
        >>> [round(radam_factor(i - 5, beta2=0.999), 6) for i in (6, 100, 1000)]
        [0.025821, 0.215335, 0.645326]

    References:
        L. Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond*, ICLR 2020,
        section 4. J. Ma, D. Yarats, AAAI 2021, section 3, on the steps passed over.
    """
    limit = untuned_steps(beta2) - 1
    if not limit > 4:
        raise ValueError(
            f"`beta2` must be above 0.6 for the shape 'radam', got {beta2}. With less the variance "
            "is never finite; use 'linear' or 'untuned'."
        )
    passed_over = 0
    while _samples(passed_over + 1, beta2) <= 4:
        passed_over += 1
    now = _samples(step + 1 + passed_over, beta2)
    return math.sqrt((now - 4) * (now - 2) * limit / ((limit - 4) * (limit - 2) * now))


def warmup_factor(
    shape: Shape,
    step: int,
    *,
    warmup_steps: int | None = None,
    start_factor: float = 0.0,
    beta2: float | None = None,
    d_model: int | None = None,
) -> float:
    """Return f of any shape, from what it needs.

    Raises:
        ValueError: for another shape, or if something that it needs is missing.

    Example:
        >>> warmup_factor("linear", 1, warmup_steps=4), warmup_factor("untuned", 1, beta2=0.5)
        (0.5, 0.5)
    """
    if shape in ("untuned", "radam"):
        if beta2 is None:
            raise ValueError(f"`beta2` must be given for the shape {shape!r}, got None.")
        return (untuned_factor if shape == "untuned" else radam_factor)(step, beta2=beta2)
    if warmup_steps is None:
        raise ValueError(f"`warmup_steps` must be given for the shape {shape!r}, got None.")
    if shape == "noam":
        if d_model is None:
            raise ValueError("`d_model` must be given for the shape 'noam', got None.")
        return noam_factor(step, warmup_steps=warmup_steps, d_model=d_model)
    factors = {
        "linear": linear_factor,
        "constant": constant_factor,
        "cosine": cosine_factor,
        "exponential": exponential_factor,
    }
    if shape not in factors:
        raise ValueError(f"`shape` must be one of {', '.join(map(repr, factors))}, got {shape!r}.")
    return factors[shape](step, warmup_steps=warmup_steps, start_factor=start_factor)


def warmup_end(
    shape: Shape, *, warmup_steps: int | None = None, beta2: float | None = None
) -> int | None:
    """Return the first step that is made at the full rate, as all later ones are.

    ``None`` for a shape that has none.

    Example:
        >>> warmup_end("linear", warmup_steps=4), warmup_end("constant", warmup_steps=4)
        (3, 4)
        >>> warmup_end("untuned", beta2=0.999), warmup_end("exponential", warmup_steps=4)
        (1999, None)
    """
    if shape == "untuned" and beta2 is not None:
        return math.ceil(untuned_steps(beta2)) - 1
    if warmup_steps is None:
        return None
    return {"linear": warmup_steps - 1, "cosine": warmup_steps - 1, "constant": warmup_steps}.get(
        shape
    )


def _risen(part: float, start: float) -> float:
    return start + (1 - start) * part  # exactly 1 at the end: its sum undoes the rounding of 1 - s


def _samples(i: int, beta2: float) -> float:
    """Return ρ: how many samples the average of squares amounts to at step i, counted from 1."""
    decayed = beta2**i
    return untuned_steps(beta2) - 1 - 2 * i * decayed / (1 - decayed)
