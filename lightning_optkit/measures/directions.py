"""Directions to look at a loss along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_optkit.measures.gradient_graph import flat

__all__ = ["TrajectoryPlane", "normalized_direction", "random_directions", "trajectory_plane"]

Normalization = Literal["filter", "layer", "none"]


def random_directions(
    params: Mapping[str, Tensor],
    num_directions: int = 2,
    *,
    normalization: Normalization = "filter",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return Gaussian directions of the size of the parameters, shape ``(num_directions, n)``.

    Two of them are nearly orthogonal in many dimensions, and are left as they are: made orthogonal
    they would lose their normalization.

    Args:
        params: by name, in the order of the surface that is looked at.
        num_directions: how many.
        normalization: see :func:`normalized_direction`.
        generator: source of the entries, on the CPU; ``None`` is a fixed seed.

    References:
        H. Li et al., "Visualizing the loss landscape of neural nets", 2018, section 4.
    """
    generator = generator or torch.Generator().manual_seed(0)
    n = sum(p.numel() for p in params.values())
    drawn = torch.randn(num_directions, n, generator=generator, dtype=torch.float64)
    return torch.stack(
        [normalized_direction(row, params, normalization=normalization) for row in drawn]
    )


def normalized_direction(
    direction: Tensor, params: Mapping[str, Tensor], *, normalization: Normalization = "filter"
) -> Tensor:
    r"""Return a direction in which each filter is as long as the parameters' own.

    .. math:: d_f \leftarrow d_f \, \|w_f\| / \|d_f\|

    for each row of a matrix, each output filter of a convolution (the first dimension). Biases and
    parameters of norm layers, with fewer dimensions, stay where they are: zero. Layers that are
    rescaled without a change of the function then look the same.

    Args:
        direction: shape ``(n,)``.
        params: by name, in the same order.
        normalization: ``"filter"``; ``"layer"``, a whole tensor in the place of a filter; or
            ``"none"``, all entries as they are.

    Returns:
        Shape ``(n,)``, in the parameters' dtype and on their device.

    Example:
        >>> import torch
        >>> w = {"a": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "b": torch.ones(2)}
        >>> normalized_direction(torch.tensor([1.0, 0.0, 0.0, 2.0, 7.0, 7.0]), w).tolist()
        [5.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    """
    if normalization not in ("filter", "layer", "none"):
        raise ValueError(
            f"`normalization` must be 'filter', 'layer' or 'none', got {normalization!r}."
        )
    whole = flat([p.detach() for p in params.values()], params)
    direction = direction.to(whole.device)
    if normalization == "none":
        return direction.to(whole)
    pieces = []
    start = 0
    for p in params.values():
        piece = direction[start : start + p.numel()].view(p.shape).double()
        pieces.append(_as_long_as(piece, p.detach().double(), normalization))
        start += p.numel()
    return torch.cat([piece.reshape(-1) for piece in pieces]).to(whole)


def _as_long_as(piece: Tensor, like: Tensor, normalization: Normalization) -> Tensor:
    if piece.dim() < 2:
        return torch.zeros_like(piece)
    shape = (len(piece), -1) if normalization == "filter" else (1, -1)
    lengths, wanted = (t.reshape(shape).norm(dim=1, keepdim=True) for t in (piece, like))
    factors = torch.where(lengths > 0, wanted / lengths, 0.0)
    return (piece.reshape(shape) * factors).view_as(piece)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class TrajectoryPlane:
    """The plane in which most of a path lies, seen from its end.

    Attributes:
        directions: two orthogonal unit vectors, shape ``(2, n)``.
        path: coordinates of each point of the path in the plane, shape ``(points, 2)``; the last is
            the origin.
        explained: share of the path's squared distance from its end that each direction explains,
            shape ``(2,)``.
    """

    directions: Tensor
    path: Tensor
    explained: Tensor


def trajectory_plane(points: Sequence[Tensor]) -> TrajectoryPlane:
    """Return the plane of the two principal components of a path, through its end.

    Of a random walk in many dimensions the first two components already explain most, so a high
    share says little about training.

    Args:
        points: at least three, each of shape ``(n,)``; the last is where training is.

    Raises:
        ValueError: if there are fewer than three, or they do not span a plane.

    References:
        H. Li et al., "Visualizing the loss landscape of neural nets", 2018, section 7.2. J.
        Antognini, J. Sohl-Dickstein, "PCA of high dimensional random walks with comparison to
        neural network training", 2018.
    """
    if len(points) < 3:
        raise ValueError(
            f"`points` must hold at least three weights of the path, got {len(points)}. Take "
            "snapshots more often."
        )
    steps = torch.stack([point - points[-1] for point in points[:-1]]).double()
    # of few points: the matrix of their products is small, however many parameters there are
    values, vectors = torch.linalg.eigh(steps @ steps.T)
    values, vectors = values.flip(0), vectors.flip(1)
    if not values[1] > 1e-12 * values[0]:
        raise ValueError(
            "`points` must span a plane, got a path along a line, or one that stands still. Draw "
            "the line between its ends."
        )
    directions = vectors[:, :2].T @ steps / values[:2].sqrt()[:, None]
    path = torch.cat([steps @ directions.T, torch.zeros(1, 2, dtype=torch.float64)])
    return TrajectoryPlane(directions.to(points[-1].dtype), path, values[:2] / values.sum())
