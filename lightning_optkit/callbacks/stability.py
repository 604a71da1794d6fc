"""How close is training to the edge of stability?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.board import tags
from lightning_optkit.bridge.cadence import Cadence
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, StepLossFn, select_parameters
from lightning_optkit.bridge.sharding import at_rest
from lightning_optkit.measures import (
    GradientStep,
    HessianOperator,
    StabilityThreshold,
    WrongDerivativesError,
    stability_threshold,
    step_along_gradient,
)
from lightning_optkit.measures.eigenpairs import Eigenpairs, top_eigenpairs
from lightning_optkit.measures.lanczos import SymmetricOperator
from lightning_optkit.measures.update_rules import update_rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Stability", "StabilityReport"]

# Pairs that have to converge. At the edge of stability eigenvectors turn fast: on a net of 323
# weights, at a tolerance of 1e-3, one alone missed it in 2 of 120 steps, cold starts in 1 to 3;
# with the runner-up converged too none did.
_NUM_PAIRS = 2
# Measurements from one random start to the next: an eigenvector that has nothing in common with the
# followed ones is not found from them.
_FOLLOWED = 50
_MAX_POINTS = 2000  # of the figure: more than it has pixels


@dataclass(frozen=True)
class StabilityReport:
    """One measurement of :class:`Stability`.

    Attributes:
        lambda_max: largest eigenvalue of the preconditioned Hessian.
        lambda_max_error: estimate of its error.
        threshold: the largest eigenvalue that is stable; NaN where the optimizer's is not known.
        learning_rate: of the step just made; NaN where the optimizer has none.
        along_gradient: the loss along the gradient, to second order.
        num_matvecs: products spent, the self-check's included.
    """

    lambda_max: float
    lambda_max_error: float
    threshold: float
    learning_rate: float
    along_gradient: GradientStep
    num_matvecs: int

    @property
    def ratio(self) -> float:
        """``lambda_max / threshold``: above 1 a step along the sharpest direction overshoots."""
        return self.lambda_max / self.threshold


class Stability(Observer[StabilityReport]):
    r"""Logs the largest curvature relative to what the optimizer is stable at.

    **Observer.** Training is bit-identical with or without it.

    For plain gradient descent the ratio is :math:`\lambda_{max} \eta / 2`. Momentum moves the
    limit; an adaptive optimizer is measured on the Hessian as it scales it,
    :math:`D^{1/2} (H + W) D^{1/2}`. SGD with momentum or Nesterov, Adam, AdamW, NAdam, RAdam,
    Adamax, RMSprop and Adagrad are known, with any parameter groups: see
    :func:`~lightning_optkit.measures.stability_threshold`. For other optimizers the plain Hessian's
    largest eigenvalue is logged, with a warning before the first step. It is followed from step to
    step: each measurement starts from the last one's two largest eigenvectors, every 50th afresh.

    Args:
        every_n_steps: optimizer steps between measurements; 1 unless ``every_n_epochs`` is given.
        every_n_epochs: epochs between measurements, in place of ``every_n_steps``.
        num_batches: training batches held; too few bias ``lambda_max`` upwards. ``None`` takes all
            of ``data``.
        parameters: glob patterns of parameter names; all must be the optimizer's. ``None`` takes
            all trainable ones that it owns.
        mode: ``"eval"`` (dropout off, running statistics of BatchNorm) or ``"train"``.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches and the first start vector.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        optimizer_index: which of the module's optimizers, counted from 0.
        rtol: tolerance for ``lambda_max``, relative to it; at least 0.
        self_check: compare the first product of the run with an independent second derivative, and
            refuse a wrong one.
        graphs: ``"cached"`` keeps one gradient graph for each held batch; ``"lockstep"`` one at a
            time.
        max_overhead: largest share of the training time to spend, in (0, 1]; ``None`` = no limit.
            The end of training is always measured.
        name: tells several instances of one Trainer apart, for example one for each optimizer.

    Logged keys:
        ``optkit-stability/{threshold, ratio, lambda_max, lambda_max_error, step_along_gradient,
        learning_rate, num_matvecs, seconds}``, at each measured step: see
        :data:`lightning_optkit.board.tags.STABILITY_SCALARS`. What is not defined is left out: the
        threshold and the ratio of an unknown optimizer, the threshold at a learning rate of zero,
        the step where the loss curves down along the gradient. At the end of fit a figure.

    Cost:
        One Hessian-vector product for the step, and for ``lambda_max`` 6 to 30 from a fresh start;
        from then on 2 or 3 where training is calm, 9 to 16 where eigenvectors turn fast; 1.5 to 2.8
        gradients each, on ``num_batches`` batches. Memory for 40 vectors, one copy of the
        parameters, and the gradient's graph of each held batch. A resumed run starts cold once.

    When it misleads:
        The threshold is that of a quadratic and a preconditioner that stands still. Noise of small
        batches keeps training below it; clipped gradients and averaged weights move it. Adam meets
        a parameter without any gradient with a step of 1 / eps, and one batch that uses it makes
        the ratio huge. With few samples ``lambda_max`` is biased upwards.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Stability(every_n_steps=10)], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        *,
        num_batches: int | None = 4,
        parameters: list[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        loss_index: int = 0,
        optimizer_index: int = 0,
        rtol: float = 1e-3,
        self_check: bool = True,
        graphs: Literal["cached", "lockstep"] = "cached",
        max_overhead: float | None = 0.05,
        name: str | None = None,
    ) -> None:
        if every_n_steps is None and every_n_epochs is None:
            every_n_steps = 1
        super().__init__(
            topic=tags.STABILITY,
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
        if optimizer_index < 0:
            raise ValueError(f"`optimizer_index` must be at least 0, got {optimizer_index}.")
        if not rtol >= 0:  # NaN neither
            raise ValueError(f"`rtol` must be at least 0, got {rtol}.")
        self._optimizer_index = optimizer_index
        self._rtol = rtol
        self._self_check = self_check
        self._forget()

    def _forget(self) -> None:
        """Drop all that belongs to one run."""
        self._optimizer: Optimizer | None = None
        self._has_threshold = False
        self._hook: RemovableHandle | None = None
        self._stepped_with: list[dict[str, Any]] = []  # hyperparameters of the last step
        self._vectors: Tensor | None = None  # where the next measurement starts from
        self._num_measured = 0
        self._checked: list[str] = []  # parameters whose products were compared
        self._noise = 0.0  # that the comparison found
        self._refusal: str | None = None  # what is wrong with the layers of this run
        self._history: list[tuple[int, StabilityReport]] = []

    # -- hooks ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        if self._optimizer_index >= len(trainer.optimizers):
            raise MisconfigurationException(
                "`optimizer_index` must be that of one of the module's "
                f"{len(trainer.optimizers)} optimizers, counted from 0, got "
                f"{self._optimizer_index}."
            )
        self._optimizer = trainer.optimizers[self._optimizer_index]
        self._has_threshold = self._warned_of_none(self._optimizer)
        # not what `param_groups` says after the step: a scheduler has moved on by then
        self._hook = self._optimizer.register_step_pre_hook(self._remember)
        super().on_train_start(trainer, pl_module)

    def parameter_names(self, pl_module: pl.LightningModule) -> list[str]:
        """Return the names of the parameters to measure in: those that the optimizer owns."""
        with at_rest(pl_module):  # FSDP2 gives gathered parameters another identity
            chosen = select_parameters(pl_module, self._patterns)
        assert self._optimizer is not None  # set when training starts
        owned = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        names = [name for name, p in chosen.items() if id(p) in owned]
        strangers = [name for name in chosen if name not in names]
        if not names or (strangers and self._patterns is not None):
            raise ValueError(
                f"`parameters` must be owned by optimizer {self._optimizer_index}, got "
                f"{', '.join(strangers[:5])}. Set `optimizer_index` to the one that owns them, or "
                "leave them out."
            )
        return names

    def _close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._forget()
        super()._close()

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        before = self._latest
        super()._measure(trainer, pl_module, step)
        if self._latest is not None and self._latest is not before:
            self._history.append(self._latest)
        if len(self._history) > _MAX_POINTS:
            del self._history[1:-1:2]  # the older, the sparser

    # -- one measurement ------------------------------------------------------------------------

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> StabilityReport:
        """Return the largest curvature beside the optimizer's limit, on the held batches."""
        if self._refusal is not None:
            raise WrongDerivativesError(self._refusal)
        names = self.parameter_names(pl_module)
        limit = self._limit(pl_module, names)
        operator = self._operator(trainer, probe, names)
        try:
            along_gradient = step_along_gradient(operator)
        except WrongDerivativesError as error:
            self._refusal = str(error)  # the layers stay wrong, wherever the weights go
            raise
        self._checked, self._noise = names, operator.noise
        top = self._followed(operator if limit is None else limit.precondition(operator))
        rate = self._groups()[0].get("lr", math.nan) if limit is None else limit.learning_rate
        return StabilityReport(
            lambda_max=float(top.values[0]),
            lambda_max_error=float(top.errors[0]),
            threshold=math.nan if limit is None else limit.threshold,
            learning_rate=float(rate),
            along_gradient=along_gradient,
            num_matvecs=operator.num_matvecs,
        )

    def scalars(self, result: StabilityReport) -> dict[str, float]:
        """Return those of :data:`~lightning_optkit.board.tags.STABILITY_SCALARS` that are defined.

        The seconds are the base class's.
        """
        found = {
            "threshold": result.threshold,
            "ratio": result.ratio,
            "lambda_max": result.lambda_max,
            "lambda_max_error": result.lambda_max_error,
            "step_along_gradient": result.along_gradient.step,
            "learning_rate": result.learning_rate,
            "num_matvecs": result.num_matvecs,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def figures(self, result: StabilityReport) -> dict[str, Figure]:
        """Return the largest eigenvalue against the threshold, through training."""
        # matplotlib takes a second to import: only once training is over
        from lightning_optkit.figures.stability import stability_figure

        return {
            tags.STABILITY_FIGURE: stability_figure(
                [step for step, _ in self._history],
                [report.lambda_max for _, report in self._history],
                [report.threshold for _, report in self._history],
            )
        }

    def _operator(self, trainer: pl.Trainer, probe: Probe, names: list[str]) -> HessianOperator:
        operator = HessianOperator(
            **self.loss_terms(trainer, probe, names),
            # once a run: it costs more than the products of a measurement
            self_check=self._self_check and names != self._checked,
        )
        operator.noise = max(operator.noise, self._noise)
        return operator

    def _followed(self, operator: SymmetricOperator) -> Eigenpairs:
        """Return the largest eigenpairs, starting from those of the last measurement."""
        start = self._vectors
        thawed = start is not None and start.shape[1] != operator.shape[0]
        if thawed or self._num_measured % _FOLLOWED == 0:
            start = None
        top = top_eigenpairs(
            operator,
            _NUM_PAIRS,
            which="largest",
            rtol=self._rtol,
            start=start,
            generator=torch.Generator().manual_seed(self._seed),
        )
        self._vectors = top.vectors
        self._num_measured += 1
        return top

    def _limit(self, pl_module: pl.LightningModule, names: list[str]) -> StabilityThreshold | None:
        if not self._has_threshold:
            return None
        assert self._optimizer is not None  # set when training starts
        params = dict(pl_module.named_parameters())
        return stability_threshold(
            self._optimizer, {name: params[name] for name in names}, groups=self._groups()
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Return the hyperparameters of the last step."""
        assert self._optimizer is not None  # set when training starts
        present = self._optimizer.param_groups
        return self._stepped_with if len(self._stepped_with) == len(present) else present

    def _remember(self, optimizer: Optimizer, *_: Any) -> None:
        """Copy the hyperparameters that a step is made with."""
        self._stepped_with = [
            {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params"
            }
            for group in optimizer.param_groups
        ]

    def _warned_of_none(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer has a threshold, with a warning if it has none."""
        try:
            for group in optimizer.param_groups:
                update_rule(optimizer, group, {})
        except (TypeError, ValueError) as error:
            rank_zero_warn(
                "Stability logs `lambda_max` of the plain Hessian, without a threshold and a "
                f"ratio. {error}"
            )
            return False
        return True
