"""What can a training run do about it? Pure functions of tensors."""

from lightning_optkit.methods.averaging import (
    RunningAverage,
    decay_of_half_life,
    exponential_share,
    polynomial_share,
    uniform_share,
)
from lightning_optkit.methods.averaging_rates import annealed_share, cyclic_share
from lightning_optkit.methods.norm_statistics import refresh_norm_statistics, tracking_layers

__all__ = [
    "RunningAverage",
    "annealed_share",
    "cyclic_share",
    "decay_of_half_life",
    "exponential_share",
    "polynomial_share",
    "refresh_norm_statistics",
    "tracking_layers",
    "uniform_share",
]
