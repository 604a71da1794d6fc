"""Gradients, updates and activations, layer by layer, and the gradient's noise scale."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optkit.board import schema, tags
from lightning_optkit.bridge.arguments import is_count
from lightning_optkit.bridge.beside_training import BesideTraining
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.due_steps import DueSteps, begins_step
from lightning_optkit.bridge.half_batches import BatchGradients
from lightning_optkit.bridge.measuring import MeasuringCallback
from lightning_optkit.bridge.noise_source import (
    NoiseSource,
    gradients_of_halves,
    gradients_of_step,
)
from lightning_optkit.bridge.probe import StepLossFn, select_parameters
from lightning_optkit.bridge.reduce import require_whole_parameters, sum_over_ranks
from lightning_optkit.bridge.report import report
from lightning_optkit.bridge.sharding import at_rest
from lightning_optkit.bridge.step_batches import BatchesOfStep, StepBatches
from lightning_optkit.bridge.step_visit import StepVisit
from lightning_optkit.bridge.together import together
from lightning_optkit.measures.activations import ActivationRecorder, Activations
from lightning_optkit.measures.adaptive_rates import effective_rate, mean_rate
from lightning_optkit.measures.gradient_report import GradientReport
from lightning_optkit.measures.gradients import (
    StepTable,
    step_table,
    tensor_norm,
    tensor_norms,
    update_norms,
)
from lightning_optkit.metrics.gradient_noise import GradientNoiseScale

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["GradientMonitor"]

_MAX_POINTS = 200  # of the history: as many columns as a heatmap can show


@dataclass
class _Point:
    """What is being measured: it spans the batches of a step, or of several optimizers' steps."""

    step: int
    seconds: float = 0.0
    halves: BatchGradients | None = None
    activations: Activations | None = None
    failure: Exception | None = None

    @contextmanager
    def holding_failure(self) -> Iterator[None]:
        """Keep an exception until all ranks can hear of it."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error

    def raise_failure(self) -> None:
        """Raise what was kept."""
        if self.failure is not None:
            raise self.failure


class GradientMonitor(MeasuringCallback):
    r"""Logs gradient, update and trust ratio of each layer, the noise scale, dead units.

    **Observer.** Training is bit-identical with or without it.

    It watches single steps of training: the first, then every ``every_n_steps``-th, and one at the
    end. Gradients are those that training itself computes: unscaled, summed over accumulation and
    ranks, before clipping. A layer is a module that owns parameters.

    Args:
        every_n_steps: optimizer steps between measured ones, at least 1.
        per_layer: measure each layer; else only the whole net.
        noise_scale: measure the gradient's noise scale: from accumulated batches, else from the
            ranks of DDP, else from two halves of the batch in a forward and backward pass more.
        activations: look for dead ReLUs and saturated sigmoids and tanhs, in a forward pass more.
        noise_window: measured points over which the noise scale is averaged, at least 1. Its error
            falls with their root; points that are far back are of other weights.
        parameters: glob patterns of parameter names, such as ``["critic.*"]``; ``None`` takes all
            trainable ones.
        mode: ``"train"`` (BatchNorm and dropout as in training) or ``"eval"``, in the passes that
            are made more.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``, in these passes.
        loss_index: which ``manual_backward`` of a step gives their loss, counted from 0.
        seed: seeds dropout in these passes.
        max_overhead: largest share of the training time to spend, in (0, 1]; ``None`` = no limit.
            The first step and one at the end are always measured.
        name: tells several instances of one Trainer apart, for example one for each part of a GAN.

    Logged keys:
        ``optkit-gradient/{gradient_norm, weight_norm, update_norm, trust_ratio, update_ratio,
        effective_learning_rate, noise_scale, noise_scale_standard_error, critical_batch_size,
        noise_source, batch_size, dead, saturated, loss, seconds}`` at each measured step: see
        :data:`lightning_optkit.board.tags.GRADIENT_SCALARS`. What is not defined is left out. To
        TensorBoard also the same by layer, and at the end of fit the figures.

    Cost:
        Of other steps, four calls that return at once. A measured step copies the weights, reads
        them, the gradients and the optimizer's state once or twice, and makes a forward pass for
        the activations and, if the noise comes from halves, a forward and backward pass.

    When it misleads:
        The noise scale takes the loss for a mean over independent samples: BatchNorm, losses over
        pairs and masks of unequal length break that. Its error bar knows the scatter of the points
        alone. A callback that changes gradients must come after it in the Trainer's list. Under
        manual optimization the gradient is what the step is given, after your own clipping.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientMonitor(every_n_steps=100)], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        per_layer: bool = True,
        noise_scale: bool = True,
        *,
        activations: bool = True,
        noise_window: int = 20,
        parameters: list[str] | None = None,
        mode: Literal["eval", "train"] = "train",
        loss_fn: StepLossFn | None = None,
        loss_index: int = 0,
        seed: int = 0,
        max_overhead: float | None = 0.05,
        name: str | None = None,
    ) -> None:
        super().__init__(
            topic=tags.GRADIENT,
            name=name,
            parameters=parameters,
            num_batches=1,  # none is held: gradients are those of training
            mode=mode,
            loss_fn=loss_fn,
            loss_index=loss_index,
            seed=seed,
        )
        if not is_count(noise_window, least=1):
            raise ValueError(
                f"`noise_window` must be an integer of at least 1, got {noise_window!r}. 1 takes "
                "each point for itself, without an error bar."
            )
        self._cadence = DueSteps(every_n_steps=every_n_steps, max_overhead=max_overhead)
        self._per_layer = per_layer
        self._wants_noise = noise_scale
        self._wants_activations = activations
        self._noise = GradientNoiseScale(window=noise_window)
        self._beside = BesideTraining(mode=mode, loss_fn=loss_fn, loss_index=loss_index, seed=seed)
        self._visit = StepVisit(self._before, self._after, is_chosen=self._is_chosen)
        self._batches = StepBatches(tensor_norm)
        self._point: _Point | None = None
        self.history: list[GradientReport] = []
        """Measurements of the last fit, oldest first; of more than 200 the older are thinned."""

    # -- hooks ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # what a checkpoint holds is loaded after this
            self._close()
            self._warned = set()
            self._cadence.forget()
            self._noise.reset()
            self.history = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_whole_parameters(trainer.strategy, type(self).__name__)
        with at_rest(pl_module):
            select_parameters(pl_module, self._patterns)  # refuses a pattern that matches none
        self._cadence.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._point is None and not self._cadence.before_batch(trainer, batch_idx):
            return
        is_new = self._point is None
        point = self._point = self._point or _Point(logger_step(trainer, after_batch=True))
        with self._clocked(trainer), point.holding_failure():
            if is_new:
                self._begin(trainer, pl_module, point, batch, batch_idx)
            if begins_step(trainer, batch_idx):
                self._batches.start(self._watched(trainer, pl_module))
            self._batches.next_batch(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._point is None:
            return
        with self._clocked(trainer), self._point.holding_failure():
            with self._guarded("the noise scale"):
                self._batches.before_step(trainer)
            self._visit.before_step(trainer, optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._point is None:
            return
        with self._clocked(trainer), self._guarded("a step"):
            with self._point.holding_failure():
                self._batches.after_batch(trainer, outputs)
            if not trainer.fit_loop._should_accumulate():
                self._settle(trainer, pl_module, self._point)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._point is not None and self._visit.found:  # an optimizer has made no step
            self._began = time.monotonic()
            with self._guarded("a step"):
                step = logger_step(trainer, after_batch=False)
                self._publish(trainer, pl_module, self._point, step)
        if not self.history:
            rank_zero_warn(
                f"{type(self).__name__} measured nothing: it saw no optimizer step. Are there "
                "batches, and are steps made with `self.optimizers()` under manual optimization?"
            )
        elif trainer.is_global_zero:
            with self._guarded("the figures"):
                step = self.history[-1].step
                report(trainer, step=step, figures=self._tagged(self.figures()))
        self._close()

    def _close(self) -> None:
        super()._close()
        self._point = None
        self._visit.close()
        self._batches.close()
        self._cadence.stop()

    def state_dict(self) -> dict[str, Any]:
        return {
            "cadence": self._cadence.state_dict(),
            "noise": dict(self._noise.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cadence.load_state_dict(state_dict["cadence"])
        self._noise.load_state_dict(state_dict["noise"])

    # -- one measurement ------------------------------------------------------------------------

    def _begin(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        point: _Point,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._visit.start(trainer, pl_module)
        if self._wants_activations:
            with self._guarded("activations"):
                point.activations = self._activations(trainer, pl_module, batch, batch_idx)
        if self._source(trainer, pl_module) == NoiseSource.HALVES:
            with self._guarded("the noise scale"):
                owned = [self._visit.parameters(each) for each in trainer.optimizers]
                point.halves = gradients_of_halves(
                    trainer, pl_module, self._beside, owned, batch, batch_idx
                )

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: _Point) -> None:
        """Report the step that was made; if none was yet, go on waiting."""
        self._point = None  # unless it has to wait, also where something fails
        self._batches.close()
        self._visit.after_batch(trainer)
        together(trainer, point.raise_failure)
        step = logger_step(trainer, after_batch=True)
        is_late = step - point.step >= self._cadence.period  # an optimizer that hardly ever steps
        if not self._visit.found or not (self._visit.is_complete or is_late):
            self._point = point
        else:
            self._publish(trainer, pl_module, point, step)

    def _publish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: _Point, step: int
    ) -> None:
        found = self._found(trainer, pl_module, point, step)
        self.history.append(found)
        if len(self.history) > _MAX_POINTS:
            del self.history[1:-1:2]  # the older, the sparser
        seconds = point.seconds + time.monotonic() - self._began
        report(
            trainer,
            step=step,
            scalars=self._tagged(self.scalars(found) | {"seconds": seconds}),
            arrays=self._tagged(self.arrays(found)),
        )
        self._warn_unless_finite(found)

    def _found(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: _Point, step: int
    ) -> GradientReport:
        batches = self._batches.of_all_ranks(trainer)
        table = self._table(pl_module)
        source = self._source(trainer, pl_module)
        with self._guarded("the noise scale"):
            self._add_noise(source, point.halves, batches, table.total.gradient_norm)
        return GradientReport(
            step=step,
            table=table,
            loss=batches.loss,
            batch_size=batches.batch_size,
            noise=self._noise.estimate if self._noise.variances else None,
            noise_source=None if source is None else int(source),
            activations=point.activations,
        )

    def scalars(self, found: GradientReport) -> dict[str, float]:
        """Return those of :data:`~lightning_optkit.board.tags.GRADIENT_SCALARS` that are defined.

        The seconds are added later.
        """
        total, noise, activations = found.table.total, found.noise, found.activations
        norms = {
            "gradient_norm": total.gradient_norm,
            "weight_norm": total.weight_norm,
            "update_norm": total.update_norm,
        }
        others = {
            "trust_ratio": total.trust_ratio,
            "update_ratio": total.update_ratio,
            "effective_learning_rate": total.learning_rate,
            "batch_size": found.batch_size,
            "loss": found.loss,
        }
        if noise is not None and not math.isnan(noise.value):
            others |= {
                "noise_scale": noise.value,
                "noise_scale_standard_error": noise.standard_error,
                "critical_batch_size": noise.value,
            }
            others |= {} if found.noise_source is None else {"noise_source": found.noise_source}
        if activations is not None:
            others |= {"dead": activations.dead, "saturated": activations.saturated}
        # a norm that is not finite is what somebody looks for
        return norms | {name: value for name, value in others.items() if not math.isnan(value)}

    def arrays(self, found: GradientReport) -> dict[str, np.ndarray[Any, Any]]:
        """Return the numbers by layer, and by place of an activation."""
        arrays = {}
        if self._per_layer:
            rows = found.table.rows
            arrays[tags.LAYER_STEPS] = schema.layers_array([row.numbers for row in rows])
            arrays[tags.LAYER_NAMES] = schema.names_array([row.layer for row in rows])
        if self._per_layer and found.activations is not None and found.activations.names:
            places = found.activations.rows
            arrays[tags.ACTIVATIONS] = schema.layers_array(list(places.values()))
            arrays[tags.ACTIVATION_NAMES] = schema.names_array(list(places))
        return arrays

    def figures(self) -> dict[str, Figure]:
        """Return loss and gradient norm through training and, by layer, the trust ratios."""
        # matplotlib takes a second to import: only once training is over
        from lightning_optkit.figures.gradients import gradient_figure, trust_ratio_figure

        steps = [each.step for each in self.history]
        totals = [each.table.total for each in self.history]
        figures = {
            tags.GRADIENT_FIGURE: gradient_figure(
                steps,
                gradient_norms=[total.gradient_norm for total in totals],
                losses=[each.loss for each in self.history],
            )
        }
        if self._per_layer:
            figures[tags.TRUST_RATIO_FIGURE] = trust_ratio_figure(
                steps, [each.table for each in self.history]
            )
        return figures

    # -- the step itself ------------------------------------------------------------------------

    def _is_chosen(self, name: str) -> bool:
        patterns = self._patterns
        return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)

    def _before(
        self, parameters: Mapping[str, Tensor], scale: float
    ) -> dict[str, tuple[int, float, float]]:
        """Return number, gradient norm and weight norm of each parameter, before the step."""
        gradients = tensor_norms(p.grad for p in parameters.values()) / scale
        weights = tensor_norms(parameters.values())
        rows = zip(parameters.items(), gradients.tolist(), weights.tolist(), strict=True)
        return {name: (p.numel(), gradient, weight) for (name, p), gradient, weight in rows}

    def _after(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
    ) -> dict[str, tuple[float, float]]:
        """Return update norm and mean learning rate of each parameter, inside the step."""
        updates = update_norms(parameters.values(), copies.values())
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        rates = [_mean_rate(optimizer, groups[id(p)], p) for p in parameters.values()]
        return dict(zip(parameters, zip(updates.tolist(), rates, strict=True), strict=True))

    def _table(self, pl_module: pl.LightningModule) -> StepTable:
        before: dict[str, tuple[int, float, float]] = {}
        after: dict[str, tuple[float, float]] = {}
        for of_one_before, of_one_after in self._visit.found:
            before, after = before | of_one_before, after | of_one_after
        names = [name for name, _ in pl_module.named_parameters() if name in before]
        sizes, gradients, weights = zip(*(before[name] for name in names), strict=True)
        updates, rates = zip(*(after[name] for name in names), strict=True)
        return step_table(
            dict(zip(names, sizes, strict=True)),
            gradients=gradients,
            weights=weights,
            updates=updates,
            learning_rates=rates,
            per_layer=self._per_layer,
        )

    def _warn_unless_finite(self, found: GradientReport) -> None:
        rows = found.table.rows
        bad = [row.layer for row in rows if not math.isfinite(row.gradient_norm)]
        if bad and "gradient" not in self._warned:
            self._warned.add("gradient")
            rank_zero_warn(
                f"The gradient is not finite at step {found.step}, in {len(bad)} of {len(rows)} "
                f"layers, `{bad[0]}` first. Lower the learning rate, clip gradients, or look for a "
                "log or a square root at zero."
            )

    # -- noise and activations ------------------------------------------------------------------

    def _source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> NoiseSource | None:
        return NoiseSource.of(trainer, pl_module) if self._wants_noise else None

    def _watched(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
        """Return the parameters whose gradients are to be seen batch by batch."""
        if self._source(trainer, pl_module) in (None, NoiseSource.HALVES):
            return []
        return list(self._visit.parameters(trainer.optimizers[0]).values())

    def _add_noise(
        self,
        source: NoiseSource | None,
        halves: BatchGradients | None,
        batches: BatchesOfStep,
        gradient_norm: float,
    ) -> None:
        """Add a point to the noise scale, if the step has one."""
        if source is None:
            return
        is_halved = source == NoiseSource.HALVES
        found = halves if is_halved else gradients_of_step(batches, gradient_norm)
        if found is None:  # it failed, and said so
            return
        # one batch is left of a step at the end of an epoch; or a gradient is not finite
        norms = (*found.square_norms, found.square_norm_of_mean)
        if len(found.square_norms) > 1 and all(map(math.isfinite, norms)):
            self._noise.update(*found)

    def _activations(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> Activations:
        modules = dict(pl_module.named_modules())
        metrics = {name for name, each in modules.items() if _is_metric(each)}
        recorder = ActivationRecorder(modules, but=metrics)

        self._beside.require(trainer, pl_module)

        def look() -> None:
            with self._beside.probe(trainer, pl_module, 2) as probe:  # 0 and 1 are the halves
                probe.parameters([])  # gathers, which is not to be recorded
                with recorder:
                    probe.forward(batch, batch_idx)

        together(trainer, look)
        same = trainer.strategy.broadcast(recorder.places) == recorder.places
        if not trainer.strategy.reduce_boolean_decision(same):
            raise RuntimeError("The ranks call different activations, which cannot be summed.")
        return recorder.activations(sum_over_ranks(trainer))

    # -- warnings and time ----------------------------------------------------------------------

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn an exception into one warning for each cause: no diagnostic stops training."""
        try:
            yield
        except Exception as error:
            kind = f"{what} {type(error).__name__}"
            if kind not in self._warned:
                self._warned.add(kind)
                rank_zero_warn(
                    f"{type(self).__name__} leaves out {what}; training goes on untouched. "
                    f"{type(error).__name__}: {error}"
                )

    @contextmanager
    def _clocked(self, trainer: pl.Trainer) -> Iterator[None]:
        """Book the time of the block on this callback, and on the point that is measured."""
        self._began = time.monotonic()
        with self._cadence.measuring(logger_step(trainer, after_batch=True)):
            yield
        if self._point is not None:
            self._point.seconds += time.monotonic() - self._began


def _mean_rate(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> float:
    # `optimizer.state[...]` would make an entry
    rate = effective_rate(optimizer, group, optimizer.state.get(parameter, {}))
    return math.nan if rate is None else mean_rate(rate)


def _is_metric(module: nn.Module) -> bool:
    """Return whether it is one of torchmetrics, which may squash what is no activation of a net."""
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)
