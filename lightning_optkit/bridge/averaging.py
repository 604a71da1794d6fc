"""What every callback that averages weights shares: who sees the average, and when."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
from lightning_optkit.bridge.averaged_checkpoint import KIND, StateDictOfAverage, raw_weights
from lightning_optkit.bridge.averaged_weights import AveragedWeights
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.optimizer_steps import StepWatch
from lightning_optkit.bridge.probe import require_batch_step
from lightning_optkit.bridge.reduce import require_whole_parameters, sum_over_ranks
from lightning_optkit.bridge.report import report
from lightning_optkit.bridge.sharding import resharded_after
from lightning_optkit.bridge.statistics_pass import StatisticsPass, statistics_names
from lightning_optkit.methods.averaging import RunningAverage, Share

__all__ = ["AveragingCallback", "RefreshNormStats", "Stage"]

Stage = Literal["validate", "test", "predict"]
RefreshNormStats = bool | int | Literal["layerwise"]

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
        if isinstance(use_for, str) or not set(use_for) <= set(_STAGES):
            raise ValueError(
                f"`use_for` must be a tuple of {', '.join(map(repr, _STAGES))}, got {use_for!r}. "
                "Write `use_for=('validate', 'test')`, or `()` to only keep the average."
            )
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"`name` must be snake_case, such as 'slow', got {name!r}.")
        self.topic = tags.AVERAGING if name is None else f"{tags.AVERAGING}-{name}"
        self._event = tags.AVERAGING_EVENT if name is None else f"{tags.AVERAGING_EVENT}_{name}"
        self.use_for = frozenset(use_for)
        self._share = share
        self._device = None if device is None else torch.device(device)
        self._pass = _statistics_pass(refresh_norm_stats)
        self._thorough = thorough
        self._watch = StepWatch()
        self._state_dict_of_average: StateDictOfAverage | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        """Forget an earlier run, in ``setup``."""
        self._watch.start()
        self._weights: AveragedWeights | None = None
        self._is_lent = False  # in the module for a stage that runs now
        self._is_interrupted = False  # by an exception: nothing is run any more
        self._rehearses = False  # before the next batch
        self._statistics_are_of = 0  # models in the average when the statistics were taken
        self._num_samples = 0  # in that pass
        self._num_left_out = 0  # models that were not finite
        self._span: list[tuple[int, int]] = []  # epoch and step of the first and the last model

    # -- what a subclass says ------------------------------------------------------------------

    @abstractmethod
    def _plan(self, trainer: pl.Trainer) -> None:
        """Hold the settings against the Trainer's, in ``setup``."""

    @abstractmethod
    def _due_after_step(self, trainer: pl.Trainer) -> bool:
        """Return whether the model enters now, after an optimizer step; asked once a step."""

    def _due_after_epoch(self, trainer: pl.Trainer) -> bool:
        """Return whether the model enters now, after the last batch of an epoch."""
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
        if self._weights is None or self.num_averaged == 0:
            raise ValueError(
                f"`{type(self).__name__}` must have averaged a model before its average is used, "
                "got none. Train until the average begins; `num_averaged` says how many there are."
            )
        if self._weights.module is not pl_module:
            raise ValueError(
                "`pl_module` must be the module that was trained, got another one. Load the "
                "average into it from a checkpoint, by `load_averaged(path)`."
            )
        with self._weights.in_module():
            yield

    @property
    def summary(self) -> str:
        """What is in the average, in a line."""
        if self.num_averaged == 0:
            return f"{type(self).__name__}: nothing averaged"
        models = "1 model" if self.num_averaged == 1 else f"{self.num_averaged:,} models"
        line = f"{type(self).__name__}: average of {models}, {self._span_of(*self._span)}"
        if self._num_left_out:
            line += f", {self._num_left_out:,} left out that were not finite"
        if self._num_samples:
            line += f"; normalization statistics from {self._num_samples:,} samples"
        return line

    # -- training ------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
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
        self._rehearses = self._refreshes(pl_module)
        if self._rehearses:
            require_batch_step(pl_module)
        self._take_if_due(trainer, after_batch=False)  # stepped, and interrupted before this knew

    def _new_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> AveragedWeights:
        average = RunningAverage(self._share, device=self._device, agreed=_agreed(trainer))
        apart = statistics_names(pl_module) if self._refreshes(pl_module) else []
        return AveragedWeights(pl_module, average, apart=apart)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and self._weights is not None:  # what others did as the epoch began
            self._weights.look_again()
        if self._rehearses:  # now that the module's hooks have prepared it for a step
            self._rehearses = False
            self._rehearse(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._take_if_due(trainer, after_batch=True)
        if trainer.is_last_batch and self._due_after_epoch(trainer):  # before it is validated
            self._take(trainer, logger_step(trainer, after_batch=True))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._due_after_epoch(trainer):  # of an epoch that was cut short
            self._take(trainer, logger_step(trainer, after_batch=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refresh(trainer, pl_module)
        self._share_buffers(trainer)
        if self.num_averaged:
            self._report(trainer, logger_step(trainer, after_batch=False), event=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the average over, after all that looks at the end of training."""
        if self.num_averaged == 0:
            rank_zero_warn(
                f"`{type(self).__name__}` averaged nothing, because training ended before it "
                "began. The module keeps its trained weights. Let it begin earlier."
            )
        elif "validate" in self.use_for and self._weights is not None and self._is_usable():
            if not self._weights.is_in_module:
                self._weights.swap()
            rank_zero_info(f"{self.summary}. The module holds the average.")
        else:
            rank_zero_info(f"{self.summary}. The module holds its trained weights.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the weights of training back."""
        if self._is_lent and self._weights is not None:
            with resharded_after(pl_module):  # a rank that failed alone cannot gather
                pass
            self._weights.swap()
            self._is_lent = False
        self._is_interrupted = True
        self._leave_optimizers()  # what writes a checkpoint now still collects the average

    def _leave(self) -> None:
        self._leave_optimizers()
        if self._state_dict_of_average is not None:
            self._state_dict_of_average.remove()
            self._state_dict_of_average = None

    def _leave_optimizers(self) -> None:
        self._watch.detach()

    def _take_if_due(self, trainer: pl.Trainer, *, after_batch: bool) -> None:
        if self._watch.stepped() and self._due_after_step(trainer):
            self._take(trainer, logger_step(trainer, after_batch=after_batch))

    def _take(self, trainer: pl.Trainer, step: int) -> None:
        assert self._weights is not None  # since the start of training
        if not self._weights.take(thorough=self._thorough):
            self._num_left_out += 1
            if self._num_left_out == 1:
                rank_zero_warn(
                    f"`{type(self).__name__}` leaves out the weights after step {step}, which are "
                    "not finite, and all such to come. Lower the learning rate."
                )
            return
        now = (trainer.current_epoch, step)
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

    # -- norm layers ---------------------------------------------------------------------------

    def _refreshes(self, pl_module: pl.LightningModule) -> bool:
        return self._pass is not None and bool(statistics_names(pl_module))

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the statistics of the average, unless they are its already."""
        if self._pass is None or self._weights is None or not self._refreshes(pl_module):
            return
        if self._statistics_are_of == self.num_averaged or not self._is_usable():
            return
        try:
            with self._weights.in_module():
                statistics = self._pass.statistics(trainer, pl_module)
        except Exception as error:
            if trainer.world_size > 1:  # others may wait for this one
                raise
            rank_zero_warn(
                f"`{type(self).__name__}` could not take the statistics of norm layers for its "
                f"average; training goes on. {type(error).__name__}: {error}"
            )
            return
        self._weights.statistics = statistics
        self._statistics_are_of = self.num_averaged
        self._num_samples = self._pass.num_samples

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the step as the pass will, so that what cannot be run raises before training."""
        assert self._pass is not None
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
        from_file = not fitting and trainer.ckpt_path is not None
        if stage not in self.use_for or self._weights is None or from_file:
            return
        if self._weights.module is not pl_module or self._weights.is_in_module:
            return
        if fitting:
            self._refresh(trainer, pl_module)
        if self.num_averaged and self._is_usable():
            if fitting:
                _broadcast_as_ddp_would(trainer)
                self._share_buffers(trainer)
            self._weights.swap()
            self._is_lent = True

    def _take_back(self) -> None:
        if self._is_lent and self._weights is not None:
            self._weights.swap()
            self._is_lent = False

    def _share_buffers(self, trainer: pl.Trainer) -> None:
        """Give all ranks the averaged buffers of rank zero, which a checkpoint holds."""
        if self._weights is None or trainer.world_size == 1:
            return
        for buffer in self._weights.averaged_buffers():
            buffer.copy_(trainer.strategy.broadcast(buffer.cpu()))

    def _is_usable(self) -> bool:
        """Return whether the average, which is not in the module, is finite."""
        assert self._weights is not None
        if self._weights.is_in_module or self._weights.average.is_finite():
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
            f"{type(self).__qualname__}[{self.topic}] (its average: `load_averaged(path)`; "
            "the weights of training: `load_raw(path)`)"
        )

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
        if not self._is_interrupted:
            self._refresh(trainer, pl_module)
        in_checkpoint = self._in_checkpoint()
        if in_checkpoint:  # a folder may hold a buffer of any rank
            self._share_buffers(trainer)
        return in_checkpoint

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
            "statistics_are_of": self._statistics_are_of,
            "num_samples": self._num_samples,
            "num_left_out": self._num_left_out,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._watch.load_state_dict(state_dict["watch"])
        self._span = [(epoch, step) for epoch, step in state_dict["span"]]
        self._statistics_are_of = state_dict["statistics_are_of"]
        self._num_samples = state_dict["num_samples"]
        self._num_left_out = state_dict["num_left_out"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the weights of training into the module, and the average beside them."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._is_lent = False
        self._weights = self._new_weights(trainer, pl_module)
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and state["weights"]:
            self._weights.load(state["weights"])
            runs_on_it = not fitting and self.num_averaged and _stage_of(trainer) in self.use_for
            if runs_on_it and self._is_usable():
                self._weights.swap()
        present = {callback.state_key for callback in _callbacks(trainer)}
        if fitting and (raw := raw_weights(checkpoint, absent_from=present)):
            self._weights.write(raw)


def _statistics_pass(refresh_norm_stats: RefreshNormStats) -> StatisticsPass | None:
    if refresh_norm_stats is False:
        return None
    layerwise = refresh_norm_stats == "layerwise"
    if not (layerwise or (isinstance(refresh_norm_stats, int) and refresh_norm_stats >= 1)):
        raise ValueError(
            "`refresh_norm_stats` must be True, False, a number of batches or 'layerwise', got "
            f"{refresh_norm_stats!r}."
        )
    takes_all = layerwise or refresh_norm_stats is True
    num_batches = None if takes_all else int(refresh_norm_stats)
    return StatisticsPass(num_batches=num_batches, layerwise=layerwise, seed=0)


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
        kinds = f"`{type(other).__name__}` and `{type(callback).__name__}`"
        if other.topic == callback.topic:
            raise MisconfigurationException(
                f"`name` must tell {kinds} apart, got {callback.topic!r} for both. Pass "
                f"`name='{type(callback).__name__.lower()}'` to one of them."
            )
        if both := sorted(other.use_for & callback.use_for):
            raise MisconfigurationException(
                f"`use_for` must name each stage in one callback only, got {both} in {kinds}. Pass "
                "`use_for=()` to one of them: its average is kept in checkpoints and used by "
                "`with callback.averaged(module)`."
            )


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(vars(trainer)["callbacks"])  # which the Trainer does not declare


def _agreed(trainer: pl.Trainer) -> Callable[[bool], bool]:
    """Return a function that says whether all ranks say yes."""

    def agreed(yes: bool) -> bool:
        reduce = sum_over_ranks(trainer)
        if reduce is None:
            return yes
        noes = torch.tensor([int(not yes)], device=trainer.strategy.root_device)
        return int(reduce(noes)) == 0

    return agreed


def _stage_of(trainer: pl.Trainer) -> str:
    return {
        TrainerFn.VALIDATING: "validate",
        TrainerFn.TESTING: "test",
        TrainerFn.PREDICTING: "predict",
    }.get(trainer.state.fn, "")  # type: ignore[arg-type]
