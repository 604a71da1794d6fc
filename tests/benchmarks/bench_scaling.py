"""The cost model against measured memory and time, and its table for larger nets.

Run with ``python -m tests.benchmarks.bench_scaling``: about three minutes. Writes the two marked
sections of ``docs/scaling.md``; with ``--table`` only the second, which measures nothing.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_optkit.measures.cost_model import (
    Hardware,
    MeasurementCost,
    measurement_cost,
    transformer_activations,
)
from lightning_optkit.measures.critical_point import critical_point
from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.spectrum import hessian_spectrum
from tests.benchmarks.bench_products import gradient
from tests.benchmarks.nets import GPT, Workload
from tests.benchmarks.page import PAGE, machine, markdown_table, write_section
from tests.benchmarks.timing import cpu_seconds, peak_memory

SCALING_PAGE = PAGE.with_name("scaling.md")
SHAPES = {"0.1M": (64, 2), "1M": (128, 5), "10M": (256, 13)}  # width and layers
VOCAB, LENGTH, BATCH, HEAD_WIDTH = 128, 64, 4, 32
SETTINGS = {"num_matvecs": 10, "num_probes": 2, "num_batches": 2}
CALIBRATED_ON = "1M"
GRADIENT_ROUNDS = 7

# The table of docs/scaling.md. 64 sequences in all, so that more devices hold fewer each.
SIZES = {"10M": 10**7, "1B": 10**9, "70B": 70 * 10**9}
DEVICES = (1, 8, 64, 512)
SEQUENCES = 64


@dataclass(frozen=True)
class Comparison:
    """One measurement, made and predicted."""

    label: str
    num_params: int
    route: str
    num_products: int
    num_bytes: int
    seconds: float
    predicted: MeasurementCost

    @property
    def bytes_error(self) -> float:
        return self.predicted.total_bytes / self.num_bytes - 1

    @property
    def seconds_error(self) -> float:
        return self.predicted.seconds / self.seconds - 1

    @property
    def cells(self) -> list[str]:
        return [
            f"{self.num_params:,}, {self.route}",
            f"{self.num_products}",
            f"{self.num_bytes / 1e6:,.0f} MB",
            f"{self.predicted.total_bytes / 1e6:,.0f} MB",
            f"{self.bytes_error:+.0%}",
            f"{self.seconds:.2f} s",
            f"{self.predicted.seconds:.2f} s",
            f"{self.seconds_error:+.0%}",
        ]


def main() -> None:
    if "--table" not in sys.argv[1:]:
        measure_all()
    write_section("cost_model", table_section(), page=SCALING_PAGE)


def measure_all() -> None:
    torch.set_num_threads(1)
    flops = measured_flops(workload(CALIBRATED_ON))
    found = [compared(label, route, flops) for label in SHAPES for route in ("cached", "lockstep")]
    table = Table(*COLUMNS, title=f"calibrated at {flops / 1e9:.1f} GFLOP/s")
    for comparison in found:
        table.add_row(*comparison.cells)
    Console().print(table)
    write_section("bench_scaling", measured_section(found, flops), page=SCALING_PAGE)


def workload(label: str) -> Workload:
    width, layers = SHAPES[label]
    torch.manual_seed(0)
    net = GPT(vocab=VOCAB, length=LENGTH, width=width, heads=width // HEAD_WIDTH, layers=layers)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1))
    return Workload(f"GPT {label}", net.eval(), tokens[:, :-1], tokens[:, 1:])


def measured_flops(work: Workload) -> float:
    """Return the FLOP/s that a gradient reaches here, as the model counts them."""
    gradient(work)
    seconds = [cpu_seconds(lambda: gradient(work)) for _ in range(GRADIENT_ROUNDS)]
    return 6 * work.num_params * work.inputs.numel() / statistics.median(seconds)


def predicted(work: Workload, label: str, route: str, flops: float) -> MeasurementCost:
    width, layers = SHAPES[label]
    return measurement_cost(
        work.num_params,
        route=route,
        batch_size=BATCH,
        sequence_length=LENGTH,
        activations=transformer_activations(
            work.num_params,
            sequence_length=LENGTH,
            layers=layers,
            width=width,
            head_width=HEAD_WIDTH,
            vocab=VOCAB,
        ),
        hardware=Hardware(flops=flops, efficiency=1.0),
        exact_below=0,
        **SETTINGS,
    )


def compared(label: str, route: Literal["cached", "lockstep"], flops: float) -> Comparison:
    work = workload(label)
    num_products: list[int] = []
    # memory first: that run warms caches and chooses kernels
    num_bytes = peak_memory(lambda: num_products.append(measure(work, route)))
    return Comparison(
        label=label,
        num_params=work.num_params,
        route=route,
        num_products=num_products[0],
        num_bytes=num_bytes,
        seconds=cpu_seconds(lambda: measure(work, route)),
        predicted=predicted(work, label, route, flops),
    )


def measure(work: Workload, route: Literal["cached", "lockstep"]) -> int:
    """Measure as `HessianSpectrum` does, on a copy of the parameters; return the products."""
    copies: dict[str, Tensor] = {name: p.detach().clone() for name, p in work.params.items()}
    operator = HessianOperator([work.loss] * SETTINGS["num_batches"], copies, graphs=route)
    spectrum = hessian_spectrum(
        operator,
        num_matvecs=SETTINGS["num_matvecs"],
        num_probes=SETTINGS["num_probes"],
        exact_below=0,
    )
    critical_point(operator, spectrum)
    operator.loss()
    return operator.num_matvecs


# -- what is shown ----------------------------------------------------------------------------

COLUMNS = [
    "parameters, route",
    "products",
    "peak",
    "predicted",
    "error",
    "CPU time",
    "predicted",
    "error",
]


def measured_section(found: list[Comparison], flops: float) -> str:
    widest = max(found, key=lambda c: abs(c.bytes_error))
    slowest = max(found, key=lambda c: abs(c.seconds_error))
    return f"""\
{machine()}.

GPTs of three sizes on {SETTINGS["num_batches"]} batches of {BATCH} sequences of {LENGTH} tokens,
{SETTINGS["num_probes"]} probes of {SETTINGS["num_matvecs"]} products, self-check and kind of point
included; the bytes are the peak of torch's own allocations.
The speed was calibrated once, with a gradient of the {CALIBRATED_ON} net:
{flops / 1e9:.1f} GFLOP/s.

{markdown_table(COLUMNS, [comparison.cells for comparison in found])}

Largest errors: bytes {widest.bytes_error:+.0%}, seconds {slowest.seconds_error:+.0%}."""


TABLE_COLUMNS = [
    "parameters",
    "devices",
    "batches each",
    "whole: memory",
    "time",
    "of it network",
    "sharded: memory",
    "time",
    "of it network",
]


def table_section() -> str:
    rows = [row(label, n, devices) for label, n in SIZES.items() for devices in DEVICES]
    whole, sharded = (
        measurement_cost(SIZES["10M"], route=route).num_products for route in ("cached", "sharded")
    )
    return f"""\
{whole} products: 4 probes of 80, and 3 for the self-check and the kind of point; {sharded} where
parameters stay sharded: 11 find the step of the differences, and there is no self-check. On
{SEQUENCES} sequences of 1,024 tokens in all, one a batch. Memory is the peak on each device beside
what training holds; whole parameters are taken on the leaner of the two routes, `graphs="cached"`
or `"lockstep"`.

{markdown_table(TABLE_COLUMNS, rows)}"""


def row(label: str, num_params: int, devices: int) -> list[str]:
    batches = max(1, SEQUENCES // devices)
    cells = [label, f"{devices}", f"{batches}"]
    costs = {
        route: measurement_cost(num_params, route=route, world_size=devices, num_batches=batches)
        for route in ("cached", "lockstep", "sharded")
    }
    whole = min(costs["cached"], costs["lockstep"], key=lambda cost: cost.total_bytes)
    for cost in (whole, costs["sharded"]):
        cells += [
            quantity(cost.total_bytes / 1e9, "GB"),
            duration(cost.seconds),
            duration(cost.network_seconds),
        ]
    return cells


def quantity(value: float, unit: str) -> str:
    return f"{value:,.{0 if value >= 10 else 1}f} {unit}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return quantity(seconds / size, unit)
    return quantity(seconds, "s")


if __name__ == "__main__":
    main()
