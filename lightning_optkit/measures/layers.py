"""Curvature layer by layer: the spectrum of each diagonal block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_optkit.measures.operators import HessianOperator
from lightning_optkit.measures.spectrum import Spectrum, hessian_spectrum

__all__ = ["layer_spectra", "layers_of"]


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of parameters by the module that owns them, in order.

    Example:
        >>> layers_of(["body.0.weight", "body.0.bias", "scale"])
        {'body.0': ['body.0.weight', 'body.0.bias'], 'scale': ['scale']}
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers


def layer_spectra(
    operator: HessianOperator,
    *,
    layers: Mapping[str, list[str]] | None = None,
    **settings: Any,
) -> dict[str, Spectrum]:
    r"""Return the spectrum of each layer's block :math:`\partial^2 L / \partial \theta_l^2`.

    The other layers are held where they are. The largest eigenvalue of a block is at most that of
    the whole matrix, and the traces of all blocks sum to its trace.

    Args:
        operator: the Hessian of all layers.
        layers: names of parameters by layer; by default parameters of one module are a layer.
        settings: arguments of :func:`hessian_spectrum`, the same for each layer.

    Example:
        >>> import torch
        >>> params = {"a.weight": torch.ones(2), "b.weight": torch.ones(1)}
        >>> op = HessianOperator(
        ...     lambda p: p["a.weight"].square().sum() + 3 * p["b.weight"].square().sum(), params
        ... )
        >>> {name: found.lambda_max for name, found in layer_spectra(op).items()}
        {'a': 2.0, 'b': 6.0}
    """
    layers = layers_of(operator.names) if layers is None else layers
    return {
        layer: hessian_spectrum(operator.restricted(names), **settings)
        for layer, names in layers.items()
    }
