r"""Certified statements about a spectrum from one tridiagonal matrix.

A start vector :math:`v` and a symmetric :math:`A = \sum \lambda_i u_i u_i^\top` define the
measure :math:`\mu_v(S) = \sum_{\lambda_i \in S} (u_i^\top v)^2 / \|v\|^2`. After :math:`m`
Lanczos steps its moments up to order :math:`2m` are known, and with them the sharpest possible
bounds on :math:`\mu_v(-\infty, t]` (Chebyshev, Markov, Stieltjes): no estimate enters. What
remains is that :math:`\mu_v` is not the share of eigenvalues; for Gaussian :math:`v` the
difference has an exact law, a Beta distribution, which :func:`share_interval` inverts.

References:
    G. H. Golub, G. Meurant, "Matrices, Moments and Quadrature with Applications", 2010, chapters 2
    and 6. T. Chen, T. Trogdon, S. Ubaru, "Analysis of stochastic Lanczos quadrature for spectrum
    approximation", ICML 2021.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from scipy.special import betainc
from torch import Tensor

__all__ = ["gauss", "mass_below", "share_interval", "tridiagonal_matrix"]

_WEIGHT_ERROR = 1e-10  # of a sum of weights, by rounding
# Largest last entry of a Radau rule, in spectral radii: rounding grows with it, and has to stay
# near that of the products.
_LARGEST_ENTRY = 1e2


def tridiagonal_matrix(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Return the symmetric matrix ``(m, m)``; the last of the ``m`` off-diagonals leads out."""
    beta = off_diagonal[:-1]
    return torch.diag(diagonal) + torch.diag(beta, 1) + torch.diag(beta, -1)


def gauss(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return Gauss nodes, weights and residuals of a tridiagonal matrix.

    Nodes are the Ritz values :math:`\theta`, ascending; weights the squared first components of its
    eigenvectors, which sum to 1; each interval :math:`\theta \pm` residual, with residual
    :math:`\beta_m |s_m|`, holds an eigenvalue.

    Args:
        diagonal: shape ``(m,)``, float64.
        off_diagonal: shape ``(m,)``, float64; the last entry is :math:`\beta_m`.

    Returns:
        Three tensors of shape ``(m,)``, float64.

    Example:
        >>> import torch
        >>> beta = torch.tensor([1.0, 0.0]).double()
        >>> nodes, weights, residuals = gauss(torch.zeros(2).double(), beta)
        >>> nodes.round(decimals=6).tolist(), weights.round(decimals=6).tolist()
        ([-1.0, 1.0], [0.5, 0.5])
    """
    nodes, vectors = torch.linalg.eigh(tridiagonal_matrix(diagonal, off_diagonal))
    return nodes, vectors[0].square(), off_diagonal[-1] * vectors[-1].abs()


def mass_below(
    diagonal: Tensor, off_diagonal: Tensor, threshold: float, *, slack: float
) -> tuple[float, float]:
    r"""Return certified bounds on :math:`\mu_v(-\infty, t]`.

    The Gauss–Radau rule with a node prescribed at :math:`t` has the last diagonal entry
    :math:`t + \beta_m^2 e_m^\top (T_m - tI)^{-1} e_m`, and

    .. math:: \sum_{\theta < t} w \;\le\; \mu_v(-\infty, t] \;\le\; \sum_{\theta \le t} w .

    Rounding moves an eigenvalue by no more than ``slack``, so the lower bound is taken at
    ``t - slack`` and the upper one at ``t + slack``. The mass of one vector may besides leak across
    a gap between eigenvalues, by twice ``slack / gap``; the number of eigenvalues does not.

    Args:
        diagonal: shape ``(m,)``, float64.
        off_diagonal: shape ``(m,)``, float64; the last entry is :math:`\beta_m`, 0 where the
            measure is known exactly.
        threshold: :math:`t`.
        slack: rounding error of the eigenvalues, absolute, positive.

    Example:
        >>> import torch
        >>> beta = torch.tensor([1.0, 0.0]).double()  # eigenvalues -1 and 1, weight 1/2 each
        >>> lower, upper = mass_below(torch.zeros(2).double(), beta, 0.0, slack=1e-12)
        >>> round(lower, 6), round(upper, 6)
        (0.5, 0.5)
    """
    lower, _ = _radau_masses(diagonal, off_diagonal, threshold - slack, away=-slack)
    _, upper = _radau_masses(diagonal, off_diagonal, threshold + slack, away=slack)
    # Next to a pair of eigenvalues that rounding cannot tell apart the two may cross.
    lower, upper = min(lower, upper), max(lower, upper)
    return max(0.0, lower - _WEIGHT_ERROR), min(1.0, upper + _WEIGHT_ERROR)


def _radau_masses(
    diagonal: Tensor, off_diagonal: Tensor, t: float, *, away: float
) -> tuple[float, float]:
    """Return the Radau weights below ``t``, without and with the weight at ``t``."""
    nodes, weights, residuals = gauss(diagonal, off_diagonal)
    if float(off_diagonal[-1]) == 0.0:
        return float(weights[nodes < t].sum()), float(weights[nodes <= t].sum())
    # Next to a Ritz value the new entry is huge and would drown the others: step further out, to
    # the side on which the bound stays a bound.
    reach = float(nodes.abs().max()) + float(off_diagonal.max()) + abs(t)
    for _ in range(60):
        entry = t + float((residuals.square() / (nodes - t)).sum())
        if abs(entry) < _LARGEST_ENTRY * reach:
            break
        t += away
        away *= 2
    extended_diagonal = torch.cat([diagonal, diagonal.new_tensor([entry])])
    extended_off = torch.cat([off_diagonal, off_diagonal.new_zeros(1)])
    rule_nodes, rule_weights, _ = gauss(extended_diagonal, extended_off)
    prescribed = int((rule_nodes - t).abs().argmin())
    below = float(rule_weights[:prescribed].sum())
    return below, below + float(rule_weights[prescribed])


def share_interval(
    lower: float, upper: float, *, dimension: int, num_probes: int, confidence: float
) -> tuple[float, float]:
    r"""Return an interval that holds the share :math:`p` of eigenvalues in a set.

    For ``k`` Gaussian probes the pooled mass :math:`X = \sum_j \|v_j\|^2 \mu_{v_j} / \sum_j
    \|v_j\|^2` follows :math:`\mathrm{Beta}(k p n / 2,\; k (1 - p) n / 2)` exactly, for every
    spectrum. Given :math:`X \in` [``lower``, ``upper``], the interval keeps each :math:`p` that
    neither tail rejects at level (1 - ``confidence``)/2, as Clopper and Pearson do for a binomial.

    Args:
        lower: certified lower bound on the pooled mass, in [0, 1].
        upper: certified upper bound, in [0, 1].
        dimension: ``n``.
        num_probes: ``k``.
        confidence: probability with which the interval holds the share, in (0, 1).

    Returns:
        Lower and upper end. They are multiples of ``1 / n``, as the share is.

    Example:
        >>> share_interval(0.5, 0.5, dimension=100_000, num_probes=4, confidence=0.99)
        (0.49713, 0.50287)
    """
    tail = (1 - confidence) / 2
    half = num_probes / 2

    def possible_from_below(k: int) -> bool:  # P(X >= lower) grows with k
        if k in (0, dimension):
            return k == dimension or lower <= 0
        return 1 - float(betainc(half * k, half * (dimension - k), lower)) >= tail

    def possible_from_above(k: int) -> bool:  # P(X <= upper) falls with k
        if k in (0, dimension):
            return k == 0 or upper >= 1
        return float(betainc(half * k, half * (dimension - k), upper)) >= tail

    first = bisect_left(range(dimension + 1), True, key=possible_from_below)
    beyond = bisect_left(range(dimension + 1), True, key=lambda k: not possible_from_above(k))
    last = beyond - 1
    # Where both tails reject every p, the two nearest are the interval.
    return min(first, last) / dimension, max(first, last) / dimension
