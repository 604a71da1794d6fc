"""Statistics of norm layers for an average, and whether they are still its own."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optkit.bridge.averaged_weights import AveragedWeights
from lightning_optkit.bridge.probe import require_batch_step
from lightning_optkit.bridge.statistics_pass import StatisticsPass, statistics_names

__all__ = ["AverageStatistics", "RefreshNormStats"]

RefreshNormStats = bool | int | Literal["layerwise"]


class AverageStatistics:
    """Takes them from the training data when asked, and knows of which average they are.

    Args:
        refresh_norm_stats: whether they are taken anew; a number takes so many batches;
            ``"layerwise"`` makes a pass for each layer.
        owner: name of the callback, for what it says.

    Raises:
        ValueError: for another value.
    """

    def __init__(self, refresh_norm_stats: RefreshNormStats, *, owner: str) -> None:
        self._pass = _pass_of(refresh_norm_stats)
        self._owner = owner
        self.start_anew()

    def start_anew(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._are_of = 0  # models in the average when they were taken
        self._num_samples = 0  # in that pass
        self._needs_rehearsal = False

    def names(self, module: nn.Module) -> list[str]:
        """Return the names of the buffers that are taken anew, and so not averaged."""
        return [] if self._pass is None else statistics_names(module)

    def origin(self, weights: AveragedWeights) -> str:
        """Return where those of the average are from; nothing if they are averaged."""
        if not self.names(weights.module):
            return ""
        if self._are_of == weights.num_averaged:
            return f"from {self._num_samples:,} samples"
        return "of an earlier average" if self._are_of else "of the last model"

    def warn_unless_its_own(self, weights: AveragedWeights) -> None:
        """Say so where the average is about to be used with those of other weights."""
        if self.names(weights.module) and self._are_of != weights.num_averaged:
            rank_zero_warn(
                f"The average of `{self._owner}` is used with normalization statistics "
                f"{self.origin(weights)}, because training was interrupted or their pass failed. "
                "Validate within `fit`, or let it end, to have them taken anew."
            )

    # -- rehearsal -----------------------------------------------------------------------------

    def require_step(self, pl_module: pl.LightningModule) -> None:
        """Refuse a step that cannot be called with a batch, in ``on_train_start``."""
        self._needs_rehearsal = bool(self.names(pl_module))
        if self._needs_rehearsal:
            require_batch_step(pl_module)

    def rehearse_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the step as a pass will, before the first batch: what cannot be run raises there.

        By then the module's own hooks have prepared it for a step.

        Raises:
            MisconfigurationException: if it fails.
        """
        if not self._needs_rehearsal or self._pass is None:
            return
        self._needs_rehearsal = False
        try:
            self._pass.rehearse(trainer, pl_module)
        except MisconfigurationException:
            raise
        except Exception as error:
            raise MisconfigurationException(
                "`training_step` must run once more for the statistics of norm layers, and did "
                f"not. {type(error).__name__}: {error} Pass `refresh_norm_stats=False`, which "
                "averages them, or have `lightning_optkit.is_probing()` skip what fails."
            ) from error

    # -- the pass ------------------------------------------------------------------------------

    def are_due(self, weights: AveragedWeights) -> bool:
        """Return whether they are still to be taken for the average, which is aside."""
        is_new = self._are_of != weights.num_averaged and not weights.is_in_module
        return is_new and bool(self.names(weights.module))

    def refresh(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: AveragedWeights
    ) -> None:
        """Take them with the average in the module. All ranks call it."""
        assert self._pass is not None
        if self._are_of == 0:  # a first, perhaps long, silence
            rank_zero_info(
                f"{self._owner}: going over the training data for the statistics of norm layers; "
                "again for each use of a new average."
            )
        try:
            with weights.in_module():
                statistics = self._pass.statistics(trainer, pl_module)
        except Exception as error:
            if trainer.world_size > 1:  # others may wait for this one
                raise
            rank_zero_warn(
                f"`{self._owner}` could not take the statistics of norm layers for its average, "
                f"which keeps those {self.origin(weights)}; training goes on. "
                f"{type(error).__name__}: {error}"
            )
            return
        weights.statistics = statistics
        self._are_of = weights.num_averaged
        self._num_samples = self._pass.num_samples

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {"are_of": self._are_of, "num_samples": self._num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run."""
        self._are_of = state["are_of"]
        self._num_samples = state["num_samples"]


def _pass_of(refresh_norm_stats: RefreshNormStats) -> StatisticsPass | None:
    if refresh_norm_stats is False:
        return None
    layerwise = refresh_norm_stats == "layerwise"
    if not (layerwise or (isinstance(refresh_norm_stats, int) and refresh_norm_stats >= 1)):
        raise ValueError(
            "`refresh_norm_stats` must be True, False, a number of batches or 'layerwise', got "
            f"{refresh_norm_stats!r}. `True` takes all training data."
        )
    takes_all = layerwise or refresh_norm_stats is True
    num_batches = None if takes_all else int(refresh_norm_stats)
    return StatisticsPass(num_batches=num_batches, layerwise=layerwise, seed=0)
