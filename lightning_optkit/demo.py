"""A small net trained on real data with the callbacks around it: ``lightning-optkit demo``."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import Accuracy

from lightning_optkit.board.report import html_report, read_folders
from lightning_optkit.callbacks.hessian_spectrum import HessianReport, HessianSpectrum
from lightning_optkit.figures.spectrum import spectrum_figure

__all__ = ["DigitsClassifier", "digits", "run_demo"]


class DigitsClassifier(pl.LightningModule):
    """A convolutional net for 8 x 8 images of digits. It knows nothing of the callbacks."""

    def __init__(self, learning_rate: float = 0.05) -> None:
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
        self.accuracy = Accuracy(task="multiclass", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def digits(batch_size: int = 64) -> tuple[DataLoader[tuple[Tensor, ...]], ...]:
    """Return loaders of scikit-learn's 1,797 handwritten digits: 1,437 to train on, 360 held out.

    Raises:
        ModuleNotFoundError: without scikit-learn, which brings the data.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The demo's data comes with scikit-learn. Install it with "
            "`pip install 'lightning-optkit[examples]'`."
        ) from error

    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(
        torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    )
    train, held_out = random_split(dataset, [1437, 360], generator=torch.Generator().manual_seed(0))
    return (
        DataLoader(train, batch_size, shuffle=True),
        DataLoader(held_out, batch_size=360),
    )


def run_demo(folder: str | Path = "optkit_logs", *, epochs: int = 15, seed: int = 0) -> int:
    """Train, show progress, and end with a table of what the callbacks saw.

    Args:
        folder: where the logs go.
        epochs: length of the training.
        seed: of weights and shuffling.

    Returns:
        0 if training went well, as a process's exit status.
    """
    console = Console()
    _quiet()
    torch.set_num_threads(1)  # a net this small gains nothing from more
    pl.seed_everything(seed, verbose=False)
    train, held_out = digits()
    # A run of seconds cannot pay for its diagnostics. A real one keeps to 5 %.
    last = _LastReport(every_n_epochs=1, max_overhead=None)
    logger = TensorBoardLogger(folder, name="digits", default_hp_metric=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger,
        log_every_n_steps=5,
        callbacks=[last, RichProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    console.print(
        f"Training a small net on 1,437 images of digits for {epochs} epochs, with "
        "[bold]HessianSpectrum[/bold] around it."
    )
    trainer.fit(DigitsClassifier(), train, held_out)
    if last.report is None:
        console.print("[red]The Hessian could not be measured; the warning above says why.[/red]")
        return 1
    console.print(summary_table(trainer, last.report, last.overhead))
    picture = Path(logger.log_dir) / "spectrum.png"
    spectrum_figure(last.report.spectrum).savefig(picture, dpi=150)
    console.print(f"Picture of the last spectrum: {picture}", soft_wrap=True)
    report = Path(logger.log_dir) / "report.html"
    report.write_text(html_report(read_folders([logger.log_dir])), encoding="utf-8")
    console.print(
        f"Everything over time: tensorboard --logdir {folder}, tab Optkit", soft_wrap=True
    )
    console.print(f"The same as one file, for any browser: {report}", soft_wrap=True)
    return 0


class _LastReport(HessianSpectrum):
    """Keeps the last measurement for the table."""

    report: HessianReport | None = None
    overhead = math.nan

    def scalars(self, result: HessianReport) -> dict[str, float]:
        """Return the scalars, and keep the result."""
        self.report = result
        self.overhead = self._cadence.overhead
        return super().scalars(result)


def summary_table(trainer: pl.Trainer, report: HessianReport, overhead: float) -> Table:
    """Return the table that ends the demo."""
    spectrum, point, metrics = report.spectrum, report.point, trainer.callback_metrics
    title = f"After training: the Hessian in {spectrum.num_params:,} parameters"
    bounds = (
        "exact" if spectrum.method == "exact" else f"in brackets: {spectrum.confidence:.0%} bounds"
    )
    table = Table(title=title, caption=bounds, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(style="dim")
    for row in (
        ("training loss", f"{report.loss:.4f}", f"{report.num_samples} held samples"),
        ("accuracy", f"{float(metrics['val_accuracy']):.1%}", "360 images not trained on"),
        ("λ max", f"{spectrum.lambda_max:.3g} ± {spectrum.lambda_max_error:.0e}", "sharpness"),
        ("λ min", f"{spectrum.lambda_min:.3g} ± {spectrum.lambda_min_error:.0e}", ""),
        ("minimum ratio", str(spectrum.positive), f"share of λ > {spectrum.tol:.2g}"),
        ("negative ratio", str(spectrum.negative), f"share of λ < -{spectrum.tol:.2g}"),
        ("kind of point", point.kind, f"gradient norm {point.gradient_norm:.2g}"),
        ("cost", f"{overhead:.1%} of the run", f"{spectrum.num_matvecs} products a time"),
    ):
        table.add_row(*row)
    return table


def _quiet() -> None:
    """Leave the screen to the progress bar and the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
