"""Mixup and CutMix against plain training, on handwritten digits with wrong labels.

    python examples/mixup.py [--seeds 4] [--epochs 30] [--samples 300] [--noise 0.2] [--out FOLDER]

A net learns from a few images, a fifth of which have a wrong label. Plain training learns these by
heart in the end; on mixtures it cannot. The nets are tested on images with correct labels: how
often they err, and whether they are right as often as their confidence says. Mixing helps the first
and costs the second: labels that are never certain teach a net to doubt. Only the callback differs
between the runs; the LightningModule knows nothing of it.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import CutMix, Mixup

METHODS = {
    "plain": list,
    "Mixup": lambda: [Mixup(alpha=1.0)],
    "CutMix": lambda: [CutMix(alpha=1.0)],
}
COLOURS = {"plain": "#000000", "Mixup": "#0072B2", "CutMix": "#D55E00"}
BINS = 10


class Classifier(LightningModule):
    """A convolutional net for 8 × 8 images."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * width, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Images(NamedTuple):
    """Images and their labels."""

    images: Tensor
    labels: Tensor


class Tests(Callback):
    """Tests the net after every epoch."""

    def __init__(self, test: Images) -> None:
        self.test = test
        self.errors: list[float] = []  # in percent
        self.probabilities = torch.empty(0)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.probabilities = pl_module.net(self.test.images).softmax(1)
        is_wrong = self.probabilities.argmax(1) != self.test.labels
        self.errors.append(100 * float(is_wrong.float().mean()))


class Finding(NamedTuple):
    """Of one net: its errors, its loss, and what its confidence is worth."""

    errors: list[float]  # after each epoch, in percent
    loss: float
    calibration_error: float  # in percentage points
    reliability: np.ndarray  # (2, bins): mean confidence, share that is right


def draw(*, samples: int, noise: float, seed: int) -> tuple[Images, Images]:
    """Draw images to train on, give some of them a wrong label; return those to test on too."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    drawn, rest = order[:samples], order[samples:]
    given = labels[drawn]
    num_wrong = round(noise * samples)
    given[:num_wrong] += torch.randint(1, 10, (num_wrong,), generator=generator)
    return Images(images[drawn], given % 10), Images(images[rest], labels[rest])


def study(train: Images, test: Images, callbacks: list[Callback], *, epochs: int, seed: int):
    """Train a net. Runs of one seed start alike, and see the same batches."""
    torch.manual_seed(seed)
    net, tests = Classifier(), Tests(test)
    shuffling = torch.Generator().manual_seed(seed)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, tests],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(*train), 32, shuffle=True, generator=shuffling)
    trainer.fit(net, loader)
    return finding(tests)


def finding(tests: Tests) -> Finding:
    confidence, predicted = tests.probabilities.max(1)
    right = (predicted == tests.test.labels).float()
    order = confidence.argsort()
    means = [
        np.array([float(part[bin_].mean()) for bin_ in order.tensor_split(BINS)])
        for part in (confidence, right)
    ]
    return Finding(
        errors=tests.errors,
        loss=float(-tests.probabilities.log()[range(len(right)), tests.test.labels].mean()),
        calibration_error=100 * float(np.abs(means[0] - means[1]).mean()),
        reliability=np.stack(means),
    )


def mean_and_error(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds and its standard error."""
    values = np.asarray(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


def table(found: dict[str, list[Finding]]) -> str:
    lines = [f"{'':<8}{'test error in %':>18}{'test loss':>18}{'calibration error':>22}"]
    for name, findings in found.items():
        cells = [
            "{:.2f} ± {:.2f}".format(*mean_and_error([f.errors[-1] for f in findings])),
            "{:.3f} ± {:.3f}".format(*mean_and_error([f.loss for f in findings])),
            "{:.1f} ± {:.1f}".format(*mean_and_error([f.calibration_error for f in findings])),
        ]
        lines.append(f"{name:<8}{cells[0]:>18}{cells[1]:>18}{cells[2]:>22}")
    return "\n".join(lines)


def change(found: dict[str, list[Finding]], name: str) -> str:
    """Return how a method changes the test error, seed by seed."""
    pairs = zip(found[name], found["plain"], strict=True)
    differences = [one.errors[-1] - other.errors[-1] for one, other in pairs]
    return "{:+.2f} ± {:.2f}".format(*mean_and_error(differences))


def picture(found: dict[str, list[Finding]], title: str) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    errors, reliability = figure.subplots(1, 2)
    for name, findings in found.items():
        style = {"color": COLOURS[name], "label": name}
        epochs = np.arange(1, len(findings[0].errors) + 1)
        draw_band(errors, epochs, *mean_and_error([f.errors for f in findings]), **style)
        confidence, right = np.mean([f.reliability for f in findings], axis=0)
        _, spread = mean_and_error([f.reliability[1] for f in findings])
        reliability.errorbar(confidence, right, spread, marker="o", ms=4, lw=1.2, **style)
    reliability.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":")
    errors.set(xlabel="epoch", ylabel="test error in %", title="Correct labels, other images")
    errors.set_ylim(0, np.percentile([f.errors[-1] for f in found["plain"]], 100) * 1.6)
    reliability.set(
        xlabel="confidence", ylabel="share that is right", title="Confidence, in tenths of the test"
    )
    for axes in (errors, reliability):
        axes.spines[["top", "right"]].set_visible(False)
    errors.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_band(axes: Axes, x: np.ndarray, mean: np.ndarray, error: np.ndarray, **style) -> None:
    axes.plot(x, mean, lw=1.8, **style)
    axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.2, lw=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="how often to repeat the study")
    parser.add_argument("--epochs", type=int, default=30, help="length of a training")
    parser.add_argument("--samples", type=int, default=300, help="images to train on")
    parser.add_argument("--noise", type=float, default=0.2, help="share of wrong labels")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"`--seeds` must be at least 2, for an error bar, got {arguments.seeds}.")
    if not 0 <= arguments.noise <= 1:
        parser.error(f"`--noise` must be in [0, 1], got {arguments.noise}.")
    if not 32 <= arguments.samples <= 1500:
        parser.error(f"`--samples` must be in [32, 1500], got {arguments.samples}.")
    torch.set_num_threads(1)  # a net this small gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")

    found: dict[str, list[Finding]] = {name: [] for name in METHODS}
    for seed in range(arguments.seeds):
        train, test = draw(samples=arguments.samples, noise=arguments.noise, seed=seed)
        for name, callbacks in METHODS.items():
            found[name].append(study(train, test, callbacks(), epochs=arguments.epochs, seed=seed))

    title = (
        f"{arguments.samples:,} images, {arguments.noise:.0%} of them with a wrong label; "
        f"{arguments.epochs} epochs; mean ± standard error of {arguments.seeds} seeds"
    )
    print(f"{title}.\n")
    print(table(found))
    print("\nChange of the test error, in percentage points, seed by seed:")
    for name in ("Mixup", "CutMix"):
        print(f"{change(found, name)} by {name}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(found, title).savefig(arguments.out / "mixup.png", dpi=150)
    print(f"\nPicture: {arguments.out / 'mixup.png'}")


if __name__ == "__main__":
    main()
