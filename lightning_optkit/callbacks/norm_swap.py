"""Normalization layers of a module replaced by those of another kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_optkit.board import tags
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.effective_batch import batch_per_device
from lightning_optkit.bridge.layer_swap import LayerSwap
from lightning_optkit.bridge.report import close_report, report
from lightning_optkit.bridge.swapped_checkpoint import StateDictFit, record_of, save_record
from lightning_optkit.methods.batch_renorm import BatchRenorm
from lightning_optkit.methods.norm_swap import SwapPlan, SwapReport, require_where
from lightning_optkit.methods.normalization import KINDS, Divisor, NormRule, Source

__all__ = ["NormSwap"]

_FEW = 16
"""Samples a device: with fewer BatchNorm's error rises, by figure 1 of Wu & He, ECCV 2018."""


class NormSwap(pl.Callback):
    r"""Replaces the normalization layers of a module by those of another kind.

    **Intervener.** The net is another one from before its optimizer is made. A run that was
    interrupted and resumed with the same callback ends with the weights of one that was not. With
    ``target="report"`` nothing is changed: what would be is printed.

    BatchNorm normalises by the batch in training and by running statistics in evaluation, and with
    few samples a device the two differ. GroupNorm normalises each sample by itself, in both:

    .. math:: y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta,

    with mean and variance over a group of channels of one sample. Names, γ and β, frozen flags and
    hooks of the layers stay; see :func:`~lightning_optkit.methods.norm_swap.swap_norms`, which does
    the same for any module. Layers are found wherever the module makes them: in ``__init__``,
    ``setup`` or ``configure_model``.

    Args:
        source: kind of the layers to replace: ``"batch"`` for BatchNorm and SyncBatchNorm,
            ``"sync"`` for the latter alone, ``"group"``, ``"layer"``, ``"instance"``,
            ``"batch_renorm"``, ``"ghost"``.
        target: kind of the new layers: one of these but for the same; ``"layer"`` is GroupNorm with
            one group; ``"none"``, where only γ and β are left; ``"report"``, which prints what
            ``"group"`` would do.
        num_groups: of GroupNorm, at most.
        channels_per_group: of GroupNorm, at least, in place of ``num_groups``.
        divisor: where channels are not divisible by that: ``"largest"`` takes the largest divisor
            below, ``"error"`` refuses.
        where: which layers: glob patterns of names such as ``["encoder.*"]``, or a function of name
            and layer; ``None`` = all.
        keep_affine: whether γ and β go on, or begin at 1 and 0.
        target_options: further arguments of the new layers, by name: ``eps``, ``momentum``,
            ``chunk_size`` of :class:`~lightning_optkit.methods.GhostBatchNorm`; limits and schedule
            of :class:`~lightning_optkit.methods.BatchRenorm`. A dict, as YAML can write one.
        name: tells several swaps of one Trainer apart; each leaves alone what those before it
            replaced.

    Raises:
        ValueError: if a value is out of range; in ``setup``, if no layer is of this kind.

    Logged keys:
        ``optkit-events/norm_swap`` at the start of training: how many layers were replaced. With a
        ``name``: ``optkit-events/norm_swap_<name>``.

    Cost:
        None by itself. GroupNorm takes longer than BatchNorm on many devices; see the page.

    When it misleads:
        BatchNorm's noise regularises, and a learning rate was tuned with it: GroupNorm with the
        same settings may do worse at batches that are large enough for BatchNorm. Pretrained γ and
        β are those of a net with BatchNorm: without training on, the new net is not a good one.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NormSwap(target="group", num_groups=32)], logger=False)
    """

    def __init__(
        self,
        source: Source = "batch",
        target: Literal[
            "group", "batch", "layer", "instance", "batch_renorm", "ghost", "sync", "none", "report"
        ] = "group",
        *,
        num_groups: int = 32,
        channels_per_group: int | None = None,
        divisor: Divisor = "largest",
        where: list[str] | Callable[[str, nn.Module], bool] | None = None,
        keep_affine: bool = True,
        target_options: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        require_where(where)
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", str(name)):
            raise ValueError(
                f"`name` must be snake_case, such as 'encoder', got {name!r}. It becomes part of "
                "a tag."
            )
        self._changes = target != "report"
        self._rule = NormRule(
            source,
            "group" if target == "report" else target,
            num_groups,
            channels_per_group,
            divisor,
            keep_affine,
            target_options,
        )
        self._where = where
        self._name = name
        self._layers = LayerSwap(self._swap, self._save)
        self._fit_of_file: StateDictFit | None = None
        self._before: list[NormSwap] = []  # in the Trainer's order
        self._names: list[str] = []  # of the layers that are as the rule says
        self._num_logged = 0
        self._said = ""
        self.report: SwapReport | None = None
        """The norm layers of the module, and what became of each; ``None`` before ``setup``."""

    # -- the swap ------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()
        self._require_trainer(trainer)
        callbacks = vars(trainer)["callbacks"]  # which the Trainer does not declare
        swaps = [callback for callback in callbacks if isinstance(callback, NormSwap)]
        self._before = swaps[: swaps.index(self)] if self in swaps else []
        self._layers.attach(pl_module)
        if self._changes:
            self._fit_of_file = StateDictFit(pl_module, trains=stage == "fit")

    def _require_trainer(self, trainer: pl.Trainer) -> None:
        target = self._rule.target
        synchronises = getattr(trainer.strategy, "_layer_sync", None) is not None
        if synchronises and target in ("batch_renorm", "ghost"):
            raise MisconfigurationException(
                f"`target` must not be {target!r} with `Trainer(sync_batchnorm=True)`, which would "
                "make SyncBatchNorm of it. Leave `sync_batchnorm` out."
            )
        is_cpu = trainer.strategy.root_device.type == "cpu"
        if target == "sync" and trainer.world_size > 1 and is_cpu:
            raise MisconfigurationException(
                "`target='sync'` must have a GPU for each process, got CPUs, on which torch does "
                "not synchronise. Take 'group', which needs no other samples."
            )

    def _swap(self, pl_module: pl.LightningModule, last: bool) -> None:
        taken = {name for swap in self._before for name in swap._names}
        plan = SwapPlan(pl_module, self._rule, self._where, apart=taken)
        if self._changes:
            if last:
                plan.require_layers()
            _require_whole(plan)
            plan.carry_out()
            self._names = plan.names
        self._merge(plan.report)
        if last:
            self._say()

    def _merge(self, found: SwapReport) -> None:
        """Keep saying of a layer what it was before this callback replaced it."""
        earlier = [] if self.report is None else self.report.of("swapped")
        swapped = {layer.name: layer for layer in earlier if self._changes}
        self.report = SwapReport(
            tuple(
                swapped.get(layer.name, layer) if layer.status == "done" else layer
                for layer in found.layers
            )
        )

    def _say(self) -> None:
        assert self.report is not None  # since the first look
        line = self.report.summary if self._changes else f"would do, and does not:\n{self.report}"
        if line != self._said:  # once, not in each stage
            rank_zero_info(f"{self._called}: {line}")
        self._said = line

    def _save(self, checkpoint: dict[str, Any]) -> None:
        if self._names:
            save_record(record_of(self._rule, self._names), checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()
        close_report(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._leave()
        close_report(trainer)

    def _leave(self) -> None:
        self._layers.detach()
        if self._fit_of_file is not None:
            self._fit_of_file.remove()
            self._fit_of_file = None

    # -- what is said of it --------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._changes:
            _advise(trainer, pl_module)
        elif self._num_logged != len(self._names):
            event = tags.NORM_SWAP_EVENT + ("" if self._name is None else f"_{self._name}")
            scalars = {tags.tag(tags.EVENTS, event): float(len(self._names))}
            report(trainer, step=logger_step(trainer, after_batch=False), scalars=scalars)
            self._num_logged = len(self._names)
        if self._rule.target == "batch_renorm":
            self._warn_if_never_relaxed(trainer, pl_module)

    def _warn_if_never_relaxed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = [pl_module.get_submodule(name) for name in self._names]
        renorm = [layer for layer in layers if isinstance(layer, BatchRenorm)]
        left = _batches_left(trainer)
        if renorm and all(left + int(x.num_batches_tracked) <= x.relax_from for x in renorm):
            rank_zero_warn(
                f"`{type(self).__name__}` trains BatchRenorm as BatchNorm to the end: its limits "
                f"move after {renorm[0].relax_from:,} batches, and {left:,.0f} are to come. Pass "
                "`target_options={'relax_from': ..., 'r_max_at': ..., 'd_max_at': ...}`."
            )

    @property
    def _called(self) -> str:
        return type(self).__name__ + ("" if self._name is None else f"[{self._name}]")

    # -- checkpoints ---------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Names the callback in checkpoints."""
        return self._called

    def state_dict(self) -> dict[str, Any]:
        return record_of(self._rule, self._names) if self._names else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_logged = len(self._names)
        if state_dict != self.state_dict():
            rank_zero_warn(
                f"`{self._called}` makes another net than the checkpoint had: there "
                f"{_in_words(state_dict)}, here {_in_words(self.state_dict())}. The weights are "
                "taken all the same."
            )


def _require_whole(plan: SwapPlan) -> None:
    for layer in plan.layers:
        if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            raise MisconfigurationException(
                "`NormSwap` must replace layers before they are sharded, got a sharded "
                f"{type(layer).__name__}. Make it in `__init__` or `setup`, or call "
                "`swap_norms(self, ...)` in `configure_model` before `fully_shard`."
            )


def _advise(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Say so where a batch is too small for the BatchNorm layers that train."""
    layers = [layer for layer in pl_module.modules() if layer.training]
    batch_norms = [layer for layer in layers if isinstance(layer, KINDS["batch"])]
    if not batch_norms:
        return
    try:
        samples = batch_per_device(trainer)
    except MisconfigurationException:  # the loader does not say
        return
    if all(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms):
        samples *= trainer.world_size
    if samples < _FEW:
        rank_zero_info(
            f"NormSwap: BatchNorm takes its statistics over {samples} samples, fewer than {_FEW}, "
            "however many are accumulated, and training and evaluation may differ much. "
            "`NormSwap(target='group')` normalises each sample by itself; 'batch_renorm' brings "
            "training nearer to evaluation."
        )


def _batches_left(trainer: pl.Trainer) -> float:
    """Return how many training batches are to come in this run, as far as is known."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    left = [(epochs - trainer.current_epoch) * trainer.num_training_batches]
    if trainer.max_steps >= 0:
        steps = max(0, trainer.max_steps - trainer.global_step)
        left.append(steps * trainer.accumulate_grad_batches)
    return float(min(left))


def _in_words(state: dict[str, Any]) -> str:
    rule = state["rule"]
    settings = {key: value for key, value in rule.items() if value is not None}
    return f"{len(state['names'])} layers by {settings}"
