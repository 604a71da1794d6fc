"""Six optimizers on four surfaces of two parameters, in one picture.

    python examples/toy_surfaces.py [--steps 150] [--out FOLDER]

Every surface is a loss of two weights, drawn by ``loss_plane``; every path is torch's own optimizer
from the same start. The table says where each ends.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lightning_optkit.measures.landscape import LossPlane, loss_plane
from lightning_optkit.measures.loss_surface import LossSurface

X = torch.linspace(-2, 2, 21)
TARGET = torch.tanh(1.5 * torch.tanh(1.0 * X))  # what the small net has to fit


def ackley(w: Tensor) -> Tensor:
    """Many minima in a bowl; the lowest, 0, at the origin."""
    bowl = -20 * torch.exp(-0.2 * (w.square().mean() + 1e-12).sqrt())
    return bowl - torch.exp(torch.cos(2 * math.pi * w).mean()) + 20 + math.e


def product(w: Tensor) -> Tensor:
    """A saddle at the origin between two valleys."""
    return (1 - w[0] * w[1]).square()


def small_net(w: Tensor) -> Tensor:
    """A net of two weights: flat far out, two minima that mirror one another."""
    return (torch.tanh(w[0] * torch.tanh(w[1] * X)) - TARGET).square().mean()


def ravine(w: Tensor) -> Tensor:
    """A quadratic whose curvatures differ by a factor of 50."""
    return (w[0].square() + 50 * w[1].square()) / 2


@dataclass(frozen=True)
class Surface:
    title: str
    loss: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    reach: float
    rate: float  # of gradient descent; the others' follow from it


SURFACES = (
    Surface("Ackley", ackley, (2.6, 1.7), 4.0, 0.02),
    Surface("(1 − w₁w₂)²", product, (0.02, -0.01), 2.0, 0.05),
    Surface("tanh(w₁ tanh(w₂x))", small_net, (-2.2, 2.6), 3.0, 0.3),
    Surface("quadratic, condition 50", ravine, (-3.5, 0.6), 4.0, 0.03),
)

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "gradient descent": torch.optim.SGD,
    "momentum": lambda p, rate: torch.optim.SGD(p, rate / 3, momentum=0.9),
    "Nesterov": lambda p, rate: torch.optim.SGD(p, rate / 3, momentum=0.9, nesterov=True),
    "AdaGrad": lambda p, rate: torch.optim.Adagrad(p, 0.4),
    "RMSProp": lambda p, rate: torch.optim.RMSprop(p, 0.03),
    "Adam": lambda p, rate: torch.optim.Adam(p, 0.08),
}
# Okabe and Ito's colours: told apart by colour-blind readers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#FFFFFF")


def path_of(surface: Surface, name: str, steps: int) -> Tensor:
    """Return where an optimizer goes from the start, shape (steps + 1, 2)."""
    w = torch.tensor(surface.start, requires_grad=True)
    optimizer = OPTIMIZERS[name]([w], surface.rate)
    path = [w.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        surface.loss(w).backward()
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def plane_of(surface: Surface) -> LossPlane:
    middle = LossSurface(lambda p: surface.loss(p["w"]), {"w": torch.zeros(2)})
    return loss_plane(middle, torch.eye(2), resolution=61, span=surface.reach)


def figure_of(paths: dict[str, dict[str, Tensor]]) -> Figure:
    figure = Figure(figsize=(11, 10), layout="constrained")
    for axes, surface in zip(figure.subplots(2, 2).flat, SURFACES, strict=True):
        plane = plane_of(surface)
        losses = plane.losses.clamp(min=float(plane.losses[plane.losses > 0].min()))
        x, y, z = plane.x.numpy(), plane.y.numpy(), losses.numpy()
        levels = torch.logspace(math.log10(max(z.min(), 1e-3)), math.log10(z.max()), 24).tolist()
        norm = LogNorm(levels[0], levels[-1])
        axes.contourf(x, y, z, levels=levels, norm=norm, cmap="viridis", extend="both", alpha=0.8)
        axes.contour(x, y, z, levels=levels[::3], colors="black", linewidths=0.4, alpha=0.6)
        for (name, path), colour in zip(paths[surface.title].items(), COLOURS, strict=True):
            axes.plot(path[:, 0].numpy(), path[:, 1].numpy(), color=colour, linewidth=1.6,
                      marker="o", markersize=2, markevery=10, label=name)  # fmt: skip
        axes.plot(*surface.start, marker="s", color="white", markeredgecolor="black")
        axes.set(title=surface.title, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]),
                 xlabel="w₁", ylabel="w₂")  # fmt: skip
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, facecolor="0.85")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="length of each path")
    parser.add_argument("--out", type=Path, default=Path("optkit_logs"), help="folder to write to")
    options = parser.parse_args()
    paths = {
        surface.title: {name: path_of(surface, name, options.steps) for name in OPTIMIZERS}
        for surface in SURFACES
    }
    print(f"loss after {options.steps} steps\n{'':26}" + "".join(f"{n:>18}" for n in OPTIMIZERS))
    for surface in SURFACES:
        ends = [float(surface.loss(path[-1])) for path in paths[surface.title].values()]
        print(f"{surface.title:26}" + "".join(f"{end:18.2e}" for end in ends))
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "toy_surfaces.png"
    figure_of(paths).savefig(picture, dpi=120)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
