"""The momentum of a step at a new rate, where an optimizer folds the rate into the velocity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_optkit.bridge.attended_step import torch_optimizers
from lightning_optkit.bridge.optimizer_steps import UpdateInStep
from lightning_optkit.methods.batch_scaling import corrected_momentum

__all__ = ["MomentumCorrection"]


class MomentumCorrection:
    r"""Multiplies the momentum by :math:`\eta_t / \eta_{t-1}`, only while parameters are updated.

    So the velocity of :math:`v \leftarrow m v + \eta g` goes over to each new rate. No state of
    the optimizer is touched, and everyone else finds its momentum as it was.

    Args:
        chosen: ``None`` corrects the groups that say ``fold_lr``; ``True`` all with a momentum;
            ``False`` none.
    """

    def __init__(self, chosen: bool | None) -> None:
        self._chosen = chosen
        self._update = UpdateInStep(self._corrected)
        self._rates: dict[int, dict[int, float]] = {}  # of the last step, by optimizer and group

    def start(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._rates = {}

    def attach(self, trainer: pl.Trainer, optimizers: Sequence[int]) -> None:
        """Surround the updates of these optimizers, in ``on_train_start``.

        Raises:
            MisconfigurationException: for Nesterov's momentum, which uses it for another thing too.
        """
        self.detach()
        for i, optimizer in enumerate(torch_optimizers(trainer)):
            for group in optimizer.param_groups if i in optimizers else ():
                if self._is_corrected(group) and group.get("nesterov"):
                    raise MisconfigurationException(
                        f"Optimizer {i} ({type(optimizer).__qualname__}) must not use Nesterov's "
                        "momentum where its momentum is corrected: it looks ahead by the same "
                        "number. Write `nesterov=False`, or `momentum_correction=False`."
                    )
        self._update.attach(trainer, optimizers)

    def detach(self) -> None:
        """Leave the optimizers, at the end of training or on an exception."""
        self._update.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if not interrupted."""
        return {"rates": {i: dict(rates) for i, rates in self._rates.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from an interrupted run."""
        self._rates = {i: dict(rates) for i, rates in state["rates"].items()}

    def _is_corrected(self, group: Mapping[str, Any]) -> bool:
        if self._chosen is None:
            return bool(group.get("fold_lr", False)) and "momentum" in group
        return self._chosen and "momentum" in group

    @contextmanager
    def _corrected(self, i: int, optimizer: Optimizer) -> Iterator[None]:
        groups = {j: g for j, g in enumerate(optimizer.param_groups) if self._is_corrected(g)}
        rates = {j: float(group["lr"]) for j, group in groups.items()}
        momenta = {j: group["momentum"] for j, group in groups.items()}
        before = self._rates.get(i, {})
        try:
            for j, group in groups.items():
                group["momentum"] = corrected_momentum(momenta[j], rates[j], before.get(j))
            yield
        finally:
            for j, group in groups.items():
                group["momentum"] = momenta[j]
        if rates and not _was_skipped(optimizer):
            self._rates[i] = before | rates


def _was_skipped(optimizer: Optimizer) -> bool:
    """Return whether a gradient scaler had a fused optimizer skip its update."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(torch.as_tensor(found_inf).detach() > 0)
