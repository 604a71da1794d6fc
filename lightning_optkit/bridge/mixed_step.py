"""A training step whose targets are mixed: what it gives, and what leaves it on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torchmetrics import Metric

from lightning_optkit.bridge.guarded_pass import guarded_pass
from lightning_optkit.bridge.interceptor import Step
from lightning_optkit.methods.mixed_target import MixedTargetError, Mixing, settled

__all__ = ["MixedStep", "check_against_two_losses", "two_passes"]


class MixedStep:
    """Runs steps with a mixed target in their batch, and hands on what is plain.

    Logs get the mixture, metrics of the module the label that weighs more; metrics that take mixed
    targets say so by an attribute ``takes_mixed_targets``. When the step is over, all that it left
    is plain.

    Args:
        pl_module: the module, whose metrics are looked for here.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._doors: list[tuple[nn.Module, str]] = []
        for child in pl_module.modules():
            if isinstance(child, pl.LightningModule):
                self._doors += [(child, "log"), (child, "log_dict")]
            elif isinstance(child, Metric) and not getattr(child, "takes_mixed_targets", False):
                self._doors.append((child, "update"))

    def __call__(self, step: Step, batch: Any, mixing: Mixing) -> Any:
        """Run the step and return what it returns, mixed.

        Args:
            step: the rest of the way to ``training_step``.
            batch: with a mixed target in it.
            mixing: of that target.

        Raises:
            MixedTargetError: if it has no exact mixed result.
        """
        with self._plain_doors():
            try:
                return settled(step(batch))
            except Unsupported as error:
                raise MixedTargetError(
                    "A compiled `training_step` must be free to leave its graph where it computes "
                    "with a mixed target, and this one is compiled with `fullgraph=True`. Leave "
                    "that out, or mix with `targets='soft'` or 'direct'."
                ) from error
            finally:
                mixing.close()

    @contextmanager
    def _plain_doors(self) -> Iterator[None]:
        """Shadow, on the instances, the methods through which values leave a step."""
        before = []
        try:
            for child, name in self._doors:
                before.append((child, name, vars(child).get(name)))
                vars(child)[name] = _with_plain_arguments(getattr(child, name))
            yield
        finally:
            for child, name, shadowed in reversed(before):
                if shadowed is None:
                    vars(child).pop(name, None)
                else:
                    vars(child)[name] = shadowed


def _with_plain_arguments(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():  # what is only shown has reached no loss
            args, kwargs = settled(args), settled(kwargs)
        return method(*args, **kwargs)

    return wrapped


def two_passes(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    step: Step,
    first: Any,
    second: Any,
    mixing: Mixing,
) -> Any:
    """Run the step on two batches and return the first output, with the mixture of both losses.

    Both see the same random numbers and the same state. What they leave, beside the loss, is what
    the first leaves.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module, with automatic optimization.
        step: the rest of the way to ``training_step``.
        first: the batch with the first targets.
        second: that with the second.
        mixing: with which the losses count.
    """
    with guarded_pass(trainer, pl_module):  # before the other: it starts from the same state then
        second_output = step(second)
    output = step(first)
    if output is None and second_output is None:
        return None
    losses = [_loss_of(each) for each in (output, second_output)]
    if losses[0] is None or losses[1] is None:
        raise MixedTargetError(
            "`training_step` must return a loss for both targets of a mixed batch, got "
            f"{type(output).__name__} and {type(second_output).__name__}. Mix with another "
            "`targets=`."
        )
    loss = mixing.of(*losses)
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def _loss_of(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output


_CHECKED_WEIGHT = 0.3
"""Neither end, where an error would not show, nor the middle, where two may cancel."""

_TOLERANCE = 1e-3
"""Of the losses: far above rounding, which is all that two exact ways differ by."""


def check_against_two_losses(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    mixed_step: MixedStep,
    step: Step,
    *,
    batch_of: Callable[[Mixing | int], Any],
    num_samples: int | None,
) -> None:
    """Run the step three times, without a trace, and compare the mixed loss with the two apart.

    Tensors are followed wherever they go; numbers and arrays that a step takes out of them, and
    feeds back into its loss, are not.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module, with automatic optimization.
        mixed_step: runs the step on a mixed target.
        step: the rest of the way to ``training_step``.
        batch_of: gives a batch with a target mixed by this, or with the first (0) or second (1).
        num_samples: in the batch, where each has its own λ; ``None`` where they share one.

    Raises:
        MixedTargetError: if the losses differ by more than rounding.
    """

    def loss_of(which: Mixing | int) -> Tensor | None:
        batch = batch_of(which)
        run = step if isinstance(which, int) else partial(mixed_step, step, mixing=which)
        with guarded_pass(trainer, pl_module):
            output = run(batch)
        loss = _loss_of(output)
        return loss.detach() if isinstance(loss, Tensor) else None

    one = _CHECKED_WEIGHT
    weight = one if num_samples is None else torch.full((num_samples,), one, dtype=torch.float64)
    found, first, second = (loss_of(which) for which in (Mixing(weight), 0, 1))
    if found is None or first is None or second is None:
        return
    expected = one * first + (1 - one) * second
    if _agree(found, expected, first, second):
        return
    again = loss_of(0)
    if again is not None and _agree(again, first, first, second):  # else the step is random
        raise MixedTargetError(
            f"The loss of a mixed batch must be {one} times the loss of the one target and "
            f"{1 - one} times that of the other, {float(expected):.6g}, got {float(found):.6g}. "
            "`training_step` takes numbers or arrays out of the targets, with `item`, `numpy` or "
            "code of another library, and computes its loss with them; or, with one λ a sample, it "
            "makes of a sum over samples what is not linear. Compute it with tensors, or mix with "
            '`targets="two_pass"`.'
        )


def _agree(found: Tensor, expected: Tensor, first: Tensor, second: Tensor) -> bool:
    if not all(bool(torch.isfinite(each).all()) for each in (found, first, second)):
        return True  # nothing to compare
    eps = torch.finfo(found.dtype).eps
    size = float(first.abs() + second.abs())
    return float((found - expected).abs()) <= max(_TOLERANCE, 8 * eps) * size
