"""Extreme eigenvalues with their eigenvectors, in as many products as they need and no more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.krylov import KrylovSpace, TrackedSpace
from lightning_optkit.measures.lanczos import SymmetricOperator
from lightning_optkit.measures.ritz import Which, error_estimates, settled, wanted

__all__ = ["Eigenpairs", "Which", "top_eigenpairs"]

# Krylov vectors kept before the basis is cut back. Five pairs of a ResNet take about 25 products,
# so most runs never restart.
_BASIS_SIZE = 40
# Ritz vectors handed on beside the wanted ones: those that may overtake them.
_SPARE = 1
# A row of a start counts if it lies this far, in sine, out of the space of those before it.
_INDEPENDENT = 1e-3


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Eigenpairs:
    r"""Eigenvalues with unit eigenvectors and their errors.

    Attributes:
        values: :math:`\lambda_1 \dots \lambda_k`, shape ``(k,)``, float64, CPU; the largest
            magnitude first where that was asked for, else descending.
        vectors: unit rows :math:`u_i`, shape ``(k, n)``, of the operator's dtype and device.
        residuals: :math:`\|A u_i - \lambda_i u_i\|` with rounding, shape ``(k,)``, float64, CPU.
            Certified: an eigenvalue lies within it.
        errors: estimate of the distance to that eigenvalue, same shape: the residual, or where it
            is less its square over the distance to the next Ritz value, but no less than the last
            two products have moved the value by.
        converged: whether each error met the tolerance, same shape, bool.
        subspace: the vectors, and one or two more Ritz vectors beside them, in rows: what to start
            from at an operator near this one.
        num_matvecs: products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    errors: Tensor
    converged: Tensor
    subspace: Tensor
    num_matvecs: int


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    which: Which = "magnitude",
    rtol: float = 1e-3,
    max_matvecs: int = 300,
    start: Tensor | None = None,
    basis_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""Return the extreme eigenpairs of a symmetric operator, stopping on their residuals.

    Thick-restart Lanczos with full reorthogonalisation. A Ritz pair :math:`(\theta, u)` with
    residual :math:`r` has an eigenvalue within :math:`r`, and within about :math:`r^2 / \delta`
    where :math:`\delta` is the distance to the rest of the spectrum (Kato, Temple). A pair has
    converged when the lesser of the two is at most ``rtol`` :math:`|\theta|`, or rounding, and two
    products have moved it by no more: many eigenvalues that are not resolved yet look like one.

    The start vector is random, or the one row of ``start``. From several rows, such as the
    ``subspace`` found for an operator that has changed little, a handful of products is enough: the
    space then grows by residuals (Davidson), and sees what overtakes the pair that is followed, if
    it is among the rows.

    One start vector sees an eigenvalue of an unbroken Krylov space once, however often it is
    repeated. Where the space closes, a new random vector is taken, until one adds nothing: the
    repeated eigenvalues of small or low-rank operators are all found.

    Args:
        operator: a symmetric operator of size ``n``.
        k: how many pairs, at least 1; an operator of smaller size has fewer.
        which: ``"magnitude"`` for the largest :math:`|\lambda|`; ``"largest"`` or ``"smallest"``
            for an algebraic end; ``"both"`` for ``k`` at each.
        rtol: tolerance for the error of each value, relative to it; at least 0.
        max_matvecs: products to spend at most; pairs that need more come back not converged.
        start: rows to start from, shape ``(r, n)``, such as ``previous.subspace``.
        basis_size: Krylov vectors kept at most, more than ``2 k`` of them: the memory, in vectors.
        generator: source of the random vectors, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range or ``start`` has the wrong shape.
        TypeError: if a count is not an integer.
        CurvatureError: if a product is NaN or infinite.

    Example:
        >>> import torch
        >>> found = top_eigenpairs(torch.diag(torch.arange(1.0, 101.0)), 2, rtol=1e-6)
        >>> found.values.round(decimals=3).tolist()
        [100.0, 99.0]

    References:
        K. Wu, H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems",
        2000, section 2. Y. Saad, "Numerical Methods for Large Eigenvalue Problems", 2011, section
        3.2.
    """
    size = operator.shape[0]
    count = min(2 * k if which == "both" else k, size)
    capacity = max(_BASIS_SIZE, 3 * count) if basis_size is None else basis_size
    _check_arguments(k, which, rtol, max_matvecs, capacity, 2 * count)
    generator = generator or torch.Generator().manual_seed(0)
    rows = None if start is None else _rows(operator, start)
    space: KrylovSpace | TrackedSpace
    if rows is None or len(rows) == 1:
        first = None if rows is None else rows[0]
        space = KrylovSpace(operator, min(capacity, size), first, generator)
    else:
        rows = rows[:max_matvecs]
        space = TrackedSpace(operator, max(capacity // 2, len(rows) + 1), rows, generator)
    past: list[Tensor] = []
    worst = 0
    while True:
        space.step(residual_of=worst)
        theta, vectors, residuals = space.ritz()
        errors = error_estimates(theta, residuals)
        chosen = wanted(theta, count, which)
        values, residuals, errors = theta[chosen], residuals[chosen], errors[chosen]
        past = [*past[-2:], values]
        if not space.knows_neighbours:
            errors = settled(errors, residuals, past)
        floor = space.noise * space.radius
        converged = errors <= (rtol * values.abs()).clamp_min(floor)
        # the second product shows what the start has missed, if only by its rounding
        enough = space.num_matvecs > 1 and len(chosen) == count and bool(converged.all())
        if space.num_matvecs >= max_matvecs or space.is_complete:
            break
        if enough and not space.may_hide(count, which, rtol):
            break
        worst = int(chosen[int(converged.int().argmin())])
        if space.is_full:
            keep = count + (space.num_vectors - count) // 2
            space.restart(wanted(theta, keep, which).sort().values)
    return Eigenpairs(
        values,
        space.combined(vectors[:, chosen]),
        residuals + floor,
        errors + floor,
        converged,
        space.combined(vectors[:, wanted(theta, count + _SPARE, which)]),
        space.num_matvecs,
    )


def _rows(operator: SymmetricOperator, start: Tensor) -> Tensor:
    """Return independent rows to start from, in the operator's dtype and on its device."""
    n, rows = operator.shape[0], start if start.ndim == 2 else start[None]
    if rows.shape[1:] != (n,) or len(rows) == 0 or not bool(rows.norm(dim=1).min() > 0):
        got = tuple(start.shape)
        raise ValueError(f"`start` must hold non-zero rows of length {n}, got shape {got}.")
    rows = rows[:n].detach().to(operator.device, operator.dtype)
    independent = torch.linalg.qr((rows / rows.norm(dim=1, keepdim=True)).T).R.diagonal().abs()
    return rows[independent > _INDEPENDENT]


def _check_arguments(
    k: int, which: str, rtol: float, max_matvecs: int, capacity: int, least: int
) -> None:
    for name, count in (("k", k), ("max_matvecs", max_matvecs)):
        if not isinstance(count, int):
            raise TypeError(f"`{name}` must be an integer, got {count!r}.")
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    kinds = ("magnitude", "largest", "smallest", "both")
    if which not in kinds:
        raise ValueError(f"`which` must be one of {', '.join(map(repr, kinds))}, got {which!r}.")
    if not rtol >= 0:  # NaN neither
        raise ValueError(f"`rtol` must be at least 0, got {rtol}.")
    if capacity <= least:
        raise ValueError(f"`basis_size` must be more than {least}, got {capacity}.")
