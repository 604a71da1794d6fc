"""A plane of 25 × 25 losses against its bare forward passes and a peer; Keskar's sharpness.

Run with ``python -m tests.benchmarks.bench_landscape``: some twenty minutes. All planes of a round
take turns, of the same ResNet-20 on the same images, in CPU time of one thread. The peer is the
package loss-landscapes. Sharpness is compared with SciPy's L-BFGS-B used as it comes: from the
parameters, on unscaled variables, with the loss and gradient of one batch; at the weights of an
untrained net, where gradients are large, and at a minimum, where they are not.
"""

from __future__ import annotations

import logging
import time
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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optkit.bridge.probe import Probe
from lightning_optkit.measures import (
    LossSurface,
    ModuleLoss,
    epsilon_sharpness,
    loss_plane,
    random_directions,
)
from tests.benchmarks.nets import Workload, cross_entropy, resnet20_workload
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.timing import cpu_seconds, quartiles

RESOLUTION = 25
ROUNDS = {16: 3, 64: 2}  # by the images in a batch
MOST = 1.03  # of the forward passes alone
EPSILON = 1e-3
COLUMNS = ["plane of 25 × 25", "images", "CPU seconds", "of its forward passes", "quartiles"]
OF_SHARPNESS = ["Keskar's sharpness, ε = 0.001", "found by", "φ, %", "gradients", "CPU seconds"]


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


class Passes:
    """CPU seconds in a net's forward passes, whoever calls it."""

    def __init__(self, net: nn.Module) -> None:
        self.seconds = 0.0
        self._began = 0.0
        net.register_forward_pre_hook(self._begin)
        net.register_forward_hook(self._end)

    def _begin(self, net: nn.Module, inputs: object) -> None:
        self._began = time.process_time()

    def _end(self, net: nn.Module, inputs: object, output: object) -> None:
        self.seconds += time.process_time() - self._began

    def __deepcopy__(self, memo: dict[int, object]) -> Passes:
        """Of a copy of the net too: the peer works on one."""
        return self


class Planes(pl.Callback):
    """Draws planes in turn, within a Trainer: its probe is one of the ways."""

    def __init__(self, work: Workload, rounds: int) -> None:
        self.work = work
        self.rounds = rounds
        self.planes: dict[str, list[tuple[float, float]]] = {}  # CPU seconds, those of passes

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        work, passes = self.work, Passes(self.work.net)
        loss = ModuleLoss(work.net, lambda net: cross_entropy(net(work.inputs), work.targets))
        surface = LossSurface(loss, work.params)
        directions = random_directions(surface.params, 2)

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

        calls = {
            "`loss_plane`": ours,
            "`LossLandscape`, through the probe": through_the_probe,
            "loss-landscapes": peer,
        }
        self.planes = {name: [] for name in calls}
        for _ in range(self.rounds + 1):
            for name, call in calls.items():
                passes.seconds = 0.0
                seconds = cpu_seconds(call)
                self.planes[name].append((seconds, passes.seconds))


def workload(num_images: int) -> Workload:
    work = resnet20_workload()
    return Workload("ResNet-20", work.net, work.inputs[:num_images], work.targets[:num_images])


def trained_workload() -> Workload:
    """Return a perceptron that has learnt 1,200 digits by heart, with all of them."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(x[:1200], dtype=torch.float32) / 16, torch.tensor(y[:1200])
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
    net.append(nn.Linear(48, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return Workload("perceptron at a minimum", net, inputs, targets)


def measured_planes(work: Workload, rounds: int) -> dict[str, list[tuple[float, float]]]:
    planes = Planes(work, rounds)
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
    return {name: taken[1:] for name, taken in planes.planes.items()}  # the first is warm-up


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
        rows.append([work.name, name, f"{value:.3g}", str(spent), f"{seconds:.1f}"])
    return rows


def heading() -> str:
    return f"""## Sharpness and landscape

{machine()}, Lightning {pl.__version__},
loss-landscapes {version("loss-landscapes")}, SciPy {version("scipy")}.

ResNet-20, {RESOLUTION**2} points, float32, one thread. A plane is compared with the time that the
net's own forward passes took while it was drawn, by hooks around the net: passes at far weights can
be slower. "Through the probe" is what `LossLandscape` does around an unedited `training_step`: it
leaves no trace in module, metrics, logs and random streams, for a time that does not depend on the
size of the batch. loss-landscapes takes directions without a normalization: with its own for
filters it divides by zero where a filter is zero, as the β of a fresh BatchNorm. L-BFGS-B as it
comes starts at the parameters, on unscaled variables: at a minimum, where the gradient is next to
nothing, it stops far below what is there."""


def plane_rows() -> tuple[list[list[str]], list[str]]:
    """Return the table, and what became of the target."""
    rows, outcomes = [], []
    for num_images, rounds in ROUNDS.items():
        for name, taken in measured_planes(workload(num_images), rounds).items():
            low, ratio, high = quartiles([seconds / passes for seconds, passes in taken])
            seconds = quartiles([seconds for seconds, _ in taken])[1]
            shown = [f"{seconds:.2f}", f"{ratio:.3f} x", f"{low:.3f} to {high:.3f}"]
            rows.append([name, str(num_images), *shown])
            outcome = "met" if ratio <= MOST else "MISSED"
            outcomes.append(f"{name} on {num_images} images {ratio:.3f} x, {outcome}")
    return rows, outcomes


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows, outcomes = plane_rows()
    verdict = f"Target: {MOST} x; {'; '.join(outcomes)}."
    of_sharpness = [
        row for work in (workload(16), trained_workload()) for row in sharpness_rows(work)
    ]
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
