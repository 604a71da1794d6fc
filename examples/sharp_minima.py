"""Small batches against large ones: how sharp are the minima that each finds?

    python examples/sharp_minima.py [--seeds 2] [--target 0.02 | --epochs 40] [--data mnist.npz]

Keskar et al. (2017) trained nets with Adam, once with small batches and once with batches of a
tenth of the data, until both fitted it, and found the large-batch minima sharper. Here two nets
learn handwritten digits that way, one plain and one with BatchNorm, each until its loss on all
training images, in eval mode, is below a target, and `Sharpness` measures all kinds at the end, on
the same images. The table gives each kind for both batches and their ratio; the lines below it are
computed from the ratios.

With BatchNorm the size of a layer's weights has no part in what the net computes: absolute kinds
then measure that size too, adaptive ones do not, and the two can order minima differently: look at
both. The last lines scale the large batch's layers to the lengths of the small one's, which leaves
the function alone, and tell the ratios then.

`--epochs 40` trains for equally many epochs in place of to an equal loss. To stop by the loss that
training itself sees would not do: with BatchNorm it is that of noisy statistics, and a small batch
would have to fit ten times better than a large one before it is as low.

`--data` takes MNIST in place of scikit-learn's digits, as arrays `train_x`, `train_y`, `test_x` and
`test_y` in a file for `numpy.load`; 6,000 training images are used, drawn at random: such files
may be sorted by label.
"""

import argparse
import copy
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import Sharpness
from lightning_optkit.measures import (
    HessianOperator,
    ModuleLoss,
    average_sharpness,
    ball_sharpness,
    epsilon_sharpness,
    top_eigenpairs,
)

SMALL = 16
ABSOLUTE = ("epsilon", "ball", "average", "lambda_max")
ADAPTIVE = ("adaptive", "adaptive_average")
KINDS = (*ABSOLUTE, *ADAPTIVE)
BLUE, ORANGE = "#0072B2", "#D55E00"


class Classifier(LightningModule):
    """A net of three layers, with BatchNorm or without."""

    def __init__(self, inputs: int, width: int = 48, batch_norm: bool = False) -> None:
        super().__init__()

        def layer(n: int) -> list[nn.Module]:
            norm = [nn.BatchNorm1d(width)] if batch_norm else []
            return [nn.Linear(n, width), *norm, nn.ReLU()]

        self.net = nn.Sequential(*layer(inputs), *layer(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch  # of the training images
        self.log("fit_loss", cross_entropy(self(x), y), batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def load(path: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test images as rows, with their labels."""
    if path is None:
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        train, test = order[:1200], order[1200:]
        return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
    with np.load(path) as arrays:
        found = []
        for part, number in (("train", 6000), ("test", 10000)):
            order = np.random.default_rng(0).permutation(len(arrays[f"{part}_y"]))[:number]
            images = torch.tensor(arrays[f"{part}_x"][order], dtype=torch.float32)[:, None] / 255
            labels = torch.tensor(arrays[f"{part}_y"][order], dtype=torch.long)
            found.append(TensorDataset(avg_pool2d(images, 2).flatten(1), labels))
    return found[0], found[1]


def measured(
    train: TensorDataset, test: TensorDataset, *, batch_size: int, batch_norm: bool, target: float,
    epochs: int | None, seed: int,
) -> tuple[Classifier, dict[str, float]]:  # fmt: skip
    """Train a net and return it, with its losses and its sharpness by kind."""
    torch.manual_seed(seed)
    net = Classifier(train.tensors[0].shape[1], batch_norm=batch_norm)
    shuffling = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, batch_size, shuffle=True, drop_last=batch_norm, generator=shuffling)
    all_images = DataLoader(train, 600)
    sharpness = Sharpness(
        ("epsilon", "ball", "average", *ADAPTIVE), data=all_images, num_batches=None,
        epsilon=1e-3, rho=0.05, num_samples=20, invariance_check=False,
    )  # fmt: skip
    fitted = EarlyStopping("fit_loss", stopping_threshold=target, patience=1000)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs or 1000,
        callbacks=[sharpness] if epochs else [fitted, sharpness], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(net, loader, None if epochs else all_images)
    if not epochs and not float(trainer.callback_metrics["fit_loss"]) <= target:
        raise SystemExit(
            f"The loss did not fall to {target} in 1,000 epochs: give more `--target`."
        )
    logged = {k.split("/")[-1]: float(v) for k, v in trainer.callback_metrics.items()}
    logged["steps"] = trainer.global_step
    net.eval()
    with torch.no_grad():
        x, y = test.tensors
        logged["test error"] = 100 * float((net(x).argmax(1) != y).double().mean())
    logged["training loss"] = logged["loss"]
    return net, logged


def scaled_to(net: Classifier, lengths_of: Classifier) -> Classifier:
    """Return a net of the same function whose layers before BatchNorm are as long as another's."""
    scaled = copy.deepcopy(net)
    layers = zip(scaled.net, list(scaled.net)[1:], lengths_of.net, strict=False)
    with torch.no_grad():
        for layer, norm, other in layers:
            if isinstance(norm, nn.BatchNorm1d):
                factor = other.weight.norm() / layer.weight.norm()
                for tensor in (layer.weight, layer.bias, norm.running_mean):
                    tensor.mul_(factor)
                norm.running_var.mul_(factor**2)
    return scaled


def sharpness_of(net: Classifier, train: TensorDataset) -> dict[str, float]:
    """Return the loss and the sharpness by kind of a net that is trained."""
    net.eval()
    x, y = (tensor.split(600) for tensor in train.tensors)
    losses = [
        ModuleLoss(net, lambda net, x=x, y=y: cross_entropy(net(x), y))
        for x, y in zip(x, y, strict=True)
    ]
    sizes = [len(each) for each in y]
    operator = HessianOperator(losses, dict(net.named_parameters()), weights=sizes)
    return {
        "loss": float(operator.value()),
        "epsilon": epsilon_sharpness(operator, epsilon=1e-3).value,
        "ball": ball_sharpness(operator, rho=0.05).value,
        "average": average_sharpness(operator, rho=0.05).value,
        "lambda_max": float(top_eigenpairs(operator, 1, which="largest", rtol=1e-3).values[0]),
        "adaptive": ball_sharpness(operator, rho=0.5, adaptive=True).value,
        "adaptive_average": average_sharpness(operator, rho=0.05, adaptive=True).value,
    }


def at_equal_lengths(nets: list[list[Classifier]], train: TensorDataset) -> str:
    """Return the ratios once weights before BatchNorm are as long for both batches."""
    small = [sharpness_of(net, train) for net in nets[0]]
    scaled = [scaled_to(*pair) for pair in zip(nets[1], nets[0], strict=True)]
    big = [sharpness_of(net, train) for net in scaled]
    before = [sharpness_of(net, train)["loss"] for net in nets[1]]
    moved = max(abs(b["loss"] - loss) for b, loss in zip(big, before, strict=True))
    ratios = (f"{kind.replace('_', ' ')} {ratio_of(small, big, kind)[0]:.2f}" for kind in KINDS)
    return (
        "The lengths of weights before BatchNorm are no part of the function. With the large "
        f"batch's scaled to the\nsmall one's, which moves no loss by more than {moved:.0e}, the "
        f"ratios are {', '.join(ratios)}."
    )


def table(found: dict[tuple[bool, bool], list[dict[str, float]]], large: int) -> str:
    """Return means over seeds, and the ratio of large to small batch with its standard error."""
    lines = []
    for batch_norm in (False, True):
        small, big = found[batch_norm, False], found[batch_norm, True]
        net = "with BatchNorm" if batch_norm else "without BatchNorm"
        lines.append(f"{net:28}{f'batch {SMALL}':>12}{f'batch {large}':>12}{'ratio':>16}")
        for name in ("steps", "training loss", "test error", *KINDS):
            means = [np.mean([each[name] for each in side]) for side in (small, big)]
            cells = f"{means[0]:12.3g}{means[1]:12.3g}"
            if name in KINDS:
                ratio, error = ratio_of(small, big, name)
                cells += f"{f'{ratio:.2f} ×/÷ {error:.2f}':>16}"
            lines.append(f"  {name.replace('_', ' '):26}{cells}")
    return "\n".join(lines)


def ratio_of(
    small: list[dict[str, float]], big: list[dict[str, float]], kind: str
) -> tuple[float, float]:
    """Return the geometric mean of large over small batch, seed by seed, and its error factor."""
    logs = np.log([b[kind] / s[kind] for s, b in zip(small, big, strict=True)])
    return float(np.exp(logs.mean())), float(np.exp(logs.std(ddof=1) / len(logs) ** 0.5))


def verdicts(found: dict[tuple[bool, bool], list[dict[str, float]]]) -> str:
    """Return, net by net, for which kinds the large batch is sharper, flatter, or neither."""
    lines = []
    for batch_norm in (False, True):
        sides: dict[str, list[str]] = {"sharper": [], "flatter": [], "neither": []}
        for kind in KINDS:
            ratio, error = ratio_of(found[batch_norm, False], found[batch_norm, True], kind)
            clear = max(ratio, 1 / ratio) > error**2
            side = ("sharper" if ratio > 1 else "flatter") if clear else "neither"
            sides[side].append(kind.replace("_", " "))
        net = "With BatchNorm" if batch_norm else "Without BatchNorm"
        said = [f"{side} by {', '.join(kinds)}" for side, kinds in sides.items() if kinds]
        lines.append(f"{net} the large batch ends where it is {'; '.join(said)}.")
    return "\n".join(lines).replace("neither by", "within two standard errors by")


def picture(found: dict[tuple[bool, bool], list[dict[str, float]]], title: str) -> Figure:
    """Draw the ratio of large to small batch by kind, for both nets."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for batch_norm, colour, shift in ((False, BLUE, -0.12), (True, ORANGE, 0.12)):
        ratios = [ratio_of(found[batch_norm, False], found[batch_norm, True], k) for k in KINDS]
        middle = np.array([ratio for ratio, _ in ratios])
        factor = np.array([error for _, error in ratios])
        axes.errorbar(
            np.arange(len(KINDS)) + shift, middle,
            yerr=[middle - middle / factor, middle * factor - middle], fmt="o", color=colour,
            capsize=3, label="with BatchNorm" if batch_norm else "without",
        )  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    border = len(ABSOLUTE) - 0.5
    axes.axvline(border, color="black", linewidth=0.8, linestyle=":")
    for shift, side, label in ((-0.05, "right", "absolute"), (0.05, "left", "adaptive")):
        axes.text(border + shift, 0.55, label, ha=side, color="0.3")
    axes.set_yscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(KINDS)), [kind.replace("_", "\n") for kind in KINDS])
    axes.set_ylabel("large batch / small batch")
    axes.set_title(title, fontsize=10)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="how often to repeat the study")
    parser.add_argument("--target", type=float, default=0.02, help="loss to train to")
    parser.add_argument("--epochs", type=int, help="train for so many, whatever the loss")
    parser.add_argument("--data", type=Path, help="MNIST, in place of scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"`--seeds` must be at least 2, for an error bar, got {options.seeds}.")
    torch.set_num_threads(1)  # a net this small gains nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*isinstance.treespec")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")

    train, test = load(options.data)
    large = len(train) // 10
    found: dict[tuple[bool, bool], list[dict[str, float]]] = {}
    nets: dict[tuple[bool, bool], list[Classifier]] = {}
    for batch_norm in (False, True):
        for is_large in (False, True):
            runs = [
                measured(
                    train,
                    test,
                    batch_size=large if is_large else SMALL,
                    batch_norm=batch_norm,
                    target=options.target,
                    epochs=options.epochs,
                    seed=seed,
                )
                for seed in range(options.seeds)
            ]
            nets[batch_norm, is_large] = [net for net, _ in runs]
            found[batch_norm, is_large] = [logged for _, logged in runs]
    extent = f"for {options.epochs} epochs" if options.epochs else f"to {options.target}"
    title = (
        f"{len(train):,} images, batches of {SMALL} and {large}, trained {extent}; "
        f"mean of {options.seeds} seeds"
    )
    print(f"{title}.\n\n{table(found, large)}\n\n{verdicts(found)}\n")
    print(at_equal_lengths([nets[True, False], nets[True, True]], train))
    options.out.mkdir(parents=True, exist_ok=True)
    picture(found, title).savefig(options.out / "sharp_minima.png", dpi=150)
    print(f"\nPicture: {options.out / 'sharp_minima.png'}")


if __name__ == "__main__":
    main()
