"""Lanczos tridiagonalisation of a symmetric operator, several start vectors in step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_optkit.measures.errors import CurvatureError

__all__ = [
    "SymmetricOperator",
    "Tridiagonal",
    "dot",
    "inner_sum",
    "lanczos",
    "norm",
    "projection",
    "rounding_noise",
]


_PIECE = 512  # terms of a dot product that are summed in float32


class SymmetricOperator(Protocol):
    """What :func:`lanczos` needs: products, and where and how big the vectors are.

    Where each process holds a part of every vector, an operator also has ``local_size``, the number
    of entries here, and ``inner_sum``, which sums a tensor of partial dot products over processes.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the products for ``vectors`` of shape ``(n, k)``."""


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Tridiagonal:
    r"""What Lanczos found: :math:`A Q^\top = Q^\top T + \beta_m q_{m+1} e_m^\top` for each lane.

    Attributes:
        diagonal: :math:`\alpha_1 \dots \alpha_m`, shape ``(lanes, m)``, float64, CPU.
        off_diagonal: :math:`\beta_1 \dots \beta_m`, same shape; the last couples to the part of the
            space that was not reached, and is the residual.
        num_steps: number of valid entries in each lane, shape ``(lanes,)``: fewer than ``m`` where
            the lane closed an invariant subspace, and is exact.
        start_norms: Euclidean norms of the start vectors, shape ``(lanes,)``, float64, CPU.
        size: ``n``, the dimension of the operator.
        dtype: dtype of the products.
        basis: orthonormal rows ``Q``, shape ``(lanes, m, n)``, on the operator's device, if kept.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    num_steps: Tensor
    start_norms: Tensor
    size: int
    dtype: torch.dtype
    basis: Tensor | None = None

    @property
    def num_matvecs(self) -> int:
        """Products that were made: every lane runs all steps."""
        return self.diagonal.numel()

    def lanes(self) -> list[tuple[Tensor, Tensor]]:
        """Return each lane's valid diagonal and off-diagonal, both of shape ``(steps,)``."""
        counts = [int(count) for count in self.num_steps]
        return [
            (a[:m], b[:m]) for a, b, m in zip(self.diagonal, self.off_diagonal, counts, strict=True)
        ]


def rounding_noise(dtype: torch.dtype) -> float:
    r"""Return the error of one computed eigenvalue relative to :math:`\max|\lambda|`.

    Measured against float64: products in float32 carry 7e-7 of :math:`\lambda_{max}`, six units in
    the last place; 32 units leave room for deep nets and for the recurrence on top.
    """
    return 32 * torch.finfo(dtype).eps


def lanczos(
    operator: SymmetricOperator,
    num_matvecs: int,
    *,
    num_lanes: int = 1,
    start: Tensor | None = None,
    keep_basis: bool = False,
    workspace: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tridiagonal:
    r"""Return the tridiagonal matrices of ``num_lanes`` Lanczos runs of ``num_matvecs`` steps.

    Start vectors are Gaussian, so no eigenvector is special (a Rademacher start can be an exact
    eigenvector of a small Hessian). Every new vector is orthogonalised by the recurrence and then
    against all before it: what is left to the second is rounding, so once is enough, and without
    it the largest eigenvalue was found 24 times over in 200 float32 steps. Dot
    products are summed in float64. The loop never waits for the device: a lane that has closed an
    invariant subspace goes on with zeros, and is cut afterwards.

    Args:
        operator: a symmetric operator of size ``n``.
        num_matvecs: steps of each lane, ``m``; at least 1; no more than ``n`` are made.
        num_lanes: independent runs, at least 1.
        start: start vectors, shape ``(lanes, n)``, in place of random ones.
        keep_basis: keep the Lanczos vectors, ``lanes * m * n`` numbers.
        workspace: memory for them, shape ``(lanes, m, n)``, overwritten: several runs in turn then
            ask the system for it once, and the basis that is kept lies in it.
        generator: source of the start vectors, on the CPU; ``None`` is a fixed seed. Processes that
            hold parts of the vectors need each their own.

    Raises:
        ValueError: if a count is under 1 or ``start`` has the wrong shape.
        CurvatureError: if a product is NaN or infinite.

    Example:
        >>> import torch
        >>> found = lanczos(torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0])), 4)
        >>> int(found.num_steps)  # three distinct eigenvalues
        3

    References:
        C. C. Paige, "The computation of eigenvalues and eigenvectors of very large sparse
        matrices", 1971. G. H. Golub, G. Meurant, "Matrices, Moments and Quadrature with
        Applications", 2010, chapter 4.
    """
    for name, count in (("num_matvecs", num_matvecs), ("num_lanes", num_lanes)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    size, total = operator.shape[0], inner_sum(operator)
    q, norms = _start_vectors(operator, num_lanes, start, generator)
    lanes, steps = len(q), min(num_matvecs, size)
    diagonal = torch.zeros(lanes, steps, dtype=dot(q, q).dtype, device=q.device)
    off_diagonal = torch.zeros_like(diagonal)
    basis = q.new_empty(lanes, steps, q.shape[1]) if workspace is None else workspace
    alive = torch.ones(lanes, dtype=torch.bool, device=q.device)
    scale = torch.zeros_like(diagonal[:, 0])
    closed = rounding_noise(q.dtype) / 4  # below this share of |A| a residual is rounding

    for j in range(steps):
        basis[:, j] = q
        r = (operator @ q.T).T
        alpha = total(dot(q, r))
        r = r - alpha.to(r)[:, None] * q
        if j > 0:
            r -= off_diagonal[:, j - 1, None].to(r) * basis[:, j - 1]
        r -= projection(basis[:, : j + 1], r, total)
        beta = norm(r, total)
        scale = torch.maximum(scale, alpha.abs() + beta)
        diagonal[:, j] = torch.where(alive, alpha, 0.0)
        alive = alive & ~(beta <= closed * scale)  # NaN stays alive and is found below
        off_diagonal[:, j] = torch.where(alive, beta, 0.0)
        q = r * torch.where(alive, 1 / beta, 0.0).to(r)[:, None]

    found = torch.stack([diagonal, off_diagonal]).cpu().double()  # here the device is waited for
    if not bool(torch.isfinite(found).all()):
        raise CurvatureError.not_finite(operator)
    ended = found[1] == 0
    num_steps = torch.where(ended.any(1), ended.int().argmax(1) + 1, steps)
    kept = basis if keep_basis else None
    return Tridiagonal(found[0], found[1], num_steps, norms, size, q.dtype, kept)


def _start_vectors(
    operator: SymmetricOperator,
    num_lanes: int,
    start: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    size = getattr(operator, "local_size", operator.shape[0])
    if start is None:
        generator = generator or torch.Generator().manual_seed(0)
        start = torch.randn(num_lanes, size, generator=generator, dtype=torch.float64)
    if start.ndim != 2 or start.shape[1] != size:
        got = tuple(start.shape)
        raise ValueError(f"`start` must hold non-zero rows of length {size}, got shape {got}.")
    squares = start.double().square().sum(1)
    squares = inner_sum(operator)(squares.to(operator.device))
    norms = squares.sqrt().cpu()
    if not bool((norms > 0).all()):
        raise ValueError(f"`start` must hold non-zero rows of length {size}, got a row of zeros.")
    unit = start.double() / norms.to(start.device)[:, None]
    return unit.to(operator.device, operator.dtype), norms


def inner_sum(operator: object) -> Callable[[Tensor], Tensor]:
    """Return what completes dot products: a sum over the processes that hold parts of vectors."""
    total: Callable[[Tensor], Tensor] = getattr(operator, "inner_sum", _whole)
    return total


def _whole(part: Tensor) -> Tensor:
    return part


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products of rows, shape ``(lanes, n)``, summed in float64 where there is any.

    On a CPU a sum in float64 would first copy the row, at the price of all the rest of a Lanczos
    step: there short pieces are summed in float32, and only their sums in float64.
    """
    product = left * right
    if product.device.type == "mps":  # it has no float64
        return product.sum(-1)
    if product.device.type == "cpu" and product.dtype == torch.float32:
        whole = product.shape[-1] - product.shape[-1] % _PIECE
        pieces = product[:, :whole].unflatten(-1, (-1, _PIECE)).sum(-1)
        rest = product[:, whole:].sum(-1, keepdim=True)
        product = torch.cat([pieces, rest], dim=-1)
    return product.sum(-1, dtype=torch.float64)


def norm(rows: Tensor, total: Callable[[Tensor], Tensor] = _whole) -> Tensor:
    """Return the Euclidean norms of rows, ``(lanes, n)``, also where float32 holds no squares."""
    largest = rows.abs().amax(-1, keepdim=True) if rows.numel() else rows.new_ones(len(rows), 1)
    unit = rows / largest.clamp_min(torch.finfo(rows.dtype).tiny)
    squares = dot(unit, unit)
    return total(squares * largest[:, 0].to(squares).square()).sqrt()


def projection(rows: Tensor, vectors: Tensor, total: Callable[[Tensor], Tensor] = _whole) -> Tensor:
    """Return each lane's vector projected on the span of its orthonormal rows.

    Args:
        rows: shape ``(lanes, m, n)``.
        vectors: shape ``(lanes, n)``.
        total: completes dot products where each process holds a part of the vectors.
    """
    coefficients = total(torch.bmm(rows, vectors[:, :, None]))
    return torch.bmm(rows.transpose(1, 2), coefficients)[:, :, 0]
