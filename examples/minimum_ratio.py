"""The share of positive eigenvalues against the loss, at the critical points of many small nets.

    python examples/minimum_ratio.py [--nets 300] [--out FOLDER]

Nets with four hidden units learn whether two numbers have the same sign. Each is trained for a time
of its own, from none to 500 steps. Then not its loss but the norm of its gradient is minimised,
which ends at critical points of any kind: saddles as well as minima. The exact Hessian there has a
share of positive eigenvalues, the minimum ratio.

Where that search does not get to a gradient of zero, there may be no critical point near, however
small the gradient. Those points are grey.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import grad, hessian, vmap

from lightning_optkit.measures import (
    CriticalPoint,
    HessianOperator,
    Spectrum,
    critical_point,
    hessian_spectrum,
)

BLUE, GREY = "#0072B2", "#999999"
HIDDEN = 4
SIZES = (2 * HIDDEN, HIDDEN, HIDDEN, 1)
TOLERANCES = (1e-2, 1e-3, 1e-6)  # in units of max|λ|; the middle one is the package's default

# |g| / (max|λ| |θ|) at a critical point that counts as found: a Newton step along an eigenvalue at
# the smallest tolerance then moves the weights by no more than 1e-4 of their norm.
FOUND = 1e-10


@dataclass
class Finding:
    """What is at one net's final point, at each tolerance."""

    loss: float
    spectra: list[Spectrum]
    points: list[CriticalPoint]

    @property
    def is_critical(self) -> bool:
        return self.has_small_gradient and self.points[1].relative_gradient < FOUND

    @property
    def has_small_gradient(self) -> bool:
        return self.points[1].kind != "not critical"

    @property
    def ratios(self) -> list[float]:
        return [spectrum.minimum_ratio for spectrum in self.spectra]


def quadrants() -> tuple[Tensor, Tensor]:
    """Return a grid of pairs, labelled 1 where both have the same sign and else -1.

    Zero counts as positive, and so the labels do not cancel.
    """
    side = torch.arange(-3, 4, dtype=torch.float64) / 1.5
    pairs = torch.cartesian_prod(side, side)
    is_positive = pairs >= 0
    return pairs, (is_positive[:, 0] == is_positive[:, 1]).double() * 2 - 1


INPUTS, TARGETS = quadrants()


def loss(weights: Tensor) -> Tensor:
    """Return the mean squared error of one net, given as a vector of all its weights."""
    hidden, bias, output, last = weights.split(SIZES)
    units = torch.tanh(INPUTS @ hidden.view(2, HIDDEN) + bias)
    return (units @ output + last - TARGETS).square().mean()


losses, gradients, hessians = vmap(loss), vmap(grad(loss)), vmap(hessian(loss))


def train(weights: Tensor, num_steps: Tensor) -> Tensor:
    """Train all nets at once with Adam, each for its own number of steps."""
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.05)
    trained = weights.detach().clone()
    for step in range(int(num_steps.max()) + 1):
        trained = torch.where((num_steps == step)[:, None], weights.detach(), trained)
        weights.grad = gradients(weights.detach())
        optimizer.step()
    return trained


def without_gradient(weights: Tensor, num_steps: int = 300) -> Tensor:
    r"""Minimise the gradient's norm from there, by Levenberg and Marquardt's method.

    Gradient g and Hessian H are residual and Jacobian: the step is -(H² + μ)⁻¹ H g, and the damping
    μ of each net falls where the norm falls.
    """
    identity = torch.eye(weights.shape[1], dtype=weights.dtype)
    damping = torch.full((len(weights),), 1e-2, dtype=weights.dtype)
    g, h = gradients(weights), hessians(weights)
    for _ in range(num_steps):
        steps = torch.linalg.solve(h @ h + damping[:, None, None] * identity, h @ g[:, :, None])
        ahead = weights - steps[:, :, 0]
        g_ahead = gradients(ahead)
        better = g_ahead.norm(dim=1) < g.norm(dim=1)
        weights = torch.where(better[:, None], ahead, weights)
        g = torch.where(better[:, None], g_ahead, g)
        h = hessians(weights)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-20, 1e6)
    return weights


def finding(weights: Tensor) -> Finding:
    """Return the exact spectrum at one net's weights, and the kind of point."""
    operator = HessianOperator(lambda p: loss(p["weights"]), {"weights": weights})
    spectra = [hessian_spectrum(operator, tol_rel=tolerance) for tolerance in TOLERANCES]
    points = [critical_point(operator, spectrum) for spectrum in spectra]
    return Finding(float(loss(weights)), spectra, points)


def picture(found: list[Finding]) -> Figure:
    """Draw loss against minimum ratio, and how the ratio moves with the tolerance."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    study, caution = figure.subplots(1, 2, sharex=True, sharey=True)
    critical = [f for f in found if f.is_critical]
    small = [f for f in found if f.has_small_gradient and not f.is_critical]
    other = [f for f in found if not f.has_small_gradient]
    scatter(study, other, marker="x", color=GREY, label="not critical")
    hollow = {"marker": "o", "facecolors": "none", "color": GREY}
    scatter(study, small, label="small gradient, search stuck", **hollow)
    scatter(study, critical, marker="o", color=BLUE, alpha=0.6, label="critical")
    study.set(xlabel=f"minimum ratio (tolerance {TOLERANCES[1]:g} max|λ|)", ylabel="loss")
    study.set_title(f"{len(critical)} critical points of {len(found)} nets")
    study.legend(loc="lower left", fontsize=9)

    loose, _, strict = np.array([f.ratios for f in critical]).reshape(-1, 3).T
    heights = [f.loss for f in critical]
    caution.hlines(heights, loose, strict, color=BLUE, alpha=0.25, lw=1)
    caution.plot(loose, heights, "<", color=BLUE, markersize=5, alpha=0.6, label="1e-2 max|λ|")
    caution.plot(strict, heights, ">", color="black", markersize=5, alpha=0.6, label="1e-6 max|λ|")
    caution.set(xlabel="minimum ratio", xlim=(0, 1.02), ylim=(0, None))
    caution.set_title("The same critical points at two tolerances")
    caution.legend(loc="lower left", fontsize=9, title="tolerance")
    for axes in (study, caution):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def scatter(axes: Axes, found: list[Finding], **style) -> None:
    label = f"{style.pop('label')} ({len(found)})"
    axes.scatter([f.ratios[1] for f in found], [f.loss for f in found], s=28, label=label, **style)


def table(found: list[Finding]) -> str:
    """Return rank correlations, and ratios of the lower and the upper half by loss."""
    critical = sorted((f for f in found if f.is_critical), key=lambda f: f.loss)
    half = len(critical) // 2
    lines = [f"{'tolerance':>10} {'rank correlation':>17} {'low losses':>11} {'high losses':>12}"]
    for i, tolerance in enumerate(TOLERANCES):
        ratios = [f.ratios[i] for f in critical]
        correlation = spearmanr(ratios, [f.loss for f in critical]).statistic
        low, high = median(ratios[:half]), median(ratios[-half:])
        lines.append(f"{tolerance:>10g} {correlation:>17.2f} {low:>11.2f} {high:>12.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=int, default=300, help="how many nets to train")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.nets < 20:
        parser.error(f"`--nets` must be at least 20, got {arguments.nets}.")

    generator = torch.Generator().manual_seed(1)
    start = torch.randn(arguments.nets, sum(SIZES), generator=generator, dtype=torch.float64)
    times = torch.logspace(0, 2.7, arguments.nets, dtype=torch.float64).long() - 1
    found = [finding(weights) for weights in without_gradient(train(start, times))]

    stuck = [f for f in found if not f.is_critical]
    small = sum(f.has_small_gradient for f in stuck)
    print(f"{len(found)} nets of {sum(SIZES)} weights: {len(found) - len(stuck)} critical points;")
    print(f"{len(stuck)} searches got stuck, {small} of them at a gradient that looks like zero.")
    flatness = median(f.points[1].flatness for f in stuck)
    usual = median(f.spectra[1].ritz_values.square().mean().sqrt().item() for f in stuck)
    usual /= median(f.spectra[1].spectral_radius for f in stuck)
    print(f"There |Hg| / (max|λ| |g|) is {flatness:.2g}, for a random direction {usual:.2g}:")
    print("the gradient lies where the surface is flat, and no critical point need be near.\n")
    print("Share of positive eigenvalues at the critical points, and its medians by loss:")
    print(table(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(found).savefig(arguments.out / "minimum_ratio.png", dpi=150)
    print(f"\nPicture: {arguments.out / 'minimum_ratio.png'}")


if __name__ == "__main__":
    main()
