"""The Hessian's spectrum, through training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch

from lightning_optkit.board import schema, tags
from lightning_optkit.bridge.cadence import EVERY_EPOCH, Cadence
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, StepLossFn
from lightning_optkit.bridge.reduce import sum_over_ranks
from lightning_optkit.measures import (
    CriticalPoint,
    HessianOperator,
    Spectrum,
    WrongDerivativesError,
    critical_point,
    hessian_spectrum,
)
from lightning_optkit.measures.spectrum import check_settings

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["HessianReport", "HessianSpectrum"]


@dataclass(frozen=True)
class HessianReport:
    """One measurement of :class:`HessianSpectrum`.

    Attributes:
        spectrum: the eigenvalues.
        point: the kind of point, with the gradient's norm.
        loss: on the held batches.
        num_samples: held by all ranks together.
    """

    spectrum: Spectrum
    point: CriticalPoint
    loss: float
    num_samples: int


class HessianSpectrum(Observer[HessianReport]):
    r"""Logs the spectrum of the training loss's Hessian: minimum ratio, extremes, trace, density.

    **Observer.** Training is bit-identical with or without it.

    The Hessian is that of the loss on a few training batches, drawn once and held for the whole
    run, in the trainable parameters. Up to ``exact_below`` parameters the spectrum is exact.
    Above, Lanczos quadrature gives shares of positive, negative and zero eigenvalues with
    certified bounds, and extremes and trace with errors.

    Args:
        every_n_epochs: epochs between measurements; 1 unless ``every_n_steps`` is given.
        every_n_steps: optimizer steps between measurements, in place of ``every_n_epochs``.
        num_batches: training batches held; too few bias ``lambda_max`` upwards. ``None`` takes all
            of ``data``.
        num_matvecs: Lanczos steps of one probe, at least 2.
        num_probes: probes, at least 1.
        top_k: how many of the largest eigenvalues the figure marks, at least 1.
        tol_rel: eigenvalues within ``tol_rel * max|lambda|`` of zero count as zero.
        curvature: ``"hessian"``.
        parameters: glob patterns of parameter names, such as ``["generator.*"]``; ``None`` takes
            all trainable ones.
        mode: ``"eval"`` (dropout off, running statistics of BatchNorm) or ``"train"``. The two are
            different functions with different spectra.
        max_overhead: largest share of the training time to spend, in (0, 1]; ``None`` = no limit.
            The end of training is always measured.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches and the probes.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        confidence: probability with which each share lies within its bounds.
        self_check: compare the first product of each measurement with an independent second
            derivative: refuses a wrong one, and tells the rounding noise.
        exact_below: largest number of parameters for which all eigenvalues are computed, at as
            many products.
        graphs: ``"cached"`` keeps one gradient graph for each held batch; ``"lockstep"`` one at a
            time, and all probes' vectors: less memory where graphs are larger than vectors.
        name: tells several instances of one Trainer apart, for example one for each part of a GAN.

    Logged keys:
        ``optkit-hessian/{minimum_ratio, negative_ratio, zero_ratio}``, each with ``_lower`` and
        ``_upper``; ``tol, lambda_max, lambda_min, trace, trace_standard_error, loss,
        gradient_norm, gradient_noise, flatness, num_matvecs, num_samples, seconds``, at each
        measured step: see :data:`lightning_optkit.board.tags.HESSIAN_SCALARS`. To TensorBoard also
        the quadrature and, at the end of fit, a figure.

    Cost:
        ``num_matvecs * num_probes`` Hessian-vector products a measurement, or one a parameter up
        to ``exact_below``; 1.5 to 2.8 gradients each, on ``num_batches`` batches. Memory for
        ``num_matvecs`` vectors, one copy of the parameters, and the gradient's graph of each held
        batch.

    When it misleads:
        With few samples ``lambda_max`` is biased upwards. The minimum ratio varies tenfold with the
        tolerance; an interval wider than 0.1 says *unresolved*. A point whose gradient is not small
        is no minimum, whatever the ratio. Weight decay in the loss shifts all eigenvalues up.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[HessianSpectrum(every_n_epochs=5)], logger=False)
    """

    def __init__(
        self,
        every_n_epochs: int | None = EVERY_EPOCH,
        every_n_steps: int | None = None,
        num_batches: int | None = 4,
        num_matvecs: int = 80,
        num_probes: int = 4,
        top_k: int = 5,
        tol_rel: float = 1e-3,
        curvature: Literal["hessian"] = "hessian",
        parameters: list[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        max_overhead: float | None = 0.05,
        loss_fn: StepLossFn | None = None,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        loss_index: int = 0,
        confidence: float = 0.99,
        self_check: bool = True,
        exact_below: int = 1000,
        graphs: Literal["cached", "lockstep"] = "cached",
        name: str | None = None,
    ) -> None:
        super().__init__(
            topic=tags.HESSIAN,
            name=name,
            cadence=Cadence(
                every_n_steps=every_n_steps,
                every_n_epochs=every_n_epochs,
                max_overhead=max_overhead,
            ),
            parameters=parameters,
            num_batches=num_batches,
            mode=mode,
            loss_fn=loss_fn,
            loss_index=loss_index,
            data=data,
            seed=seed,
        )
        if curvature != "hessian":
            raise ValueError(f"`curvature` must be 'hessian', got {curvature!r}.")
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        self._spectrum_of = partial(
            hessian_spectrum,
            num_matvecs=num_matvecs,
            num_probes=num_probes,
            tol_rel=tol_rel,
            confidence=confidence,
            exact_below=exact_below,
        )
        check_settings(
            num_matvecs=num_matvecs,
            num_probes=num_probes,
            tol_rel=tol_rel,
            confidence=confidence,
        )
        self._top_k = top_k
        if graphs not in ("cached", "lockstep"):
            raise ValueError(f"`graphs` must be 'cached' or 'lockstep', got {graphs!r}.")
        self._graphs: Literal["cached", "lockstep"] = graphs
        self._self_check = self_check
        self._refusal: str | None = None  # what is wrong with the layers of this run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refusal = None
        super().on_train_start(trainer, pl_module)

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> HessianReport:
        """Return the spectrum of the loss on the held batches."""
        if self._refusal is not None:
            raise WrongDerivativesError(self._refusal)
        operator = HessianOperator(
            [probe.loss_fn(held.batch, i) for i, held in enumerate(self.held_batches)],
            probe.parameters(self.parameter_names(pl_module)),
            weights=[held.num_samples for held in self.held_batches],
            reduce=sum_over_ranks(trainer),
            graphs=self._graphs,
            self_check=self._self_check,
        )
        generator = torch.Generator().manual_seed(self._seed)
        try:
            spectrum = self._spectrum_of(operator, generator=generator)
        except WrongDerivativesError as error:
            self._refusal = str(error)  # the layers stay wrong, wherever the weights go
            raise
        point = critical_point(operator, spectrum)
        return HessianReport(spectrum, point, float(operator.loss()), int(operator.total_weight))

    def scalars(self, result: HessianReport) -> dict[str, float]:
        """Return all of :data:`~lightning_optkit.board.tags.HESSIAN_SCALARS` but the seconds."""
        spectrum = result.spectrum
        shares = {
            "minimum_ratio": spectrum.positive,
            "negative_ratio": spectrum.negative,
            "zero_ratio": spectrum.zero,
        }
        found: dict[str, float] = {}
        for name, share in shares.items():
            found |= {name: share.value, f"{name}_lower": share.lower, f"{name}_upper": share.upper}
        found |= {
            "tol": spectrum.tol,
            "lambda_max": spectrum.lambda_max,
            "lambda_min": spectrum.lambda_min,
            "trace": spectrum.trace,
            "trace_standard_error": spectrum.trace_standard_error,
            "loss": result.loss,
            "gradient_norm": result.point.gradient_norm,
            "gradient_noise": result.point.gradient_noise,
            "flatness": result.point.flatness,
            "num_matvecs": spectrum.num_matvecs,
            "num_samples": result.num_samples,
        }
        # the noise of one batch, and the flatness at a gradient of zero, are not defined
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def arrays(self, result: HessianReport) -> dict[str, np.ndarray[Any, Any]]:
        """Return the quadrature."""
        spectrum = result.spectrum
        return {
            tags.QUADRATURE: schema.quadrature_array(
                spectrum.ritz_values.numpy(), spectrum.ritz_weights.numpy()
            )
        }

    def figures(self, result: HessianReport) -> dict[str, Figure]:
        """Return the last spectrum as a figure."""
        # matplotlib takes a second to import: only once training is over
        from lightning_optkit.figures.spectrum import spectrum_figure

        return {tags.HESSIAN_FIGURE: spectrum_figure(result.spectrum, num_eigenvalues=self._top_k)}
