r"""Mean and variance of what a norm layer sees, added up batch by batch.

References:
    T. F. Chan, G. H. Golub, R. J. LeVeque, *Algorithms for Computing the Sample Variance*, The
    American Statistician, 1983, equation 2.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["InstanceMoments", "Moments", "ValueMoments", "exact_dtype"]

_PART = 2**23  # values of an activation that are in float64 at a time: 64 MiB


class Moments(ABC):
    """Sums over a layer's inputs, per channel, to take its statistics from.

    Args:
        num_channels: of the layer.
    """

    num_lost: ClassVar[int]
    """Degrees of freedom that the mean takes from the variance."""

    def __init__(self, num_channels: int) -> None:
        self.mean = torch.zeros(num_channels)
        self.num_means = 0
        """What the mean is over."""
        self.squares = torch.zeros(num_channels)
        self.num_squares = 0
        """What the sum of squares is over."""

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Take an input of shape (batch, channels, ...) in, with at least one value."""
        dtype = exact_dtype(values.device)
        num_rows = max(1, _PART * len(values) // values.numel())
        with torch.autocast(values.device.type, enabled=False):
            for part in values.split(num_rows):
                self._merge(part.to(dtype))

    def _merge_mean(self, mean: Tensor, number: int) -> Tensor:
        """Take a mean over so many into the mean; return how far it was from it."""
        shift = mean - self.mean.to(mean)
        self.num_means += number
        self.mean = self.mean.to(mean) + shift * (number / self.num_means)
        return shift

    @abstractmethod
    def _merge(self, part: Tensor) -> None: ...

    @abstractmethod
    def squares_about(self, mean: Tensor) -> Tensor:
        """Return what this process adds to the sum of squares, given the mean over all."""


class ValueMoments(Moments):
    """Mean and squares of all values of a channel, merged by the formula of Chan et al."""

    num_lost = 1

    def _merge(self, part: Tensor) -> None:
        dims = [dim for dim in range(part.ndim) if dim != 1]
        mean = part.mean(dims, keepdim=True)
        squares = (part - mean).square_().sum(dims)
        num_before, number = self.num_means, part.numel() // part.shape[1]
        shift = self._merge_mean(mean.flatten(), number)
        between = shift.square() * (num_before * number / self.num_means)
        self.squares = self.squares.to(squares) + squares + between
        self.num_squares = self.num_means

    def squares_about(self, mean: Tensor) -> Tensor:
        """Return the squares about the mean over all."""
        own = self.mean.to(mean)
        return self.squares.to(mean) + self.num_means * (own - mean).square()


class InstanceMoments(Moments):
    """Mean of the instances' means, and sum of their unbiased variances."""

    num_lost = 0

    def _merge(self, part: Tensor) -> None:
        values = part.flatten(2)
        mean = values.mean(2, keepdim=True)
        self._merge_mean(mean.flatten(1).mean(0), len(values))
        if values.shape[2] > 1:  # else an instance has a mean, but no variance
            squares = (values - mean).square_().sum((0, 2))
            self.squares = self.squares.to(squares) + squares / (values.shape[2] - 1)
            self.num_squares += len(values)

    def squares_about(self, mean: Tensor) -> Tensor:
        """Return the sum as it is: each instance has a mean of its own."""
        return self.squares


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are made in: float64, or float32 where a device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
