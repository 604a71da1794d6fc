"""Three warmups over real runs, as their papers have them: Noam, Goyal, ResNet-110.

    python examples/warmup.py [--seed 0] [--length 1] [--out FOLDER]

Each trains a net on handwritten digits twice, with its warmup and without, from the same weights
and on the same batches. The picture shows the learning rate that each step was made at, and the
training error that came of it.

- Noam: a Transformer over the rows of an image. The warmup is the whole schedule: up along a line,
  down as an inverse root. Without, the rate begins at the peak and falls from there.
- Goyal: a batch 16 times as large and a rate 16 times as high, warmed up over 5 epochs from the
  rate of one worker.
- ResNet-110: its 54 residual blocks are 18 here. A tenth of the rate until the training error is
  below 80 %; the run itself says when.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import ErrorBelow, LRWarmup
from lightning_optkit.methods import noam_factor

BLUE, ORANGE = "#0072B2", "#D55E00"
D_MODEL, RISE = 32, 100  # width of the Transformer, and the steps of its warmup
WORKERS = 16


class Classifier(LightningModule):
    """Learns digits, and logs its training error as a running mean."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.error = 0.9  # of ten classes, by chance

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        wrong = float((logits.argmax(1) != labels).float().mean())
        self.error = 0.9 * self.error + 0.1 * wrong
        self.log("train_error", self.error)
        return cross_entropy(logits, labels)

    def with_schedule(self, optimizer: torch.optim.Optimizer, make: Callable) -> dict:
        """Return the optimizer with a schedule, made for the steps of the run."""
        schedule = make(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(nn.Module):
    """A Transformer that reads an image row by row."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, D_MODEL)
        self.position = nn.Parameter(0.02 * torch.randn(8, D_MODEL))
        layer = nn.TransformerEncoderLayer(D_MODEL, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(D_MODEL, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images) + self.position
        return self.head(self.encoder(rows).mean(1))


class Transformer(Classifier):
    """Trained by Adam as in the paper, with a rate of 1: the warmup's factor is the rate."""

    def __init__(self) -> None:
        super().__init__(Rows())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)


class Block(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width), nn.BatchNorm1d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class Residual(Classifier):
    """A net of residual blocks."""

    def __init__(self, blocks: int, width: int = 32) -> None:
        first = [nn.Flatten(), nn.Linear(64, width), nn.ReLU()]
        body = [Block(width) for _ in range(blocks)]
        super().__init__(nn.Sequential(*first, *body, nn.Linear(width, 10)))

    def sgd(self, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)


class LargeBatch(Residual):
    """The rate of one worker times their number, and a cosine from there."""

    def __init__(self) -> None:
        super().__init__(blocks=9)

    def configure_optimizers(self) -> dict:
        return self.with_schedule(self.sgd(0.025 * WORKERS), CosineAnnealingLR)


class Deep(Residual):
    """A rate that falls to a tenth at half of the run, and again at three quarters."""

    def __init__(self) -> None:
        super().__init__(blocks=18)

    def configure_optimizers(self) -> dict:
        return self.with_schedule(
            self.sgd(0.1), lambda optimizer, n: MultiStepLR(optimizer, [n // 2, 3 * n // 4])
        )


class Recorder(Callback):
    """Notes rate and error of each step. The rate is the warmup's where there is one."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.errors: list[float] = []  # in percent

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_) -> None:
        self.scheduled = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_) -> None:
        tag = f"optkit-lr/effective/{type(trainer.optimizers[0]).__name__}"
        self.rates.append(float(trainer.callback_metrics.get(tag, self.scheduled)))
        self.errors.append(100 * module.error)


@dataclass(frozen=True)
class Rule:
    """A warmup, the run that it belongs to, and what stands in its place without it."""

    name: str
    make: Callable[[], Classifier]
    batch_size: int
    epochs: int
    warmup: Callable[[], LRWarmup]
    without: Callable[[], LRWarmup] | None = None


def from_the_peak(step: int) -> float:
    """Return Noam's rate, without what comes before its largest."""
    return noam_factor(max(step, RISE - 1), warmup_steps=RISE, d_model=D_MODEL)


RULES = (
    Rule(
        "Noam",
        Transformer,
        batch_size=32,
        epochs=6,
        warmup=lambda: LRWarmup(steps=RISE, shape="noam", d_model=D_MODEL),
        without=lambda: LRWarmup(shape=from_the_peak),
    ),
    Rule(
        "Goyal",
        LargeBatch,
        batch_size=32 * WORKERS,
        epochs=30,
        warmup=lambda: LRWarmup(epochs=5, start_factor=1 / WORKERS),
    ),
    Rule(
        "ResNet-110",
        Deep,
        batch_size=32,
        epochs=6,
        warmup=lambda: LRWarmup(until=ErrorBelow("train_error", 0.8), start_factor=0.1),
    ),
)


def load() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    return TensorDataset(pixels[:1600], torch.tensor(labels)[:1600])


def fit(
    rule: Rule, warmup: LRWarmup | None, data: TensorDataset, *, epochs: int, seed: int
) -> Recorder:
    """Train a net; return what was recorded."""
    seed_everything(seed, verbose=False)
    shuffling = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, rule.batch_size, shuffle=True, drop_last=True, generator=shuffling)
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*([] if warmup is None else [warmup]), recorder],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(rule.make(), loader)
    return recorder


def draw(axes: Axes, values: list[float], *, warm: bool) -> None:
    style = {"color": BLUE, "lw": 1.8} if warm else {"color": ORANGE, "lw": 1.4, "ls": "--"}
    axes.plot(values, label="with warmup" if warm else "without", **style)


def picture(found: dict[str, tuple[Recorder, Recorder]]) -> Figure:
    """Draw rates above and errors below, a column for each rule."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    rows = figure.subplots(2, len(found), sharex="col")
    for (name, (warm, cold)), rate, error in zip(found.items(), *rows, strict=True):
        for recorder, is_warm in ((cold, False), (warm, True)):
            draw(rate, recorder.rates, warm=is_warm)
            draw(error, recorder.errors, warm=is_warm)
        rate.set_title(name)
        rate.set_ylim(0, None)
        error.set(ylim=(0, 100), xlabel="optimizer step")
        for axes in (rate, error):
            axes.spines[["top", "right"]].set_visible(False)
    resnet = rows[1][-1]
    resnet.axhline(80, color="black", lw=0.8, ls=":", zorder=0)
    rows[0][0].set_ylabel("learning rate of the step")
    rows[1][0].set_ylabel("training error in %")
    rows[1][0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--length", type=float, default=1, help="times as many epochs")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    arguments = parser.parse_args()
    if not arguments.length > 0:
        parser.error(f"`--length` must be positive, got {arguments.length}.")
    torch.set_num_threads(1)  # a net this small gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")

    data, found = load(), {}
    print(f"{'':12}{'steps':>7}{'first rate':>13}{'largest':>10}{'training error in %':>24}")
    print(f"{'':42}{'with warmup':>14}{'without':>10}")
    for rule in RULES:
        epochs = max(round(rule.epochs * arguments.length), 1)
        warm = fit(rule, rule.warmup(), data, epochs=epochs, seed=arguments.seed)
        instead = None if rule.without is None else rule.without()
        cold = fit(rule, instead, data, epochs=epochs, seed=arguments.seed)
        found[rule.name] = warm, cold
        print(
            f"{rule.name:12}{len(warm.rates):7,}{warm.rates[0]:13.3g}{max(warm.rates):10.3g}"
            f"{warm.errors[-1]:14.1f}{cold.errors[-1]:10.1f}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(found).savefig(arguments.out / "warmup.png", dpi=150)
    print(f"\nPicture: {arguments.out / 'warmup.png'}")


if __name__ == "__main__":
    main()
