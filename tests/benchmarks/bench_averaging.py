"""Cost of one update of an exponential moving average, beside the bare arithmetic and Lightning's.

Run with ``python -m tests.benchmarks.bench_averaging``: about two minutes. Both callbacks live in
one Trainer and their hooks are called in turn, so what is timed is what an optimizer step pays.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optkit import EMA
from tests.benchmarks.nets import cross_entropy, resnet20
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.timing import interleaved, peak_memory, quartiles

DECAY = 0.999
MIN_ROUNDS, SECONDS = 20, 20.0
BARE = "bare `torch._foreach_lerp_`"
COLUMNS = ["update", "milliseconds", "times the bare", "quartiles", "memory, in copies"]


@dataclass(frozen=True)
class Problem:
    """A net and a batch to train it on."""

    name: str
    net: nn.Module
    batch: tuple[Tensor, Tensor]
    most: float  # times the bare update


def resnet_problem() -> Problem:
    torch.manual_seed(0)
    batch = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    return Problem("ResNet-20, batch 128", resnet20(), batch, most=2.0)


def wide_problem() -> Problem:
    """Return a hundred layers of a million parameters each."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(100)])
    batch = torch.randn(256, 1000), torch.randint(1000, (256,))
    return Problem("100 layers of a million parameters, batch 256", net, batch, most=1.1)


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


@dataclass(frozen=True)
class Cost:
    """Quartiles of an update, of its ratio to the bare one, and its memory."""

    label: str
    seconds: float
    ratios: tuple[float, float, float]
    copies: float | None

    @property
    def cells(self) -> list[str]:
        low, median, high = self.ratios
        copies = "" if self.copies is None else f"{self.copies:.2f}"
        shown = f"{low:.2f}–{high:.2f}"
        return [self.label, f"{self.seconds * 1e3:.3f}", f"{median:.2f}", shown, copies]


class Measurement(pl.Callback):
    """Calls the hooks in turn, at the end of a training of one step."""

    def __init__(self, ours: EMA, peer: EMAWeightAveraging) -> None:
        self._ours = ours
        self._peer = peer
        self.costs: list[Cost] = []
        self.step_seconds = 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = [*pl_module.parameters()]
        tensors += [buffer for buffer in pl_module.buffers() if buffer.is_floating_point()]
        average = [tensor.detach().clone() for tensor in tensors]
        calls: dict[str, Callable[[], object]] = {
            BARE: lambda: _lerp(average, tensors),
            "optkit `EMA`": lambda: _our_hook(self._ours, trainer, pl_module),
            "Lightning `EMAWeightAveraging`": lambda: _their_hook(self._peer, trainer, pl_module),
        }
        seconds = interleaved([*calls.values()], min_rounds=MIN_ROUNDS, seconds=SECONDS)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        memory = [size, peak_memory(lambda: _first_update(pl_module)), _bytes_of(self._peer)]
        for label, times, held in zip(calls, seconds, memory, strict=True):
            ratios = [t / bare for t, bare in zip(times, seconds[0], strict=True)]
            self.costs.append(Cost(label, quartiles(times)[1], quartiles(ratios), held / size))
        (steps,) = interleaved([lambda: _step(trainer, pl_module)], min_rounds=5, seconds=2.0)
        self.step_seconds = quartiles(steps)[1]


@torch.no_grad()
def _lerp(average: list[Tensor], tensors: list[Tensor]) -> None:
    torch._foreach_lerp_(average, tensors, 1 - DECAY)


def _our_hook(callback: EMA, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    before = callback.num_averaged
    callback._watch._asked = -1  # as after a step
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert callback.num_averaged == before + 1


def _their_hook(
    callback: EMAWeightAveraging, trainer: pl.Trainer, module: pl.LightningModule
) -> None:
    callback._latest_update_step = 0
    callback.on_train_batch_end(trainer, module, {}, None, 0)
    assert callback._latest_update_step == trainer.global_step


def _first_update(module: pl.LightningModule) -> object:
    from lightning_optkit.bridge.averaged_weights import AveragedWeights
    from lightning_optkit.methods.averaging import RunningAverage, uniform_share

    weights = AveragedWeights(module, RunningAverage(uniform_share))
    weights.take(thorough=False)
    return weights


def _bytes_of(callback: EMAWeightAveraging) -> int:
    model = callback._average_model
    assert model is not None
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _step(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    batch = next(iter(trainer.train_dataloader))
    optimizer = trainer.optimizers[0]
    optimizer.zero_grad()
    module.training_step(batch).backward()
    optimizer.step()


def measured(problem: Problem) -> Measurement:
    ours = EMA(DECAY, warmup=False, use_for=())
    peer = EMAWeightAveraging(decay=DECAY)
    measurement = Measurement(ours, peer)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[ours, peer, measurement],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(problem.net), DataLoader([problem.batch], batch_size=None))
    return measurement


def verdict(problem: Problem, measurement: Measurement) -> str:
    bare, ours, theirs = measurement.costs
    ratio, share = ours.ratios[1], ours.seconds / measurement.step_seconds
    return (
        f"Target: at most {problem.most:g} times the bare update; {ratio:.2f}, "
        f"{outcome(ratio <= problem.most)}. {theirs.seconds / ours.seconds:.1f} times as fast as "
        f"Lightning's. A training step takes {measurement.step_seconds * 1e3:.0f} ms. Target: at "
        f"most 1 % of it; {share:.2%}, {outcome(share <= 0.01)} (the bare update: "
        f"{bare.seconds / measurement.step_seconds:.2%})."
    )


def outcome(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def heading() -> str:
    return f"""## One update of an average

{machine()}, Lightning {pl.__version__}.

The average of all parameters and float buffers after an optimizer step, by the whole hook of each
callback, against one fused call on the same tensors, in turn: milliseconds of CPU time, and the
median and quartiles of the ratio over the rounds. Ours looks for numbers that are not finite first.
Memory is that of the average, in copies of parameters and float buffers."""


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console()
    sections = []
    for make in (resnet_problem, wide_problem):
        problem = make()
        measurement = measured(problem)
        size = sum(p.numel() for p in problem.net.parameters())
        title = f"{problem.name}: {size:,} parameters"
        table = Table(*COLUMNS, title=title, title_justify="left")
        for cost in measurement.costs:
            table.add_row(*cost.cells)
        console.print(table)
        console.print(verdict(problem, measurement))
        rows = markdown_table(COLUMNS, [cost.cells for cost in measurement.costs])
        sections.append(f"### {title}\n\n{rows}\n\n{verdict(problem, measurement)}")
    write_section("bench_averaging", "\n\n".join([heading(), *sections]))


if __name__ == "__main__":
    main()
