"""What mixing adds to a training step of ResNet-20.

Run with ``python -m tests.benchmarks.bench_mixing``: about a minute. Losses are taken of logits
that lie ready, with and without the callback around the step, in turn: the difference is all that
mixing costs beside the net's own pass, which is timed alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_optkit import CutMix, Mixup
from lightning_optkit.bridge.mixing import MixingCallback
from tests.benchmarks.nets import cross_entropy, resnet20
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.timing import interleaved, quartiles

MIN_ROUNDS, SECONDS = 30, 6.0
MOST = 0.02  # of a step
COLUMNS = ["callback", "milliseconds", "quartiles", "share of a step"]
CALLBACKS: dict[str, Callable[[], MixingCallback]] = {
    "`Mixup()`": Mixup,
    "`Mixup(per_sample=True)`": lambda: Mixup(per_sample=True),
    "`Mixup(targets='soft', ...)`": lambda: Mixup(targets="soft", num_classes=10),
    "`CutMix()`": CutMix,
    "`CutMix(per_sample=True)`": lambda: CutMix(per_sample=True),
}


class Ready(nn.Module):
    """Gives the same logits at once."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        return cross_entropy(logits, batch[1]) if batch[1].dim() == 1 else soft(logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def soft(logits: Tensor, probabilities: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, probabilities)


class PlainMetric(MulticlassAccuracy):
    """Counts the likeliest class of soft targets, as a module with them would have to."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds, target.argmax(1) if target.dim() == 2 else target)


class Measurement(pl.Callback):
    """Runs steps with and without the callback, within a step of a training."""

    def __init__(self, mixing: MixingCallback) -> None:
        self._mixing = mixing
        self.extra: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        plain = type(pl_module).training_step

        def without() -> None:
            plain(pl_module, batch, 0).backward()

        def within() -> None:
            pl_module.training_step(batch, 0).backward()
            self._mixing.on_train_batch_end(trainer, pl_module, None, batch, 0)

        bare, mixed = interleaved([without, within], min_rounds=MIN_ROUNDS, seconds=SECONDS)
        self.extra = [m - b for m, b in zip(mixed, bare, strict=True)]


def batch() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(128, 3, 32, 32), torch.randint(10, (128,))]


def extra_seconds(mixing: MixingCallback) -> list[float]:
    module = Module(Ready())
    module.accuracy = PlainMetric(10)
    measurement = Measurement(mixing)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[mixing, measurement],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1000,
    )
    trainer.fit(module, DataLoader([batch()], batch_size=None))
    return measurement.extra


def step_seconds() -> float:
    module = Module(resnet20())
    optimizer = module.configure_optimizers()

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch(), 0).backward()
        optimizer.step()

    (seconds,) = interleaved([step], min_rounds=5, seconds=3.0)
    return quartiles(seconds)[1]


def heading(step: float) -> str:
    return f"""## Mixing a batch

{machine()}, Lightning {pl.__version__}.

What a callback adds to a training step beside the net's own pass: drawing, mixing 128 images of
3 × 32 × 32 numbers, the second loss and its gradient, and a metric's labels. The median of the
differences to the step without it, in turn, in CPU time. A step of ResNet-20 on the batch takes
{step * 1e3:.0f} ms; `targets="two_pass"` runs it twice. The first mixed batch of a run is left out,
whose losses are compared by three more passes."""


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    step = step_seconds()
    rows, shares = [], []
    for label, make in CALLBACKS.items():
        low, median, high = (each * 1e3 for each in quartiles(extra_seconds(make())))
        shares.append(median / 1e3 / step)
        rows.append([label, f"{median:.2f}", f"{low:.2f}–{high:.2f}", f"{shares[-1]:.2%}"])
    outcome = "met" if max(shares) <= MOST else "MISSED"
    verdict = f"Target: at most {MOST:.0%} of a step; {max(shares):.2%}, {outcome}."
    table = Table(*COLUMNS, title="Mixing a batch", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table, verdict)
    write_section(
        "bench_mixing", f"{heading(step)}\n\n{markdown_table(COLUMNS, rows)}\n\n{verdict}"
    )


if __name__ == "__main__":
    main()
