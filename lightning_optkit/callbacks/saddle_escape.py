"""A step down where the gradient shows none."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_optkit.board import tags
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.measuring import MeasuringCallback, buffers_of_rank_zero
from lightning_optkit.bridge.probe import Probe, StepLossFn, select_parameters
from lightning_optkit.bridge.report import report
from lightning_optkit.bridge.turns import Turns
from lightning_optkit.measures import EscapeAttempt, HessianOperator, escape_attempt
from lightning_optkit.measures.eigenpairs import top_eigenpairs
from lightning_optkit.measures.escape import check_escape_settings
from lightning_optkit.measures.gradient_graph import split

__all__ = ["SaddleEscape"]


class SaddleEscape(MeasuringCallback):
    r"""Steps along the direction of most negative curvature where the gradient leads nowhere.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not.

    Before the first batch and then once an epoch, the loss on a few held training batches is asked
    for its gradient and its smallest eigenvalue. Where the eigenvalue is negative beyond rounding,
    a line search looks for a step along its eigenvector, down. The step is taken only if it lowers
    the loss on the held batches by a quarter of what the curvature promises, and if the gradient
    is small beside it. Else nothing happens: weights are bit-identical to those of a run without.

    A step is written into the parameters, in place and in their own dtype, the same on all ranks.
    Buffers, gradients, the scaler and the optimizer's state stay: running means of gradients are
    small at a saddle, and forget it at their own rate.

    Args:
        every_n_epochs: epochs between attempts; 1 unless ``every_n_steps`` is given.
        every_n_steps: optimizer steps between attempts, in place of ``every_n_epochs``.
        num_batches: training batches held; ``None`` takes all of ``data``.
        gradient_tol: the gradient is small if a step along it would bring at most this share of
            what the escape brings; at least 0.
        max_matvecs: products to find the direction, at least 1.
        max_radius: longest step, as a share of the norm of the parameters; positive.
        max_escapes: steps after which no more attempts are made; ``None`` = no limit.
        parameters: glob patterns of parameter names, such as ``["generator.*"]``, which alone are
            moved; ``None`` takes all trainable ones.
        mode: ``"eval"`` (dropout off, running statistics of BatchNorm) or ``"train"``: in which of
            the two functions the loss has to fall.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches and the search.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        graphs: ``"cached"`` keeps one gradient graph for each held batch; ``"lockstep"`` one at a
            time: less memory, more time.
        name: tells several instances of one Trainer apart.

    Logged keys:
        ``optkit-escape/{gradient_norm, relative_gradient, spectral_radius, lambda_min,
        lambda_min_error, certified, step, predicted, actual, escaped, num_escapes, loss_before,
        loss_after, num_matvecs, num_samples, seconds}`` at each attempt: see
        :data:`lightning_optkit.board.tags.ESCAPE_SCALARS`. ``optkit-events/escape`` at each step
        that was taken: its length.

    Cost:
        At most ``max_matvecs`` and 3 Hessian-vector products an attempt, 15 to 50 in small nets,
        of 1.5 to 2.8 gradients each on ``num_batches`` batches; 18 losses. Memory for 40 vectors,
        two copies of the parameters, and the gradient's graph of each held batch.

    When it misleads:
        The loss that falls is that on the held batches: with few of them the way down may not be
        that of the whole set. Between random start and minimum a net nearly always has negative
        curvature; it is no saddle there, and ``gradient_tol`` keeps the step from being taken.
        Optimizers that keep a copy of the parameters, such as lookahead and averages, do not see
        the step.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SaddleEscape(every_n_steps=100)], logger=False)
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        *,
        num_batches: int | None = 4,
        gradient_tol: float = 0.1,
        max_matvecs: int = 100,
        max_radius: float = 0.5,
        max_escapes: int | None = None,
        parameters: list[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        loss_index: int = 0,
        graphs: Literal["cached", "lockstep"] = "cached",
        name: str | None = None,
    ) -> None:
        super().__init__(
            topic=tags.ESCAPE,
            name=name,
            parameters=parameters,
            num_batches=num_batches,
            mode=mode,
            loss_fn=loss_fn,
            loss_index=loss_index,
            data=data,
            seed=seed,
            graphs=graphs,
        )
        check_escape_settings(
            gradient_tol=gradient_tol, max_matvecs=max_matvecs, max_radius=max_radius
        )
        if max_escapes is not None and max_escapes < 1:
            raise ValueError(
                f"`max_escapes` must be at least 1, got {max_escapes}. `None` sets no limit."
            )
        self._turns = Turns(every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        self._search = partial(
            escape_attempt,
            gradient_tol=gradient_tol,
            max_matvecs=max_matvecs,
            max_radius=max_radius,
        )
        self._max_escapes = max_escapes
        self._event = tags.ESCAPE_EVENT if name is None else f"{tags.ESCAPE_EVENT}_{name}"
        self.num_escapes = 0
        """Steps taken in this run."""
        self._fingerprint: int | None = None  # of the batches held

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint is restored
            self._turns.start()
            self.num_escapes, self._fingerprint = 0, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "`SaddleEscape` needs whole parameters on each device, got sharded ones. Use "
                "`strategy='ddp'` or a single device, or remove the callback."
            )
        if self._patterns is None and len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                "`parameters` must name what to move where there are several optimizers, got "
                f"{len(trainer.optimizers)} of them: one loss may be another's to raise. Pass the "
                "names of one optimizer's parameters, such as `parameters=['generator.*']`, and "
                "`loss_index` of its loss."
            )
        self._open(trainer, pl_module)
        before, self._fingerprint = self._fingerprint, self.held_fingerprint()
        if before not in (None, self._fingerprint):
            rank_zero_warn(
                "`SaddleEscape` holds other batches than the interrupted run did, so this one may "
                "not end with the same weights. Pass the same batches as `data=` to both."
            )
        with self._probe(trainer, pl_module) as probe:  # what cannot be measured raises here
            top_eigenpairs(self._operator(trainer, pl_module, probe), max_matvecs=1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        spent = self._max_escapes is not None and self.num_escapes >= self._max_escapes
        if spent or not self._turns.before_batch(trainer):
            return
        step = logger_step(trainer, after_batch=False)
        with self._warning_once(step):
            with buffers_of_rank_zero(trainer, pl_module):
                scalars = self._attempt(trainer, pl_module)
            report(trainer, step=step, scalars=scalars)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "turns": self._turns.state_dict(),
            "num_escapes": self.num_escapes,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._turns.load_state_dict(state_dict["turns"])
        self.num_escapes = state_dict["num_escapes"]
        self._fingerprint = state_dict["fingerprint"]

    def _operator(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> HessianOperator:
        return HessianOperator(
            **self.loss_terms(trainer, probe, self.parameter_names(pl_module)),
        )

    def _attempt(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Search, step where that helps, and return what to log."""
        started = time.monotonic()
        with self._probe(trainer, pl_module) as probe:
            operator = self._operator(trainer, pl_module, probe)
            generator = torch.Generator().manual_seed(self._seed)
            attempt = self._search(operator, generator=generator)
            here = probe.parameters(self.parameter_names(pl_module))
        loss_after = attempt.loss_before
        if attempt.accepted:
            pieces = split(attempt.displacement, here)
            there = [p + piece for p, piece in zip(here.values(), pieces, strict=True)]
            loss_after = self._move(trainer, pl_module, there, below=attempt.loss_before)
        escaped = loss_after < attempt.loss_before
        self.num_escapes += escaped
        found = _scalars(attempt) | {
            "escaped": float(escaped),
            "num_escapes": self.num_escapes,
            "loss_after": loss_after,
            "num_samples": int(operator.total_weight),
            "seconds": time.monotonic() - started,
        }
        event = {tags.tag(tags.EVENTS, self._event): attempt.step} if escaped else {}
        return self._tagged({k: v for k, v in found.items() if not math.isnan(v)}) | event

    def _move(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        there: list[Tensor],
        *,
        below: float,
    ) -> float:
        """Write the parameters and return the loss there; put them back unless it is lower.

        Half-precision parameters round the step, so the loss is taken again where they end.
        """
        parameters = list(select_parameters(pl_module, self._patterns).values())
        before = [p.detach().clone() for p in parameters]
        loss = below
        try:
            _write(parameters, there)
            with self._probe(trainer, pl_module) as probe:
                loss = float(self._operator(trainer, pl_module, probe).loss())
        finally:
            if not loss < below:
                _write(parameters, before)
        return loss if loss < below else below


@torch.no_grad()
def _write(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _scalars(attempt: EscapeAttempt) -> dict[str, float]:
    return {
        "gradient_norm": attempt.gradient_norm,
        "relative_gradient": attempt.relative_gradient,
        "spectral_radius": attempt.spectral_radius,
        "lambda_min": attempt.lambda_min,
        "lambda_min_error": attempt.lambda_min_error,
        "certified": float(attempt.certified),
        "step": attempt.step,
        "predicted": attempt.predicted,
        "actual": attempt.actual,
        "loss_before": attempt.loss_before,
        "num_matvecs": attempt.num_matvecs,
    }
