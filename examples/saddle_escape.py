"""Off a saddle: L(w₁, w₂) = (1 − w₁w₂)² from the origin, with and without `SaddleEscape`.

    python examples/saddle_escape.py [--out FOLDER]

The gradient at the origin is exactly zero, so gradient descent stays for ever. The Hessian is
[[0, −2], [−2, 0]], with eigenvalues 2 and −2; the eigenvector of −2 is (1, 1)/√2. One step along
it, and gradient descent finds the valley w₁w₂ = 1 by itself.
"""

import argparse
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit import SaddleEscape

BLUE, ORANGE = "#0072B2", "#D55E00"


class Product(LightningModule):
    """The product of two weights, fitted to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (batch - self.weights[0] * self.weights[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Path2D(Callback):
    """Notes where the weights are at the start, before each step and at the end."""

    def __init__(self) -> None:
        self.points: list[np.ndarray] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.points.append(pl_module.weights.detach().numpy().copy())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self.on_train_start(trainer, pl_module)


def train(*callbacks: Callback, num_steps: int = 60) -> tuple[np.ndarray, dict[str, float]]:
    """Return the path of the weights, and what was logged last."""
    path = Path2D()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[*callbacks, path],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Product(), DataLoader(torch.ones(num_steps, 1)))
    return np.stack(path.points), {k: float(v) for k, v in trainer.callback_metrics.items()}


def loss(points: np.ndarray) -> np.ndarray:
    return (1 - points[..., 0] * points[..., 1]) ** 2


def picture(without: np.ndarray, escaped: np.ndarray) -> Figure:
    """Draw both paths on the surface, the first step close up, and the losses."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    surface, curves = figure.subplots(1, 2, width_ratios=[1.15, 1])
    draw_surface(surface, 1.7)
    surface.plot(*escaped.T, ".-", color=BLUE, markersize=4, lw=1.2)
    surface.plot(*escaped[-1], "*", color=BLUE, markersize=14)
    surface.plot(*without.T, "X", color=ORANGE, markersize=9)
    half = np.linspace(1 / 1.7, 1.7, 50)
    for side in (half, -half):
        surface.plot(side, 1 / side, ":", color="black", lw=1)
    surface.text(0.85, 0.85, "w₁w₂ = 1", ha="center", va="center", rotation=-45)
    surface.set_title("(1 − w₁w₂)², darker is higher")

    close_up = surface.inset_axes((0.03, 0.58, 0.39, 0.39))
    draw_surface(close_up, 0.02)
    close_up.plot(*escaped[1:].T, ".-", color=BLUE, markersize=5, lw=1.2)
    arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    close_up.annotate("", xytext=(0, 0), xy=escaped[1], arrowprops=arrow)
    close_up.plot(0, 0, "X", color=ORANGE, markersize=9)
    close_up.set(xticks=[], yticks=[], xlabel="", ylabel="")
    toward = -np.sign(escaped[1][0])
    close_up.text(
        0.0, 0.011 * toward, "the escape,\nalong (1, 1)/√2", ha="center", va="center", fontsize=8
    )
    close_up.text(0.019, -0.019, "85 × closer", ha="right", va="bottom", fontsize=8)

    steps = np.arange(len(without) - 1)
    curves.semilogy(steps, loss(without[1:]), color=ORANGE, label="without")
    curves.semilogy(steps, loss(escaped[1:]), color=BLUE, label="with SaddleEscape")
    curves.set(xlabel="step", ylabel="loss", title="Gradient descent, step size 0.1")
    curves.legend()
    return figure


def draw_surface(axes: Axes, reach: float) -> None:
    """Draw contours of the loss around the origin."""
    side = np.linspace(-reach, reach, 241)
    points = np.stack(np.meshgrid(side, side), axis=-1)
    above_valley = np.abs(1 - points[..., 0] * points[..., 1])  # equally spaced contours of √L
    levels = np.linspace(max(0, 1 - reach**2), 1 + reach**2, 17)
    darkest = levels[-1] + levels[-1] - levels[0]  # so that lines stay visible on it
    axes.contourf(side, side, above_valley, levels, cmap="Greys", vmin=levels[0], vmax=darkest)
    axes.contour(side, side, above_valley, levels, colors="white", linewidths=0.5)
    axes.set(xlabel="w₁", ylabel="w₂", aspect="equal", xlim=side[[0, -1]], ylim=side[[0, -1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    out = parser.parse_args().out
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")

    without, _ = train()
    escaped, logged = train(SaddleEscape(every_n_steps=10, max_escapes=1))
    lambda_min, step = logged["optkit-escape/lambda_min"], logged["optkit-events/escape"]
    print(f"At the origin: λmin = {lambda_min:.3f}, a step of {step:.4f} along its eigenvector.\n")
    print(f"{'after 60 steps':18} {'w₁':>8} {'w₂':>8} {'loss':>9}")
    for name, path in (("without", without), ("with SaddleEscape", escaped)):
        print(f"{name:18} {path[-1][0]:>8.4f} {path[-1][1]:>8.4f} {loss(path[-1]):>9.1e}")
    out.mkdir(parents=True, exist_ok=True)
    picture(without, escaped).savefig(out / "saddle_escape.png", dpi=150)
    print(f"\nPicture: {out / 'saddle_escape.png'}")


if __name__ == "__main__":
    main()
