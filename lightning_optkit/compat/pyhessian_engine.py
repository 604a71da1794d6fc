"""The installed PyHessian as an engine: its numbers, for who must reproduce a published one."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_optkit.measures import CurvatureError, Share, Spectrum, full_precision
from lightning_optkit.measures.gradient_graph import LossFn, evaluated, explained, flat
from lightning_optkit.measures.lanczos import rounding_noise
from lightning_optkit.measures.spectrum import check_settings

__all__ = ["PyHessianSpectrum", "check_pyhessian", "pyhessian_spectrum"]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class PyHessianSpectrum(Spectrum):
    """A spectrum as PyHessian reports it: estimates without a bound.

    Shares are weights of Ritz values of its density, and lie in [0, 1]: more is not known. Ritz
    values have no residual: infinite. Where its power iteration gave no eigenvector of the smallest
    eigenvalue, ``lambda_min_vector`` is NaN; so is the standard error of a trace of one probe.

    Attributes:
        top_eigenvalue: the eigenvalue of largest magnitude, by power iteration.
    """

    top_eigenvalue: float = math.nan

    @property
    def lambda_max(self) -> float:
        """The eigenvalue of power iteration if positive, else the largest Ritz value."""
        return self.top_eigenvalue if self.top_eigenvalue > 0 else float(self.ritz_values.max())

    @property
    def lambda_min(self) -> float:
        """The eigenvalue of power iteration if negative, else the smallest Ritz value."""
        return self.top_eigenvalue if self.top_eigenvalue < 0 else float(self.ritz_values.min())

    @property
    def lambda_max_error(self) -> float:
        """Infinite: PyHessian tells none."""
        return math.inf

    @property
    def lambda_min_error(self) -> float:
        """Infinite: PyHessian tells none."""
        return math.inf

    @property
    def condition_reason(self) -> str:
        """Why the condition number's lower bound says nothing."""
        return "unknown: PyHessian bounds no eigenvalue away from zero"


def check_pyhessian(*, num_matvecs: int, num_probes: int, tol_rel: float | str) -> None:
    """Refuse what :func:`pyhessian_spectrum` cannot do, PyHessian's absence first.

    Raises:
        ModuleNotFoundError: if PyHessian is not installed.
        ValueError: if an argument is out of range.
    """
    _pyhessian()
    if isinstance(tol_rel, str):
        raise ValueError(
            f"`tol_rel` must be a number with the engine 'pyhessian', got {tol_rel!r}: its shares "
            "have no bounds to choose a tolerance by. Pass one, such as 1e-3."
        )
    check_settings(num_matvecs=num_matvecs, num_probes=num_probes, tol_rel=tol_rel, confidence=0.99)


def pyhessian_spectrum(
    loss_fns: LossFn | Sequence[LossFn],
    params: Mapping[str, Tensor],
    weights: Sequence[float] | None = None,
    *,
    num_matvecs: int = 100,
    num_probes: int = 1,
    tol_rel: float = 1e-3,
    seed: int = 0,
) -> PyHessianSpectrum:
    r"""Return the spectrum of a Hessian by the installed PyHessian.

    Three calls, as published work makes them: ``eigenvalues()`` and ``trace()`` with their
    defaults (100 iterations, a tolerance of 1e-3), ``density(iter=num_matvecs, n_v=num_probes)``.
    ``torch.eig``, which its density calls, has left torch: it gets a stand-in for the call.

    PyHessian draws from torch's global stream, which is seeded for it and put back.

    Args:
        loss_fns: a function from ``{name: parameter}`` to a scalar loss, or one for each batch.
            Parameters that a loss does not depend on are allowed.
        params: the parameters by name; float32 or float64. They are not modified.
        weights: one positive weight for each batch, usually its samples; default equal.
        num_matvecs: steps of the density's Lanczos, at least 2; no more than there are parameters
            are made.
        num_probes: runs of the density, at least 1.
        tol_rel: Ritz values within ``tol_rel * max|lambda|`` of zero count as zero; at least 0.
        seed: seeds all of PyHessian's random vectors.

    Returns:
        The spectrum, with ``method="pyhessian"``. Nothing in it is certified.

    Raises:
        ModuleNotFoundError: if PyHessian is not installed.
        ValueError: if an argument is out of range.
        CurvatureError: if there are several processes, or a result is not finite.

    References:
        Z. Yao, A. Gholami, K. Keutzer, M. Mahoney, "PyHessian: Neural networks through the lens of
        the Hessian", 2020, section III.
    """
    check_pyhessian(num_matvecs=num_matvecs, num_probes=num_probes, tol_rel=tol_rel)
    _check_single_process()
    functions: list[LossFn] = [loss_fns] if callable(loss_fns) else list(loss_fns)
    shares = [1.0] * len(functions) if weights is None else [float(w) for w in weights]
    if not functions or len(shares) != len(functions):
        raise ValueError(
            f"`weights` must have one entry for each of the {len(functions)} batches, at least "
            f"one, got {len(shares)}."
        )
    started = time.perf_counter()
    model = _Losses(functions, params)
    batches = [(_Batch(i, weight), _Batch(i, weight)) for i, weight in enumerate(shares)]
    with _as_pyhessian_needs(model, seed):
        try:
            peer = _pyhessian()(model, _loss_itself, dataloader=batches, cuda=model.is_on_cuda)
            (top, *_), (vector, *_) = peer.eigenvalues()
            traces = peer.trace()
            if not math.isfinite(top + sum(traces)):
                raise CurvatureError.not_finite()
            with _torch_eig():
                nodes, masses = peer.density(iter=min(num_matvecs, model.size), n_v=num_probes)
        except RuntimeError as error:
            raise explained(error) from error
    theta = torch.tensor(nodes, dtype=torch.float64)
    w = torch.tensor(masses, dtype=torch.float64)
    mean = statistics.fmean(traces)
    if not bool(theta.isfinite().all()):
        raise CurvatureError.not_finite()
    radius = max(abs(top), float(theta.abs().max()))
    noise = max(rounding_noise(model.dtype) * radius, 1e-300)
    tol = max(tol_rel * radius, 4 * noise)
    direction = flat(vector, params)
    return PyHessianSpectrum(
        positive=_share(w, theta > tol),
        negative=_share(w, theta < -tol),
        zero=_share(w, theta.abs() <= tol),
        tol=tol,
        tol_rel=tol_rel,
        ritz_values=theta,
        ritz_weights=w,
        ritz_residuals=torch.full_like(theta, math.inf),
        trace=mean,
        trace_standard_error=_standard_error(traces),
        lambda_min_vector=direction if top < 0 else torch.full_like(direction, math.nan),
        confidence=1.0,  # [0, 1] holds any share
        num_matvecs=model.num_calls // len(functions),
        num_params=model.size,
        method="pyhessian",
        seconds=time.perf_counter() - started,
        noise=noise,
        top_eigenvalue=top,
    )


def _pyhessian() -> Callable[..., Any]:
    """Return PyHessian's class."""
    try:
        return import_module("pyhessian").hessian
    except ModuleNotFoundError as error:
        if error.name != "pyhessian":
            raise
        raise ModuleNotFoundError(
            "The engine 'pyhessian' needs PyHessian: pip install 'lightning-optkit[pyhessian]'. "
            "The default engine answers the same questions without it.",
            name="pyhessian",
        ) from error


def _check_single_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        if count > 1:
            raise CurvatureError(
                f"The engine 'pyhessian' must run in a single process, got {count}: PyHessian sums "
                "over none. The default engine does."
            )


@dataclass(frozen=True)
class _Batch:
    """Stands for a batch where PyHessian handles one: it asks for its size and moves it."""

    index: int
    weight: float

    def size(self, dim: int) -> float:
        return self.weight

    def to(self, device: str) -> _Batch:
        return self


class _Losses(nn.Module):
    """A model whose parameters are the given ones and whose output is the loss of a batch."""

    def __init__(self, functions: list[LossFn], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._functions = functions
        self._names = list(params)
        self._values = nn.ParameterList([nn.Parameter(p.detach()) for p in params.values()])
        self._devices = sorted({p.device.index for p in params.values() if p.is_cuda})
        self.num_calls = 0

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self._values)

    @property
    def dtype(self) -> torch.dtype:
        dtypes = {p.dtype for p in self._values}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def devices(self) -> list[int]:
        return self._devices

    @property
    def is_on_cuda(self) -> bool:
        return bool(self._devices)

    def forward(self, batch: _Batch) -> Tensor:
        self.num_calls += 1
        named = dict(zip(self._names, self._values, strict=True))
        # a loss may seed the stream from which PyHessian draws: all its probes would be one
        with torch.random.fork_rng(self._devices):
            loss, _ = evaluated(self._functions[batch.index], named)
        # an exact zero, twice differentiable, for parameters that take no part in the loss or only
        # a linear one: PyHessian fails on them
        return loss.reshape(()) + sum(0.0 * p.square().sum() for p in self._values)


def _loss_itself(output: Tensor, target: _Batch) -> Tensor:
    return output


@contextmanager
def _as_pyhessian_needs(model: _Losses, seed: int) -> Iterator[None]:
    """Seed what PyHessian draws from, compute in full precision, and put all back on leaving."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(model.devices))
        stack.enter_context(full_precision("cuda" if model.is_on_cuda else "cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        # of a reference cycle through `.grad`, which PyHessian breaks before each product
        warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph=True")
        stack.enter_context(np.errstate(invalid="ignore"))  # what is not finite is told afterwards
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(model.dtype)
        torch.default_generator.manual_seed(seed)
        for index in model.devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def _torch_eig() -> Iterator[None]:
    """Give torch its old ``eig``, for symmetric matrices: all that PyHessian passes."""

    def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    absent = object()
    before = getattr(torch, "eig", absent)
    setattr(torch, "eig", eig)  # noqa: B010 - mypy knows no such attribute
    try:
        yield
    finally:
        if before is absent:
            delattr(torch, "eig")
        else:
            setattr(torch, "eig", before)  # noqa: B010


def _share(weights: Tensor, chosen: Tensor) -> Share:
    value = float((weights * chosen).sum() / weights.sum())
    return Share(min(max(value, 0.0), 1.0), 0.0, 1.0, quadrature_width=1.0)


def _standard_error(samples: list[float]) -> float:
    if len(samples) < 2:
        return math.nan
    return statistics.stdev(samples) / math.sqrt(len(samples))
