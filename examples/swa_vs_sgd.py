"""SWA against the last weights of SGD, with and without new statistics, and the line between them.

    python examples/swa_vs_sgd.py [--seeds 5] [--epochs 30] [--samples 600] [--noise 0.2]
        [--data mnist.npz] [--out FOLDER]

A net with BatchNorm learns handwritten digits, a fifth of whose labels are wrong. From the middle
of the training on, the learning rate of SGD falls to zero, and the net learns the wrong labels by
heart. A second run is the same up to there; then `SWA` keeps the rate up and averages the weights.
Both are tested on images with correct labels, and so are the nets on the straight line through
their weights. BatchNorm's statistics are taken anew at every point of it, from all training images.

With correct labels, `--noise 0`, there is little to learn by heart, and SWA does as well as SGD:
only the statistics pass matters then. `--data` takes MNIST in place of scikit-learn's digits, as
arrays `train_x`, `train_y`, `test_x` and `test_y` in a file for `numpy.load`.
"""

import argparse
import logging
import warnings
from dataclasses import dataclass
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
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import SWA
from lightning_optkit.methods.norm_statistics import refresh_norm_statistics

BLUE, ORANGE = "#0072B2", "#D55E00"
RATE, START, BATCH_SIZE = 0.2, 0.5, 32
POSITIONS = np.linspace(-0.5, 1.5, 21)  # on the line: 0 is SGD, 1 is SWA

SGD = "SGD, rate falls to 0"
LAST = "SGD, rate stays up"
LAST_PASS = "SGD, rate stays up, statistics pass"
SWA_LAST = "SWA, statistics of the last model"
SWA_MEAN = "SWA, averaged statistics"
SWA_PASS = "SWA, statistics pass"
ROWS = (SGD, LAST, LAST_PASS, SWA_LAST, SWA_MEAN, SWA_PASS)


class Classifier(LightningModule):
    """A convolutional net with BatchNorm; its learning rate falls to zero in the second half."""

    def __init__(self, rate: float, width: int = 12) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            *self.block(1, width),
            *self.block(width, width),
            nn.MaxPool2d(2),
            *self.block(width, 2 * width),
            *self.block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )

    @staticmethod
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-3
        )
        num_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, 2 * (1 - step / num_steps))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Images(NamedTuple):
    """Images and their labels."""

    images: Tensor
    labels: Tensor


class Score(NamedTuple):
    """What a net reaches: the loss on what it was trained on, and on other images."""

    train_loss: float
    test_loss: float
    test_error: float  # in percent


@dataclass
class Finding:
    """Of one seed: scores of the nets, and of those on the lines from SGD's weights to SWA's."""

    scores: dict[str, Score]
    lines: dict[str, list[Score]]


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
    images: Images, held_out: Images | None, *, samples: int, noise: float, seed: int
) -> tuple[Images, Images]:
    """Draw images to train on, give some of them a wrong label, and return those to test on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.labels), generator=generator)
    drawn, rest = order[:samples], order[samples:]
    labels = images.labels[drawn]
    num_wrong = round(noise * samples)
    labels[:num_wrong] += torch.randint(1, 10, (num_wrong,), generator=generator)
    train = Images(images.images[drawn], labels % 10)
    return train, held_out or Images(images.images[rest], images.labels[rest])


def fit(train: Images, *callbacks: Callback, epochs: int, seed: int) -> Classifier:
    """Train a net. Runs of one seed start alike, and see the same batches."""
    torch.manual_seed(seed)
    net = Classifier(RATE)
    shuffling = torch.Generator().manual_seed(seed)
    data = DataLoader(TensorDataset(*train), BATCH_SIZE, shuffle=True, generator=shuffling)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, data)
    return net


@torch.no_grad()
def score(net: nn.Module, train: Images, test: Images) -> Score:
    net.eval()
    outputs = torch.cat([net(images) for images in test.images.split(1024)])
    return Score(
        train_loss=float(cross_entropy(net(train.images), train.labels)),
        test_loss=float(cross_entropy(outputs, test.labels)),
        test_error=100 * float((outputs.argmax(1) != test.labels).double().mean()),
    )


@torch.no_grad()
def refresh(net: nn.Module, images: Tensor) -> None:
    """Take the statistics of BatchNorm from all training images."""
    batches = images.split(BATCH_SIZE)
    net.eval()
    refresh_norm_statistics(net, lambda: [lambda batch=batch: net(batch) for batch in batches])


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def study(train: Images, test: Images, *, epochs: int, seed: int) -> Finding:
    """Train with and without `SWA`, and score what comes of it."""
    net = fit(train, epochs=epochs, seed=seed)
    scores, ends = {SGD: score(net, train, test)}, {SGD: state(net)}

    with_pass = SWA(start=START, lr=RATE, use_for=())
    without_pass = SWA(start=START, refresh_norm_stats=False, use_for=(), name="without_pass")
    net = fit(train, with_pass, without_pass, epochs=epochs, seed=seed)
    scores[LAST], ends[LAST] = score(net, train, test), state(net)
    with with_pass.averaged(net):
        scores[SWA_PASS], average = score(net, train, test), state(net)
    with without_pass.averaged(net):
        scores[SWA_MEAN] = score(net, train, test)
    net.load_state_dict(ends[LAST] | {name: average[name] for name, _ in net.named_parameters()})
    scores[SWA_LAST] = score(net, train, test)
    net.load_state_dict(ends[LAST])
    refresh(net, train.images)
    scores[LAST_PASS] = score(net, train, test)
    lines = {name: line(net, end, average, train, test) for name, end in ends.items()}
    return Finding(scores, lines)


def line(
    net: nn.Module, end: dict[str, Tensor], average: dict[str, Tensor], train: Images, test: Images
) -> list[Score]:
    """Score the nets on the line from SGD's weights to SWA's, each with statistics of its own."""
    scores = []
    for position in POSITIONS:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(torch.lerp(end[name], average[name], float(position)))
        refresh(net, train.images)
        scores.append(score(net, train, test))
    return scores


def mean_and_error(values: list[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error over seeds, the first axis."""
    values = np.asarray(values)
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def table(found: list[Finding]) -> str:
    """Return mean and standard error of each score."""
    header = ("training loss", "test loss", "test error in %")
    lines = [f"{'':36}" + "".join(f"{name:>18}" for name in header)]
    for name in ROWS:
        means, errors = mean_and_error([finding.scores[name] for finding in found])
        cells = (
            f"{f'{mean:.{digits}f} ± {error:.{digits}f}':>18}"
            for mean, error, digits in zip(means, errors, (3, 3, 1), strict=True)
        )
        lines.append(f"{name:36}" + "".join(cells))
    return "\n".join(lines)


def change(found: list[Finding], before: str, after: str) -> str:
    """Return how the test error changes, in percentage points, seed by seed."""
    changes = [f.scores[after].test_error - f.scores[before].test_error for f in found]
    return "{:+.1f} ± {:.1f}".format(*mean_and_error(changes))


def picture(found: list[Finding], title: str) -> Figure:
    """Draw training loss and test error over the lines from SGD's weights to SWA's."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for axes, quantity in ((loss, "train_loss"), (error, "test_error")):
        for name, color, style in ((SGD, ORANGE, "-"), (LAST, BLUE, "--")):
            curves = np.array([[getattr(s, quantity) for s in f.lines[name]] for f in found])
            draw_band(axes, curves, color=color, linestyle=style, label=f"line from {name}")
        without_pass = mean_and_error([getattr(f.scores[SWA_MEAN], quantity) for f in found])
        hollow = {"fmt": "o", "color": "black", "markerfacecolor": "white", "capsize": 2}
        axes.errorbar(1, *without_pass, **hollow, label=SWA_MEAN)
        for end in (0, 1):
            axes.axvline(end, color="black", lw=0.8, ls=":", zorder=0)
        axes.set_xticks([-0.5, 0, 0.5, 1, 1.5], ["−0.5", "0\nlast SGD", "0.5", "1\nSWA", "1.5"])
        axes.set(xlim=POSITIONS[[0, -1]], ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    loss.set(ylabel="training loss", title="Training images, as labelled")
    error.set(ylabel="test error in %", title="Other images, correct labels")
    error.legend(framealpha=1, edgecolor="white")
    figure.supxlabel(
        "part of the way from SGD to SWA; statistics taken anew at every point", fontsize=10
    )
    figure.suptitle(title, fontsize=11)
    return figure


def draw_band(axes: Axes, curves: np.ndarray, **style) -> None:
    mean, error = mean_and_error(curves)
    axes.plot(POSITIONS, mean, lw=1.8, **style)
    axes.fill_between(POSITIONS, mean - error, mean + error, color=style["color"], alpha=0.2, lw=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how often to repeat the study")
    parser.add_argument("--epochs", type=int, default=30, help="length of a training")
    parser.add_argument("--samples", type=int, default=600, help="images to train on")
    parser.add_argument("--noise", type=float, default=0.2, help="share of wrong labels")
    parser.add_argument("--data", type=Path, help="MNIST, in place of scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"`--seeds` must be at least 2, for an error bar, got {arguments.seeds}.")
    if not 0 <= arguments.noise <= 1:
        parser.error(f"`--noise` must be in [0, 1], got {arguments.noise}.")
    torch.set_num_threads(1)  # a net this small gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")

    images, held_out = load(arguments.data)
    if not BATCH_SIZE <= arguments.samples < len(images.labels):
        parser.error(
            f"`--samples` must be in [{BATCH_SIZE}, {len(images.labels)}), got {arguments.samples}."
        )
    found = []
    for seed in range(arguments.seeds):
        train, test = draw(
            images, held_out, samples=arguments.samples, noise=arguments.noise, seed=seed
        )
        found.append(study(train, test, epochs=arguments.epochs, seed=seed))

    title = (
        f"{arguments.samples:,} images, {arguments.noise:.0%} of them with a wrong label; "
        f"{arguments.epochs} epochs; mean ± standard error of {arguments.seeds} seeds"
    )
    print(f"{title}.\n")
    print(table(found))
    print("\nChange of the test error, in percentage points, seed by seed:")
    print(f"{change(found, SWA_MEAN, SWA_PASS)} by the pass, of SWA;")
    print(f"{change(found, SGD, SWA_PASS)} by SWA with it, from SGD whose rate falls to 0.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(found, title).savefig(arguments.out / "swa_vs_sgd.png", dpi=150)
    print(f"\nPicture: {arguments.out / 'swa_vs_sgd.png'}")


if __name__ == "__main__":
    main()
