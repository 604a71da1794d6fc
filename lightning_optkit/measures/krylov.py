"""Subspaces in which extreme eigenvectors are looked for: grown blindly, or from known vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.lanczos import (
    SymmetricOperator,
    dot,
    norm,
    projection,
    rounding_noise,
)
from lightning_optkit.measures.ritz import Which, wanted

__all__ = ["KrylovSpace", "TrackedSpace"]

# Residual, as a share of the Ritz value, up to which a start counts as near an eigenvector. At the
# edge of stability eigenvectors turn by more from step to step.
_NEAR = 0.1


class KrylovSpace:
    r"""An orthonormal basis ``V``, the projection ``T`` of the operator on it, and what comes next.

    The vector to come is the whole residual of every Ritz pair, as in plain Lanczos:
    :math:`A V^\top = V^\top T + \beta q e^\top`, after restarts too.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        start: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self._operator = operator
        self._generator = generator
        self._basis = torch.empty(
            capacity, operator.shape[0], dtype=operator.dtype, device=operator.device
        )
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._beta = 0.0
        self._scale = 0.0
        self._block = 0  # first vector of the block that has not closed
        self._before = 0  # first vector of the one before
        self.radius = 0.0
        self.num_vectors = 0
        self.num_matvecs = 0
        self.noise = float(getattr(operator, "noise", rounding_noise(operator.dtype)))
        self._next = self._random() if start is None else self._orthogonal(start)

    knows_neighbours = False
    """Whether Ritz values near the wanted ones are resolved from the start."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.num_vectors == len(self._basis)

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.num_vectors == self._operator.shape[0]

    def step(self, residual_of: int) -> None:
        """Take the next vector into the basis, multiply it, and make the one after it.

        Args:
            residual_of: not needed here: the residuals of all Ritz pairs are parallel.
        """
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
        beta = norm(r[None])[0]
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
        self.radius = max(self.radius, float(theta.abs().max()))  # a restart forgets an end
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
        slack = rtol * self.radius + self.noise * self._scale
        if self.num_vectors == self._block:  # the last one has just closed
            return self._adds(self._before, self._block, count, which, slack)
        block = slice(self._block, self.num_vectors)
        _, vectors = torch.linalg.eigh(self._projected[block, block])
        residuals = self._beta * vectors[-1].abs()
        ends = {"largest": [-1], "smallest": [0]}.get(which, [0, -1])
        if float(residuals[ends].max()) > slack:
            return True
        return self._adds(self._block, self.num_vectors, count, which, slack)

    def _adds(self, first: int, last: int, count: int, which: Which, slack: float) -> bool:
        """Return whether the vectors from ``first`` on bring a wanted eigenvalue."""
        if first < count:
            return True
        before, after = (torch.linalg.eigvalsh(self._projected[:m, :m]) for m in (first, last))
        best, known = (values[wanted(values, count, which)] for values in (after, before))
        return bool((best - known).abs().max() > slack)

    def _couple(self, places: int | range, values: float | Tensor) -> None:
        if not self.is_full:
            self._projected[places, self.num_vectors] = values
            self._projected[self.num_vectors, places] = values

    def _close(self) -> None:
        """Start a new block in what the closed ones leave."""
        self._beta = 0.0
        self._before, self._block = self._block, self.num_vectors
        self._next = self._random()

    def _grow(self) -> None:
        self._basis = torch.cat([self._basis, torch.empty_like(self._basis)])
        self._projected = torch.nn.functional.pad(self._projected, (0, self.num_vectors) * 2)

    def _random(self) -> Tensor:
        like = self._basis.new_empty(self._operator.shape[0])
        return self._orthogonal(random_like(like, self._generator))

    def _orthogonal(self, vector: Tensor) -> Tensor:
        return orthogonalised(vector, self._basis[: self.num_vectors])


class TrackedSpace:
    r"""A space that starts from several known vectors and grows by residuals.

    Known eigenvectors of an operator that has changed a little are nearly those of this one, each
    by itself; of their sum a Krylov space would have to tell them apart again. The products of all
    basis vectors are kept, so that a residual :math:`A u - \theta u` is a sum of known vectors.

    References:
        E. R. Davidson, "The iterative calculation of a few of the lowest eigenvalues and
        corresponding eigenvectors of large real-symmetric matrices", 1975, section II.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        start: Tensor,
        generator: torch.Generator,
    ) -> None:
        self._operator = operator
        self._generator = generator
        self._capacity = capacity
        self._basis = start.new_empty(0, start.shape[1])
        for row in start:
            self._basis = torch.cat([self._basis, orthogonalised(row, self._basis)[None]])
        self._products = self._basis[:0]
        self.knows_neighbours: bool | None = None
        """Whether the start is near eigenvectors: what lies beside the wanted is resolved then."""
        self._num_dropped = 0  # products that restarts have left behind
        self.noise = float(getattr(operator, "noise", rounding_noise(operator.dtype)))
        self.radius = 0.0

    @property
    def num_vectors(self) -> int:
        """Vectors in the basis."""
        return len(self._basis)

    @property
    def num_matvecs(self) -> int:
        """Products made."""
        return self._num_dropped + len(self._products)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.num_vectors >= self._capacity

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.num_vectors == self._operator.shape[0]

    def step(self, residual_of: int) -> None:
        """Multiply the start, or the residual of a Ritz pair as a new vector of the basis."""
        if len(self._products) == self.num_vectors:
            residual = self._residuals[residual_of]
            if not bool(residual.any()):  # the space has closed, and is too small
                residual = random_like(residual, self._generator)
            direction = orthogonalised(residual, self._basis)
            self._basis = torch.cat([self._basis, direction[None]])
        new = self._basis[len(self._products) :]
        self._products = torch.cat([self._products, (self._operator @ new.T).T])

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, ascending, their coefficients in columns, and their residuals."""
        projected = (self._basis @ self._products.T).double().cpu()
        if not bool(projected.isfinite().all()):
            raise CurvatureError.not_finite(self._operator)
        theta, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        rows = vectors.T.to(self._basis)
        self._residuals = rows @ self._products - theta.to(rows)[:, None] * (rows @ self._basis)
        self.radius = max(self.radius, float(theta.abs().max()))
        residuals = norm(self._residuals).double().cpu()
        if self.knows_neighbours is None:
            self.knows_neighbours = bool((residuals <= _NEAR * theta.abs()).all())
        return theta, vectors, residuals

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return unit vectors of the space, in rows."""
        rows = coefficients.T.to(self._basis) @ self._basis
        return rows / rows.norm(dim=1, keepdim=True)

    def restart(self, keep: Tensor) -> None:
        """Cut the basis back to some of its Ritz vectors."""
        _, vectors, _ = self.ritz()
        rows = vectors[:, keep].T.to(self._basis)
        self._num_dropped += len(self._products) - len(keep)
        self._basis, self._products = rows @ self._basis, rows @ self._products

    def may_hide(self, count: int, which: Which, rtol: float) -> bool:
        """Return whether copies of wanted eigenvalues may lie outside: nobody asks here."""
        return False


def random_like(vector: Tensor, generator: torch.Generator) -> Tensor:
    """Return a Gaussian vector of the same shape, dtype and device, drawn on the CPU."""
    return torch.randn(vector.shape, generator=generator, dtype=torch.float64).to(vector)


def orthogonalised(vector: Tensor, basis: Tensor) -> Tensor:
    """Return the unit vector of the part that is orthogonal to the orthonormal rows of a basis."""
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        vector = vector / norm(vector[None]).to(vector)
        vector = vector - projection(basis[None], vector[None])[0]
    return vector / norm(vector[None]).to(vector)
