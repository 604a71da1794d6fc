"""Extreme eigenvalues with their eigenvectors, in as many products as they need and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.lanczos import SymmetricOperator, dot, projection, rounding_noise

__all__ = ["Eigenpairs", "Which", "top_eigenpairs"]

Which = Literal["magnitude", "largest", "smallest", "both"]

# Krylov vectors kept before the basis is cut back. Five pairs of a ResNet take about 25 products,
# so most runs never restart.
_BASIS_SIZE = 40


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
        num_matvecs: products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    errors: Tensor
    converged: Tensor
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

    The start vector is random, or the sum of the rows of ``start``: with those of an operator that
    has changed little, a handful of products is enough. One start vector sees an eigenvalue of an
    unbroken Krylov space once, however often it is repeated. Where the space closes, a new random
    vector is taken, until one adds nothing: the repeated eigenvalues of small or low-rank operators
    are all found.

    Args:
        operator: a symmetric operator of size ``n``.
        k: how many pairs, at least 1; an operator of smaller size has fewer.
        which: ``"magnitude"`` for the largest :math:`|\lambda|`; ``"largest"`` or ``"smallest"``
            for an algebraic end; ``"both"`` for ``k`` at each.
        rtol: tolerance for the error of each value, relative to it; at least 0.
        max_matvecs: products to spend at most; pairs that need more come back not converged.
        start: rows to start from, shape ``(r, n)``, such as ``previous.vectors``.
        basis_size: Krylov vectors kept at most, more than ``2 k`` of them: the memory, in vectors.
        generator: source of the random vectors, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range or ``start`` has the wrong shape.
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
    krylov = _Krylov(operator, min(capacity, size), start, generator)
    past: list[Tensor] = []
    while True:
        krylov.step()
        theta, vectors, residuals = krylov.ritz()
        errors = _errors(theta, residuals)
        chosen = _chosen(theta, count, which)
        values, residuals = theta[chosen], residuals[chosen]
        past = [*past[-2:], values]
        errors = _settled(errors[chosen], residuals, past)
        floor = krylov.noise * float(theta.abs().max())
        converged = errors <= (rtol * values.abs()).clamp_min(floor)
        enough = len(chosen) == count and bool(converged.all())
        if krylov.num_matvecs == max_matvecs or krylov.is_complete:
            break
        if enough and not krylov.may_hide(count, which, rtol):
            break
        if krylov.is_full:
            keep = count + (krylov.num_vectors - count) // 2
            krylov.restart(_chosen(theta, keep, which).sort().values)
    return Eigenpairs(
        values,
        krylov.combined(vectors[:, chosen]),
        residuals + floor,
        errors + floor,
        converged,
        krylov.num_matvecs,
    )


def _settled(errors: Tensor, residuals: Tensor, past: list[Tensor]) -> Tensor:
    """Return the errors, none of them less than what the last two products moved the value by.

    One Ritz value may stand for many eigenvalues that are not resolved yet, far from all others:
    its residual squared over that distance is small, and the next products still move it.
    """
    if len(past) < 3 or len({len(values) for values in past}) > 1:
        return residuals
    moved = torch.stack(past).diff(dim=0).abs().max(dim=0).values
    return torch.minimum(residuals, torch.maximum(errors, moved))


def _check_arguments(
    k: int, which: str, rtol: float, max_matvecs: int, capacity: int, least: int
) -> None:
    for name, count in (("k", k), ("max_matvecs", max_matvecs)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    kinds = ("magnitude", "largest", "smallest", "both")
    if which not in kinds:
        raise ValueError(f"`which` must be one of {', '.join(map(repr, kinds))}, got {which!r}.")
    if not rtol >= 0:  # NaN neither
        raise ValueError(f"`rtol` must be at least 0, got {rtol}.")
    if capacity <= least:
        raise ValueError(f"`basis_size` must be more than {least}, got {capacity}.")


def _chosen(theta: Tensor, count: int, which: Which) -> Tensor:
    """Return the places of the wanted Ritz values, in the order in which they are returned."""
    ascending = torch.arange(len(theta))
    if which == "magnitude":
        return theta.abs().argsort(descending=True, stable=True)[:count]
    if which == "largest":
        return ascending.flip(0)[:count]
    if which == "smallest":
        return ascending[:count].flip(0)
    lower = min(count // 2, len(theta))
    upper = min(count - lower, len(theta) - lower)
    return torch.cat([ascending[len(theta) - upper :], ascending[:lower]]).sort().values.flip(0)


def _errors(theta: Tensor, residuals: Tensor) -> Tensor:
    r"""Return :math:`\min(r, r^2 / \delta)`; the neighbour's own residual is taken off the gap."""
    distances = (theta[:, None] - theta).abs() - residuals
    distances.fill_diagonal_(torch.inf)
    gaps = distances.min(1).values
    refined = residuals.square() / gaps.clamp_min(1e-300)
    # a basis of one vector knows of no neighbour, and its gap is infinite: the residual stands
    return torch.where((gaps > 0) & gaps.isfinite(), torch.minimum(residuals, refined), residuals)


class _Krylov:
    r"""An orthonormal basis ``V``, the projection ``T`` of the operator on it, and what comes next.

    The vector to come is the whole residual of every Ritz pair, as in plain Lanczos:
    :math:`A V^\top = V^\top T + \beta q e^\top`, after restarts too.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        start: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        self._operator = operator
        self._generator = generator or torch.Generator().manual_seed(0)
        self._basis = torch.empty(
            capacity, operator.shape[0], dtype=operator.dtype, device=operator.device
        )
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._beta = 0.0
        self._scale = 0.0
        self._block = 0  # first vector of the block that has not closed
        self.num_vectors = 0
        self.num_matvecs = 0
        self.noise = float(getattr(operator, "noise", rounding_noise(operator.dtype)))
        self._next = self._random() if start is None else self._summed(start)

    @property
    def is_full(self) -> bool:
        return self.num_vectors == len(self._basis)

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.num_vectors == self._operator.shape[0]

    def step(self) -> None:
        """Take the next vector into the basis, multiply it, and make the one after it."""
        m = self.num_vectors
        if self.is_full:  # only where blocks have closed, which are not cut back
            self._grow()
            self._couple(m - 1, self._beta)  # there was no room for it
        q = self._basis[m] = self._next
        r = self._operator @ q
        couplings = self._projected[:m, m]
        coupled = couplings.nonzero()[:, 0]
        if len(coupled):
            r = r - self._basis[coupled.to(r.device)].T @ couplings[coupled].to(r)
        alpha = dot(q[None], r[None])[0]
        r = r - alpha.to(r) * q
        r -= projection(self._basis[None, : m + 1], r[None])[0]
        beta = dot(r[None], r[None])[0].sqrt()
        entry, self._beta = torch.stack([alpha, beta]).tolist()
        if not (abs(entry) < torch.inf and self._beta < torch.inf):
            raise CurvatureError.not_finite(self._operator)
        self._projected[m, m] = entry
        self.num_vectors += 1
        self.num_matvecs += 1
        self._scale = max(self._scale, abs(entry) + self._beta + float(couplings.norm()))
        if self.is_complete:
            self._beta = 0.0
        elif self._beta > rounding_noise(q.dtype) / 4 * self._scale:
            self._next = r / self._beta
            self._couple(m, self._beta)
        else:
            self._close()

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, ascending, their coefficients in columns, and their residuals."""
        m = self.num_vectors
        theta, vectors = torch.linalg.eigh(self._projected[:m, :m])
        return theta, vectors, self._beta * vectors[-1].abs()

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return unit vectors of the space, in rows."""
        rows = coefficients.T.to(self._basis) @ self._basis[: self.num_vectors]
        return rows / rows.norm(dim=1, keepdim=True)

    def restart(self, keep: Tensor) -> None:
        """Cut the basis back to some of its Ritz vectors, unless a block has closed."""
        if self._block > 0:
            return
        theta, vectors, _ = self.ritz()
        kept = len(keep)
        self._basis[:kept] = vectors[:, keep].T.to(self._basis) @ self._basis
        self._projected.zero_()
        self._projected[range(kept), range(kept)] = theta[keep]
        self.num_vectors = kept
        self._couple(range(kept), self._beta * vectors[-1, keep])

    def may_hide(self, count: int, which: Which, rtol: float) -> bool:
        """Return whether copies of wanted eigenvalues may lie outside the basis.

        They can where a block has closed. Each block starts from a random vector of the rest of
        the space and sees all eigenvalues that are left there: once one adds nothing, none will.
        """
        if self._block == 0:
            return False
        if self._block < count or self.num_vectors == self._block:
            return True
        closed = torch.linalg.eigvalsh(self._projected[: self._block, : self._block])
        block = slice(self._block, self.num_vectors)
        theta, vectors = torch.linalg.eigh(self._projected[block, block])
        residuals = self._beta * vectors[-1].abs()
        slack = rtol * theta.abs().max() + self.noise * self._scale
        reach = torch.cat([theta - residuals, theta + residuals])
        wanted = _chosen(torch.cat([closed, reach]).sort().values, count, which)
        best = torch.cat([closed, reach]).sort().values[wanted]
        return bool((best - closed[_chosen(closed, count, which)]).abs().max() > slack)

    def _couple(self, places: int | range, values: float | Tensor) -> None:
        if not self.is_full:
            self._projected[places, self.num_vectors] = values
            self._projected[self.num_vectors, places] = values

    def _close(self) -> None:
        """Start a new block in what the closed ones leave."""
        self._beta = 0.0
        self._block = self.num_vectors
        self._next = self._random()

    def _grow(self) -> None:
        self._basis = torch.cat([self._basis, torch.empty_like(self._basis)])
        self._projected = torch.nn.functional.pad(self._projected, (0, self.num_vectors) * 2)

    def _random(self) -> Tensor:
        n = self._operator.shape[0]
        vector = torch.randn(n, generator=self._generator, dtype=torch.float64)
        return self._orthogonal(vector.to(self._basis))

    def _summed(self, start: Tensor) -> Tensor:
        n = self._operator.shape[0]
        vector = start.sum(0) if start.ndim == 2 else start
        if vector.shape != (n,) or not bool(vector.norm() > 0):
            got = tuple(start.shape)
            raise ValueError(
                f"`start` must hold rows of length {n} whose sum is not zero, got shape {got}."
            )
        return self._orthogonal(vector.detach().to(self._basis))

    def _orthogonal(self, vector: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            vector = vector / vector.norm()
            basis = self._basis[None, : self.num_vectors]
            vector = vector - projection(basis, vector[None])[0]
        return vector / vector.norm()
