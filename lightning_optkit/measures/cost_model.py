"""What a measurement of the Hessian costs, before it is made: products, bytes and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "Hardware",
    "MeasurementCost",
    "Route",
    "measurement_cost",
    "transformer_activations",
]

Route = Literal["cached", "lockstep", "sharded"]

_FLOAT = 4  # bytes: measurements are in float32 whatever precision training uses

# Matrix multiplications of a linear layer: 1 forward, 2 for the gradient, 6 for a product with the
# gradient's graph. So 2 gradients by operation count; docs/benchmarks.md measures 2.13 on a GPT.
_PRODUCT = 2.13  # gradients
_GRAPH = 1.03  # gradients, to build the graph: a product that rebuilds it takes 3.16
_CHECK = 3.5  # gradients: one product by forward over reverse mode, graph included
_FORWARD = 1 / 3  # gradients

# How often each batch is gone through beside the spectrum's products. Lockstep graphs: the point
# asks for the gradient, for its noise twice, for the flatness and for a loss, the report for one.
_POINT_PRODUCTS, _POINT_GRAPHS, _POINT_VECTORS = 1, 6, 3  # summed: product and two gradients
_POINT_LOSSES = 2  # a step to either side along the most negative curvature
_CHECK_PRODUCTS, _CHECK_GRAPHS, _CHECK_VECTORS = 2, 3, 4
_COLUMNS_AT_ONCE = 16  # where all columns are made
# By differences of gradients a loss takes a gradient too.
_SEARCH_PRODUCTS, _SEARCH_GRADIENTS = 11, 1  # of the step; products take two gradients each
_POINT_GRADIENTS = 7  # the gradient, its noise twice, three losses; and the report's loss

# Memory beyond basis and vectors, in floats that a forward pass keeps and in parameters: fitted to
# torch's allocations on GPTs of 0.05 to 10 million parameters, each within 10 %.
_GRAPH_KEEPS = 2.0  # the activations, and the gradients at them; and the gradient itself
_PRODUCT_ADDS = (1.5, 0.5)
_CHECK_ADDS = (7.3, 9.2)  # forward mode doubles both passes
_LANCZOS_VECTORS = 5  # of each lane: current, next, projection, and two of arithmetic
_LANES_IN_PRODUCT = 3  # current, last and new vector of each lane while a product is made
_PAIRS_PER_STEP, _MAX_PAIRS = 1 / 5, 16  # eigenvectors kept for the trace, about one in five steps
_SHARD_COPIES = 2  # one to put back, one to move from
_SEARCH_VECTORS = 11  # two directions, and their products at all steps but the last
_DIFFERENCE_VECTORS = (4, 7)  # in a backward with the activations, and after it without

_WIDTH_PER_LAYER = 128  # of published models from 1 to 70 billion parameters, within a third


@dataclass(frozen=True)
class Hardware:
    """One device and its share of the network.

    Attributes:
        flops: peak of float32 without tensor cores, in FLOP/s. The default is the data sheet of
            NVIDIA's H100 and H200 (SXM): measuring switches TF32 off.
        efficiency: share of the peak that a gradient reaches, in (0, 1]. The default is an
            assumption: time one gradient to know yours.
        bandwidth: of the network at each device, bytes/s. The default is 400 Gbit/s.
    """

    flops: float = 67e12
    efficiency: float = 0.4
    bandwidth: float = 50e9

    def __post_init__(self) -> None:
        """Refuse what is no speed."""
        for name in ("flops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"`efficiency` must be in (0, 1], got {self.efficiency}.")


@dataclass(frozen=True)
class MeasurementCost:
    """What one measurement costs each device.

    Attributes:
        route: ``"cached"`` and ``"lockstep"`` hold whole parameters on each device, as DDP and a
            gathered FSDP2 model do; ``"sharded"`` is FSDP2 with finite differences of the real
            backward.
        num_params: ``n``.
        world_size: devices, ``p``.
        num_products: Hessian-vector products, those of the self-check or of the search for a step
            included; exact.
        num_passes: how often each batch is gone through forward, whatever follows; exact where an
            eigenvalue is negative, a few too many elsewhere.
        num_samples: of all devices together; exact.
        gradients: all work, in gradients over this device's batches.
        flops: floating-point operations of this device.
        parameter_bytes: the copy to differentiate by, or two copies of this device's shard; exact.
        krylov_bytes: the Lanczos basis, ``lanes * num_matvecs * n`` floats, or this device's shard
            of it; exact.
        graph_bytes: gradient graphs that are alive between products: activations, the gradients
            at them, and the gradient.
        working_bytes: the most that is needed beside these at one time.
        compute_seconds: arithmetic.
        network_seconds: sums over devices; 0 for one.
    """

    route: Route
    num_params: int
    world_size: int
    num_products: int
    num_passes: int
    num_samples: int
    gradients: float
    flops: float
    parameter_bytes: float
    krylov_bytes: float
    graph_bytes: float
    working_bytes: float
    compute_seconds: float
    network_seconds: float

    @property
    def total_bytes(self) -> float:
        """Peak on each device, beside what training itself holds there."""
        return self.parameter_bytes + self.krylov_bytes + self.graph_bytes + self.working_bytes

    @property
    def seconds(self) -> float:
        """Wall time, with arithmetic and network one after the other."""
        return self.compute_seconds + self.network_seconds

    def __str__(self) -> str:
        """Return the cost in one line."""
        return (
            f"{self.route}: {self.num_products:,} products, {self.gradients:,.0f} gradients, "
            f"{self.flops:.3g} FLOP, {self.total_bytes / 1e9:.3g} GB and {self.seconds:.3g} s "
            f"on {'one device' if self.world_size == 1 else f'each of {self.world_size:,} devices'}"
        )


def measurement_cost(
    num_params: int,
    *,
    route: Route = "cached",
    world_size: int = 1,
    num_matvecs: int = 80,
    num_probes: int = 4,
    num_batches: int = 4,
    batch_size: int = 1,
    sequence_length: int = 1024,
    activations: float | None = None,
    self_check: bool = True,
    exact_below: int = 1000,
    hardware: Hardware | None = None,
) -> MeasurementCost:
    r"""Return what one measurement of ``HessianSpectrum`` costs each device.

    With ``n`` parameters and ``t`` tokens a batch, a forward pass takes :math:`2nt` operations (a
    multiplication and an addition a parameter; attention's own products are left out), a gradient
    three times as many, and a product 2.13 gradients, on each of the batches. A ring sums the flat
    vector of a product over ``p`` devices in :math:`2 \frac{p-1}{p} 4n` bytes.

    Args:
        num_params: ``n``, at least 1.
        route: see :class:`MeasurementCost`.
        world_size: devices, at least 1.
        num_matvecs: Lanczos steps of one probe.
        num_probes: probes; in lockstep all at once, else one after another.
        num_batches: batches held by each device.
        batch_size: samples in a batch.
        sequence_length: tokens of a sample; 1 where a sample meets each parameter once.
        activations: floats that a forward pass keeps for each token; ``None`` is
            :func:`transformer_activations`.
        self_check: compare the first product with forward mode; the sharded route never does.
        exact_below: up to here all ``n`` columns are made in place of Lanczos steps, unless
            parameters are sharded.
        hardware: speeds; ``None`` is :class:`Hardware` as it comes.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> cost = measurement_cost(7_000_000_000, route="sharded", world_size=64)
        >>> cost.num_products, f"{cost.krylov_bytes / 1e9:.0f} GB"
        (332, '35 GB')
    """
    counts = {
        "num_params": num_params,
        "world_size": world_size,
        "num_matvecs": num_matvecs,
        "num_probes": num_probes,
        "num_batches": num_batches,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if route not in ("cached", "lockstep", "sharded"):
        raise ValueError(f"`route` must be 'cached', 'lockstep' or 'sharded', got {route!r}.")
    hardware = hardware or Hardware()
    if activations is None:
        activations = transformer_activations(num_params, sequence_length=sequence_length)

    exact = num_params <= exact_below and route != "sharded"
    steps = num_params if exact else min(num_matvecs, num_params)
    lanes = num_probes if route == "lockstep" and not exact else 1
    checked = self_check and route != "sharded"
    work = _work(route, steps * (1 if exact else num_probes), exact, lanes, checked)
    tokens = batch_size * sequence_length
    flops = work.in_gradients * 6.0 * num_params * tokens * num_batches

    vector = float(_FLOAT * num_params) / (world_size if route == "sharded" else 1)
    kept = float(_FLOAT * activations * tokens)
    basis = 0.0 if exact else vector * lanes * steps
    pairs = 0.0 if exact else _pairs(steps, num_probes)
    if route == "sharded":
        graphs, working = kept, _sharded_working_bytes(kept, vector, pairs=pairs)
    else:
        graph = _GRAPH_KEEPS * kept + vector
        graphs = graph * (num_batches if route == "cached" else 1)
        working = _working_bytes(kept, vector, lanes=lanes, checked=checked) + pairs * vector
    return MeasurementCost(
        route=route,
        num_params=num_params,
        world_size=world_size,
        num_products=work.products,
        num_passes=work.passes,
        num_samples=num_batches * batch_size * world_size,
        gradients=work.in_gradients,
        flops=flops,
        parameter_bytes=vector * (_SHARD_COPIES if route == "sharded" else 1),
        krylov_bytes=basis,
        graph_bytes=graphs,
        working_bytes=working,
        compute_seconds=flops / (hardware.flops * hardware.efficiency),
        network_seconds=_network_bytes(num_params, world_size, work, num_batches)
        / hardware.bandwidth,
    )


def transformer_activations(
    num_params: int,
    *,
    sequence_length: int,
    layers: int | None = None,
    width: int | None = None,
    head_width: int = 128,
    vocab: int = 0,
) -> float:
    r"""Return the floats that a transformer's forward pass keeps for each token.

    .. math:: L \, (16 \, d + s \, d / d_{head}) + 2 V

    Sixteen vectors of width ``d`` a layer: inputs of both norms and of the four linear maps, query,
    key and value, the scaled ones, and the four-fold hidden layer before and after its
    nonlinearity; the attention weights of every head over ``s`` positions, since the kernels that
    spare them have no second derivative; and logits with their softmax.

    Args:
        num_params: tells layers and width where they are not given: :math:`n = 12 L d^2` with
            :math:`d = 128 L`, which is 33 layers of width 4,200 at 7 billion.
        sequence_length: ``s``.
        layers: ``L``.
        width: ``d``.
        head_width: width of one attention head; 128 in most large nets.
        vocab: ``V``, 0 to leave the head out.

    Example:
        >>> round(transformer_activations(98_304, sequence_length=64, layers=2, width=64))
        2112
    """
    if layers is not None:
        depth = float(layers)
    elif width is not None:
        depth = num_params / (12 * width**2)
    else:
        depth = (num_params / (12 * _WIDTH_PER_LAYER**2)) ** (1 / 3)
    wide = (num_params / (12 * depth)) ** 0.5 if width is None else float(width)
    return depth * (16 * wide + sequence_length * wide / head_width) + 2 * vocab


class _Work(NamedTuple):
    """How often each batch is gone through, and for what.

    Attributes:
        products: Hessian-vector products.
        graphs: gradients that keep their graph.
        losses: forward passes alone.
        checks: products by forward over reverse mode.
        gradients: gradients without a graph.
        vectors: that are summed over devices.
    """

    products: int
    graphs: int
    losses: int
    checks: int
    gradients: int
    vectors: int

    @property
    def passes(self) -> int:
        return self.graphs + self.losses + self.checks + self.gradients

    @property
    def in_gradients(self) -> float:
        products = 0.0 if self.gradients else _PRODUCT * self.products  # else they are gradients
        built = _GRAPH * self.graphs + _FORWARD * self.losses + _CHECK * self.checks
        return products + built + self.gradients


def _work(route: Route, columns: int, exact: bool, lanes: int, checked: bool) -> _Work:
    """Return the work of one measurement, the loss, the kind of point and the checks included.

    Args:
        route: see :class:`MeasurementCost`.
        columns: products of the spectrum alone.
        exact: whether they are the columns of the matrix.
        lanes: vectors multiplied at once by Lanczos.
        checked: whether the self-check is made.
    """
    if route == "sharded":
        products = columns + _SEARCH_PRODUCTS + _POINT_PRODUCTS
        gradients = 2 * products + _SEARCH_GRADIENTS + _POINT_GRADIENTS
        return _Work(products, 0, 0, 0, gradients, 0)
    together = _COLUMNS_AT_ONCE if exact else lanes
    rebuilt = math.ceil(columns / together) + _POINT_GRAPHS + _CHECK_GRAPHS * checked
    return _Work(
        products=columns + _POINT_PRODUCTS + _CHECK_PRODUCTS * checked,
        graphs=1 if route == "cached" else rebuilt,
        losses=_POINT_LOSSES,
        checks=int(checked),
        gradients=0,
        vectors=columns + _POINT_VECTORS + _CHECK_VECTORS * checked,
    )


def _working_bytes(kept: float, vector: float, *, lanes: int, checked: bool) -> float:
    """Return the most that is needed at one time, beside basis and graphs.

    Args:
        kept: bytes that a forward pass keeps.
        vector: bytes of one vector.
        lanes: vectors multiplied at once.
        checked: whether the self-check keeps a forward-mode graph beside, of one batch.
    """
    product = _LANES_IN_PRODUCT * lanes * vector + max(
        _PRODUCT_ADDS[0] * kept + _PRODUCT_ADDS[1] * vector, 2 * vector
    )
    check = lanes * vector + checked * (_CHECK_ADDS[0] * kept + _CHECK_ADDS[1] * vector)
    return max(product, check, _LANCZOS_VECTORS * lanes * vector)


def _sharded_working_bytes(kept: float, vector: float, *, pairs: float) -> float:
    """Return the most that is needed at one time, beside basis, shards and activations.

    Args:
        kept: bytes that a forward pass keeps.
        vector: bytes of this device's part of one vector.
        pairs: eigenvectors kept; none yet while the step is searched.
    """
    backward, after = _DIFFERENCE_VECTORS
    beside = max(_SEARCH_VECTORS, _LANCZOS_VECTORS + pairs)
    return beside * vector + max(backward * vector, after * vector - kept)


def _pairs(steps: int, num_probes: int) -> float:
    """Return how many eigenvectors are kept for the trace, and the lowest."""
    return 1 + min(_MAX_PAIRS, _PAIRS_PER_STEP * steps) * (num_probes > 1)


def _network_bytes(num_params: int, world_size: int, work: _Work, num_batches: int) -> float:
    """Return what each device sends: sums of vectors, or a sharded model's own traffic.

    A sharded model gathers its parameters forward and backward and scatters the gradient's sum,
    for each batch of each gradient.
    """
    once = _FLOAT * num_params * (world_size - 1) / world_size
    return once * (2 * work.vectors + 3 * work.gradients * num_batches)
