"""Small batches against large ones: what they cost, and what scaling, warmup and LARS make good.

    python examples/large_batch.py [--seeds 3] [--epochs 20] [--samples 1400] [--rate 0.05]
        [--data mnist.npz] [--out FOLDER]

A convolutional net learns handwritten digits for so many epochs, in batches of 32 and in larger
ones, the same images in all. An epoch of a large batch has fewer steps, so it is over sooner and
gets less far, unless the steps are longer. `BatchScaling` makes them longer: by the linear rule,
from the first step on or after a warmup of five epochs. `LARS` does so layer by layer.

The rates of SGD and LARS are those for a batch of 32, searched for on other seeds. SGD's best
there, 0.1, is at the edge of what is stable, so the study takes half of it; `--rate 0.1` shows what
scaling does at the edge. `--data` takes MNIST in place of scikit-learn's digits, as arrays
`train_x`, `train_y`, `test_x` and `test_y` in a file for `numpy.load`.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import LARS, BatchScaling, lars_param_groups

BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
SMALL, SHARE = 32, 0.1  # the batch that rates were searched for, and the large one of the table
SHARES = (0.1, 0.25, 0.5)  # of the images: the batches of the picture, beside the small one
LARS_RATE, TRUST_COEFFICIENT = 0.1, 0.08  # of 0.04, 0.08 and 0.16
WARMUP_EPOCHS = 5  # as Goyal et al.


class Classifier(LightningModule):
    """A convolutional net whose learning rate falls to zero along half a cosine."""

    def __init__(self, make_optimizer: Callable[[nn.Module], Optimizer], width: int = 8) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.net = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict:
        optimizer = self.make_optimizer(self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def sgd(module: nn.Module, rate: float) -> Optimizer:
    return SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)


def lars(module: nn.Module, rate: float) -> Optimizer:
    groups = lars_param_groups(module, weight_decay=1e-4)
    return LARS(groups, lr=LARS_RATE, momentum=0.9, trust_coefficient=TRUST_COEFFICIENT)


def linear(warmup_epochs: int) -> BatchScaling:
    return BatchScaling(SMALL, "linear", warmup_epochs=warmup_epochs)


class Method(NamedTuple):
    """How a net is trained, and how that is drawn."""

    optimizer: Callable[[nn.Module, float], Optimizer]
    callbacks: Callable[[], list[Callback]]
    color: str
    marker: str


SAME, SCALED, WARMED, LAYERWISE = "SGD, same rate", "+ linear scaling", "+ warmup", "LARS + both"
METHODS = {
    SAME: Method(sgd, list, BLACK, "o"),
    SCALED: Method(sgd, lambda: [linear(warmup_epochs=0)], ORANGE, "s"),
    WARMED: Method(sgd, lambda: [linear(warmup_epochs=WARMUP_EPOCHS)], BLUE, "D"),
    LAYERWISE: Method(lars, lambda: [linear(warmup_epochs=WARMUP_EPOCHS)], GREEN, "^"),
}


class Images(NamedTuple):
    """Images and their labels."""

    images: Tensor
    labels: Tensor


class Score(NamedTuple):
    """What a training reaches, and what it takes."""

    test_accuracy: float  # in percent
    train_loss: float
    num_steps: int
    step_time: float  # in ms
    epoch_time: float  # in s

    @property
    def test_error(self) -> float:
        return 100 - self.test_accuracy


class Stopwatch(Callback):
    """Takes the time of training, without what comes before and after it."""

    def on_train_start(self, trainer, pl_module):
        self.began = time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.began


def load(path: Path | None) -> tuple[Images, Images | None]:
    """Return images, and others to test on if the data says which."""
    if path is None:
        images, labels = load_digits(return_X_y=True)
        scaled = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        return Images(scaled, torch.tensor(labels)), None
    with np.load(path) as arrays:
        train, test = (
            Images(
                # A quarter of the pixels: the net sees a whole digit, and a study takes minutes.
                avg_pool2d(
                    torch.tensor(arrays[f"{part}_x"], dtype=torch.float32)[:, None] / 255, 2
                ),
                torch.tensor(arrays[f"{part}_y"], dtype=torch.long),
            )
            for part in ("train", "test")
        )
    return train, test


def draw(
    images: Images, held_out: Images | None, *, samples: int, seed: int
) -> tuple[Images, Images]:
    """Draw images to train on, and return those to test on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.labels), generator=generator)
    train, rest = (Images(*(part[i] for part in images)) for i in order.tensor_split([samples]))
    return train, held_out or rest


def train_and_score(
    train: Images,
    test: Images,
    method: Method,
    *,
    batch_size: int,
    rate: float,
    epochs: int,
    seed: int,
) -> Score:
    """Train a net. Runs of one seed start alike."""
    torch.manual_seed(seed)
    net, stopwatch = Classifier(partial(method.optimizer, rate=rate)), Stopwatch()
    shuffling = torch.Generator().manual_seed(seed)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*method.callbacks(), stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(TensorDataset(*train), batch_size, True, generator=shuffling))
    net.eval()
    with torch.no_grad():
        outputs, on_test = (
            torch.cat([net(part) for part in each.images.split(1024)]) for each in (train, test)
        )
    return Score(
        test_accuracy=100 * float((on_test.argmax(1) == test.labels).double().mean()),
        train_loss=float(cross_entropy(outputs, train.labels).nan_to_num(torch.inf)),
        num_steps=trainer.global_step,
        step_time=1000 * stopwatch.seconds / trainer.global_step,
        epoch_time=stopwatch.seconds / epochs,
    )


Found = dict[tuple[str, int], list[Score]]
"""Scores of all seeds, by method and batch size."""


def study(
    train: Images, test: Images, batch_sizes: list[int], **options
) -> dict[tuple[str, int], Score]:
    """Train by each method with each batch; at the small one, scaling leaves the rate alone."""
    scores = {}
    for batch_size in batch_sizes:
        for name, method in METHODS.items():
            if batch_size == SMALL and name in (SCALED, WARMED):
                score = scores[SAME, SMALL]
            else:
                score = train_and_score(train, test, method, batch_size=batch_size, **options)
            scores[name, batch_size] = score
    return scores


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def table(found: Found, large: int) -> str:
    """Return mean and standard error over seeds of each score."""
    header = ("test accuracy in %", "training loss", "steps", "ms a step", "s an epoch")
    lines = [f"{'batch':>5}  {'method':18}" + "".join(f"{name:>20}" for name in header)]
    rows = [(SAME, SMALL), (LAYERWISE, SMALL), *((name, large) for name in METHODS)]
    for name, batch_size in rows:
        scores = found[name, batch_size]
        cells = []
        for key, digits in zip(Score._fields, (1, 4, 0, 2, 3), strict=True):
            mean, error = mean_and_error([getattr(score, key) for score in scores])
            is_exact = key == "num_steps"
            cells.append(f"{mean:,.0f}" if is_exact else f"{mean:.{digits}f} ± {error:.{digits}f}")
        shown = name.removesuffix(" + both") if batch_size == SMALL else name
        lines.append(f"{batch_size:>5}  {shown:18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def difference(found: Found, before: tuple[str, int], after: tuple[str, int]) -> str:
    """Return how the test accuracy differs, in points, seed by seed, and whether that is noise."""
    pairs = zip(found[before], found[after], strict=True)
    mean, error = mean_and_error([b.test_accuracy - a.test_accuracy for a, b in pairs])
    verdict = "not told apart" if abs(mean) <= 2 * error else "higher" if mean > 0 else "lower"
    return f"{mean:+.1f} ± {error:.1f} ({verdict})"


def conclusions(found: Found, large: int) -> str:
    """Return what the numbers say."""
    lines = [
        f"Test accuracy with batches of {large}, in points, seed by seed; "
        "not told apart: less than two standard errors."
    ]
    pairs = [((SAME, SMALL), (name, large)) for name in METHODS]
    steps = [(SAME, SCALED), (SCALED, WARMED), (WARMED, LAYERWISE)]
    pairs += [((before, large), (after, large)) for before, after in steps]
    for before, after in pairs:
        text = difference(found, before, after)
        lines.append(f"  {after[0]:18}{text:34}against {before[0]}, batches of {before[1]}")
    small, other = ([s.epoch_time for s in found[SAME, b]] for b in (SMALL, large))
    num_steps = [found[SAME, b][0].num_steps for b in (SMALL, large)]
    lines.append(
        f"\nWith {large} an epoch takes {np.mean(other) / np.mean(small):.2f} of the time that it "
        f"takes with {SMALL}, for {num_steps[1] / num_steps[0]:.2f} of the steps."
    )
    return "\n".join(lines)


def by_batch_size(found: Found, batch_sizes: list[int]) -> str:
    """Return the test accuracy of each method with each batch."""
    lines = [f"{'Test accuracy in %':18}" + "".join(f"{b:>16}" for b in batch_sizes)]
    for name in METHODS:
        scores = [[s.test_accuracy for s in found[name, b]] for b in batch_sizes]
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(each)) for each in scores]
        lines.append(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def picture(found: Found, batch_sizes: list[int], large: int, title: str) -> Figure:
    """Draw error and time by batch size."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    error, step, epoch = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for name, method in METHODS.items():
        style = {"color": method.color, "marker": method.marker, "label": name}
        draw_line(error, found, name, batch_sizes, "test_error", **style)
    for axes, key in ((step, "step_time"), (epoch, "epoch_time")):
        draw_line(axes, found, SAME, batch_sizes, key, color=BLACK, marker="o")
        axes.set_ylim(0, None)
    error.set(ylabel="test error in %", title="How far the same epochs get", yscale="log")
    error.yaxis.set_major_formatter("{x:g}")
    step.set(ylabel="ms", title="A step")
    epoch.set(ylabel="s", title="An epoch")
    for axes in (error, step, epoch):
        axes.set_xscale("log")
        axes.set_xticks(batch_sizes, [str(b) for b in batch_sizes])
        axes.xaxis.minorticks_off()
        axes.axvline(large, color="black", lw=0.8, ls=":", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    error.legend(loc="upper left", framealpha=1, edgecolor="white")
    figure.supxlabel(f"batch size; dotted: {SHARE:.0%} of the images", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_line(
    axes: Axes, found: Found, name: str, batch_sizes: list[int], key: str, **style
) -> None:
    values = [mean_and_error([getattr(s, key) for s in found[name, b]]) for b in batch_sizes]
    means, errors = zip(*values, strict=True)
    axes.errorbar(batch_sizes, means, errors, capsize=2, lw=1.6, markersize=5, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how often to repeat the study")
    parser.add_argument("--epochs", type=int, default=20, help="length of a training")
    parser.add_argument("--samples", type=int, default=1400, help="images to train on")
    parser.add_argument("--rate", type=float, default=0.05, help=f"of SGD with a batch of {SMALL}")
    parser.add_argument("--data", type=Path, help="MNIST, in place of scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"`--seeds` must be at least 2, for an error bar, got {arguments.seeds}.")
    if arguments.epochs <= WARMUP_EPOCHS:
        parser.error(f"`--epochs` must be above {WARMUP_EPOCHS}, those of the warmup.")
    torch.set_num_threads(1)  # a net this small gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")

    images, held_out = load(arguments.data)
    least, limit = SMALL / SHARE, len(images.labels)
    if not least < arguments.samples < limit:
        parser.error(f"`--samples` must be in ({least:.0f}, {limit}), got {arguments.samples}.")
    batch_sizes = [SMALL, *(round(share * arguments.samples) for share in SHARES)]
    large = batch_sizes[SHARES.index(SHARE) + 1]
    found: Found = {}
    for seed in range(arguments.seeds):
        train, test = draw(images, held_out, samples=arguments.samples, seed=seed)
        options = {"rate": arguments.rate, "epochs": arguments.epochs, "seed": seed}
        scores = study(train, test, batch_sizes, **options)
        for key, score in scores.items():
            found.setdefault(key, []).append(score)

    title = (
        f"{arguments.samples:,} images, {arguments.epochs} epochs, rate {arguments.rate:g} at a "
        f"batch of {SMALL}; "
        f"mean ± standard error of {arguments.seeds} seeds"
    )
    print(f"{title}.\n")
    print(table(found, large))
    print(f"\n{conclusions(found, large)}\n")
    print(by_batch_size(found, batch_sizes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(found, batch_sizes, large, title).savefig(arguments.out / "large_batch.png", dpi=150)
    print(f"\nPicture: {arguments.out / 'large_batch.png'}")


if __name__ == "__main__":
    main()
