"""A plane of 25 × 25 losses against its bare forward passes and a peer; Keskar's sharpness.

Run with ``python -m tests.benchmarks.bench_landscape``: some five minutes. All planes of a round
take turns, of the same ResNet-20 on the same batch, in CPU time of one thread. The peer is the
package loss-landscapes. Sharpness is compared with SciPy's L-BFGS-B used as it comes: from the
parameters, on unscaled variables, with the loss and gradient of one batch.
"""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version

import lightning.pytorch as pl
import loss_landscapes
import numpy as np
import torch
from loss_landscapes.metrics import Loss
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optkit.bridge.probe import Probe
from lightning_optkit.measures import LossSurface, epsilon_sharpness, loss_plane, random_directions
from tests.benchmarks.nets import Workload, cross_entropy, resnet20_workload
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.timing import cpu_seconds, interleaved, quartiles

RESOLUTION = 25
ROUNDS = 3
BATCH = 16
MOST = 1.03  # of the forward passes alone
EPSILON = 1e-3
COLUMNS = ["plane of 25 × 25", "CPU seconds", "of its forward passes"]
OF_SHARPNESS = ["Keskar's sharpness, ε = 0.001", "φ, %", "losses with gradients", "CPU seconds"]


class Module(pl.LightningModule):
    """A training step as users write them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Planes(pl.Callback):
    """Draws planes in turn, within a Trainer: its probe is one of the ways."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.seconds: list[list[float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        work = self.work
        surface = LossSurface(work.loss, work.params)
        directions = random_directions(surface.params, 2)

        def forwards() -> None:
            with torch.no_grad():
                for _ in range(RESOLUTION**2):
                    float(work.loss())

        def peer() -> None:
            metric = Loss(cross_entropy, work.inputs, work.targets)
            with torch.no_grad():
                loss_landscapes.random_plane(work.net, metric, 1.0, RESOLUTION, None, True)

        def ours() -> None:
            loss_plane(surface, directions, resolution=RESOLUTION)

        def through_the_probe() -> None:
            with Probe(trainer, pl_module) as probe:
                params = probe.parameters([name for name, _ in pl_module.named_parameters()])
                surface = LossSurface(probe.loss_fn(batch), params)
                loss_plane(surface, directions, resolution=RESOLUTION)

        calls = [forwards, ours, through_the_probe, peer]
        self.seconds = interleaved(calls, min_rounds=ROUNDS, seconds=0)


def workload() -> Workload:
    work = resnet20_workload()
    return Workload("ResNet-20", work.net, work.inputs[:BATCH], work.targets[:BATCH])


def plane_seconds(work: Workload) -> list[list[float]]:
    planes = Planes(work)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[planes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(work.net)
    trainer.fit(module, DataLoader([[work.inputs, work.targets]], batch_size=None))
    return planes.seconds


def naive_sharpness(work: Workload, surface: LossSurface) -> tuple[float, int]:
    """Return φ by L-BFGS-B as it comes, and what it spent."""
    start = surface.vector().numpy()
    loss = float(surface.loss())
    spent = 0

    def negative(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal spent
        spent += 1
        value, gradient = surface.loss_and_gradient(torch.from_numpy(z).to(surface.dtype))
        return -float(value), -gradient.numpy().astype(np.float64)

    half = EPSILON * (np.abs(start) + 1)
    found = minimize(
        negative,
        np.zeros(len(start)),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(-half, half, strict=True)),
        options={"maxiter": 10},
    )
    return 100 * (-found.fun - loss) / (1 + loss), spent


def sharpness_rows(work: Workload) -> list[list[str]]:
    surface = LossSurface(work.loss, work.params)
    found: dict[str, tuple[float, int]] = {}

    def ours() -> None:
        result = epsilon_sharpness(surface, epsilon=EPSILON)
        found["ours"] = result.value, result.num_gradients

    def naive() -> None:
        found["L-BFGS-B as it comes"] = naive_sharpness(work, surface)

    rows = []
    for name, call in {"ours": ours, "L-BFGS-B as it comes": naive}.items():
        seconds = cpu_seconds(call)
        value, spent = found[name]
        rows.append([name, f"{value:.1f}", str(spent), f"{seconds:.1f}"])
    return rows


def heading() -> str:
    return f"""## Sharpness and landscape

{machine()}, Lightning {pl.__version__}, loss-landscapes {version("loss-landscapes")}, SciPy
{version("scipy")}.

ResNet-20 on {BATCH} images. The forward passes are {RESOLUTION**2} calls of the net and its loss at
its own parameters. "Through the probe" is what `LossLandscape` does around an unedited
`training_step`: it leaves no trace in module, metrics, logs and random streams at each of them.
loss-landscapes takes directions without a normalization: with its own for filters it divides by
zero where a filter is zero, as the β of a fresh BatchNorm."""


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    work = workload()
    seconds = plane_seconds(work)
    names = ["forward passes alone", "`loss_plane`", "through the probe", "loss-landscapes"]
    bare = quartiles(seconds[0])[1]
    ratios = [
        quartiles([a / b for a, b in zip(each, seconds[0], strict=True)])[1] for each in seconds
    ]
    rows = [
        [name, f"{quartiles(each)[1]:.2f}", f"{ratio:.3f} x"]
        for name, each, ratio in zip(names, seconds, ratios, strict=True)
    ]
    verdict = (
        f"Target: {MOST} x of the forward passes, {bare / RESOLUTION**2 * 1e3:.1f} ms each; "
        f"{ratios[1]:.3f} x, {'met' if ratios[1] <= MOST else 'MISSED'}; through the probe "
        f"{ratios[2]:.3f} x, {'met' if ratios[2] <= MOST else 'MISSED'}."
    )
    of_sharpness = sharpness_rows(work)
    for columns, lines in ((COLUMNS, rows), (OF_SHARPNESS, of_sharpness)):
        shown = Table(*columns)
        for line in lines:
            shown.add_row(*line)
        Console().print(shown)
    Console().print(verdict)
    body = [heading(), markdown_table(COLUMNS, rows), verdict]
    body.append(markdown_table(OF_SHARPNESS, of_sharpness))
    write_section("bench_landscape", "\n\n".join(body))


if __name__ == "__main__":
    main()
