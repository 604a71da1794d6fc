"""A loss whose norm layers have running statistics of their own wherever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.bridge.held_batches import HeldBatch
from lightning_optkit.bridge.probe import Probe, in_full_precision
from lightning_optkit.bridge.reduce import sum_over_ranks
from lightning_optkit.bridge.statistics_pass import statistics_of
from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.gradient_graph import scalar
from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.measures.losses_along import LossesAlong, Reduce
from lightning_optkit.methods.norm_statistics import StatisticsNotFiniteError

__all__ = ["FreshStatisticsSurface", "held_statistics"]

Statistics = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Running statistics, by the name of their buffer, that fit some parameters."""


class FreshStatisticsSurface(LossSurface):
    """A loss that takes the statistics of norm layers anew before it is computed at a point.

    Its values are those of nets as SWA and others finish them; they have no gradient.

    Args:
        surface: the loss, with any statistics.
        statistics: finds them; all processes call it. Where they are not finite, nor is the loss.
    """

    def __init__(self, surface: LossSurface, statistics: Statistics) -> None:
        super().__init__(
            surface.loss_fns,
            surface.params,
            weights=surface.weights,
            reduce=surface._reduce,
        )
        self._statistics = statistics

    def at(self, params: Mapping[str, Tensor]) -> FreshStatisticsSurface:
        """Return the same loss with some of the parameters replaced."""
        return FreshStatisticsSurface(super().at(params), self._statistics)

    def along(self) -> LossesAlong:
        """Return a context of the loss at many points."""
        return _FreshLossesAlong(
            self._loss_fns,
            self._params,
            weights=self._weights,
            reduce=self._reduce,
            statistics=self._statistics,
        )


class _FreshLossesAlong(LossesAlong):
    def __init__(self, *args: Any, statistics: Statistics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._statistics = statistics

    def _loss_at(self, begin: Tensor, direction: Tensor, position: float) -> Tensor:
        self._move(begin, direction, position)
        params = {name: p.detach().clone() for name, p in self._live.items()}
        total = torch.zeros((), dtype=self._here.dtype, device=self._here.device)
        try:
            statistics = self._statistics(params)
        except StatisticsNotFiniteError:
            return total + torch.nan
        for p in params.values():  # as where a gradient is taken: a step may ask for it
            p.requires_grad_()
        with torch.enable_grad():
            for loss_fn, weight in zip(self._loss_fns, self._weights, strict=True):
                total = total + weight * scalar(loss_fn(params | statistics)).detach()
        return total


def held_statistics(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    held: Sequence[HeldBatch],
    probe: Callable[[], Probe],
) -> Statistics:
    """Return what takes statistics from held batches, of all ranks together.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module.
        held: the batches of this rank.
        probe: makes one, in eval mode.
    """
    reduce = sum_over_ranks(trainer)

    def forwards(params: dict[str, Tensor]) -> Iterator[Callable[[], None]]:
        with probe() as opened:
            for i, each in enumerate(held):
                yield partial(opened.forward, each.batch, i, params)

    def statistics(params: dict[str, Tensor]) -> dict[str, Tensor]:
        found = statistics_of(
            trainer, pl_module, lambda: _all_or_none(forwards(params), reduce, like=params)
        )
        return {name: in_full_precision(values) for name, values in found.items()}

    return statistics


def _all_or_none(
    calls: Iterable[Callable[[], None]], reduce: Reduce | None, *, like: Mapping[str, Tensor]
) -> Iterator[Callable[[], None]]:
    """Yield calls of which none raises; after the last, raise on all processes if one did on any.

    Else the process on which it did would leave the others waiting for its sums.
    """
    failures: list[Exception] = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    for call in calls:
        yield partial(attempt, call)
        if failures:
            break
    if reduce is not None:
        device = next(iter(like.values())).device
        failed = reduce(torch.tensor([len(failures)], device=device))
        if int(failed) and not failures:
            raise CurvatureError("Statistics could not be taken on another process, see there.")
    if failures:
        raise failures[0]
