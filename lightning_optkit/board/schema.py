"""Array payloads in TensorBoard event files: shape, meaning and version of each.

``quadrature``, ``(probes, nodes, 2)``, float32: Ritz value and weight of each node. A probe's
weights sum to 1; weight 0 pads. The raw rule, a kilobyte or two a step, leaves bandwidth, axis and
kind of picture to whoever looks.

``layers``, ``(layers, 6)``, float32: largest and smallest eigenvalue of each layer's block, its
trace, its minimum ratio and the interval that holds it. ``layer_names``, ``(layers,)``, UTF-8
bytes: the names, in the same order.

``losses``, ``(points,)`` or ``(rows, columns)``, float32: losses along a line or on a plane; NaN or
infinite where the loss is. ``axes``, ``(1, points)`` or ``(2, points)``: their positions, x before
y. ``path``, ``(points, 2)``: the path of training in the plane; the last point is the origin.

``layer_steps``, ``(layers, 6)``, float32, NaN for what is not defined: norms of each layer's
gradient, weights and update, trust ratio, update ratio, and learning rate of an adaptive optimizer;
with ``layer_names``.

``activations``, ``(places, 2)``, float32: share of dead units of a ReLU, and of saturated values of
a sigmoid or tanh; NaN for the other. ``activation_names``, as ``layer_names``.

``trust_ratios``, ``(layers,)``, float32: what the gradient or the update of each layer was
multiplied by; with ``layer_names``, of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_ndarray, make_tensor_proto

__all__ = [
    "PLUGIN_NAME",
    "VERSION",
    "array_summary",
    "decode_array",
    "layers_array",
    "names_array",
    "quadrature_array",
]

PLUGIN_NAME = "optkit"
"""Name of the TensorBoard plugin that the payloads belong to."""

VERSION = b"1"
"""Version of the payloads, stored as the plugin's content."""


def quadrature_array(
    nodes: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return the ``quadrature`` payload of Ritz values (NaN where padded) and their weights.

    Args:
        nodes: shape ``(probes, nodes)``.
        weights: same shape.

    Example:
        >>> quadrature_array(np.array([[1.0, np.nan]]), np.array([[1.0, 0.0]])).tolist()
        [[[1.0, 1.0], [0.0, 0.0]]]
    """
    return np.stack([np.nan_to_num(nodes), weights], axis=-1).astype(np.float32)


def layers_array(rows: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    """Return a payload of one row a layer, or a place, such as ``layers``.

    Example:
        >>> layers_array([(2.0, -1.0, 3.0, 0.5, 0.4, 0.6)]).shape
        (1, 6)
    """
    return np.asarray(rows, dtype=np.float32)


def names_array(names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return a payload of names, such as ``layer_names``.

    Example:
        >>> names_array(["head"]).tolist()
        [b'head']
    """
    return np.array([name.encode() for name in names], dtype=object)


def array_summary(tag: str, array: np.ndarray[Any, Any]) -> Any:
    """Return the array as a TensorBoard summary that names this plugin.

    Without the data class TensorBoard shows the tab and nothing in it.
    """
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=VERSION),
        data_class=DATA_CLASS_TENSOR,
    )
    value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(array))
    return Summary(value=[value])


def decode_array(summary: Any) -> np.ndarray[Any, Any]:
    """Return the array of a summary made by :func:`array_summary`.

    Example:
        >>> decode_array(array_summary("a/b", np.ones((1, 2, 2), np.float32))).shape
        (1, 2, 2)
    """
    return np.asarray(make_ndarray(summary.value[0].tensor))
