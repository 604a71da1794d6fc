"""Three runs with every observer around them, for a tour of the Optkit tab.

    python examples/board_tour.py [--epochs 40] [--out optkit_logs]
    tensorboard --logdir optkit_logs/tour

The same net learns handwritten digits three times: `steady`, with a warmup and an average of its
weights; `hot`, at a rate that is far too high; and `mixed`, on mixtures of two images. The tab then
tells them apart, and says what is wrong with the second.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import (
    EMA,
    GradientMonitor,
    HessianSpectrum,
    LossLandscape,
    LRWarmup,
    Mixup,
    Sharpness,
    Stability,
)


class Digits(LightningModule):
    """A small convolutional net. It knows nothing of the callbacks."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def loaders(num_samples: int) -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    )
    train = torch.utils.data.Subset(data, range(num_samples))
    held_out = torch.utils.data.Subset(data, range(1400, len(data)))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=397)


def observers(every: int, resolution: int) -> list[Callback]:
    """Return what looks. A run of seconds cannot pay for it; a real one keeps to 5 %."""
    return [
        HessianSpectrum(every_n_epochs=every, num_matvecs=60, num_probes=2, max_overhead=None),
        Stability(every_n_epochs=every, max_overhead=None),
        GradientMonitor(every_n_steps=20, max_overhead=None),
        Sharpness(every_n_epochs=2 * every, invariance_check=False, max_overhead=None),
        LossLandscape(directions="trajectory", resolution=resolution, max_overhead=None),
    ]


RUNS = {
    "steady": (0.2, lambda: [LRWarmup(steps=40), EMA(decay=0.98)]),
    "hot": (0.9, list),
    "mixed": (0.2, lambda: [Mixup(alpha=0.4), LRWarmup(epochs=3)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="of each run")
    parser.add_argument("--samples", type=int, default=1400, help="images to train on")
    parser.add_argument("--every", type=int, default=2, help="epochs between spectra")
    parser.add_argument("--resolution", type=int, default=25, help="points a side of landscapes")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder of the logs")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    torch.set_num_threads(1)
    for name in options.runs:
        learning_rate, interveners = RUNS[name]
        seed_everything(0, verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            logger=TensorBoardLogger(options.out, name="tour", version=name),
            log_every_n_steps=5,
            callbacks=[*interveners(), *observers(options.every, options.resolution)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Digits(learning_rate), *loaders(options.samples))
        loss = float(trainer.callback_metrics["val_loss"])
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        print(f"{name:8} loss {loss:8.4f}   accuracy {accuracy:6.1%}   not trained on")
    print(f"tensorboard --logdir {options.out / 'tour'}")


if __name__ == "__main__":
    main()
