"""Optimizers of torch's kind that scale the step of each layer to its weights."""

from lightning_optkit.optim.groups import lars_param_groups
from lightning_optkit.optim.lamb import LAMB
from lightning_optkit.optim.lars import LARS

__all__ = ["LAMB", "LARS", "lars_param_groups"]
