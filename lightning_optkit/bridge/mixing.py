"""What Mixup, CutMix and MixupOrCutMix share: where they meet a run and its batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_optkit.board import tags
from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.batch_fields import BatchFields, Key, Setter
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.interceptor import Step, StepInterceptor
from lightning_optkit.bridge.mixed_images import MixedImages, mixed_images
from lightning_optkit.bridge.mixed_step import MixedStep, check_against_two_losses, two_passes
from lightning_optkit.bridge.report import close_report, report
from lightning_optkit.bridge.target_mixing import SAID, TargetMixing, batch_size
from lightning_optkit.methods.mixed_target import MixedTargetError, Mixing
from lightning_optkit.methods.mixing import Mixed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MixingCallback", "check_alpha", "check_dims", "check_share"]


class MixingCallback(pl.Callback, ABC):
    """Mixes the batches of training, and their targets.

    A subclass says how inputs are mixed (:meth:`mix`) and how they are drawn (:meth:`figure`). What
    is random in a batch depends on seed, epoch and number of the batch alone, and on the rank, but
    for whether and in what way it is mixed: a run that is resumed mixes as one that was not
    interrupted, and no other random stream is touched.

    Args:
        target_mixing: how targets are mixed.
        probability: of a batch to be mixed.
        per_sample: one λ a sample.
        input_key: where the inputs are in a batch.
        target_key: where the targets are.
        setter: returns a batch with others in their places, where a key is a function.
        stop_epoch: first epoch that is not mixed.
        seed: of all that is random.
    """

    def __init__(
        self,
        target_mixing: TargetMixing,
        *,
        probability: float,
        per_sample: bool,
        input_key: Key | None,
        target_key: Key | None,
        setter: Setter | None,
        stop_epoch: int | None,
        seed: int,
    ) -> None:
        check_share("probability", probability, "1 mixes all batches.")
        if stop_epoch is not None and not is_count(stop_epoch, least=1):
            raise ValueError(
                f"`stop_epoch` must be an integer of at least 1, got {stop_epoch!r}. `None` mixes "
                "to the end."
            )
        if not is_count(seed, least=0):
            raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}.")
        if not isinstance(per_sample, bool):
            raise TypeError(f"`per_sample` must be True or False, got {per_sample!r}.")
        self._targets = target_mixing
        self._per_sample = per_sample
        self._probability = probability
        self._stop_epoch = stop_epoch
        self._seed = seed
        self._fields = BatchFields(input_key, target_key, setter)
        self._interceptor = StepInterceptor(self._around, role="mixing")
        self._module: pl.LightningModule | None = None
        self._start_anew()

    @abstractmethod
    def mix(self, inputs: Any, generator: torch.Generator, *, shared: torch.Generator) -> Mixed:
        """Return the mixed inputs of a batch.

        Args:
            inputs: of the batch.
            generator: of this rank.
            shared: the same on all ranks, for what they must do alike.
        """

    @abstractmethod
    def figure(self, images: MixedImages) -> Figure:
        """Return the picture of a mixed batch."""

    def _start_anew(self) -> None:
        self._mixed_step: MixedStep | None = None
        self._has_checked = False
        self._said: set[str] = set()
        self._images: MixedImages | None = None
        self._is_drawn = False
        self._latest: float | Tensor | None = None  # λ of the batch that runs; None = not mixed
        self._counted = (-1, 0, 0)  # epoch, batches of it so far, and how many of them were mixed

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._start_anew()
        if self._targets.targets == "two_pass" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`targets='two_pass'` must go with automatic optimization, got a module that steps "
                "by itself: its loss is used before it is mixed. Write `targets='proxy'`."
            )
        self._interceptor.attach(pl_module)
        self._module = pl_module

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mixed_step = None  # metrics may have been added

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        epoch, num_batches, num_mixed = self._counted
        if epoch != trainer.current_epoch:
            num_batches = num_mixed = 0
        num_batches, num_mixed = num_batches + 1, num_mixed + (self._latest is not None)
        self._counted = (trainer.current_epoch, num_batches, num_mixed)
        mixing, self._latest = self._latest, None
        step = logger_step(trainer, after_batch=True)
        if trainer._logger_connector.should_update_logs:
            weights = torch.as_tensor(1.0 if mixing is None else mixing, dtype=torch.float64)
            found = {"mixing": float(weights.mean()), "share": num_mixed / num_batches}
            scalars = {tags.tag(tags.MIXING, name): value for name, value in found.items()}
            report(trainer, step=step, scalars=scalars)
        if self._images is not None:
            self._draw(trainer, step, self._images)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()
        close_report(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._leave()
        close_report(trainer)

    def _leave(self) -> None:
        self._interceptor.detach()
        self._module = self._mixed_step = self._images = self._latest = None

    def state_dict(self) -> dict[str, Any]:
        return {"counted": list(self._counted), "is_drawn": self._is_drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        epoch, num_batches, num_mixed = state_dict["counted"]
        self._counted = (epoch, num_batches, num_mixed)
        self._is_drawn = state_dict["is_drawn"]

    # -- a step --------------------------------------------------------------------------------

    def _around(self, step: Step, batch: Any) -> Any:
        """Take the place of a step."""
        assert self._module is not None  # while attached
        trainer = self._module.trainer
        self._latest = None
        shared = _generator(trainer, self._seed, 0)
        if not self._is_due(trainer, shared):
            return step(batch)
        has_target = self._targets.has_target
        inputs, targets = self._fields.of(batch, with_target=has_target)
        if batch_size(inputs, targets) < 2:
            return step(batch)  # nobody to mix with
        mixed = self.mix(inputs, _generator(trainer, self._seed, 1 + _rank(trainer)), shared=shared)
        modes = {*self._targets.modes(targets, mixed)}
        self._latest = mixed.mixing
        self._begin(trainer, mixed, targets, modes)

        def batch_of(which: Mixing | int, *, again: bool = True) -> Any:
            """Return the batch with inputs that the step may change, if it is to run again."""
            x = tree_map(torch.clone, mixed.inputs) if again else mixed.inputs
            y = self._targets.mixed(targets, mixed, which)
            return self._fields.replaced(batch, x, y, with_target=has_target)

        mixing = Mixing(mixed.mixing)
        if "two_pass" in modes:
            return two_passes(trainer, self._module, step, batch_of(0), batch_of(1), mixing)
        if "proxy" not in modes:
            return step(batch_of(mixing, again=False))
        return self._proxied(trainer, step, batch_of, mixing, len(mixed.partners))

    def _proxied(
        self,
        trainer: pl.Trainer,
        step: Step,
        batch_of: Callable[..., Any],
        mixing: Mixing,
        num_samples: int,
    ) -> Any:
        """Run the step on a target that stands for two; the first time, see that it is right."""
        assert self._module is not None
        if self._mixed_step is None:
            self._mixed_step = MixedStep(self._module)
        if self._has_checked:
            return self._mixed_step(step, batch_of(mixing, again=False), mixing)
        if self._module.automatic_optimization:
            check_against_two_losses(
                trainer,
                self._module,
                self._mixed_step,
                step,
                batch_of=batch_of,
                num_samples=num_samples if self._per_sample else None,
            )
        output = self._mixed_step(step, batch_of(mixing, again=False), mixing)
        self._has_checked = mixing.has_mixed_loss
        has_skipped = self._module.automatic_optimization and output is None
        if not self._has_checked and not has_skipped:
            raise MixedTargetError(
                "The loss must be computed from the mixed targets, got one that is not: by code "
                "that runs without Python, or from labels that are not where `target_key` says. "
                "Mix with `targets='two_pass'`, with 'soft', with 'direct' for float targets, or "
                "with 'none' if the loss needs no target."
            )
        return output

    def _is_due(self, trainer: pl.Trainer, shared: torch.Generator) -> bool:
        draw = torch.rand((), dtype=torch.float64, generator=shared)
        if self._stop_epoch is not None and trainer.current_epoch >= self._stop_epoch:
            return False
        return bool(draw < self._probability)

    def _begin(self, trainer: pl.Trainer, mixed: Mixed, targets: Any, modes: set[str]) -> None:
        """Say and keep what is said and drawn once."""
        if "soft" in modes - self._said:
            self._targets.check_labels(targets)
        for mode in sorted(modes - self._said):
            rank_zero_info(f"`{type(self).__name__}` mixes, targets={mode!r}: {SAID[mode]}.")
        self._said |= modes
        if not self._is_drawn:
            self._is_drawn = True
            if trainer.loggers and trainer.is_global_zero:
                self._images = mixed_images(mixed, targets)

    def _draw(self, trainer: pl.Trainer, step: int, images: MixedImages) -> None:
        self._images = None
        try:
            name = tags.tag(tags.MIXING, tags.MIXING_FIGURE)
            report(trainer, step=step, figures={name: self.figure(images)})
        except Exception as error:  # a picture must not stop training
            rank_zero_warn(f"`{type(self).__name__}` could not draw a mixed batch: {error}")


def check_share(name: str, value: object, hint: str) -> None:
    """Refuse what is no number in [0, 1].

    Raises:
        ValueError: for such.
    """
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number in [0, 1], got {value!r}. {hint}")


def check_alpha(name: str, value: object) -> float:
    """Return the parameter of a Beta distribution, if it is one.

    Raises:
        ValueError: if not.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be a positive number, such as 0.2, got {value!r}. To leave batches as "
            "they are, write `probability=0`."
        )
    return float(value)


def check_dims(dims: Any) -> list[int] | None:
    """Return the dimensions to cut, if they can be.

    Raises:
        ValueError: if not.
    """
    if dims is None:
        return None
    found = list(dims) if isinstance(dims, (list, tuple)) else []
    is_fine = all(isinstance(dim, int) and not isinstance(dim, bool) and dim for dim in found)
    if not found or not is_fine:
        raise ValueError(
            f"`dims` must be a list of dimensions without 0, that of the batch, got {dims!r}. "
            "`[2, 3]` are height and width of images."
        )
    return found


def _generator(trainer: pl.Trainer, seed: int, rank: int) -> torch.Generator:
    """Return the random numbers of the batch that runs, the same whenever it runs.

    The Trainer's total number of batches would not do: it counts one twice that was broken off.
    """
    key = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, rank
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _rank(trainer: pl.Trainer) -> int:
    """Return which part of the data this process sees: tensor-parallel ones share theirs."""
    return (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
