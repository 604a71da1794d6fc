"""PyHessian's interface on this package's engine: one changed import and old scripts run."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from lightning_optkit.measures import HessianOperator, lanczos, top_eigenpairs
from lightning_optkit.measures.gradient_graph import LossFn, flat, split
from lightning_optkit.measures.quadrature import gauss

__all__ = ["hessian"]

# Probes of the trace that are multiplied together, and the least number. Two parameters make only
# two different values of v'Hv, and sixteen alike, which would pass for certainty, come once in
# 2^15.
_PROBES_AT_ONCE = 16


class hessian:
    r"""The Hessian of a model's loss on its data, asked as PyHessian is asked.

    .. math:: H = \nabla^2_\theta \sum_b n_b L_b(\theta) / \sum_b n_b

    in the trainable parameters, with the model in eval mode, where :math:`L_b` is the criterion on
    batch :math:`b` and :math:`n_b` the length of its inputs, as in PyHessian. Modes, gradients,
    buffers and the global random streams are left as they were. Products follow the parameters
    when these are changed, but not through ``p.data``.

    What differs, beyond speed: eigenvalues come from Lanczos, so that :math:`\pm\lambda` are two
    and not a mean of both; ``tol`` is a tolerance for the error, not for the change from one
    iteration to the next; probes come from an own generator, so that ``torch.manual_seed`` has no
    say; a loader is read once and its batches are held, so that all products are of one matrix.

    Args:
        model: any module, on the CPU or a GPU; ``DataParallel`` and compiled ones are unwrapped.
        criterion: ``(outputs, targets) -> loss``, a mean over the samples.
        data: one batch, ``(inputs, targets)``.
        dataloader: batches in place of ``data``. They must fit in memory.
        cuda: whether the model is on a GPU. ``True``, as in PyHessian.
        graphs: ``"cached"`` keeps the gradient's graph of each batch: fewest seconds.
            ``"lockstep"`` rebuilds them, one alive at a time: the memory of one batch. By default
            a single batch is cached, as in PyHessian.
        self_check: compare the first product with an independent second derivative.
        generator: source of the probes, on the CPU; ``None`` is a fixed seed. Each call goes on
            where the last one stopped.

    Raises:
        ValueError: if not exactly one of ``data`` and ``dataloader`` is given, the batches are not
            pairs, there are none, or the model is not where ``cuda`` says.
        TypeError: if the inputs are not tensors, or the model is ``DistributedDataParallel``.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> module = hessian(net, torch.nn.functional.mse_loss, data=data, cuda=False)
        >>> [round(value, 4) for value in module.eigenvalues(top_n=2)[0]]
        [9.0, 1.0]

    References:
        Z. Yao, A. Gholami, K. Keutzer, M. Mahoney, "PyHessian: Neural networks through the lens of
        the Hessian", 2020, section III.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Sequence[Any] | None = None,
        dataloader: Iterable[Any] | None = None,
        cuda: bool = True,
        *,
        graphs: Literal["cached", "lockstep"] | None = None,
        self_check: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if (data is None) == (dataloader is None):
            given = "neither" if data is None else "both"
            raise ValueError(f"Exactly one of `data` and `dataloader` must be given, got {given}.")
        self.model = _plain(model)
        self.criterion = criterion
        self.device = "cuda" if cuda else "cpu"
        self._named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        _check_place(self.model, self.device)
        if data is not None:
            batches = [data]
        else:
            assert dataloader is not None  # one of the two is given
            with _random_streams_kept(self._streams(), getattr(dataloader, "generator", None)):
                batches = list(dataloader)
        pairs = [_pair(batch, "data" if dataloader is None else "dataloader") for batch in batches]
        if not pairs:
            raise ValueError("`dataloader` must yield at least one batch, got none.")
        self.operator = HessianOperator(
            [self._loss_fn(inputs, targets) for inputs, targets in pairs],
            self._named,
            weights=[len(inputs) for inputs, _ in pairs],
            graphs=graphs or ("cached" if dataloader is None else "lockstep"),
            self_check=self_check,
        )
        self._generator = generator or torch.Generator().manual_seed(0)

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the eigenvectors' pieces."""
        return list(self._named.values())

    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        r"""Return :math:`v^\top H v` and :math:`H v`.

        Args:
            v: tensors of the parameters' shapes.
        """
        vector = flat(v, self._named)
        product = self.operator @ vector
        return float(vector.double() @ product.double()), split(product, self._named)

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        r"""Return the ``top_n`` eigenvalues of largest magnitude, with their eigenvectors.

        A warning tells of values that have not converged.

        Args:
            maxIter: products to spend on each eigenvalue at most, at least 1.
            tol: tolerance for the error of each eigenvalue, relative to it.
            top_n: how many, at least 1.

        Returns:
            The eigenvalues, the largest magnitude first, and for each a list of tensors of the
            parameters' shapes: the unit eigenvector.
        """
        _check_counts(maxIter=maxIter, top_n=top_n)
        found = top_eigenpairs(
            self.operator,
            top_n,
            rtol=tol,
            max_matvecs=maxIter * top_n,
            generator=self._generator,
        )
        if not bool(found.converged.all()):
            short = int((~found.converged).sum())
            warnings.warn(
                f"{short} of {len(found.values)} eigenvalues have not converged to `tol`={tol:g} "
                f"in {found.num_matvecs} products. Raise `maxIter`.",
                stacklevel=2,
            )
        return found.values.tolist(), [split(row, self._named) for row in found.vectors]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        r"""Return estimates of the trace, :math:`v^\top H v` for Rademacher vectors :math:`v`.

        Their mean is unbiased. It ends where the standard error of the mean is within ``tol`` of
        it, relatively; PyHessian ends where two means that follow each other are close, which
        happens by luck, and always where the trace is negative.

        Args:
            maxIter: estimates at most, at least 1.
            tol: relative standard error that is small enough.
        """
        _check_counts(maxIter=maxIter)
        n = self.operator.shape[0]
        samples: list[float] = []
        while len(samples) < maxIter:
            count = min(_PROBES_AT_ONCE, maxIter - len(samples))
            signs = torch.randint(2, (count, n), generator=self._generator) * 2 - 1
            vectors = signs.to(self.operator.device, self.operator.dtype).T
            products = self.operator @ vectors
            samples += (vectors * products).sum(0, dtype=torch.float64).tolist()
            if len(samples) >= _PROBES_AT_ONCE and _relative_error(samples) <= tol:
                break
        return samples

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Return Lanczos quadratures of the density of eigenvalues: nodes and weights.

        Args:
            iter: Lanczos steps of one probe, at least 1.
            n_v: probes, Gaussian, at least 1.

        Returns:
            For each probe a list of ``iter`` nodes, ascending, and one of their weights, which sum
            to 1. A probe that has found all that it can see in fewer steps is filled up with
            copies of its last node, of weight 0.
        """
        _check_counts(iter=iter, n_v=n_v)
        together = n_v if self.operator.works_in_blocks else 1
        nodes: list[list[float]] = []
        weights: list[list[float]] = []
        for _ in range(n_v // together):
            run = lanczos(self.operator, iter, num_lanes=together, generator=self._generator)
            for lane in run.lanes():
                theta, mass, _ = gauss(*lane)
                missing = iter - len(theta)
                nodes.append(pad(theta, (0, missing), value=float(theta[-1])).tolist())
                weights.append(pad(mass, (0, missing)).tolist())
        return nodes, weights

    def _loss_fn(self, inputs: Tensor, targets: Any) -> LossFn:
        def loss(params: dict[str, Tensor]) -> Tensor:
            device = next(iter(self._named.values())).device
            state = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            streams = self._streams()
            with _in_eval_mode(self.model), _random_streams_kept(streams):
                for stream in streams:  # layers that are random in eval mode too: one draw for all
                    stream.manual_seed(0)
                outputs = functional_call(self.model, state | params, (inputs.to(device),))
                moved = targets.to(device) if isinstance(targets, Tensor) else targets
                return self.criterion(outputs, moved)

        return loss

    def _streams(self) -> list[torch.Generator]:
        """Return torch's global generators that a forward pass may draw from."""
        devices = {p.device for p in self._named.values() if p.device.type == "cuda"}
        return [torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)]


def _plain(model: nn.Module) -> nn.Module:
    """Return the module itself, without what compiles or replicates it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "`model` must be a plain module, got DistributedDataParallel. Pass `model.module` for "
            "the Hessian on this process's batches; the `HessianSpectrum` callback sums over all."
        )
    if isinstance(model, nn.DataParallel):
        return _plain(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else _plain(compiled)


def _check_place(model: nn.Module, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "`cuda` must be False where torch sees no CUDA device, got True, which is also the "
            "default, as in PyHessian. Pass `cuda=False`."
        )
    for name, p in model.named_parameters():
        if p.device.type != device:
            raise ValueError(
                f"`model` must be on {device} with `cuda={device == 'cuda'}`, got {name!r} on "
                f"{p.device}. Move it with `model.to({device!r})`, or change `cuda`."
            )


def _pair(batch: Any, name: str) -> tuple[Tensor, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = type(batch).__name__
        got += f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        what = "be" if name == "data" else "yield"
        raise ValueError(f"`{name}` must {what} a pair (inputs, targets), got {got}.")
    inputs, targets = batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"The inputs of `{name}` must be a tensor, got {type(inputs).__name__}. For other "
            "batches use `lightning_optkit.measures.HessianOperator` with a loss function."
        )
    return inputs, targets


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")


def _relative_error(samples: list[float]) -> float:
    """Return the standard error of the mean, relative to the mean; infinite for a mean of zero."""
    error, mean = statistics.stdev(samples) / math.sqrt(len(samples)), statistics.fmean(samples)
    if mean == 0:
        return math.inf if error > 0 else 0.0
    return error / abs(mean)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _random_streams_kept(
    streams: list[torch.Generator], own: torch.Generator | None = None
) -> Iterator[None]:
    """Put the streams of torch, NumPy and Python back on leaving, and a loader's own."""
    generators = streams if own is None else [*streams, own]
    states = [generator.get_state() for generator in generators]
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 - user code may draw from it
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
