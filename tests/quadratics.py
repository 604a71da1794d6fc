"""Losses and operators whose spectrum is prescribed, so that every number has a truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.lanczos import rounding_noise

# Spectra that trip up eigensolvers, each of ten eigenvalues.
SPECTRA: dict[str, list[float]] = {
    "distinct": [-4.0, -2.5, -1.0, -0.1, 0.3, 1.0, 1.5, 2.0, 3.0, 7.0],
    "repeated": [-1.0, -1.0, -1.0, 2.0, 2.0, 2.0, 2.0, 5.0, 5.0, 5.0],
    "negative": [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, -0.5],
    "huge": [1e8, 1e7, 3e6, 1e6, -1e6, -2e7, 5e5, 4e5, 3e5, 2e5],
    "huge and small": [1e8, 1.0, 0.5, 2.0, 3.0, -1.0, -2.0, 4.0, 5.0, 6.0],
    "tiny": [1e-12, 2e-12, -1e-12, 3e-12, 4e-12, -5e-12, 6e-12, 7e-12, 8e-12, 9e-12],
    "zero": [0.0] * 10,
    "mostly zero": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 4.0],
}


def symmetric(eigenvalues: Sequence[float] | Tensor, *, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors, float64."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    vectors = orthogonal(len(values), seed=seed)
    matrix = vectors @ torch.diag(values) @ vectors.T
    return (matrix + matrix.T) / 2


def orthogonal(n: int, *, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def random_params(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{i}": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for i, shape in enumerate(shapes)
    }


def flatten(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1).double() for p in params.values()])


@dataclass
class Quadratic:
    """The loss ``w @ A @ w / 2``, whose Hessian is ``A`` and whose gradient is ``A @ w``."""

    matrix: Tensor
    calls: int = 0

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        w = flatten(params)
        return w @ self.matrix @ w / 2


@dataclass
class MatrixOperator:
    """A matrix with the interface of a `HessianOperator`, cheap enough for many repetitions."""

    matrix: Tensor
    works_in_blocks: bool = True
    num_matvecs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.matrix), len(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def noise(self) -> float:
        return rounding_noise(self.dtype)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.num_matvecs += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix @ vectors

    def dense(self) -> Tensor:
        self.num_matvecs += len(self.matrix)
        return self.matrix.double()


def within_sem(samples: Tensor, truth: float, *, sems: float = 4.0) -> bool:
    """Return whether the mean of the samples is within so many of its standard errors of truth."""
    error = abs(float(samples.mean()) - truth)
    return error <= sems * float(samples.std()) / math.sqrt(len(samples))
