"""The Hessian's spectrum, through training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.board import schema, tags
from lightning_optkit.bridge.cadence import Cadence
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, StepLossFn
from lightning_optkit.bridge.sharded_gradient import (
    rank_generator,
    require_shards,
    sharded_gradient,
)
from lightning_optkit.bridge.sharding import at_rest, fsdp_groups, whole_fits
from lightning_optkit.compat.pyhessian_engine import check_pyhessian, pyhessian_spectrum
from lightning_optkit.measures import (
    CriticalPoint,
    GaussNewtonOperator,
    HessianOperator,
    Spectrum,
    WrongDerivativesError,
    critical_point,
    hessian_spectrum,
    layer_spectra,
)
from lightning_optkit.measures.finite_difference import FiniteDifferenceOperator
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
        layers: the spectrum of each layer's block, if asked for.
    """

    spectrum: Spectrum
    point: CriticalPoint
    loss: float
    num_samples: int
    layers: dict[str, Spectrum] = field(default_factory=dict)


# Codes of what a scalar cannot spell; the tags say them too.
_KINDS = ("not critical", "minimum", "saddle", "maximum", "degenerate")
_METHODS = ("exact", "lanczos", "fd", "pyhessian")


def _report(
    operator: HessianOperator, spectrum: Spectrum, layers: dict[str, Spectrum]
) -> HessianReport:
    point = critical_point(operator, spectrum)
    return HessianReport(
        spectrum, point, float(operator.loss()), int(operator.total_weight), layers
    )


_OPERATORS: dict[str, type[HessianOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
}


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
        tol_rel: eigenvalues within ``tol_rel * max|lambda|`` of zero count as zero. ``"auto"``
            takes, at each point, the smallest that resolves the minimum ratio to 0.05.
        curvature: ``"hessian"``, or ``"gauss_newton"``: without the curvature of the net itself,
            never negative. It needs a loss that is one of torch's own loss functions of the
            outputs, and logs under ``optkit-hessian-gauss_newton`` unless ``name`` is given.
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
        engine: ``"optkit"``, or ``"pyhessian"`` for the installed PyHessian's own numbers, to
            reproduce a published one: no bounds, no self-check, a single process.
        sharded: what to do under FSDP2: ``"gather"`` the parameters on each rank while measuring;
            ``"fd"``, leave them in shards and take differences of FSDP's own gradients; ``"auto"``
            gathers where half of the free memory holds what that takes.
        per_layer: measure the block of each layer too, the others held: as many products again
            for each.
        name: tells several instances of one Trainer apart, for example one for each part of a GAN.

    Logged keys:
        ``optkit-hessian/{minimum_ratio, negative_ratio, zero_ratio}``, each with ``_lower`` and
        ``_upper``; ``tol, lambda_max, lambda_min, trace, trace_standard_error, loss,
        gradient_norm, gradient_noise, flatness, kind, method, predicted_change, actual_change,
        num_matvecs, num_samples, seconds``, at each measured step: see
        :data:`lightning_optkit.board.tags.HESSIAN_SCALARS`. To TensorBoard also the quadrature,
        the values by layer, and at the end of fit the figures.

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
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        *,
        num_batches: int | None = 4,
        num_matvecs: int = 80,
        num_probes: int = 4,
        top_k: int = 5,
        tol_rel: float | Literal["auto"] = 1e-3,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
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
        per_layer: bool = False,
        engine: Literal["optkit", "pyhessian"] = "optkit",
        sharded: Literal["auto", "gather", "fd"] = "auto",
        name: str | None = None,
    ) -> None:
        if curvature not in _OPERATORS:
            kinds = " or ".join(map(repr, _OPERATORS))
            raise ValueError(f"`curvature` must be {kinds}, got {curvature!r}.")
        if engine not in ("optkit", "pyhessian"):
            raise ValueError(f"`engine` must be 'optkit' or 'pyhessian', got {engine!r}.")
        if sharded not in ("auto", "gather", "fd"):
            raise ValueError(f"`sharded` must be 'auto', 'gather' or 'fd', got {sharded!r}.")
        if engine == "pyhessian":
            check_pyhessian(num_matvecs=num_matvecs, num_probes=num_probes, tol_rel=tol_rel)
        only_whole = curvature != "hessian" or per_layer or engine == "pyhessian"
        theirs = engine == "pyhessian" and (curvature != "hessian" or per_layer)
        if theirs or (only_whole and sharded == "fd"):
            raise ValueError(
                "`sharded='fd'` and `engine='pyhessian'` measure the whole Hessian and nothing "
                f"else, got curvature={curvature!r}, per_layer={per_layer}, engine={engine!r} and "
                f"sharded={sharded!r}."
            )
        if name is None and curvature != "hessian":
            name = curvature
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
            graphs=graphs,
        )
        if exact_below < 0:
            raise ValueError(f"`exact_below` must be at least 0, got {exact_below}.")
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        settings: dict[str, Any] = {
            "num_matvecs": num_matvecs,
            "num_probes": num_probes,
            "tol_rel": tol_rel,
            "confidence": confidence,
        }
        check_settings(**settings)
        self._settings = settings | {"exact_below": exact_below}
        self._operator_type = _OPERATORS[curvature]
        self._per_layer = per_layer
        self._top_k = top_k
        self._self_check = self_check
        self._engine = engine
        self._sharded = sharded
        self._only_whole = only_whole
        self._by_differences = False
        self._refusal: str | None = None  # what is wrong with the layers of this run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refusal = None
        if self._engine == "pyhessian" and trainer.world_size > 1:
            raise MisconfigurationException(
                "`engine='pyhessian'` needs a single process, got "
                f"{trainer.world_size}: PyHessian sums nothing over ranks. Use `engine='optkit'`."
            )
        super().on_train_start(trainer, pl_module)
        self._by_differences = self._needs_differences(trainer, pl_module)

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> HessianReport:
        """Return the spectrum of the loss on the held batches."""
        if self._refusal is not None:
            raise WrongDerivativesError(self._refusal)
        if self._by_differences:
            return self._report_of_shards(trainer, pl_module, probe)
        operator = self._operator_type(
            **self.loss_terms(trainer, probe, self.parameter_names(pl_module)),
            self_check=self._self_check,
        )
        generator = torch.Generator().manual_seed(self._seed)
        try:
            spectrum = self._spectrum(operator, generator)
            layers = (
                layer_spectra(operator, generator=generator, **self._settings)
                if self._per_layer
                else {}
            )
        except WrongDerivativesError as error:
            self._refusal = str(error)  # the layers stay wrong, wherever the weights go
            raise
        return _report(operator, spectrum, layers)

    def _spectrum(self, operator: HessianOperator, generator: torch.Generator) -> Spectrum:
        if self._engine == "optkit":
            return hessian_spectrum(operator, generator=generator, **self._settings)
        operator @ torch.ones(operator.shape[0])  # PyHessian has no self-check: ours comes first
        kept = ("num_matvecs", "num_probes", "tol_rel")
        return pyhessian_spectrum(
            operator.loss_fns,
            operator.params,
            operator.weights,
            seed=self._seed,
            **{name: self._settings[name] for name in kept},
        )

    def _report_of_shards(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> HessianReport:
        """Return the measurement by finite differences of FSDP's own gradients."""
        names, held = self.parameter_names(pl_module), self.held_batches
        with sharded_gradient(trainer, pl_module, probe, names=names, held=held) as gradient:
            operator: Any = FiniteDifferenceOperator(
                gradient.functions,
                gradient.parameters,
                weights=gradient.weights,
                inner_sum=gradient.inner_sum,
            )
            settings = self._settings | {"exact_below": 0}
            generator = rank_generator(trainer, self._seed)
            spectrum = hessian_spectrum(operator, generator=generator, **settings)
            return _report(operator, replace(spectrum, method="fd"), {})

    def _needs_differences(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Return whether parameters stay in shards while measuring."""
        if not fsdp_groups(pl_module):
            if self._sharded == "fd":
                raise MisconfigurationException(
                    "`sharded='fd'` needs a module sharded by `fully_shard` under "
                    "`ModelParallelStrategy`, got whole parameters. Leave it at 'auto'."
                )
            return False
        lanes = self._settings["num_probes"] if self._graphs == "lockstep" else 1
        vectors = lanes * self._settings["num_matvecs"]
        gathers = self._sharded == "gather" or (
            self._sharded == "auto" and whole_fits(trainer, pl_module, num_vectors=vectors)
        )
        if not gathers and self._only_whole:
            raise MisconfigurationException(
                "The gathered parameters do not fit into half of the free memory, and in shards "
                "only the whole Hessian can be measured. Leave out `per_layer` and `curvature`, "
                "take fewer `num_matvecs`, or set `sharded='gather'`."
            )
        if not gathers:
            with at_rest(pl_module):  # a validation leaves parameters gathered
                require_shards(pl_module, self.parameter_names(pl_module))
        return not gathers

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
            "kind": _KINDS.index(result.point.kind),
            "method": _METHODS.index(spectrum.method),
            "num_matvecs": spectrum.num_matvecs
            + sum(layer.num_matvecs for layer in result.layers.values()),
            "num_samples": result.num_samples,
        }
        if (descent := result.point.descent) is not None:
            found |= {"predicted_change": descent.predicted[descent.side]}
            found |= {"actual_change": descent.actual[descent.side]}
        # the noise of one batch, and the flatness at a gradient of zero, are not defined
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def arrays(self, result: HessianReport) -> dict[str, np.ndarray[Any, Any]]:
        """Return the quadrature, and the values by layer if asked for."""
        spectrum = result.spectrum
        found = {
            tags.QUADRATURE: schema.quadrature_array(
                spectrum.ritz_values.numpy(), spectrum.ritz_weights.numpy()
            )
        }
        if result.layers:
            found[tags.LAYER_NAMES] = schema.names_array(list(result.layers))
            found[tags.LAYERS] = schema.layers_array(
                [
                    (s.lambda_max, s.lambda_min, s.trace, s.minimum_ratio, *s.minimum_ratio_bounds)
                    for s in result.layers.values()
                ]
            )
        return found

    def figures(self, result: HessianReport) -> dict[str, Figure]:
        """Return the last spectrum, and the last values by layer, as figures."""
        # matplotlib takes a second to import: only once training is over
        from lightning_optkit.figures.layers import layers_figure
        from lightning_optkit.figures.spectrum import spectrum_figure

        found = {
            tags.HESSIAN_FIGURE: spectrum_figure(
                result.spectrum, num_eigenvalues=self._top_k, matrix=self._operator_type.matrix_name
            )
        }
        if result.layers:
            found[tags.LAYERS_FIGURE] = layers_figure(result.layers)
        return found
