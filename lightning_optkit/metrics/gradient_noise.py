"""The gradient's noise scale over the points of a run, as a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optkit.measures.gradient_noise import (
    NoisePoint,
    NoiseScale,
    noise_point,
    noise_scale,
)

__all__ = ["GradientNoiseScale"]


class GradientNoiseScale(Metric):
    r"""The simple noise scale :math:`S / |G|^2` with its standard error, over the last points.

    Each update is a point: the gradients of at least two batches at the same weights. Noise S and
    signal :math:`|G|^2` are averaged over the points first and divided then; formulas and units are
    those of :func:`~lightning_optkit.measures.gradient_noise.noise_point` and
    :func:`~lightning_optkit.measures.gradient_noise.noise_scale`. Processes that update with points
    of their own are pooled when it synchronises.

    Args:
        window: how many of the latest points to average, at least 1; ``None`` takes all.
        **settings: as of ``torchmetrics.Metric``.

    Raises:
        ValueError: if the window is no such number.

    Example:
        >>> metric = GradientNoiseScale(window=20)
        >>> metric.update([1.0, 1.0], square_norm_of_mean=0.75, batch_sizes=[8, 8])
        >>> metric.update([1.0, 1.0], square_norm_of_mean=0.75, batch_sizes=[8, 8])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'noise_scale': 8.0, 'standard_error': 0.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    variances: list[Tensor]
    square_norms: list[Tensor]

    def __init__(self, window: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if window is not None and (
            isinstance(window, bool) or not isinstance(window, int) or window < 1
        ):
            raise ValueError(
                f"`window` must be an integer of at least 1, got {window!r}. `None` takes all."
            )
        self.window = window
        for state in ("variances", "square_norms"):
            self.add_state(state, default=[], dist_reduce_fx="cat", persistent=True)

    def update(
        self,
        square_norms: Tensor | Sequence[float],
        square_norm_of_mean: Tensor | float,
        batch_sizes: Tensor | Sequence[float],
    ) -> None:
        """Add the point of k batches.

        Args:
            square_norms: of the mean gradient of each batch, shape ``(k,)``, k at least 2.
            square_norm_of_mean: of the plain mean of the k gradients.
            batch_sizes: samples in each, shape ``(k,)``.

        Raises:
            ValueError: if there are fewer than two batches, or one without samples.
        """
        point = noise_point(square_norms, square_norm_of_mean, batch_sizes)
        for state, value in (
            (self.variances, point.variance),
            (self.square_norms, point.square_norm),
        ):
            state.append(torch.tensor([value], dtype=torch.float64, device=self.device))
            del state[: 0 if self.window is None else -self.window]

    def compute(self) -> dict[str, Tensor]:
        """Return ``noise_scale`` and ``standard_error``, in samples.

        Both are NaN where the signal is not resolved, and the error where there is one point.
        """
        found = self.estimate
        return {
            "noise_scale": torch.tensor(found.value, device=self.device),
            "standard_error": torch.tensor(found.standard_error, device=self.device),
        }

    @property
    def estimate(self) -> NoiseScale:
        """The estimate with all that it was made of.

        Raises:
            ValueError: before the first update.
        """
        return noise_scale(
            [
                NoisePoint(variance, square)
                for variance, square in zip(
                    _numbers(self.variances), _numbers(self.square_norms), strict=True
                )
            ]
        )


def _numbers(state: list[Tensor] | Tensor) -> list[float]:
    """Return what is in a state: a list, or one tensor after a synchronisation."""
    return state.tolist() if isinstance(state, Tensor) else [float(each) for each in state]
