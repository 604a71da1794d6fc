"""Norms of whole tensors, also where each rank holds a shard of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_optkit.optim.foreach import Tensors, working_dtype

__all__ = ["Layout", "is_flattened", "layout_of", "local_norms", "whole_norms"]


class Layout(NamedTuple):
    """Over which ranks tensors are cut into shards."""

    mesh: DeviceMesh
    dims: tuple[int, ...]
    """Dimensions of the mesh along which ranks hold different parts; along the others, copies."""


def is_flattened(parameter: Tensor) -> bool:
    """Return whether FSDP1 holds it as a part of one long vector, of which ranks have pieces."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def layout_of(tensor: Tensor) -> Layout | None:
    """Return how a tensor is spread over ranks; ``None`` where it is whole."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [i for i, place in enumerate(tensor.placements) if not place.is_replicate()]
    return Layout(tensor.device_mesh, tuple(dims))


def local_norms(tensors: Tensors) -> Tensor:
    r"""Return :math:`\|t\|_2` of each tensor, shape (k,), in float32 or finer.

    A sum of squares in half precision overflows at 65504 and stalls at 256 equal terms.
    """
    return torch.stack(torch._foreach_norm(tensors, 2, working_dtype(tensors[0])))


def whole_norms(norms: Sequence[Tensor], layout: Layout | None) -> Sequence[Tensor]:
    """Return norms of whole tensors, given those of this rank's shards; all ranks must call it.

    However many there are, it is one sum over ranks along each dimension of the mesh that shards.

    Args:
        norms: any number of vectors.
        layout: of all tensors alike.
    """
    if layout is None or not layout.dims or not norms:
        return norms
    squares = torch.cat([vector.square() for vector in norms])
    device = squares.device
    squares = squares.to(layout.mesh.device_type)  # shards that are offloaded to the CPU travel
    for dim in layout.dims:
        torch.distributed.all_reduce(squares, group=layout.mesh.get_group(dim))
    return squares.sqrt().to(device).split([len(vector) for vector in norms])
