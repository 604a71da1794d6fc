"""The other libraries for curvature in PyTorch, each called as its documentation says.

A side is made for one task and thrown away, so that what it sets up is part of its time. It counts
its products, and answers the same four questions: ``product``, ``top``, ``density``, ``trace``.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_optkit.measures.gradient_graph import flat, split
from tests.benchmarks.nets import cross_entropy
from tests.benchmarks.problems import Problem
from tests.benchmarks.timing import OutOfPatience


class Peer:
    """What all sides share: the problem and the count of products."""

    label: ClassVar[str]
    distribution: ClassVar[str]
    module: ClassVar[str]
    trace_methods: ClassVar[tuple[str, ...]] = ("hutchinson",)

    def __init__(self, problem: Problem, *, deadline: float = math.inf) -> None:
        self.problem = problem
        self.deadline = deadline  # CPU time of this process, after which no product is made
        self.num_products = 0

    @classmethod
    def is_installed(cls) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they import is deprecated here and there
            try:
                import_module(cls.module)
            except ImportError:  # an extra: `pip install lightning-optkit[peers]`
                return False
        return True

    @classmethod
    def version(cls) -> str:
        return f"{cls.label} {metadata.version(cls.distribution)}"

    def counted(self, product: Callable[..., Any]) -> Callable[..., Any]:
        """Return the library's own product, which it looks up on its operator, with a count."""

        def counting(*args: Any) -> Any:
            if time.process_time() > self.deadline:
                raise OutOfPatience(self.num_products)
            self.num_products += self.columns(args[-1])
            return product(*args)

        return counting

    def columns(self, vectors: Any) -> int:
        return 1


class PyHessianPeer(Peer):
    """PyHessian over a data loader: power iteration, Hutchinson, Lanczos."""

    label, distribution, module = "PyHessian", "PyHessian", "pyhessian"

    def __init__(self, problem: Problem, *, deadline: float = math.inf) -> None:
        super().__init__(problem, deadline=deadline)
        make = import_module(self.module).hessian
        self.peer = make(problem.net, cross_entropy, dataloader=problem.batches, cuda=False)
        self.peer.dataloader_hv_product = self.counted(self.peer.dataloader_hv_product)

    def product(self, vector: Tensor) -> Tensor:
        _, pieces = self.peer.dataloader_hv_product(split(vector, self.problem.params))
        return flat(pieces, self.problem.params)

    def top(self, k: int, *, tol: float, max_iterations: int = 1000) -> list[float]:
        torch.manual_seed(0)  # it draws from the global stream
        return self.peer.eigenvalues(maxIter=max_iterations, tol=tol, top_n=k)[0]

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> float:
        torch.manual_seed(0)
        with mock.patch.object(torch, "eig", removed_eig):
            nodes, weights = self.peer.density(iter=steps, n_v=probes)
        return float((torch.tensor(nodes) * torch.tensor(weights)).sum() / probes)

    def trace(self, num_products: int, method: str) -> float:
        torch.manual_seed(0)
        # no tolerance: it compares two means that follow each other, and stops where the trace is
        # negative or by luck
        samples = self.peer.trace(maxIter=num_products, tol=-math.inf)
        return sum(samples) / len(samples)


def removed_eig(matrix: Tensor, *, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    """Stand in for ``torch.eig``, which left torch in 1.13 and without which density crashes."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


class EigenthingsPeer(Peer):
    """hessian-eigenthings: Lanczos, Hutch++ and Lanczos quadrature, all reorthogonalised."""

    label, distribution = "hessian-eigenthings", "hessian-eigenthings"
    module = "hessian_eigenthings"
    trace_methods = ("hutchinson", "hutch++")

    def __init__(self, problem: Problem, *, deadline: float = math.inf) -> None:
        super().__init__(problem, deadline=deadline)
        self.library = import_module(self.module)
        self.operator = self.library.HessianOperator(
            problem.net, problem.batches, self.library.supervised_loss(cross_entropy)
        )
        self.operator.matvec = self.counted(self.operator.matvec)

    def product(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector)

    def top(self, k: int, *, steps: int) -> list[float]:
        found = self.library.lanczos(
            self.operator, k=k, max_iter=steps, reorthogonalize=True, which="LM", seed=0
        )
        return found.eigenvalues.tolist()

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> float:
        found = self.library.spectral_density(
            self.operator, num_runs=probes, lanczos_steps=steps, seed=0
        )
        return float((found.raw_weights * found.raw_eigenvalues).sum() / probes)

    def trace(self, num_products: int, method: str) -> float:
        return self.library.trace(
            self.operator, num_matvecs=num_products, method=method, seed=0
        ).estimate


class CurvlinopsPeer(Peer):
    """curvlinops: ARPACK through scipy, Hutch++, Lanczos quadrature as it came (no second pass)."""

    label, distribution, module = "curvlinops", "curvlinops-for-pytorch", "curvlinops"
    trace_methods = ("hutchinson", "hutch++", "xtrace")

    def __init__(self, problem: Problem, *, deadline: float = math.inf) -> None:
        super().__init__(problem, deadline=deadline)
        self.library = import_module(self.module)
        self.operator = self.library.HessianLinearOperator(
            problem.net,
            CrossEntropy(),
            list(problem.net.parameters()),
            problem.batches,
            check_deterministic=False,
        )
        self.operator._matmat = self.counted(self.operator._matmat)

    def columns(self, vectors: list[Tensor]) -> int:
        return vectors[0].shape[-1]

    def product(self, vector: Tensor) -> Tensor:
        return self.operator @ vector

    def top(self, k: int, *, tol: float, basis: int) -> list[float]:
        linalg = import_module("scipy.sparse.linalg")
        numpy = import_module("numpy")
        start = numpy.random.default_rng(0).standard_normal(self.operator.shape[0])
        return linalg.eigsh(
            self.operator.to_scipy(),
            k=k,
            which="LM",
            tol=tol,
            ncv=basis,
            v0=start,
            return_eigenvectors=False,
        ).tolist()

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> float:
        torch.manual_seed(0)
        grid, density = self.library.lanczos_approximate_spectrum(
            self.operator, steps, num_repeats=probes, boundaries=ends
        )
        return float(torch.trapezoid(grid * density, grid))

    def trace(self, num_products: int, method: str) -> float:
        torch.manual_seed(0)
        functions = {"hutchinson": "hutchinson_trace", "hutch++": "hutchpp_trace"}
        estimate = getattr(self.library, functions.get(method, method))
        return float(estimate(self.operator, num_products))


class CrossEntropy(nn.Module):
    """The loss as curvlinops wants it: it reads the reduction off the module."""

    reduction = "mean"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets)


PEERS: list[type[Peer]] = [PyHessianPeer, EigenthingsPeer, CurvlinopsPeer]
