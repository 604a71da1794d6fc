"""Cost of a step of LARS and LAMB, beside other libraries' and torch's own SGD and AdamW.

Run with ``python -m tests.benchmarks.bench_layerwise``: about two minutes. Peers that are missing
are left out: ``pip install --no-deps pytorch_optimizer timm``. Of timm only two files are loaded:
the rest would import torchvision.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_optkit import LAMB, LARS, lars_param_groups
from tests.benchmarks.nets import resnet20
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.timing import quartiles

MIN_ROUNDS, SECONDS = 30, 25.0
DECAY = 5e-4
COLUMNS = ["step", "milliseconds", "times ours", "quartiles"]
Groups = list[dict[str, Any]]
Make = Callable[[Groups], Optimizer]


@dataclass
class Side:
    """An optimizer with a net of its own, and the CPU seconds of its steps."""

    label: str
    optimizer: Optimizer
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        generator = torch.Generator().manual_seed(0)
        self.grads = [1e-2 * torch.randn(p.shape, generator=generator) for p in self.params]

    def step(self, clock: Callable[[], float]) -> float:
        """Return what a step takes, on gradients that it may write to, as some do."""
        for parameter, grad in zip(self.params, self.grads, strict=True):
            parameter.grad = grad.to(parameter.device, copy=True)
        begin = clock()
        self.optimizer.step()
        return clock() - begin

    def cells(self, ours: Side) -> list[str]:
        ratios = [a / b for a, b in zip(self.seconds, ours.seconds, strict=True)]
        low, median, high = quartiles(ratios)
        milliseconds = f"{quartiles(self.seconds)[1] * 1e3:.3f}"
        return [self.label, milliseconds, f"{median:.2f}", f"{low:.2f}–{high:.2f}"]


def run_in_turn(sides: Sequence[Side], *, clock: Callable[[], float] = time.process_time) -> None:
    """Time the steps of all sides, one of each a round; nobody is always first."""
    for side in sides:
        for _ in range(3):
            side.step(clock)
    begin, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - begin < SECONDS:
        first = rounds % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            side.seconds.append(side.step(clock))
        rounds += 1


# -- who takes part --------------------------------------------------------------------------------


def timms(module: str, name: str) -> Any:
    """Return a class of timm's; importing timm itself would import torchvision."""
    if "timm" not in sys.modules:
        home = metadata.distribution("timm").locate_file("timm")
        for package, folder in (("timm", home), ("timm.optim", home / "optim")):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return getattr(import_module(f"timm.optim.{module}"), name)


def is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def lars_sides() -> dict[str, Make]:
    same = {"lr": 0.1, "momentum": 0.9, "foreach": True}
    sides: dict[str, Make] = {"optkit `LARS`": lambda groups: LARS(groups, **same)}
    if is_installed("pytorch_optimizer"):
        theirs = import_module("pytorch_optimizer").LARS
        sides["pytorch_optimizer `LARS`"] = lambda groups: theirs(groups, **same)
    if is_installed("timm"):
        timm = timms("lars", "Lars")
        sides["timm `Lars`"] = lambda groups: timm(groups, **same)
    return sides | {"torch `SGD`, the floor": lambda groups: SGD(groups, **same)}


def lamb_sides() -> dict[str, Make]:
    same = {"lr": 1e-3, "foreach": True}
    sides: dict[str, Make] = {"optkit `LAMB`": lambda groups: LAMB(groups, **same)}
    if is_installed("pytorch_optimizer"):
        theirs = import_module("pytorch_optimizer").Lamb
        options = same | {"weight_decouple": False}
        sides["pytorch_optimizer `Lamb`"] = lambda groups: theirs(groups, **options)
    if is_installed("timm"):
        timm = timms("lamb", "Lamb")  # it would clip the norm of all gradients too
        sides["timm `Lamb`"] = lambda groups: timm(groups, max_grad_norm=None, **same)
    return sides | {"torch `AdamW`, the floor": lambda groups: AdamW(groups, **same)}


# -- what they are measured on ---------------------------------------------------------------------


def wide() -> nn.Module:
    """Return layers of a million parameters each."""
    return nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(8)])


def measured(make_net: Callable[[], nn.Module], makers: dict[str, Make]) -> list[Side]:
    sides = []
    for label, make in makers.items():
        torch.manual_seed(0)
        sides.append(Side(label, make(lars_param_groups(make_net(), weight_decay=DECAY))))
    run_in_turn(sides)
    return sides


def verdict(sides: Sequence[Side], *, is_target: bool) -> str:
    ours, *peers, floor = sides
    of_floor = quartiles([a / b for a, b in zip(ours.seconds, floor.seconds, strict=True)])[1]
    said = f"{of_floor:.2f} times {floor.label.removesuffix(', the floor')}."
    if not peers:
        return said
    times = {peer.label: float(peer.cells(ours)[2]) for peer in peers}
    fastest = min(times, key=times.__getitem__)
    if not is_target:
        return f"The fastest peer takes {times[fastest]:.2f} times ours. Ours takes {said}"
    outcome = "met" if times[fastest] >= 1 else "MISSED"
    return (
        f"Target: at least as fast as the fastest peer, which takes {times[fastest]:.2f} times "
        f"ours; {outcome}. Ours takes {said}"
    )


# -- on a GPU --------------------------------------------------------------------------------------


def gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def gpu_lines() -> str:
    """Return what a step takes on a GPU, in times of torch's own foreach AdamW; at most 1.3."""
    makers = lars_sides(), lamb_sides()
    chosen = {label: make for each in makers for label, make in each.items() if "optkit" in label}
    chosen["torch `AdamW`"] = lambda groups: AdamW(groups, lr=1e-3, foreach=True)
    sides = []
    for label, make in chosen.items():
        sides.append(Side(label, make(lars_param_groups(resnet20().cuda(), weight_decay=DECAY))))
    run_in_turn(sides, clock=gpu_clock)
    *ours, floor = sides
    lines = [f"### On a GPU: {torch.cuda.get_device_name()}, ResNet-20"]
    for side in ours:
        ratios = [a / b for a, b in zip(side.seconds, floor.seconds, strict=True)]
        ratio = quartiles(ratios)[1]
        outcome = "met" if ratio <= 1.3 else "MISSED"
        lines.append(
            f"- {side.label}: target at most 1.3 times torch's foreach `AdamW`; {ratio:.2f}, "
            f"{outcome}."
        )
    return "\n".join([lines[0], "", *lines[1:]])


# -- the page --------------------------------------------------------------------------------------


def heading() -> str:
    versions = [
        f"{name} {metadata.version(name)}"
        for name in ("pytorch_optimizer", "timm")
        if is_installed(name)
    ]
    return f"""## One step of LARS and LAMB

{machine()}{"".join(f", {version}" for version in versions)}.

Milliseconds of CPU time of `step()` alone, on gradients that are made anew, all with `foreach=True`
and the same groups: matrices and filters scaled and decayed, the rest neither. One step of each in
turn; the ratios to ours are by round. Not all do the same work: pytorch_optimizer's `Lamb` scales
all tensors and corrects no bias of v; timm's counts steps by group, and the clipping of all
gradients that it adds is switched off."""


def main() -> None:
    torch.set_num_threads(1)
    console = Console()
    sections = [heading()]
    for name, make_net, is_target in (
        ("ResNet-20", resnet20, True),
        ("8 layers of a million parameters", wide, False),
    ):
        sizes: list[Tensor] = list(make_net().parameters())
        numbers = sum(p.numel() for p in sizes)
        sections.append(f"### {name}: {numbers:,} parameters in {len(sizes)} tensors")
        for makers in (lars_sides(), lamb_sides()):
            sides = measured(make_net, makers)
            rows = [side.cells(sides[0]) for side in sides]
            table = Table(*COLUMNS, title=name, title_justify="left")
            for row in rows:
                table.add_row(*row)
            said = verdict(sides, is_target=is_target)
            console.print(table)
            console.print(said)
            sections += [markdown_table(COLUMNS, rows), said]
    if torch.cuda.is_available():
        sections.append(gpu_lines())
        console.print(sections[-1])
    write_section("bench_layerwise", "\n\n".join(sections))


if __name__ == "__main__":
    main()
