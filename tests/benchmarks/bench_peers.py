"""The same questions to lightning_optkit and to its peers, one after another in one run.

Run with ``python -m tests.benchmarks.bench_peers``: about ten minutes; ``--quick`` leaves ResNet-20
and PyHessian's power iteration out and writes nothing. CPU seconds of one thread, as in
``bench_products``.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_optkit.measures.eigenpairs import Eigenpairs, top_eigenpairs
from lightning_optkit.measures.spectrum import Spectrum, hessian_spectrum
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.problems import PROBLEMS, Problem
from tests.benchmarks.timing import cpu_seconds, interleaved, peak_memory, quartiles

TOP = 5
RTOL = 1e-4  # of each of the five eigenvalues, against float64
PROBES, STEPS = 2, 50  # of the density: the hundred products of PyHessian's default, on two probes
TRAINING_STEPS, FOLLOWING_RTOL = 50, 1e-3

# The cheapest settings found that reach RTOL, in hindsight: their users do not know them.
CHEAPEST = {
    ("PyHessian", "MLP"): {"tol": 3e-6},
    ("PyHessian", "ResNet-20"): {"tol": 3e-6},
    ("PyHessian", "GPT"): {"tol": 2e-6},
    ("hessian-eigenthings", "MLP"): {"steps": 30},
    ("hessian-eigenthings", "ResNet-20"): {"steps": 20},
    ("hessian-eigenthings", "GPT"): {"steps": 38},
    ("curvlinops", "MLP"): {"tol": 1e-2, "basis": 15},
    ("curvlinops", "ResNet-20"): {"tol": 0.1, "basis": 20},
    ("curvlinops", "GPT"): {"tol": 1e-2, "basis": 15},
}


def ours_top(problem: Problem) -> tuple[list[float], int]:
    found = top_eigenpairs(problem.operator(), TOP, rtol=RTOL)
    return found.values.tolist(), found.num_matvecs


def peer_top(peer: type[Peer], problem: Problem) -> tuple[list[float], int]:
    side = peer(problem)
    kind = problem.name.split()[0].rstrip(",")
    return side.top(TOP, **CHEAPEST[peer.label, kind]), side.num_products


def reference(problem: Problem) -> Tensor:
    """Return the top eigenvalues in float64, by magnitude.

    ARPACK finds the vectors with float32 products; their Rayleigh quotients with float64 products
    are off by the square of what is left of the residual, over the gap.
    """
    operator = problem.operator()

    def product(vector: np.ndarray) -> np.ndarray:
        return (operator @ torch.from_numpy(vector.ravel().astype(np.float32))).numpy()

    wrapped = scipy.sparse.linalg.LinearOperator(operator.shape, matvec=product, dtype=np.float32)
    start = np.random.default_rng(1).standard_normal(operator.shape[0])
    _, vectors = scipy.sparse.linalg.eigsh(wrapped, k=TOP, which="LM", tol=1e-6, v0=start)
    rows = torch.from_numpy(vectors.T).double()
    truth = problem.in_float64().operator()
    products = torch.stack([truth @ row for row in rows])
    rayleigh = torch.linalg.eigvalsh(rows @ products.T)
    return rayleigh[rayleigh.abs().argsort(descending=True)]


def worst_error(values: list[float], truth: Tensor) -> float:
    found = torch.tensor(values, dtype=torch.float64)
    found = found[found.abs().argsort(descending=True)]
    return float(((found - truth) / truth).abs().max())


def probes_for(method: str, target: float, frobenius: float, largest: Tensor) -> int:
    r"""Return the products with which a method's standard error of the trace meets ``target``.

    Hutchinson's variance is :math:`2 \|A\|_F^2` a probe. Hutch++ spends two thirds of its products,
    XTrace half, on taking the range of the sketch out; here they take out exactly the largest
    eigenvalues, which is the best they can do.
    """
    squares = largest.square().sort(descending=True).values
    for probes in range(1, 10_000):
        taken = {"hutchinson": 0, "hutch++": probes, "xtrace": probes - 1}[method]
        left = frobenius**2 - float(squares[:taken].sum())
        if 2 * left / probes <= target**2:
            return probes * {"hutchinson": 1, "hutch++": 3, "xtrace": 2}[method]
    raise ValueError(f"{method} needs more than 10,000 probes for {target}.")


def following(problem: Problem) -> tuple[list[int], list[float]]:
    """Return products and true relative error of the largest eigenvalue after each step of SGD."""
    previous: Eigenpairs | None = None
    counts, errors = [], []
    for _, _ in zip(range(TRAINING_STEPS), problem.steps(), strict=False):
        operator = problem.operator()
        start = None if previous is None else previous.vectors
        previous = top_eigenpairs(operator, 1, which="largest", rtol=FOLLOWING_RTOL, start=start)
        cold = top_eigenpairs(operator, 2, which="largest", rtol=1e-6).values[0]
        counts.append(previous.num_matvecs)
        errors.append(abs(float(previous.values[0] / cold) - 1))
    return counts, errors


# -- one problem ------------------------------------------------------------------------------

COLUMNS = {
    "product": ["library", "gradients per product", "quartiles", "ours is faster by", "error"],
    "memory": ["library", "MiB"],
    "top": ["library", "products", "CPU seconds", "ours is faster by", "error"],
    "bundle": ["library", "products", "density", "trace", "all, CPU seconds", "ours is faster by"],
    "following": ["net", "products a step", "at most", "first", "worst error", "steps off"],
}
TITLES = {
    "product": "one product",
    "memory": "peak memory",
    "top": f"top {TOP}",
    "bundle": "the bundle",
    "following": "following",
}


@dataclass(frozen=True)
class Timed:
    """The answer of a task with what it cost."""

    answer: float | list[float]
    num_products: int
    seconds: float


def timed(task: Callable[[], tuple[float | list[float], int]]) -> Timed:
    kept: list[tuple[float | list[float], int]] = []
    seconds = cpu_seconds(lambda: kept.append(task()))
    return Timed(*kept[0], seconds)


def product_rows(problem: Problem, peers: list[type[Peer]], seconds: float) -> list[list[str]]:
    """Time one product of each library in gradients; check ours against forward mode first."""
    vector = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(0))
    operator = problem.operator()
    products = {"optkit": partial(operator.__matmul__, vector)}
    products |= {peer.label: partial(peer(problem).product, vector) for peer in peers}
    truth = problem.operator().forward_mode_product(vector)
    errors = [float((product() - truth).norm() / truth.norm()) for product in products.values()]
    if not errors[0] < RTOL:
        raise RuntimeError(f"The product is {errors[0]:.1e} away from forward over reverse mode.")
    unit, ours, *others = interleaved(
        [problem.gradient, *products.values()], min_rounds=8, seconds=seconds
    )
    rows = []
    for label, times, error in zip(products, [ours, *others], errors, strict=True):
        low, median, high = quartiles([t / u for t, u in zip(times, unit, strict=True)])
        faster = statistics.median(t / o for t, o in zip(times, ours, strict=True))
        cells = [f"{median:.2f}", f"{low:.2f}–{high:.2f}", f"{faster:.2f}", f"{error:.0e}"]
        rows.append([label, *cells])
    return rows


def top_tasks(problem: Problem, peers: list[type[Peer]]) -> dict[str, Timed]:
    tasks = {"optkit": partial(ours_top, problem)}
    tasks |= {peer.label: partial(peer_top, peer, problem) for peer in peers}
    return {label: timed(task) for label, task in tasks.items()}


def ours_bundle(problem: Problem) -> tuple[Spectrum, int]:
    spectrum = hessian_spectrum(problem.operator(), num_probes=PROBES, num_matvecs=STEPS)
    return spectrum, spectrum.num_matvecs


def peer_density(peer: type[Peer], problem: Problem, largest: float) -> tuple[float, int]:
    side = peer(problem)
    return side.density(PROBES, STEPS, largest), side.num_products


def peer_trace(peer: type[Peer], problem: Problem, method: str, num: int) -> tuple[float, int]:
    side = peer(problem)
    return side.trace(num, method), side.num_products


def cheapest_trace(peer: type[Peer], spectrum: Spectrum) -> tuple[str, int]:
    """Return the method and products of a peer whose standard error is that of ``spectrum``."""
    nodes = spectrum.ritz_values[0]
    largest = nodes[~nodes.isnan()].abs().sort(descending=True).values[:16]
    left = PROBES / 2 * spectrum.trace_standard_error**2  # what ours has not taken out
    frobenius = float(left + largest[:TOP].square().sum()) ** 0.5
    costs = {
        method: probes_for(method, spectrum.trace_standard_error, frobenius, largest)
        for method in peer.trace_methods
    }
    return min(costs.items(), key=lambda item: item[1])


def top_rows(tops: dict[str, Timed], truth: Tensor) -> list[list[str]]:
    return [
        [
            label,
            str(task.num_products),
            f"{task.seconds:.2f}",
            f"{task.seconds / tops['optkit'].seconds:.2f}",
            f"{worst_error(task.answer, truth):.1e}",
        ]
        for label, task in tops.items()
    ]


def bundle_rows(
    problem: Problem, peers: list[type[Peer]], tops: dict[str, Timed]
) -> list[list[str]]:
    """Time ours at once; of a peer, the top eigenvalues timed before, the density and the trace."""
    ours = timed(partial(ours_bundle, problem))
    spectrum = ours.answer
    rows = [["optkit", str(ours.num_products), "", "", f"{ours.seconds:.2f}", "1.00"]]
    for peer in peers:
        method, num = cheapest_trace(peer, spectrum)
        density = timed(partial(peer_density, peer, problem, spectrum.lambda_max))
        trace = timed(partial(peer_trace, peer, problem, method, num))
        parts = [tops[peer.label], density, trace]
        seconds = sum(part.seconds for part in parts)
        rows.append(
            [
                peer.label,
                str(sum(part.num_products for part in parts)),
                f"{density.num_products} in {density.seconds:.2f} s",
                f"{trace.num_products} in {trace.seconds:.2f} s, {method}",
                f"{seconds:.2f}",
                f"{seconds / ours.seconds:.2f}",
            ]
        )
    return rows


def memory_rows(problem: Problem, peers: list[type[Peer]]) -> list[list[str]]:
    """Return the peak of tensors in MiB while a side is set up and makes one product."""
    vectors = torch.randn(4, problem.num_params).T
    sides = {
        "optkit, lockstep": lambda: problem.operator(graphs="lockstep") @ vectors[:, 0],
        "optkit, lockstep of 4": lambda: problem.operator(graphs="lockstep") @ vectors,
        "optkit, cached": lambda: problem.operator() @ vectors[:, 0],
    }
    sides |= {p.label: lambda p=p: p(problem).product(vectors[:, 0]) for p in peers}
    return [[label, f"{peak_memory(call) / 2**20:.1f}"] for label, call in sides.items()]


def following_rows(problem: Problem) -> list[list[str]]:
    counts, errors = following(problem)
    late = sum(error > FOLLOWING_RTOL for error in errors)
    mean, most = statistics.mean(counts[1:]), max(counts[1:])
    cells = [f"{mean:.1f}", str(most), str(counts[0]), f"{max(errors):.1e}", str(late)]
    return [[problem.name, *cells]]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers'
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out what takes long, no page")
    parser.add_argument("--only", default="", help="the problem whose name starts so, no page")
    options = parser.parse_args()
    peers = [peer for peer in PEERS if peer.is_installed()]
    console = Console(width=120)
    sections = []

    def show(problem: Problem, kind: str, rows: list[list[str]]) -> None:
        title = f"{problem.name}: {TITLES[kind]}"
        console.print(rich_table(title, kind, rows))
        sections.append(f"### {title}\n\n{markdown_table(COLUMNS[kind], rows)}")

    for make in PROBLEMS:
        if not make.__name__.startswith(options.only):
            continue
        problem = make()
        patient = [p for p in peers if not (options.quick and p.label == "PyHessian")]
        show(problem, "product", product_rows(problem, peers, 20.0))
        show(problem, "memory", memory_rows(problem, peers))
        tops = top_tasks(problem, patient)
        show(problem, "top", top_rows(tops, reference(problem)))
        show(problem, "bundle", bundle_rows(problem, patient, tops))
        if make.__name__ != "resnet20_problem":  # two minutes, and no other question than the MLP
            show(problem, "following", following_rows(problem))
    if not options.quick and not options.only:
        write_section("bench_peers", "\n\n".join([heading(peers), *sections]))


def rich_table(title: str, kind: str, rows: list[list[str]]) -> Table:
    shown = Table(*COLUMNS[kind], title=title, title_justify="left")
    for row in rows:
        shown.add_row(*row)
    return shown


def heading(peers: list[type[Peer]]) -> str:
    versions = ", ".join(peer.version() for peer in peers)
    left_out = [peer.label for peer in PEERS if peer not in peers]
    missing = f" Not installed and left out: {', '.join(left_out)}." if left_out else ""
    return f"""\
## Beside the peers

{machine()}; {versions}.{missing}

All libraries answer the same questions about the same nets in the middle of their training, one
after another in one process, in CPU seconds of one thread. All read several batches: PyHessian
keeps the graph of a single batch, and then its products cost what ours do.

- *One product*: in gradients over the same batches; error against forward over reverse mode.
  curvlinops is off on LayerNorm's weight: torch's `jvp` of `jacrev` is.
- *Peak memory*: tensors of one product, set-up included, in MiB.
- *Top {TOP}*: eigenvalues of largest magnitude, error of the worst against float64. Each peer has
  the cheapest settings that reach {RTOL:.0e}, found in hindsight; ours stops by itself.
- *The bundle*: density ({PROBES} probes of {STEPS} steps), top {TOP} and trace. Ours reads all of
  them off one Krylov run; a peer makes three calls. Its trace gets as many products as bring its
  standard error to ours, by the cheapest of its methods, on the assumption that a sketch finds the
  largest eigenvalues exactly. PyHessian's density calls `torch.eig`, which is gone: a stand-in of
  two lines replaces it here.
- *Following*: the largest eigenvalue after each of {TRAINING_STEPS} steps of SGD on fresh batches,
  warm-started, to {FOLLOWING_RTOL:.0e}."""


if __name__ == "__main__":
    main()
