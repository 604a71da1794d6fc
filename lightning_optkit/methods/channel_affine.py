"""What is left of a norm layer that no longer normalises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    r"""Returns γx + β, with a γ and a β for each channel.

    Layers before a norm layer often have no bias, because that has β: without either a net could
    shift nothing.

    Args:
        shape: of γ and β: (C,), or the last dimensions of the input with ``trailing``.
        trailing: whether γ and β are of the last dimensions, as in LayerNorm, or of dimension 1.
        device: of γ and β.
        dtype: of γ and β.

    Example:
        >>> layer = ChannelAffine((3,))
        >>> x = torch.randn(2, 3, 4)
        >>> bool((layer(x) == x).all())
        True
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        trailing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.trailing = trailing
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(self.shape, device=device, dtype=dtype)
        )
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty_like(self.weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from γ = 1 and β = 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return it, of the same shape and dtype."""
        shape = self.shape if self.trailing else (-1, *[1] * (input.ndim - 2))
        if self.weight is not None:
            input = input * self.weight.view(shape).to(input.dtype)  # as norm layers in half
        return input if self.bias is None else input + self.bias.view(shape).to(input.dtype)

    def extra_repr(self) -> str:
        """Return what is printed of the layer."""
        return f"{self.shape}" + (", trailing=True" if self.trailing else "")
