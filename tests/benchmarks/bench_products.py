"""Cost of one Hessian-vector product, in gradients on the same batch.

Run with ``python -m tests.benchmarks.bench_products``: about four minutes. Every round times the
gradient and each route once, in CPU seconds of one thread: waiting for another process does not
count, and what it takes of caches and memory slows a ratio's two halves alike.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_optkit.measures.gradient_graph import flat, split
from lightning_optkit.measures.operators import HessianOperator
from tests.benchmarks.nets import WORKLOADS, Workload, cross_entropy
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.timing import interleaved, peak_memory

try:
    from pyhessian import hessian as PyHessian
    from pyhessian.utils import hessian_vector_product
except ImportError:  # an extra: `pip install lightning-optkit[pyhessian]`
    PyHessian = None

LANES = 4  # vectors at once in lockstep: the count from which it is the low-memory default
MIN_ROUNDS, SECONDS = 10, 25.0  # of each workload; ten rounds of ResNet-20 take two minutes
TOLERANCE = 1e-4  # relative error between routes: float32 rounding is 1e-6, a wrong route 1
TARGETS = {"MLP": 1.6, "ResNet-20": 2.9, "GPT": 2.3}  # most gradients for a cached product


@dataclass(frozen=True)
class Route:
    """One way to products: ``prepare()`` returns ``H V`` as a function of ``V``, shape (n, k)."""

    label: str
    prepare: Callable[[], Callable[[Tensor], Tensor]]
    num_vectors: int = 1


@dataclass(frozen=True)
class Cost:
    """One product in gradients: quartiles over the rounds, and peak memory."""

    label: str
    quartiles: tuple[float, float, float]
    memory: float
    rounds: int

    @property
    def cells(self) -> list[str]:
        low, median, high = self.quartiles
        return [self.label, f"{median:.2f}", f"{low:.2f}–{high:.2f}", f"{self.memory:.2f}"]


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
    console = Console()
    sections = []
    for make in WORKLOADS:
        work = make()
        seconds, costs = measured(work)
        title = f"{work.name}: {work.num_params:,} parameters, one gradient {seconds * 1e3:.0f} ms"
        console.print(rich_table(title, costs))
        console.print(verdict(work, costs))
        sections.append(markdown_section(title, costs, verdict(work, costs)))
    write_section("bench_products", "\n\n".join([heading(), *sections]))


def measured(work: Workload) -> tuple[float, list[Cost]]:
    """Return the seconds of one gradient and what each route costs beside it."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LANES, work.num_params, generator=generator).T  # as `lanczos` lays out
    routes = all_routes(work)
    check_agreement(work, routes, vectors)
    gradient_memory = peak_memory(partial(gradient, work))
    memory = [peak_memory(partial(first_product, route, vectors)) for route in routes]
    unit, times = round_times(work, routes, vectors)
    costs = []
    for route, seconds, size in zip(routes, times, memory, strict=True):
        ratios = [s / (u * route.num_vectors) for s, u in zip(seconds, unit, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        costs.append(Cost(route.label, (low, median, high), size / gradient_memory, len(unit)))
    return statistics.median(unit), costs


def round_times(
    work: Workload, routes: list[Route], vectors: Tensor
) -> tuple[list[float], list[list[float]]]:
    """Return the seconds of the gradient and of each route's call, one for each round."""
    inputs = [vectors[:, : route.num_vectors] for route in routes]
    products = [partial(route.prepare(), v) for route, v in zip(routes, inputs, strict=True)]
    unit, *times = interleaved(
        [partial(gradient, work), *products], min_rounds=MIN_ROUNDS, seconds=SECONDS
    )
    return unit, times


def first_product(route: Route, vectors: Tensor) -> Tensor:
    return route.prepare()(vectors[:, : route.num_vectors])


def check_agreement(work: Workload, routes: list[Route], vectors: Tensor) -> None:
    """Raise unless every route returns the products of forward over reverse mode.

    The routes themselves share reverse over reverse mode, so they would also share its errors.
    """
    reference = HessianOperator(work.loss, work.params, self_check=False)
    truth = torch.stack([reference.forward_mode_product(v) for v in vectors.T], dim=1)
    for route in routes:
        expected = truth[:, : route.num_vectors]
        error = float((first_product(route, vectors) - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise RuntimeError(f"{route.label} is {error:.1e} away from forward over reverse mode.")


# -- routes -----------------------------------------------------------------------------------


def gradient(work: Workload) -> tuple[Tensor, ...]:
    return torch.autograd.grad(work.loss(), tuple(work.params.values()))


def all_routes(work: Workload) -> list[Route]:
    routes = [
        Route("optkit, cached graph", lambda: operator(work, "cached")),
        Route(f"optkit, lockstep of {LANES}", lambda: operator(work, "lockstep"), LANES),
        Route("graph rebuilt each time", lambda: lambda v: rebuilt_product(work, v)),
    ]
    if PyHessian is not None:
        routes += [
            Route("PyHessian 0.1, loader", lambda: pyhessian_loader(work)),
            Route("PyHessian 0.1, batch", lambda: pyhessian_single(work)),
        ]
    return routes


def operator(work: Workload, graphs: str) -> Callable[[Tensor], Tensor]:
    return HessianOperator(work.loss, work.params, graphs=graphs, self_check=False).__matmul__


def rebuilt_product(work: Workload, vector: Tensor) -> Tensor:
    """Return the gradient of ⟨gradient, v⟩, all of it built for this one product."""
    params = tuple(work.params.values())
    gradients = torch.autograd.grad(work.loss(), params, create_graph=True)
    pieces = split(vector[:, 0], work.params)
    inner = sum((g * v).sum() for g, v in zip(gradients, pieces, strict=True))
    return flat(torch.autograd.grad(inner, params), work.params)[:, None]


def pyhessian_loader(work: Workload) -> Callable[[Tensor], Tensor]:
    """Return its product over a data loader, which holds one batch here."""
    peer = PyHessian(work.net, cross_entropy, dataloader=[(work.inputs, work.targets)], cuda=False)

    def product(vector: Tensor) -> Tensor:
        _, pieces = peer.dataloader_hv_product(split(vector[:, 0], work.params))
        return flat(pieces, work.params)[:, None]

    return product


def pyhessian_single(work: Workload) -> Callable[[Tensor], Tensor]:
    """Return its product on one batch given as such: the only case in which it keeps the graph."""
    peer = PyHessian(work.net, cross_entropy, data=(work.inputs, work.targets), cuda=False)
    work.net.zero_grad()  # its own gradients would hold the graph and grow with every backward

    def product(vector: Tensor) -> Tensor:
        pieces = hessian_vector_product(peer.gradsH, peer.params, split(vector[:, 0], work.params))
        return flat(pieces, work.params)[:, None]

    return product


# -- what is shown ----------------------------------------------------------------------------

COLUMNS = ["route", "gradients per product", "quartiles", "peak memory"]


def rich_table(title: str, costs: list[Cost]) -> Table:
    table = Table(*COLUMNS, title=title, title_justify="left")
    for cost in costs:
        table.add_row(*cost.cells)
    return table


def verdict(work: Workload, costs: list[Cost]) -> str:
    kind = next(name for name in TARGETS if work.name.startswith(name))
    median = costs[0].quartiles[1]
    outcome = "met" if median <= TARGETS[kind] else "MISSED"
    return (
        f"Target for the cached graph: at most {TARGETS[kind]} gradients; {median:.2f}, {outcome}. "
        f"{costs[0].rounds} rounds."
    )


def markdown_section(title: str, costs: list[Cost], outcome: str) -> str:
    table = markdown_table(COLUMNS, [cost.cells for cost in costs])
    return f"### {title}\n\n{table}\n\n{outcome}"


def heading() -> str:
    peer = "" if PyHessian is not None else " PyHessian was not installed and is left out."
    return f"""\
## One Hessian-vector product

{machine()}.

The unit is one gradient of the same loss on the same batch: a ratio of 2 means that a product takes
as long as two gradients. Each round times the gradient and every route once, in CPU seconds, page
faults of the allocator included; shown are the median and the quartiles of the ratio over the
rounds. Peak memory is the most that tensors take at once while a route is set up and used once,
beyond parameters, batch and vectors, as a multiple of the gradient's. Before timing, all routes are
checked against forward over reverse mode: relative error under {TOLERANCE:.0e}.

- *optkit, cached graph*: `HessianOperator` as it comes. The graph of the gradient is built once and
  serves every product at these parameters; shown is a product after the first.
- *optkit, lockstep*: `graphs="lockstep"`. The graph is rebuilt for every multiplication and shared
  by {LANES} vectors; shown is the cost of one of them.
- *graph rebuilt each time*: reverse over reverse with nothing kept. PyHessian does so over a data
  loader (here of one batch); given a single batch it keeps the graph too.{peer}"""


if __name__ == "__main__":
    main()
