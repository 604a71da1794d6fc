"""How sharp is the minimum that training finds?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_optkit.board import tags
from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.batch_parts import batch_parts, num_rows
from lightning_optkit.bridge.cadence import Cadence
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, StepLossFn
from lightning_optkit.measures import HessianOperator, WrongDerivativesError
from lightning_optkit.measures.eigenpairs import top_eigenpairs
from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.measures.rescaling import Invariance, rescale_invariance
from lightning_optkit.measures.sharpness import (
    AverageSharpness,
    BallSharpness,
    EpsilonSharpness,
    average_sharpness,
    ball_sharpness,
    epsilon_sharpness,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sharpness", "SharpnessReport"]

Kind = Literal["epsilon", "ball", "adaptive", "average", "adaptive_average"]

_KINDS = ("epsilon", "ball", "adaptive", "average", "adaptive_average")
_NUM_STEPS = 10  # of ascent in a ball: on nets the rise settles within them to a few per cent
_LAMBDA_RTOL = 1e-2  # of lambda_max: kinds of sharpness differ by factors


@dataclass(frozen=True)
class SharpnessReport:
    """One measurement of :class:`Sharpness`.

    Attributes:
        epsilon: Keskar's sharpness for each size of the box.
        ball: the rise in a ball, if asked for.
        adaptive: the rise in a ball relative to each parameter, if asked for.
        average: the mean rise under perturbations, if asked for.
        adaptive_average: the mean rise relative to each parameter, if asked for.
        per_batch: the mean over small batches of the sharpness of each one's loss, by kind.
        lambda_max: largest eigenvalue of the Hessian; NaN where a layer has no second derivative.
        lambda_max_error: estimate of its error.
        loss: on the held batches.
        num_samples: held by all ranks together.
    """

    epsilon: tuple[EpsilonSharpness, ...]
    ball: BallSharpness | None
    adaptive: BallSharpness | None
    average: AverageSharpness | None
    adaptive_average: AverageSharpness | None
    per_batch: dict[str, float] = field(default_factory=dict)
    lambda_max: float = math.nan
    lambda_max_error: float = math.nan
    loss: float = math.nan
    num_samples: int = 0


class Sharpness(Observer[SharpnessReport]):
    r"""Logs how much the loss rises around the weights, by several definitions side by side.

    **Observer.** Training is bit-identical with or without it.

    No single number is sharpness. In the place of one there are Keskar's (a box of a thousandth),
    the rise in a ball of radius ρ, as in sharpness-aware minimization, and that of Gaussian
    perturbations; absolute ones and *adaptive* ones, which no rescaling of layers changes. At the
    end the net's own layers are rescaled where that leaves its function alone, and the callback
    prints which of the measures moved.

    Args:
        kinds: of ``"epsilon"``, ``"ball"``, ``"adaptive"``, ``"average"``, ``"adaptive_average"``.
        every_n_epochs: epochs between measurements; ``None`` = the end alone.
        at_end: measure at the end of training.
        num_batches: training batches held; ``None`` takes all of ``data``.
        epsilon: size of Keskar's box, one or several.
        subspace_dim: measure Keskar's in a random subspace of this dimension (he takes 100);
            ``None`` = in all parameters.
        rho: radius of the ball, and standard deviation of each parameter in an average (relative
            to the parameter in ``"adaptive_average"``).
        adaptive_rho: radius of the ball in which lengths are relative to each parameter.
        num_samples: perturbations of an average, even.
        per_batch_size: take the kinds that are maxima also for batches of so many samples alone,
            averaged: m-sharpness.
        invariance_check: rescale layers at the end and print what moved: costs as much as another
            measurement.
        parameters: glob patterns of parameter names; ``None`` takes all trainable ones.
        mode: ``"eval"`` (dropout off, running statistics of BatchNorm) or ``"train"``.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches, subspace and perturbations.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        max_overhead: largest share of the training time to spend, in (0, 1]; ``None`` = no limit.
            The end of training is measured in any case.
        name: tells several instances of one Trainer apart.

    Logged keys:
        ``optkit-sharpness/{epsilon, ball, adaptive, average, lambda_max, loss, num_samples,
        seconds}``, the first three and ``lambda_max`` with ``_lower``, averages with
        ``_standard_error``, at each measured step: see
        :data:`lightning_optkit.board.tags.SHARPNESS_SCALARS`. At the end of fit a figure.

    Cost:
        About 35 losses with gradients for each ``epsilon``, 11 for a ball, ``num_samples`` losses
        for an average, and 10 to 30 Hessian-vector products for ``lambda_max``, on ``num_batches``
        batches. Memory for ten copies of the parameters in float64 on the CPU while ``epsilon`` is
        measured, and ``subspace_dim`` more where that is given.

    When it misleads:
        Absolute sharpness can be made arbitrary by a rescaling that leaves the net's function alone
        (Dinh et al.), so compare nets of one kind, trained alike. BatchNorm makes a net's function
        independent of the size of its weights: absolute and adaptive measures can then order two
        solutions differently. A maximum that ascent finds is a lower bound.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Sharpness(kinds=("ball", "adaptive"))], logger=False)
    """

    def __init__(
        self,
        kinds: Sequence[Kind] = ("epsilon", "ball", "adaptive", "average"),
        *,
        every_n_epochs: int | None = None,
        at_end: bool = True,
        num_batches: int | None = 4,
        epsilon: float | Sequence[float] = (1e-3, 5e-4),
        subspace_dim: int | None = None,
        rho: float = 0.05,
        adaptive_rho: float = 0.5,
        num_samples: int = 20,
        per_batch_size: int | None = None,
        invariance_check: bool = True,
        parameters: list[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        loss_index: int = 0,
        max_overhead: float | None = 0.05,
        name: str | None = None,
    ) -> None:
        if every_n_epochs is None and not at_end:
            raise ValueError(
                "`every_n_epochs` must be given where `at_end` is False, got None: nothing would "
                "ever be measured. Write `every_n_epochs=1`."
            )
        super().__init__(
            topic=tags.SHARPNESS,
            name=name,
            cadence=Cadence(
                every_n_epochs=every_n_epochs,
                max_overhead=max_overhead,
                at_end="alone" if at_end and every_n_epochs is None else at_end,
            ),
            parameters=parameters,
            num_batches=num_batches,
            mode=mode,
            loss_fn=loss_fn,
            loss_index=loss_index,
            data=data,
            seed=seed,
        )
        is_sequence = isinstance(kinds, Sequence) and not isinstance(kinds, str)
        if not is_sequence or not kinds or not all(kind in _KINDS for kind in kinds):
            raise ValueError(
                f"`kinds` must be a tuple of {', '.join(map(repr, _KINDS))}, got {kinds!r}. Write "
                "`kinds=('ball', 'adaptive')`."
            )
        sizes: list[Any] = list(epsilon) if isinstance(epsilon, Sequence) else [epsilon]
        for name_of, value in (
            *(("epsilon", size) for size in sizes or [epsilon]),
            ("rho", rho),
            ("adaptive_rho", adaptive_rho),
        ):
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"`{name_of}` must be positive and finite, got {value!r}.")
        if not is_count(num_samples, least=4) or num_samples % 2:
            raise ValueError(
                f"`num_samples` must be an even integer of at least 4, got {num_samples!r}: each "
                "perturbation comes with its opposite."
            )
        for name_of, number in (
            ("subspace_dim", subspace_dim),
            ("per_batch_size", per_batch_size),
        ):
            if number is not None and not is_count(number, least=1):
                raise ValueError(
                    f"`{name_of}` must be an integer of at least 1 or None, got {number!r}."
                )
        self._kinds = tuple(dict.fromkeys(kinds))
        self._sizes = [float(size) for size in sizes]
        self._subspace_dim = subspace_dim
        self._rho = {False: rho, True: adaptive_rho}
        self._num_samples = num_samples
        self._per_batch_size = per_batch_size
        self._invariance_check = invariance_check
        self._history: list[tuple[int, SharpnessReport]] = []
        self._invariance: Invariance | None = None

    # -- hooks ----------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._invariance_check and self._cadence.includes_end:
            step = trainer.global_step
            with self._warning_once(step), self._probe(trainer, pl_module) as probe:
                self._invariance = self._check_invariance(trainer, pl_module, probe)
            if self._invariance is not None:
                rank_zero_info(f"{type(self).__name__}: {self._invariance}")
        super().on_train_end(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        before = self._latest
        super()._measure(trainer, pl_module, step)
        if self._latest is not None and self._latest is not before:
            self._history.append(self._latest)

    def _close(self) -> None:
        super()._close()
        self._history, self._invariance = [], None

    # -- one measurement ------------------------------------------------------------------------

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> SharpnessReport:
        """Return all kinds of sharpness of the loss on the held batches."""
        operator = self._operator(trainer, pl_module, probe)
        found: dict[str, Any] = {
            kind: self._maximum_or_mean(kind)(operator) if kind in self._kinds else None
            for kind in _KINDS[1:]
        }
        sizes = self._sizes if "epsilon" in self._kinds else []
        lambda_max, error = self._lambda_max(operator)
        return SharpnessReport(
            epsilon=tuple(self._epsilon(size)(operator) for size in sizes),
            **found,
            per_batch=self._per_batch(trainer, pl_module, probe),
            lambda_max=lambda_max,
            lambda_max_error=error,
            loss=float(operator.loss()),
            num_samples=int(operator.total_weight),
        )

    def scalars(self, result: SharpnessReport) -> dict[str, float]:
        """Return those of :data:`~lightning_optkit.board.tags.SHARPNESS_SCALARS` asked for.

        The seconds are the base class's.
        """
        found = {"loss": result.loss, "num_samples": float(result.num_samples)}
        for i, box in enumerate(result.epsilon):
            name = "epsilon" if i == 0 else f"epsilon_{box.epsilon:g}"
            found |= {name: box.value, f"{name}_lower": box.lower}
        for name in ("ball", "adaptive"):
            if (ball := getattr(result, name)) is not None:
                found |= {name: ball.value, f"{name}_lower": ball.one_step}
        for name in ("average", "adaptive_average"):
            if (mean := getattr(result, name)) is not None:
                found |= {name: mean.value, f"{name}_standard_error": mean.standard_error}
        found |= {f"{kind}_per_batch": value for kind, value in result.per_batch.items()}
        found |= {
            "lambda_max": result.lambda_max,
            "lambda_max_lower": result.lambda_max - result.lambda_max_error,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def figures(self, result: SharpnessReport) -> dict[str, Figure]:
        """Return the kinds of sharpness through training, and what a rescaling does to them."""
        # matplotlib takes a second to import: only once training is over
        from lightning_optkit.figures.sharpness import sharpness_figure

        steps = [step for step, _ in self._history]
        history = [self.scalars(report) for _, report in self._history]
        return {tags.SHARPNESS_FIGURE: sharpness_figure(steps, history, self._invariance)}

    # -- kinds ----------------------------------------------------------------------------------

    def _operator(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> HessianOperator:
        terms = self.loss_terms(trainer, probe, self.parameter_names(pl_module))
        return HessianOperator(**terms)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)  # the same at each point and on each rank

    def _epsilon(self, size: float) -> Callable[[LossSurface], EpsilonSharpness]:
        return lambda surface: epsilon_sharpness(
            surface, epsilon=size, subspace_dim=self._subspace_dim, generator=self._generator()
        )

    def _maximum_or_mean(self, kind: str) -> Callable[[LossSurface], Any]:
        is_adaptive = kind.startswith("adaptive")
        if kind in ("ball", "adaptive"):
            return lambda surface: ball_sharpness(
                surface,
                rho=self._rho[is_adaptive],
                adaptive=is_adaptive,
                num_steps=_NUM_STEPS,
                generator=self._generator(),
            )
        return lambda surface: average_sharpness(
            surface,
            rho=self._rho[False],
            adaptive=is_adaptive,
            num_samples=self._num_samples,
            generator=self._generator(),
        )

    def _kind(self, kind: str) -> Callable[[LossSurface], float]:
        """Return one kind of sharpness as a number of a surface."""
        of = self._epsilon(self._sizes[0]) if kind == "epsilon" else self._maximum_or_mean(kind)
        return lambda surface: float(of(surface).value)

    def _lambda_max(self, operator: HessianOperator) -> tuple[float, float]:
        try:
            top = top_eigenpairs(operator, 1, rtol=_LAMBDA_RTOL, generator=self._generator())
        except WrongDerivativesError:  # first derivatives, of all other kinds, need none of this
            return math.nan, math.nan
        return float(top.values[0]), float(top.errors[0])

    def _per_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> dict[str, float]:
        """Return the mean of each maximum over batches of ``per_batch_size`` samples."""
        if self._per_batch_size is None:
            return {}
        terms = self.loss_terms(trainer, probe, self.parameter_names(pl_module))
        parts = [
            (part, i)
            for i, held in enumerate(self.held_batches)
            for part in batch_parts(held.batch, self._per_batch_size)
        ]
        surface = LossSurface(
            [probe.loss_fn(part, i) for part, i in parts],
            terms["params"],
            weights=[num_rows(part) or 1 for part, _ in parts],
            reduce=terms["reduce"],
        )
        maxima = [kind for kind in self._kinds if kind in ("epsilon", "ball", "adaptive")]
        return {kind: surface.mean_over_batches(self._kind(kind)) for kind in maxima}

    def _check_invariance(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> Invariance:
        measures: dict[str, Callable[[Any], float]] = {k: self._kind(k) for k in self._kinds}
        measures["lambda_max"] = lambda operator: self._lambda_max(operator)[0]
        return rescale_invariance(self._operator(trainer, pl_module, probe), measures)
