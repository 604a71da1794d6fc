"""BatchNorm and GroupNorm at small batches: what training sees, and what evaluation does.

    python examples/norm_swap.py [--seeds 2] [--epochs 4] [--samples 600] [--out FOLDER]

A net with BatchNorm learns handwritten digits in batches of 2, 8 and 32, as it is and with
`NormSwap`, which makes GroupNorm of it. Afterwards the loss on the training images is taken twice
with the same weights: as in training, where BatchNorm normalises by the batch, and as in
evaluation, where it uses running statistics. With few values in a batch these are two different
nets. GroupNorm normalises each image by itself, in both: its two losses are the same number.

Each block halves the image, down to one pixel: the last BatchNorm has as many values a channel as
there are images in a batch.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import NormSwap

BLUE, ORANGE = "#0072B2", "#D55E00"
BATCH_SIZES = (2, 8, 32)
NORMS = {"BatchNorm": BLUE, "GroupNorm": ORANGE}


class Classifier(LightningModule):
    """A convolutional net with BatchNorm, whose rate is in proportion to the batch."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.rate = 0.1 * batch_size / 32
        self.net = nn.Sequential(
            *self.block(1, 32),
            *self.block(32, 64),
            *self.block(64, 128),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    @staticmethod
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        num_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Score(NamedTuple):
    """What a net reaches with the same weights."""

    as_in_training: float  # loss on the training images
    as_in_evaluation: float
    test_error: float  # in percent


def digits(samples: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Draw images to train on, and return the others to test on."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    scaled = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    shuffled = torch.tensor(labels)[order]
    return [scaled[:samples], shuffled[:samples]], [scaled[samples:], shuffled[samples:]]


def fit(train: list[Tensor], norm: str, batch_size: int, *, epochs: int, seed: int) -> Classifier:
    """Train a net. Runs of one seed start alike, and see the same images in the same order."""
    torch.manual_seed(seed)
    net = Classifier(batch_size)
    shuffling = torch.Generator().manual_seed(seed)
    data = DataLoader(TensorDataset(*train), batch_size, shuffle=True, generator=shuffling)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[NormSwap(channels_per_group=16)] if norm == "GroupNorm" else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, data)
    return net


@torch.no_grad()
def score(net: nn.Module, train: list[Tensor], test: list[Tensor], batch_size: int) -> Score:
    """Take the loss of all training images in both modes, and the error on the others."""
    images, labels = train
    outputs = net.eval()(images)
    error = 100 * float((net(test[0]).argmax(1) != test[1]).double().mean())
    net.train()  # last: it writes into the running statistics
    by_batch = torch.cat([net(part) for part in images.split(batch_size)])
    return Score(
        float(cross_entropy(by_batch, labels)), float(cross_entropy(outputs, labels)), error
    )


def table(scores: dict[str, np.ndarray]) -> str:
    """Return means and standard errors over seeds, a row for each norm and batch size."""
    header = ("norm", "batch", "loss as in training", "as in evaluation", "test error in %")
    lines = ["{:10} {:>5} {:>22} {:>20} {:>18}".format(*header)]
    for norm in NORMS:
        for i, batch_size in enumerate(BATCH_SIZES):
            means, errors = mean_and_error(scores[norm][:, i])
            digits = (4, 4, 1)
            cells = [
                f"{m:.{d}f} ± {e:.{d}f}" for m, e, d in zip(means, errors, digits, strict=True)
            ]
            lines.append("{:10} {:>5} {:>22} {:>20} {:>18}".format(norm, batch_size, *cells))
    return "\n".join(lines)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error over seeds, the first axis."""
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def picture(scores: dict[str, np.ndarray], title: str) -> Figure:
    """Draw the losses in both modes, and the test error, over the batch size."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for norm, color in NORMS.items():
        means, errors = mean_and_error(scores[norm])
        bars = {"color": color, "capsize": 2, "lw": 1.8}
        hollow = {"fmt": "o--", "markersize": 9, "markerfacecolor": "white"}
        loss.fill_between(BATCH_SIZES, means[:, 0], means[:, 1], color=color, alpha=0.15, lw=0)
        loss.errorbar(
            BATCH_SIZES,
            means[:, 0],
            errors[:, 0],
            label=f"{norm}, as in training",
            **hollow,
            **bars,
        )
        loss.errorbar(
            BATCH_SIZES,
            means[:, 1],
            errors[:, 1],
            fmt="o-",
            markersize=4,
            label=f"{norm}, as in evaluation",
            **bars,
        )
        error.errorbar(BATCH_SIZES, means[:, 2], errors[:, 2], fmt="o-", label=norm, **bars)
    for axes in (loss, error):
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
        axes.set_xlabel("samples in a batch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    loss.set(yscale="log", ylabel="loss", title="Training images, the same weights in both modes")
    error.set(ylim=(0, None), ylabel="test error in %", title="Other images")
    figure.suptitle(title, fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="how often to repeat the study")
    parser.add_argument("--epochs", type=int, default=4, help="length of a training")
    parser.add_argument("--samples", type=int, default=600, help="images to train on")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"`--seeds` must be at least 2, for an error bar, got {arguments.seeds}.")
    torch.set_num_threads(1)  # a net this small gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")

    scores = {norm: np.empty((arguments.seeds, len(BATCH_SIZES), 3)) for norm in NORMS}
    for seed in range(arguments.seeds):
        train, test = digits(arguments.samples, seed)
        for norm in NORMS:
            for i, size in enumerate(BATCH_SIZES):
                net = fit(train, norm, size, epochs=arguments.epochs, seed=seed)
                scores[norm][seed, i] = score(net, train, test, size)

    title = (
        f"{arguments.samples:,} images, {arguments.epochs} epochs; mean ± standard error of "
        f"{arguments.seeds} seeds"
    )
    print(f"{title}.\n")
    print(table(scores))
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(scores, title).savefig(arguments.out / "norm_swap.png", dpi=150)
    print(f"\nPicture: {arguments.out / 'norm_swap.png'}")


if __name__ == "__main__":
    main()
