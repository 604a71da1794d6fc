"""What every callback that measures shares: on which loss, under which tags, and if it fails."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_optkit.board.tags import tag
from lightning_optkit.bridge.arguments import is_count
from lightning_optkit.bridge.held_batches import HeldBatch, draw_batches
from lightning_optkit.bridge.probe import (
    Probe,
    StepLossFn,
    require_batch_step,
    select_parameters,
)
from lightning_optkit.bridge.reduce import require_whole_parameters, sum_over_ranks
from lightning_optkit.bridge.report import close_report
from lightning_optkit.bridge.snapshot import put_back

__all__ = ["MeasuringCallback", "buffers_of_rank_zero"]


Value = TypeVar("Value")


class MeasuringCallback(pl.Callback):
    """A callback that measures the training loss, on batches that it holds.

    This class checks the settings, holds the batches, opens the probe, names the tags, and turns a
    measurement that fails into one warning. A subclass says when to measure and what follows.

    Args:
        topic: first part of all tags.
        name: told apart by this: a second instance logs under ``<topic>-<name>``.
        parameters: glob patterns of the parameters to measure in; ``None`` takes all trainable.
        num_batches: training batches to hold; ``None`` takes all of ``data``.
        mode: ``"eval"`` or ``"train"``, how dropout and BatchNorm behave while measuring.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches and all probes.
        graphs: ``"cached"`` keeps one gradient graph for each held batch; ``"lockstep"`` one at a
            time.
    """

    def __init__(
        self,
        *,
        topic: str,
        name: str | None = None,
        parameters: list[str] | None = None,
        num_batches: int | None = None,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        loss_index: int = 0,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        graphs: Literal["cached", "lockstep"] = "cached",
    ) -> None:
        if isinstance(parameters, str):
            raise TypeError(
                f"`parameters` must be a list of glob patterns, got the string {parameters!r}. "
                f"Write `parameters=[{parameters!r}]`."
            )
        if num_batches is None and data is None:
            raise ValueError("`num_batches` must be a number unless `data=` is given, got None.")
        if num_batches is not None and not is_count(num_batches, least=1):
            raise ValueError(
                f"`num_batches` must be an integer of at least 1, got {num_batches!r}."
            )
        if mode not in ("eval", "train"):
            raise ValueError(f"`mode` must be 'eval' or 'train', got {mode!r}.")
        if loss_index < 0:
            raise ValueError(f"`loss_index` must be at least 0, got {loss_index}.")
        if graphs not in ("cached", "lockstep"):
            raise ValueError(f"`graphs` must be 'cached' or 'lockstep', got {graphs!r}.")
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"`name` must be snake_case, such as 'generator', got {name!r}.")
        self.topic = topic if name is None else f"{topic}-{name}"
        self._patterns = parameters
        self._num_batches = num_batches
        self._mode = mode
        self._loss_fn = loss_fn
        self._loss_index = loss_index
        self._data = data
        self._seed = seed
        self._graphs: Literal["cached", "lockstep"] = graphs
        self._held: list[HeldBatch] = []
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        """Tells two such callbacks of a Trainer apart in its checkpoints."""
        return f"{type(self).__qualname__}[{self.topic}]"

    def parameter_names(self, pl_module: pl.LightningModule) -> list[str]:
        """Return the names of the parameters to measure in."""
        return list(select_parameters(pl_module, self._patterns))

    @property
    def held_batches(self) -> list[HeldBatch]:
        """The batches to measure on."""
        return self._held

    def loss_terms(self, trainer: pl.Trainer, probe: Probe, names: list[str]) -> dict[str, Any]:
        """Return what makes an operator of the held batches' loss: its arguments.

        Args:
            trainer: the Trainer, fitting.
            probe: open.
            names: of the parameters to differentiate by.
        """
        return {
            "loss_fn": [probe.loss_fn(held.batch, i) for i, held in enumerate(self._held)],
            "params": probe.parameters(names),
            "weights": [held.num_samples for held in self._held],
            "reduce": sum_over_ranks(trainer),
            "graphs": self._graphs,
        }

    def held_fingerprint(self) -> int:
        """Return a number that tells the held batches of this rank from others."""
        found = 0
        for leaf in tree_leaves([held.batch for held in self._held]):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                found = zlib.crc32(data.numpy().tobytes(), found)
        return found

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be measured, and draw the batches, in ``on_train_start``."""
        require_whole_parameters(trainer.strategy, type(self).__name__)
        self._require_real_parameters(pl_module)
        if self._loss_fn is None:
            require_batch_step(pl_module)
        self._held = draw_batches(
            trainer, pl_module, num_batches=self._num_batches, data=self._data, seed=self._seed
        )
        self._warned = set()

    def _require_real_parameters(self, pl_module: pl.LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        for name in self.parameter_names(pl_module):  # a pattern that matches nothing raises here
            if parameters[name].is_complex() or parameters[name].layout != torch.strided:
                kind = "complex" if parameters[name].is_complex() else parameters[name].layout
                raise MisconfigurationException(
                    f"`{name}` must be a real, dense parameter to be measured, got a {kind} one. "
                    "Pass `parameters=[...]` with the names, or patterns, of the others."
                )

    def _close(self) -> None:
        """Let go of the batches, at the end of training or on an exception."""
        self._held = []

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of everything."""
        self._close()
        close_report(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write what is left."""
        close_report(trainer)

    def _probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Probe:
        return Probe(
            trainer,
            pl_module,
            mode=self._mode,
            loss_fn=self._loss_fn,
            loss_index=self._loss_index,
            seed=self._seed,
        )

    def _tagged(self, values: dict[str, Value]) -> dict[str, Value]:
        return {tag(self.topic, name): value for name, value in values.items()}

    @contextmanager
    def _warning_once(self, step: int) -> Iterator[None]:
        """Turn an exception into one warning for each cause: no diagnostic stops training."""
        try:
            yield
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if isinstance(error, torch.OutOfMemoryError):
                cause += " Hold fewer batches (`num_batches`), or measure in fewer `parameters`."
            kind = re.sub(r"\d+", "", cause)  # a message about memory has new numbers each time
            if kind not in self._warned:
                self._warned.add(kind)
                rank_zero_warn(
                    f"{type(self).__name__} measured nothing at step {step}; training goes on "
                    f"untouched. {cause}"
                )


@contextmanager
def buffers_of_rank_zero(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """Give all ranks the buffers of rank zero for the block.

    Statistics of BatchNorm differ from rank to rank, and with them the loss in eval mode: ranks
    would sum the curvature of different functions. Rank zero's are those that DDP trains with and
    that a checkpoint holds.
    """
    buffers = list(module.buffers()) if trainer.world_size > 1 else []
    own = [buffer.detach().clone() for buffer in buffers]
    for buffer in buffers:
        torch.distributed.broadcast(buffer.data, 0)
    try:
        yield
    finally:
        for buffer, saved in zip(buffers, own, strict=True):
            put_back(buffer, saved)
