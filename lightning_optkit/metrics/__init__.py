"""Measures as torchmetrics metrics, which add up over steps."""

from lightning_optkit.metrics.gradient_noise import GradientNoiseScale
from lightning_optkit.metrics.mixed_accuracy import MixedAccuracy

__all__ = ["GradientNoiseScale", "MixedAccuracy"]
