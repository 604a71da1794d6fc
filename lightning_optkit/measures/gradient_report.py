"""All that is known of one optimizer step and of the gradients around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_optkit.measures.activations import Activations
from lightning_optkit.measures.gradient_noise import NoiseScale
from lightning_optkit.measures.gradients import StepTable

__all__ = ["GradientReport"]


@dataclass(frozen=True)
class GradientReport:
    """One measurement of :class:`~lightning_optkit.GradientMonitor`; ``str()`` is a table.

    Attributes:
        step: where on the Trainer's own step axis.
        table: the step, layer by layer.
        loss: mean over the batches of the step; NaN where the training step returns none.
        batch_size: samples of the step; NaN where they cannot be told.
        noise: the noise scale over the points so far, if there is one.
        noise_source: where its gradients come from, a code of the tags.
        activations: dead and saturated units, if they were looked at.
    """

    step: int
    table: StepTable
    loss: float = math.nan
    batch_size: float = math.nan
    noise: NoiseScale | None = None
    noise_source: int | None = None
    activations: Activations | None = None

    def __str__(self) -> str:
        """Return the table, and below it what is known of noise and activations."""
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.4g}"
        lines = [f"step {self.step}{loss}", str(self.table)]
        if self.noise is not None and not math.isnan(self.noise.value):
            error = self.noise.standard_error
            bar = "" if math.isnan(error) else f" ± {error:.2g}"
            lines.append(f"noise scale {self.noise.value:.4g}{bar} samples")
        for name, (dead, saturated) in (self.activations.rows if self.activations else {}).items():
            found = f"saturated {saturated:.0%}" if math.isnan(dead) else f"dead {dead:.0%}"
            lines.append(f"{name}: {found}")
        return "\n".join(lines)
