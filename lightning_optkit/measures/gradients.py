"""What one optimizer step was, layer by layer: gradient, weights, update, and their ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit.measures.adaptive_rates import mean_rate
from lightning_optkit.measures.layers import layers_of

__all__ = ["LayerStep", "StepTable", "step_table", "tensor_norm", "tensor_norms", "update_norms"]


@dataclass(frozen=True, slots=True)
class LayerStep:
    r"""One optimizer step of a layer, or of the whole net.

    Attributes:
        layer: its name.
        num_params: its number of parameters.
        gradient_norm: :math:`\|g\|` before clipping.
        weight_norm: :math:`\|w\|` before the step.
        update_norm: :math:`\|\Delta w\|`, what the step changed.
        learning_rate: :math:`\eta / \sigma` of an adaptive optimizer, with the root mean square
            :math:`\sigma`; NaN where it is not known.
    """

    layer: str
    num_params: int
    gradient_norm: float
    weight_norm: float
    update_norm: float
    learning_rate: float = math.nan

    @property
    def trust_ratio(self) -> float:
        r""":math:`\|w\| / \|g\|`; NaN where the gradient is zero or not finite."""
        return _ratio(self.weight_norm, self.gradient_norm)

    @property
    def update_ratio(self) -> float:
        r""":math:`\|\Delta w\| / \|w\|`; NaN where the weights are zero or not finite."""
        return _ratio(self.update_norm, self.weight_norm)

    @property
    def numbers(self) -> tuple[float, ...]:
        """All six, in the order of the table's columns."""
        return (
            self.gradient_norm,
            self.weight_norm,
            self.update_norm,
            self.trust_ratio,
            self.update_ratio,
            self.learning_rate,
        )


@dataclass(frozen=True)
class StepTable:
    """One optimizer step, layer by layer; ``str()`` is a table.

    Attributes:
        rows: one a layer, in the order of the module.
    """

    rows: tuple[LayerStep, ...]

    @property
    def total(self) -> LayerStep:
        """The step of all layers together."""
        return _merged("all", self.rows)

    def __getitem__(self, layer: str) -> LayerStep:
        """Return the row of a layer.

        Raises:
            KeyError: for a layer that was not measured.
        """
        return {row.layer: row for row in self.rows}[layer]

    def __str__(self) -> str:
        """Return a table with a line for each layer, and one for the whole net below."""
        rows = self.rows if len(self.rows) == 1 else (*self.rows, self.total)
        width = max(len("layer"), *(len(row.layer) for row in rows))
        heads = ("‖g‖", "‖w‖", "‖Δw‖", "‖w‖/‖g‖", "‖Δw‖/‖w‖", "η/σ")
        lines = [f"{'layer':{width}} {'params':>10}" + "".join(f"{head:>11}" for head in heads)]
        for row in rows:
            numbers = "".join(f"{_printed(number):>11}" for number in row.numbers)
            lines.append(f"{row.layer:{width}} {row.num_params:>10,}{numbers}")
        return "\n".join(lines)


def step_table(
    sizes: Mapping[str, int],
    *,
    gradients: Sequence[float],
    weights: Sequence[float],
    updates: Sequence[float],
    learning_rates: Sequence[float],
    per_layer: bool = True,
) -> StepTable:
    r"""Return the step of each layer, from that of each parameter tensor.

    .. math:: \|x_l\| = \Big(\sum_{p \in l} \|x_p\|^2\Big)^{1/2}

    Args:
        sizes: numbers in each tensor, by the name of the parameter; n of them.
        gradients: n norms, of the gradient by each.
        weights: n norms, of each.
        updates: n norms, of the change of each.
        learning_rates: n, of each; NaN where there is none.
        per_layer: parameters that one module owns are a layer; else all are one, ``all``.

    Example:
        >>> table = step_table(
        ...     {"head.weight": 6, "head.bias": 2},
        ...     gradients=[3.0, 4.0],
        ...     weights=[6.0, 8.0],
        ...     updates=[0.3, 0.4],
        ...     learning_rates=[0.1, 0.5],
        ... )
        >>> table["head"].gradient_norm, table["head"].trust_ratio, table.total.update_ratio
        (5.0, 2.0, 0.05)
        >>> print(table)
        layer     params        ‖g‖        ‖w‖       ‖Δw‖    ‖w‖/‖g‖   ‖Δw‖/‖w‖        η/σ
        head           8          5         10        0.5          2       0.05     0.1147
    """
    columns = (gradients, weights, updates, learning_rates)
    parameters = {
        name: LayerStep(name, size, *numbers)
        for (name, size), numbers in zip(sizes.items(), zip(*columns, strict=True), strict=True)
    }
    layers = layers_of(sizes) if per_layer else {"all": list(sizes)}
    return StepTable(
        tuple(
            _merged(layer, [parameters[name] for name in names]) for layer, names in layers.items()
        )
    )


def tensor_norms(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return the Euclidean norm of each tensor, shape ``(n,)``, float64 on the CPU.

    Tensors are taken one at a time, so they may be made one at a time. ``None``, a gradient that is
    not there, counts as zero. Under FSDP2 the norm is that of all shards together, and every rank
    must call it.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), None]).tolist()
        [5.0, 0.0]
    """
    norms = [None if tensor is None else tensor_norm(tensor) for tensor in tensors]
    found = torch.zeros(len(norms), dtype=torch.float64)
    alike: dict[object, list[int]] = {}  # what can be stacked: one wait, or one sum, for each
    for i, norm in enumerate(norms):
        if norm is not None:
            mesh = (norm.device_mesh, norm.placements) if isinstance(norm, DTensor) else None
            alike.setdefault((mesh, norm.device, norm.dtype), []).append(i)
    for rows in alike.values():
        stacked = torch.stack([cast(Tensor, norms[i]) for i in rows])
        found[rows] = _whole(stacked).cpu().double()
    return found


def update_norms(now: Iterable[Tensor], before: Iterable[Tensor]) -> Tensor:
    """Return the norm of the change of each tensor, as :func:`tensor_norms`.

    Half precision is subtracted in float32: the change is as small as its rounding.
    """
    pairs = zip(now, before, strict=True)
    return tensor_norms(_at_least_single(a) - _at_least_single(b) for a, b in pairs)


def tensor_norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of a tensor, where it lies, without waiting for the device.

    Half precision is summed in float32.

    Args:
        tensor: dense or sparse; of a ``DTensor`` the norm is one too, yet to be summed.
    """
    tensor = tensor.detach()
    if tensor.is_sparse:  # several entries may stand for one number
        tensor = tensor.coalesce().values()
    return torch.linalg.vector_norm(tensor, dtype=_wide(tensor))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide(tensor))


def _whole(norms: Tensor) -> Tensor:
    if not isinstance(norms, DTensor):
        return norms
    # shards that are offloaded to the CPU travel on the device that the ranks talk through
    return cast(DTensor, norms.to(norms.device_mesh.device_type)).full_tensor()


def _merged(layer: str, rows: Sequence[LayerStep]) -> LayerStep:
    return LayerStep(
        layer,
        sum(row.num_params for row in rows),
        _root_of_squares([row.gradient_norm for row in rows]),
        _root_of_squares([row.weight_norm for row in rows]),
        _root_of_squares([row.update_norm for row in rows]),
        mean_rate([row.learning_rate for row in rows], [row.num_params for row in rows]),
    )


def _root_of_squares(numbers: Sequence[float]) -> float:
    return math.hypot(*numbers) if not any(map(math.isnan, numbers)) else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if 0 < denominator < math.inf else math.nan


def _printed(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.4g}"
