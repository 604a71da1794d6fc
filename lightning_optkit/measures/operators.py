"""Loss + parameters as a symmetric linear operator that is multiplied with ``@``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_optkit.measures.gradient_graph import GradientGraph, LossFn, split
from lightning_optkit.measures.lanczos import rounding_noise
from lightning_optkit.measures.loss_surface import LossSurface, Reduce
from lightning_optkit.measures.self_check import check_products

__all__ = ["HessianOperator", "LossFn"]

# Steps of all optimizers so far: fused ones move parameters without counting up `_version`.
_optimizer_steps: Counter[str] = Counter()
register_optimizer_step_post_hook(lambda *_: _optimizer_steps.update(["all"]))

_DENSE_BLOCK = 16  # columns per batched product: more cost memory and save no time


class HessianOperator(LossSurface):
    r"""The Hessian of a loss in its parameters, as a symmetric operator.

    For batches :math:`b` with losses :math:`L_b(\theta)` and weights :math:`w_b`,

    .. math:: H = \nabla^2_\theta L, \qquad L = \sum_b w_b L_b / \sum_b w_b,

    and ``operator @ v`` is :math:`H v`, exact up to rounding: reverse mode over reverse mode. The
    graph of the gradient is built once per batch and reused by every product until a parameter
    changes, so a product costs 1.5 to 2.8 gradients. What writes into ``p.data`` goes unseen: make
    a new operator then.

    Args:
        loss_fn: a function from ``{name: parameter}`` to a scalar loss, or one such function for
            each batch. It must be deterministic and free of side effects.
        params: the parameters by name; float32 or float64, real, dense. They are not modified.
        weights: one positive weight for each batch, usually its number of samples; default equal.
        graphs: ``"cached"`` keeps one gradient graph alive for each batch. ``"lockstep"`` keeps one
            at a time and rebuilds it for each ``@``: the memory of one batch, worth it when several
            vectors are multiplied at once.
        reduce: sums a tensor over processes, in place of a single-process identity. Every process
            must then make the same products.
        self_check: compare the first product with its transpose and with an independent second
            derivative, and raise if they disagree. Costs two products and about six gradients.

    Raises:
        TypeError: if a parameter is complex, half precision, sparse or not a tensor.
        ValueError: if there is no parameter, no batch, or a weight that is not positive.
        CurvatureError: at the first product, if second derivatives are missing or wrong.

    Example:
        >>> import torch
        >>> op = HessianOperator(lambda p: (1 - p["w"][0] * p["w"][1]) ** 2, {"w": torch.zeros(2)})
        >>> op @ torch.tensor([1.0, 1.0])
        tensor([-2., -2.])

    References:
        B. A. Pearlmutter, "Fast exact multiplication by the Hessian", 1994, section 2.
    """

    def __init__(
        self,
        loss_fn: LossFn | Sequence[LossFn],
        params: Mapping[str, Tensor],
        *,
        weights: Sequence[float] | None = None,
        graphs: Literal["cached", "lockstep"] = "cached",
        reduce: Reduce | None = None,
        self_check: bool = True,
    ) -> None:
        super().__init__(loss_fn, params, weights=weights, reduce=reduce)
        if graphs not in ("cached", "lockstep"):
            raise ValueError(f"`graphs` must be 'cached' or 'lockstep', got {graphs!r}.")
        self._graphs_kept = graphs
        self._watched = list(self._params.values())
        self._cache: list[GradientGraph] | None = [] if graphs == "cached" else None
        self._versions: list[int] = []
        self._unchecked = self_check
        self.noise = rounding_noise(self.dtype)
        """Rounding error of an eigenvalue relative to the largest; the self-check may raise it."""
        self.num_matvecs = 0
        """Hessian-vector products made so far, the self-check's included."""

    matrix_name: ClassVar[str] = "Hessian"
    """What a figure calls it."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``, where ``n`` is the number of parameters."""
        return self.num_parameters, self.num_parameters

    @property
    def works_in_blocks(self) -> bool:
        """Whether several vectors at once are cheaper than one after another."""
        return self._cache is None

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return ``H @ vectors`` for ``vectors`` of shape ``(n,)`` or ``(n, k)``."""
        if vectors.shape[:1] != self.shape[:1] or vectors.ndim > 2:
            n = self.shape[0]
            got = tuple(vectors.shape)
            raise ValueError(f"`vectors` must have the shape ({n},) or ({n}, k), got {got}.")
        if self._unchecked:
            self._unchecked = False  # the check itself makes products
            try:
                self.noise = max(self.noise, check_products(self))
            except BaseException:
                self._unchecked = True
                raise
        rows = vectors[None] if vectors.ndim == 1 else vectors.T
        rows = rows.to(self.device, self.dtype)
        products = self._sum(
            lambda graph: graph.products(rows, last=self._cache is None),
            shape=tuple(rows.shape),
            waits=False,
        )
        self.num_matvecs += len(rows)
        return products[0] if vectors.ndim == 1 else products.T

    def dense(self) -> Tensor:
        """Return ``H`` itself, shape ``(n, n)``, symmetrised, in float64: ``n`` products."""
        n = self.shape[0]
        columns = []
        for start in range(0, n, _DENSE_BLOCK):
            block = torch.zeros(n, min(_DENSE_BLOCK, n - start), dtype=self.dtype)
            block[start:].fill_diagonal_(1.0)
            columns.append((self @ block.to(self.device)).cpu().double())
        matrix = torch.cat(columns, dim=1)
        return (matrix + matrix.T) / 2

    @torch.inference_mode(False)
    def forward_mode_product(self, vector: Tensor) -> Tensor:
        """Return ``H @ vector`` by forward over reverse mode: slower, for comparison.

        Raises:
            NotImplementedError: if a layer has no forward-mode derivative.
        """
        with warnings.catch_warnings():
            # torch 2.13 scripts its forward-mode formulas on first use, and deprecates scripting
            warnings.simplefilter("ignore", DeprecationWarning)
            return self._sum(
                lambda graph: graph.gradient_tangent,
                shape=self.shape[:1],
                graphs=self._dual_graphs(vector),
            )

    def at(self, params: Mapping[str, Tensor]) -> HessianOperator:
        """Return the operator with some of the parameters replaced; it is not checked."""
        return type(self)(
            self._loss_fns,
            self._params | dict(params),
            weights=self.weights,
            graphs="lockstep",
            reduce=self._reduce,
            self_check=False,
        )

    def difference_product(self, vector: Tensor, radius: float) -> tuple[Tensor, float]:
        """Return about ``H @ vector`` and its rounding error, by a central difference of gradients.

        Args:
            vector: shape ``(n,)``.
            radius: half the distance between the two points, as a multiple of ``vector``.
        """
        ahead, behind = self.gradient(radius * vector), self.gradient(-radius * vector)
        rounding = 4 * torch.finfo(self.dtype).eps * float(ahead.norm()) / radius
        return (ahead - behind) / (2 * radius), rounding

    def restricted(self, names: Collection[str]) -> HessianOperator:
        """Return the operator of a diagonal block: the other parameters are held where they are.

        It is checked at its first product unless this operator was.

        Args:
            names: of the parameters of the block.

        Raises:
            ValueError: if none of the parameters has one of the names.

        Example:
            >>> import torch
            >>> params = {"a": torch.ones(2), "b": torch.ones(3)}
            >>> op = HessianOperator(lambda p: p["a"].sum() * p["b"].square().sum(), params)
            >>> (op.restricted(["b"]) @ torch.ones(3)).tolist()
            [4.0, 4.0, 4.0]
        """
        chosen = {name: p for name, p in self._params.items() if name in names}
        held = {name: p for name, p in self._params.items() if name not in names}
        if not chosen:
            known = ", ".join(list(self._params)[:8])
            raise ValueError(
                f"`names` must hold a parameter of the operator, got {list(names)!r}. The "
                f"parameters begin with: {known}."
            )
        block = type(self)(
            [partial(_with_held, f, held) for f in self._loss_fns],
            chosen,
            weights=self.weights,
            graphs=self._graphs_kept,
            reduce=self._reduce,
            self_check=self._unchecked,
        )
        block.noise = self.noise
        block._watched = self._watched
        return block

    # -- batches ------------------------------------------------------------------------------

    def _graph(self, loss_fn: LossFn, leaves: dict[str, Tensor]) -> GradientGraph:
        return GradientGraph(loss_fn, leaves)

    def _graphs(self) -> Iterator[GradientGraph]:
        """Yield each batch's gradient graph, fresh wherever a parameter has moved."""
        if self._cache is None:
            for loss_fn in self._loss_fns:
                yield self._graph(loss_fn, self._leaves())
            return
        versions = [_optimizer_steps["all"]]
        for p in self._watched:  # the address moves where `p.data` is replaced
            versions += [p._version, p.data_ptr()]
        if versions != self._versions:
            self._cache.clear()
            self._versions = versions
        for i, loss_fn in enumerate(self._loss_fns):
            if i == len(self._cache):
                self._cache.append(self._graph(loss_fn, self._leaves()))
            yield self._cache[i]

    def _losses(self) -> Iterator[GradientGraph]:
        return self._graphs()

    def _dual_graphs(self, vector: Tensor) -> Iterator[GradientGraph]:
        """Yield each batch's graph with dual leaves; a level for each, or all would stay alive."""
        for loss_fn in self._loss_fns:
            with forward_ad.dual_level():
                leaves = self._leaves()
                duals = {
                    name: forward_ad.make_dual(leaf, piece)
                    for (name, leaf), piece in zip(
                        leaves.items(), split(vector, leaves), strict=True
                    )
                }
                # with a graph: where none is asked for, some backwards take a shortcut at zeros
                yield self._graph(loss_fn, duals)


def _with_held(loss_fn: LossFn, held: dict[str, Tensor], params: dict[str, Tensor]) -> Any:
    # leaves too: a loss that needs none of the block still depends on something, and is not refused
    return loss_fn({name: p.detach().requires_grad_() for name, p in held.items()} | params)
