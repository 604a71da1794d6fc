"""What makes answers of several libraries comparable: the truth, and equal errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.spectrum import Spectrum
from tests.benchmarks.problems import Problem


def arpack(
    operator: HessianOperator, k: int, *, which: str, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return extreme eigenvalues and their vectors in columns, by scipy."""

    def product(vector: np.ndarray) -> np.ndarray:
        return (operator @ torch.from_numpy(vector.ravel().astype(np.float32))).numpy()

    wrapped = scipy.sparse.linalg.LinearOperator(operator.shape, matvec=product, dtype=np.float32)
    start = np.random.default_rng(1).standard_normal(operator.shape[0])
    return scipy.sparse.linalg.eigsh(wrapped, k=k, which=which, tol=tol, v0=start)


def top_in_float64(problem: Problem, k: int) -> Tensor:
    """Return the eigenvalues of largest magnitude, descending in it.

    ARPACK finds the vectors with float32 products; their Rayleigh quotients with float64 products
    are off by the square of what is left of the residual, over the gap.
    """
    _, vectors = arpack(problem.operator(), k, which="LM", tol=1e-6)
    rows = torch.linalg.qr(torch.from_numpy(vectors).double()).Q.T
    truth = problem.in_float64().operator()
    products = torch.stack([truth @ row for row in rows])
    return by_magnitude(torch.linalg.eigvalsh(rows @ products.T))


def by_magnitude(values: Tensor) -> Tensor:
    return values.gather(-1, values.abs().argsort(dim=-1, descending=True))


def worst_error(values: Sequence[float], truth: Tensor) -> float:
    """Return the largest relative error of eigenvalues, rank by rank."""
    found = by_magnitude(torch.tensor(values, dtype=torch.float64))
    return float(((found - truth) / truth).abs().max())


def top_of(spectrum: Spectrum, k: int) -> list[float]:
    """Return the Ritz values of largest magnitude; each rank is the best of all probes."""
    ranked = by_magnitude(spectrum.ritz_values.nan_to_num(0.0))[:, :k]
    best = ranked.abs().argmax(dim=0)
    return ranked[best, torch.arange(ranked.shape[1])].tolist()


def frobenius_squared(spectrum: Spectrum, largest: Tensor) -> float:
    """Return the sum of all squared eigenvalues: the largest as such, the rest by quadrature."""
    nodes = spectrum.ritz_values.nan_to_num(0.0)
    rest = nodes.abs() < largest.abs().min()
    per_probe = (spectrum.ritz_weights * nodes.square() * rest).sum(dim=1)
    return float(largest.square().sum() + spectrum.num_params * per_probe.mean())


def probes_for(method: str, standard_error: float, squared_norm: float, largest: Tensor) -> int:
    r"""Return the products with which a method's standard error of the trace is no larger.

    Hutchinson's variance is :math:`2 \|A\|_F^2` a probe. Hutch++ spends two thirds of its products,
    XTrace half, on taking the range of the sketch out; here they take out exactly the largest
    eigenvalues, which is the best they can do.

    Args:
        method: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        standard_error: the one to meet.
        squared_norm: sum of all squared eigenvalues.
        largest: as many of the largest eigenvalues as are known; no more are taken out.
    """
    squares = largest.square().sort(descending=True).values
    for probes in range(1, 10_000):
        taken = {"hutchinson": 0, "hutch++": probes, "xtrace": probes - 1}[method]
        left = squared_norm - float(squares[:taken].sum())
        if 2 * left / probes <= standard_error**2:
            return probes * {"hutchinson": 1, "hutch++": 3, "xtrace": 2}[method]
    raise ValueError(f"{method} needs more than 10,000 probes for {standard_error}.")
