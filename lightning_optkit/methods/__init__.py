"""What can a training run do about it? Pure functions of tensors."""

from lightning_optkit.methods.averaging import (
    RunningAverage,
    decay_of_half_life,
    exponential_share,
    polynomial_share,
    uniform_share,
)
from lightning_optkit.methods.averaging_rates import annealed_share, cyclic_share
from lightning_optkit.methods.batch_norm import BatchNorm
from lightning_optkit.methods.batch_renorm import BatchRenorm
from lightning_optkit.methods.batch_scaling import (
    corrected_momentum,
    gradual_factor,
    scaling_factor,
)
from lightning_optkit.methods.ghost_batch_norm import GhostBatchNorm
from lightning_optkit.methods.mixed_target import MixedTarget, Mixing, settled
from lightning_optkit.methods.mixing import Mixed, cutmix, mixup
from lightning_optkit.methods.norm_statistics import refresh_norm_statistics, tracking_layers
from lightning_optkit.methods.norm_swap import SwapReport, swap_norms
from lightning_optkit.methods.triggers import AccuracyAbove, ErrorBelow
from lightning_optkit.methods.trust_ratio import scaled_gradients, scaled_updates
from lightning_optkit.methods.warmup import (
    constant_factor,
    cosine_factor,
    exponential_factor,
    linear_factor,
    noam_factor,
    radam_factor,
    untuned_factor,
    untuned_steps,
    warmup_end,
    warmup_factor,
)

__all__ = [
    "AccuracyAbove",
    "BatchNorm",
    "BatchRenorm",
    "ErrorBelow",
    "GhostBatchNorm",
    "Mixed",
    "MixedTarget",
    "Mixing",
    "RunningAverage",
    "SwapReport",
    "annealed_share",
    "constant_factor",
    "corrected_momentum",
    "cosine_factor",
    "cutmix",
    "cyclic_share",
    "decay_of_half_life",
    "exponential_factor",
    "exponential_share",
    "gradual_factor",
    "linear_factor",
    "mixup",
    "noam_factor",
    "polynomial_share",
    "radam_factor",
    "refresh_norm_statistics",
    "scaled_gradients",
    "scaled_updates",
    "scaling_factor",
    "settled",
    "swap_norms",
    "tracking_layers",
    "uniform_share",
    "untuned_factor",
    "untuned_steps",
    "warmup_end",
    "warmup_factor",
]
