"""Event files made by hand, so that tests of the board need no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_optkit.board import schema

STEPS = range(0, 200, 10)
BEGAN = 1_700_000_000.0

LAYERS = ("conv1", "conv2", "head")


def quadrature(step: int, *, probes: int = 2, nodes: int = 12) -> np.ndarray:
    """Eigenvalues from -0.1 to a largest one of 1 + step / 100, of equal weights."""
    values = np.linspace(-0.1, 1 + step / 100, nodes)
    rule = np.stack([values, np.full(nodes, 1 / nodes)], axis=-1)
    return np.broadcast_to(rule, (probes, nodes, 2)).astype(np.float32)


SCALARS: dict[str, Callable[[int], float]] = {
    "epoch": lambda t: t // 20,
    "train_loss": lambda t: 2.0 * 0.98**t,
    "optkit-hessian/lambda_max": lambda t: 1 + t / 100,
    "optkit-hessian/lambda_min": lambda t: -0.1,
    "optkit-hessian/tol": lambda t: 0.01,
    "optkit-hessian/loss": lambda t: 2.0 * 0.98**t,
    "optkit-hessian/minimum_ratio": lambda t: 0.8 + t / 1000,
    "optkit-hessian/minimum_ratio_lower": lambda t: 0.75 + t / 1000,
    "optkit-hessian/minimum_ratio_upper": lambda t: 0.85 + t / 1000,
    "optkit-hessian/kind": lambda t: 2,
    "optkit-hessian/seconds": lambda t: 0.5,
    "optkit-stability/lambda_max": lambda t: 1 + t / 100,
    "optkit-stability/lambda_max_error": lambda t: 0.05,
    "optkit-stability/threshold": lambda t: 2.5,
    "optkit-stability/ratio": lambda t: (1 + t / 100) / 2.5,
    "optkit-stability/learning_rate": lambda t: 0.8,
    "optkit-stability/step_along_gradient": lambda t: 1.1,
    "optkit-stability/seconds": lambda t: 0.1,
    "optkit-sharpness/adaptive": lambda t: 0.3,
    "optkit-sharpness/adaptive_lower": lambda t: 0.2,
    "optkit-sharpness/epsilon": lambda t: 12.0,
    "optkit-sharpness/seconds": lambda t: 0.4,
    "optkit-landscape/loss": lambda t: 1.0,
    "optkit-landscape/seconds": lambda t: 2.0,
    "optkit-gradient/gradient_norm": lambda t: 0.5,
    "optkit-gradient/noise_scale": lambda t: 300.0,
    "optkit-gradient/noise_scale_standard_error": lambda t: 40.0,
    "optkit-gradient/batch_size": lambda t: 64,
    "optkit-gradient/update_ratio": lambda t: 1e-3,
    "optkit-gradient/loss": lambda t: 2.0 * 0.98**t,
    "optkit-gradient/seconds": lambda t: 0.01,
    "optkit-mixing/mixing": lambda t: 0.7,
    "optkit-mixing/share": lambda t: 1.0,
    "optkit-averaging/distance": lambda t: 0.1,
    "optkit-averaging/num_averaged": lambda t: t,
    "optkit-lr/effective/SGD": lambda t: min(0.8, t / 100),
}

ARRAYS: dict[str, Callable[[int], np.ndarray]] = {
    "optkit-hessian/quadrature": quadrature,
    "optkit-gradient/layer_steps": lambda t: (
        np.full((3, 6), 1 + t / 100, np.float32) * np.arange(1, 4, dtype=np.float32)[:, None]
    ),
    "optkit-gradient/layer_names": lambda t: schema.names_array(LAYERS),
}

PLANE: dict[str, np.ndarray] = {
    "optkit-landscape/losses": np.add.outer(*[np.linspace(-2, 2, 5) ** 2] * 2).astype(np.float32),
    "optkit-landscape/axes": np.stack([np.linspace(-2, 2, 5)] * 2).astype(np.float32),
    "optkit-landscape/path": np.array([[2, 2], [1, 1.5], [0, 0]], np.float32),
}


class Recorder:
    """Writes into the event file of one run.

    Args:
        folder: of the run.
        content: what plugin metadata says of the format.
    """

    def __init__(self, folder: Path, content: bytes = schema.VERSION) -> None:
        self._writer = EventFileWriter(str(folder))
        self._content = content

    def scalar(self, tag: str, step: int, value: float) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._add(summary, step)

    def array(self, tag: str, step: int, array: np.ndarray) -> None:
        summary = schema.array_summary(tag, array)
        summary.value[0].metadata.plugin_data.content = self._content
        self._add(summary, step)

    def all_of(self, step: int, scalars: Mapping = SCALARS, arrays: Mapping = ARRAYS) -> None:
        """Everything of one step."""
        for tag, value in scalars.items():
            self.scalar(tag, step, value(step))
        for tag, value in arrays.items():
            self.array(tag, step, value(step))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._writer.add_event(Event(summary=summary, step=step, wall_time=BEGAN + step))


def record(
    folder: Path,
    steps=STEPS,
    *,
    scalars: Mapping = SCALARS,
    arrays: Mapping = ARRAYS,
    event: bool = True,
) -> Path:
    """Write a whole run, with a landscape, and an event in the middle."""
    recorder = Recorder(folder)
    for step in steps:
        recorder.all_of(step, scalars, arrays)
    if event:
        recorder.scalar("optkit-events/warmup", steps[len(steps) // 2], 100.0)
    if arrays is ARRAYS:
        for tag, array in PLANE.items():
            recorder.array(tag, steps[-1], array)
    recorder.close()
    return folder
