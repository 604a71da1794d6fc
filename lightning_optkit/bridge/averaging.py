"""What every callback that averages weights shares: who sees the average, and when."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lightning_optkit.board import tags
from lightning_optkit.bridge.average_statistics import AverageStatistics, RefreshNormStats
from lightning_optkit.bridge.averaged_checkpoint import KIND, StateDictOfAverage, raw_weights
from lightning_optkit.bridge.averaged_weights import AveragedWeights
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.optimizer_steps import StepWatch
from lightning_optkit.bridge.reduce import require_whole_parameters, sum_over_ranks
from lightning_optkit.bridge.report import close_report, report
from lightning_optkit.bridge.sharding import resharded_after
from lightning_optkit.methods.averaging import RunningAverage, Share

__all__ = ["AveragingCallback", "RefreshNormStats", "Stage", "span"]

Stage = Literal["validate", "test", "predict"]

_STAGES = ("validate", "test", "predict")


class AveragingCallback(pl.Callback, ABC):
    """A callback that averages the weights of a run, and puts the average to use.

    Training goes on with the weights that the optimizer makes: they change places with the average
    while a stage of ``use_for`` runs. A subclass says which models enter.

    Args:
        share: how much of the next model enters, see :mod:`lightning_optkit.methods.averaging`.
        use_for: stages that run on the average. With ``"validate"`` among them, the average is also
            what the ``state_dict`` of checkpoints holds, and the module in the end.
        refresh_norm_stats: whether the statistics of norm layers are taken from the training data
            for the average; a number takes so many batches; ``"layerwise"`` makes a pass for each
            layer. Else they are averaged, as weights are.
        device: where the average lives; ``None`` = where the weights do.
        name: tells several instances of one Trainer apart.
        thorough: look at every number before a model enters, not only at the first of each tensor.
    """

    def __init__(
        self,
        *,
        share: Share,
        use_for: Sequence[Stage],
        refresh_norm_stats: RefreshNormStats,
        device: torch.device | str | None,
        name: str | None,
        thorough: bool,
    ) -> None:
        is_sequence = isinstance(use_for, Sequence) and not isinstance(use_for, str)
        if not is_sequence or not all(stage in _STAGES for stage in use_for):
            raise ValueError(
                f"`use_for` must be a tuple of {', '.join(map(repr, _STAGES))}, got {use_for!r}. "
                "Write `use_for=('validate', 'test')`, or `()` to only keep the average."
            )
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", str(name)):
            raise ValueError(
                f"`name` must be snake_case, such as 'slow', got {name!r}. It becomes part of tags."
            )
        self.topic = tags.AVERAGING if name is None else f"{tags.AVERAGING}-{name}"
        self._event = tags.AVERAGING_EVENT if name is None else f"{tags.AVERAGING_EVENT}_{name}"
        self.use_for = frozenset(use_for)
        self._share = share
        self._device = _device_of(device)
        self._statistics = AverageStatistics(refresh_norm_stats, owner=type(self).__name__)
        self._thorough = thorough
        self._watch = StepWatch()
        self._agreement = _Agreement(None)
        self._state_dict_of_average: StateDictOfAverage | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._watch.start()
        self._statistics.start_anew()
        self._weights: AveragedWeights | None = None
        self._is_lent = False  # in the module for a stage that runs now
        self._is_interrupted = False  # by an exception: nothing is run any more
        self._is_in_file = False  # in the checkpoint that is loaded
        self._num_left_out = 0  # models that were not finite
        self._span: list[tuple[int, int]] = []  # epoch and step of the first and the last model

    # -- what a subclass says ------------------------------------------------------------------

    @abstractmethod
    def _plan(self, trainer: pl.Trainer) -> None:
        """Hold the settings against the Trainer's, in ``setup``."""

    @abstractmethod
    def _due_after_step(self, trainer: pl.Trainer) -> bool:
        """Return whether the model enters now, after an optimizer step; asked once a step."""

    def _due_after_epoch(self, epoch: int) -> bool:
        """Return whether the model enters now, after the last batch of this epoch; asked once."""
        return False

    @abstractmethod
    def _is_logged(self, trainer: pl.Trainer) -> bool:
        """Return whether the model that has just entered is logged."""

    @abstractmethod
    def _span_of(self, first: tuple[int, int], last: tuple[int, int]) -> str:
        """Return which models were averaged, in words, given epoch and step of two of them."""

    # -- what a user asks ----------------------------------------------------------------------

    @property
    def num_averaged(self) -> int:
        """Models in the average."""
        return 0 if self._weights is None else self._weights.num_averaged

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Have the average in the module for the block, and what was there again after it.

        Args:
            pl_module: the module of the last ``fit``.

        Raises:
            ValueError: if nothing was averaged yet, or for another module.
        """
        weights = self._weights_of(pl_module)
        trainer = self._agreement.trainer
        if trainer is not None and trainer.world_size == 1:  # others may not be asked for theirs
            self._refresh(trainer, pl_module)
        if not weights.is_in_module:
            self._statistics.warn_unless_its_own(weights)
        with weights.in_module():
            yield

    @contextmanager
    def raw(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Have the weights of training in the module for the block, and what was there after it.

        Args:
            pl_module: the module of the last ``fit``.

        Raises:
            ValueError: if nothing was averaged yet, or for another module.
        """
        with self._weights_of(pl_module).in_module(average=False):
            yield

    def _weights_of(self, pl_module: pl.LightningModule) -> AveragedWeights:
        if self._weights is None or self.num_averaged == 0:
            raise ValueError(
                f"`{type(self).__name__}` must have averaged a model before its average is used, "
                "got none. Train until the average begins; `num_averaged` says how many there are."
            )
        if self._weights.module is not getattr(pl_module, "_orig_mod", pl_module):  # compiled
            raise ValueError(
                "`pl_module` must be the module that was trained, got another one. Load the "
                "average into it from a checkpoint, by `load_averaged(path)`."
            )
        return self._weights

    @property
    def summary(self) -> str:
        """What is in the average, in a line."""
        if self._weights is None or self.num_averaged == 0:
            return f"{type(self).__name__}: nothing averaged"
        models = "1 model" if self.num_averaged == 1 else f"{self.num_averaged:,} models"
        line = f"{type(self).__name__}: average of {models}, {self._span_of(*self._span)}"
        if self._num_left_out:
            line += f", {self._num_left_out:,} left out that were not finite"
        if statistics := self._statistics.origin(self._weights):
            line += f"; normalization statistics {statistics}"
        return line

    # -- training ------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._is_in_file = False
        if stage == "fit":  # before a checkpoint is restored
            self._leave()
            self._start_anew()
            _require_distinct(self, trainer)
            self._plan(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_whole_parameters(trainer.strategy, type(self).__name__)
        if self._weights is None:
            self._weights = self._new_weights(trainer, pl_module)
        self._weights.follow_devices()
        self._watch.attach(trainer)
        self._state_dict_of_average = StateDictOfAverage(
            trainer.strategy, self._weights, partial(self._is_collected, trainer, pl_module)
        )
        self._statistics.require_step(pl_module)
        self._make_up_for_interruption(trainer)

    def _new_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> AveragedWeights:
        self._agreement.trainer = trainer
        average = RunningAverage(self._share, device=self._device, agreed=self._agreement)
        return AveragedWeights(pl_module, average, apart=self._statistics.names(pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and self._weights is not None:  # what others did as the epoch began
            self._weights.look_again()
        self._statistics.rehearse_once(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._take_if_due(trainer, after_batch=True)
        if trainer.is_last_batch and self._due_after_epoch(trainer.current_epoch):
            self._take(trainer, logger_step(trainer, after_batch=True))  # before it is validated

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._due_after_epoch(trainer.current_epoch):  # which was cut short
            self._take(trainer, logger_step(trainer, after_batch=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refresh(trainer, pl_module)
        self._share_buffers(trainer)
        if self.num_averaged:
            self._report(trainer, logger_step(trainer, after_batch=False), event=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the average over, after all that looks at the end of training."""
        if self.num_averaged == 0:
            reason = "training ended before it began. Let it begin earlier"
            if self._num_left_out:
                reason = "no weights were finite when it was due. Lower the learning rate"
            rank_zero_warn(
                f"`{type(self).__name__}` averaged nothing, and the module keeps its trained "
                f"weights: {reason}."
            )
        elif "validate" in self.use_for and self._weights is not None and self._is_usable():
            if not self._weights.is_in_module:
                self._statistics.warn_unless_its_own(self._weights)
                self._weights.swap()
            rank_zero_info(f"{self.summary}. The module holds the average.")
        else:
            rank_zero_info(f"{self.summary}. The module holds its trained weights.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()
        close_report(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the weights of training back."""
        if self._is_lent:
            with resharded_after(pl_module):  # a rank that failed alone cannot gather
                pass
            self._take_back()
        self._is_interrupted = True
        self._leave_optimizers()  # what writes a checkpoint now still collects the average
        close_report(trainer)

    def _leave(self) -> None:
        self._leave_optimizers()
        if self._state_dict_of_average is not None:
            self._state_dict_of_average.remove()
            self._state_dict_of_average = None
        self._agreement.trainer = None

    def _leave_optimizers(self) -> None:
        self._watch.detach()

    def _make_up_for_interruption(self, trainer: pl.Trainer) -> None:
        """Take what was due when another callback's hook failed, before this one's was called."""
        self._take_if_due(trainer, after_batch=False)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if trainer.is_last_batch and batches.completed < batches.ready:
            epochs = trainer.fit_loop.epoch_progress.current
            is_counted = epochs.completed == epochs.ready
            epoch = trainer.current_epoch - is_counted
            if self._due_after_epoch(epoch):
                self._take(trainer, logger_step(trainer, after_batch=False), epoch=epoch)

    def _take_if_due(self, trainer: pl.Trainer, *, after_batch: bool) -> None:
        if self._watch.stepped() and self._due_after_step(trainer):
            self._take(trainer, logger_step(trainer, after_batch=after_batch))

    def _take(self, trainer: pl.Trainer, step: int, *, epoch: int | None = None) -> None:
        assert self._weights is not None  # since the start of training
        if not self._weights.take(thorough=self._thorough):
            self._num_left_out += 1
            if self._num_left_out == 1:
                rank_zero_warn(
                    f"`{type(self).__name__}` leaves out the weights after step {step + 1:,}, "
                    "which are not finite, and all such to come. Lower the learning rate."
                )
            return
        now = (trainer.current_epoch if epoch is None else epoch, step)
        self._span = [self._span[0] if self._span else now, now]
        if self.num_averaged == 1 or self._is_logged(trainer):
            self._report(trainer, step, event=self.num_averaged == 1)

    def _report(self, trainer: pl.Trainer, step: int, *, event: bool) -> None:
        found = self._scalars(trainer)
        scalars = {tags.tag(self.topic, name): value for name, value in found.items()}
        if event:
            scalars[tags.tag(tags.EVENTS, self._event)] = float(self.num_averaged)
        report(trainer, step=step, scalars=scalars)

    def _scalars(self, trainer: pl.Trainer) -> dict[str, float]:
        assert self._weights is not None
        return {
            "num_averaged": float(self.num_averaged),
            "distance": self._weights.distance(sum_over_ranks(trainer)),
        }

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the statistics of norm layers for the average, unless they are its already."""
        if self._weights is None or self._is_interrupted:
            return
        if self._statistics.are_due(self._weights) and self._is_usable():
            self._statistics.refresh(trainer, pl_module, self._weights)

    # -- stages that run on the average --------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._lend(trainer, pl_module, "validate")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_back()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lend(trainer, pl_module, "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_back()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lend(trainer, pl_module, "predict")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_back()

    def _lend(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Put the average into the module for a stage, if it is to run on it."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not fitting and trainer.ckpt_path is not None:
            self._see_file(stage)
            return
        if stage not in self.use_for or self._weights is None:
            return
        if self._weights.module is not pl_module or self._weights.is_in_module:
            return
        if fitting:
            self._refresh(trainer, pl_module)
        if self.num_averaged and self._is_usable():
            if fitting:
                _broadcast_as_ddp_would(trainer)
                self._share_buffers(trainer)
            self._statistics.warn_unless_its_own(self._weights)
            self._is_lent = True  # before, lest an interruption comes between
            self._weights.swap()

    def _take_back(self) -> None:
        if self._is_lent and self._weights is not None and self._weights.is_in_module:
            self._weights.swap()
        self._is_lent = False

    def _see_file(self, stage: Stage) -> None:
        """Know what a checkpoint without a state of this callback has put into the module."""
        if self._is_in_file:
            return
        if self._weights is not None and self._weights.is_in_module:
            self._start_anew()  # the file's weights have taken the average's place
        if stage in self.use_for and "validate" not in self.use_for:
            rank_zero_warn(
                f"`{type(self).__name__}` finds no average of its own in the checkpoint, whose "
                "weights are used as they are. Write it without `save_weights_only=True`."
            )

    def _share_buffers(self, trainer: pl.Trainer) -> None:
        """Give all ranks the averaged buffers of rank zero, which a checkpoint holds."""
        if self._weights is None or trainer.world_size == 1:
            return
        for buffer in self._weights.averaged_buffers():
            buffer.copy_(trainer.strategy.broadcast(buffer.cpu()))

    def _is_usable(self, weights: AveragedWeights | None = None) -> bool:
        """Return whether an average, by default this run's, is in the module or else finite."""
        weights = weights or self._weights
        if weights is not None and (weights.is_in_module or weights.average.is_finite()):
            return True
        rank_zero_warn(
            f"The average of `{type(self).__name__}` is not finite, and is not used: weights were "
            "not finite when they entered it. Lower the learning rate."
        )
        return False

    # -- checkpoints ---------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Names the callback in checkpoints, and in the warning of a run that resumes without."""
        return (
            f"{self._stable_key} (its average: `load_averaged(path)`; "
            "the weights of training: `load_raw(path)`)"
        )

    @property
    def _stable_key(self) -> str:
        """What a state is found by, whatever else is said in its key."""
        return f"{type(self).__qualname__}[{self.topic}]"

    def _in_checkpoint(self) -> bool:
        """Return whether ``state_dict`` in a checkpoint written now is the average's."""
        if self._weights is None or self.num_averaged == 0:
            return False
        if self._weights.is_in_module:
            return True
        is_collected = self._state_dict_of_average is not None and "validate" in self.use_for
        return is_collected and self._is_usable()

    def _is_collected(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Return the same, with the statistics of the average up to date."""
        # a cluster's signal may ask for a checkpoint in the midst of a step, where no other can run
        if (pl_module._current_fx_name or "").startswith("on_"):
            self._refresh(trainer, pl_module)
        in_checkpoint = self._in_checkpoint()
        if in_checkpoint:  # a folder may hold a buffer of any rank
            self._share_buffers(trainer)
        return in_checkpoint

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is the Trainer's, and stays where an error ended its run."""
        return vars(self) | {"_state_dict_of_average": None}

    def state_dict(self) -> dict[str, Any]:
        holds_average = self._in_checkpoint()
        weights = {}
        if self._weights is not None:
            weights = self._weights.state(average_is_in_state_dict=holds_average)
        return {
            "kind": KIND,
            "state_dict_is": "average" if holds_average else "raw",
            "weights": weights,
            "watch": self._watch.state_dict(),
            "span": self._span,
            "statistics": self._statistics.state_dict(),
            "num_left_out": self._num_left_out,
        }

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; called before Lightning's `load_state_dict`, which does nothing."""
        self._watch.load_state_dict(state_dict["watch"])
        self._span = [(epoch, step) for epoch, step in state_dict["span"]]
        self._statistics.load_state_dict(state_dict["statistics"])
        self._num_left_out = state_dict["num_left_out"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the weights of training into the module, and the average beside them."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        states = checkpoint["callbacks"]
        key = next((key for key in states if key.startswith(self._stable_key)), None)
        self._is_in_file = key is not None and bool(states[key]["weights"])
        weights = self._new_weights(trainer, pl_module)
        if fitting or self._weights is None or self._weights.is_in_module:
            self._weights, self._is_lent = weights, False  # else this run's own is kept aside
            if key is not None:
                self._load(states[key])
        if self._is_in_file:
            weights.load(states[key]["weights"])
            wanted = not fitting and _stage_of(trainer) in self.use_for
            if wanted and weights.num_averaged and self._is_usable(weights):
                weights.swap()
        present = [callback.state_key for callback in _callbacks(trainer)]
        present += [] if key is None else [key]
        if fitting and (raw := raw_weights(checkpoint, absent_from=present)):
            weights.write(raw)


def span(unit: str, first: int, last: int) -> str:
    """Return from where to where, in words.

    Example:
        >>> span("epoch", 30, 41), span("step", 5000, 5000)
        ('epochs 30–41', 'step 5,000')
    """
    return f"{unit} {first:,}" if first == last else f"{unit}s {first:,}–{last:,}"


def _device_of(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"`device` must be one of torch's, such as 'cpu' or 'cuda:0', got {device!r}. `None` "
            "keeps the average where the weights are."
        ) from error


def _broadcast_as_ddp_would(trainer: pl.Trainer) -> None:
    """Give all ranks the module's buffers of rank zero, if the next forward pass would do so.

    A validation does it once, before its first batch, and training goes on with them: it must not
    find the average in their place.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and model._check_sync_bufs_pre_fwd():
        model._sync_buffers()


def _require_distinct(callback: AveragingCallback, trainer: pl.Trainer) -> None:
    """Refuse two averages for one purpose, or under one name."""
    for other in _callbacks(trainer):
        if not isinstance(other, AveragingCallback) or other is callback:
            continue
        both = sorted(other.use_for & callback.use_for)
        remedies = ["`use_for=()`"] if both else []
        if other.topic == callback.topic:
            remedies.append(f"`name='{type(callback).__name__.lower()}'`")
        if remedies:
            raise MisconfigurationException(
                f"`{type(other).__name__}` and `{type(callback).__name__}` must have names of "
                f"their own and share no stage, got {other.topic!r} and {callback.topic!r}, and "
                f"{both or 'no stage'} in both. Pass {' and '.join(remedies)} to one of them: an "
                "average that no stage uses is kept in checkpoints and for "
                "`with callback.averaged(module)`."
            )


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(vars(trainer)["callbacks"])  # which the Trainer does not declare


class _Agreement:
    """Says whether all ranks say yes; once training is over, and after pickling, there is one."""

    def __init__(self, trainer: pl.Trainer | None) -> None:
        self.trainer = trainer

    def __call__(self, yes: bool) -> bool:
        reduce = None if self.trainer is None else sum_over_ranks(self.trainer)
        if self.trainer is None or reduce is None:
            return yes
        noes = torch.tensor([int(not yes)], device=self.trainer.strategy.root_device)
        return int(reduce(noes)) == 0

    def __reduce__(self) -> tuple[type[_Agreement], tuple[None]]:
        return _Agreement, (None,)


def _stage_of(trainer: pl.Trainer) -> str:
    return {
        TrainerFn.VALIDATING: "validate",
        TrainerFn.TESTING: "test",
        TrainerFn.PREDICTING: "predict",
    }.get(trainer.state.fn, "")  # type: ignore[arg-type]
