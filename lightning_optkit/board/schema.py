"""Array payloads in TensorBoard event files: shape, meaning and version of each.

:data:`ARRAYS` describes them all. Layer names and the like are arrays of UTF-8 bytes of their own,
in the order of the rows that they name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_ndarray, make_tensor_proto

__all__ = [
    "ARRAYS",
    "PLUGIN_NAME",
    "VERSION",
    "ArrayKind",
    "array_summary",
    "check_array",
    "decode_array",
    "layers_array",
    "names_array",
    "quadrature_array",
]

PLUGIN_NAME = "optkit"
"""Name of the TensorBoard plugin that the payloads belong to."""

VERSION = b"1"
"""Version of the payloads, stored as the plugin's content."""

_MAX_NUMBERS = 4_000_000
"""More than any payload has: 16 MB a step is a mistake, and a browser would have to hold it."""


@dataclass(frozen=True)
class ArrayKind:
    """One kind of payload.

    Attributes:
        name: the tag's part behind the topic.
        shapes: what shapes there may be; a name stands for any size.
        meaning: what is in it, and in which unit.
        is_text: whether it holds names, as UTF-8 bytes.
    """

    name: str
    shapes: tuple[tuple[str | int, ...], ...]
    meaning: str
    is_text: bool = False


ARRAYS = (
    ArrayKind(
        "quadrature",
        (("probes", "nodes", 2),),
        "Ritz value and weight of each node. A probe's weights sum to 1; weight 0 pads. The raw "
        "rule, a kilobyte or two a step, leaves bandwidth, axis and picture to whoever looks",
    ),
    ArrayKind(
        "layers",
        (("layers", 6),),
        "of each layer's block: largest and smallest eigenvalue, trace, minimum ratio, and the "
        "interval that holds it",
    ),
    ArrayKind("layer_names", (("layers",),), "names of layers or parameters", is_text=True),
    ArrayKind(
        "losses",
        (("points",), ("rows", "columns")),
        "losses along a line or on a plane; NaN or infinite where the loss is",
    ),
    ArrayKind(
        "axes", ((1, "points"), (2, "points")), "positions of the losses, x before y; NaN pads"
    ),
    ArrayKind(
        "path",
        (("points", 2),),
        "the path of training in the plane; the last point is the origin",
    ),
    ArrayKind("path_steps", (("points",),), "steps of training behind each point of the path"),
    ArrayKind(
        "layer_steps",
        (("layers", 6),),
        "of one optimizer step: norms of each layer's gradient, weights and update, trust ratio, "
        "update ratio, learning rate of an adaptive optimizer; NaN for what is not defined",
    ),
    ArrayKind(
        "activations",
        (("places", 2),),
        "share of dead units of a ReLU, of saturated values of a sigmoid or tanh; NaN for the "
        "other",
    ),
    ArrayKind("activation_names", (("places",),), "names of these places", is_text=True),
    ArrayKind(
        "trust_ratios",
        (("layers",),),
        "what the gradient or the update of each layer was multiplied by",
    ),
)
"""All payloads. Numbers are float32."""

_KINDS = {kind.name: kind for kind in ARRAYS}


def check_array(name: str, array: np.ndarray[Any, Any]) -> str | None:
    """Return what is wrong with a payload, or ``None``.

    Args:
        name: the tag's part behind the topic.
        array: as it was read, from a file that anybody may have written.

    Example:
        >>> check_array("path", np.zeros((3, 2), np.float32)) is None
        True
        >>> check_array("path", np.zeros((3, 3), np.float32))
        'should have shape (points, 2), has (3, 3)'
    """
    kind = _KINDS.get(name)
    if kind is None:
        return "not known to this version of lightning-optkit"
    if (array.dtype.kind in "OSU") != kind.is_text:
        return f"should hold {'text' if kind.is_text else 'numbers'}, holds {array.dtype}"
    if not kind.is_text and array.dtype.kind not in "fiu":
        return f"should hold numbers, holds {array.dtype}"
    if array.size > _MAX_NUMBERS:
        return f"too large: {array.size:,} numbers, at most {_MAX_NUMBERS:,} are read"
    if not any(_fits(array.shape, shape) for shape in kind.shapes):
        return f"should have shape {_shapes(kind)}, has {array.shape}"
    return None


def _fits(found: tuple[int, ...], shape: tuple[str | int, ...]) -> bool:
    return len(found) == len(shape) and all(
        isinstance(size, str) or size == there for size, there in zip(shape, found, strict=True)
    )


def _shapes(kind: ArrayKind) -> str:
    return " or ".join(
        f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for shape in kind.shapes
    )


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
