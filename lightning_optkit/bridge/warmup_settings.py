"""What a user asks of a warmup, checked, and held against a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.condition import MetricsCondition
from lightning_optkit.bridge.run_length import steps_of_next_epochs, steps_of_run
from lightning_optkit.methods.warmup import Shape, warmup_end, warmup_factor

__all__ = ["WarmupSettings"]

_HELD = 0.1  # He et al. 2016 hold a tenth of the rate
_WITH_START = ("linear", "constant", "cosine", "exponential")
_WITH_BETAS = ("untuned", "radam")


class WarmupSettings:
    """How long a warmup is, and which factor it has at each step.

    Args:
        steps: its length in optimizer steps, or one for each optimizer.
        epochs: the same in epochs.
        fraction: the same as a share of the run.
        until: a condition in place of a length.
        shape: a name, or ``(step) -> factor``; ``None`` = constant with a condition, else linear.
        start_factor: from where; ``None`` = 0, or 0.1 where it is held.
        d_model: width of the Transformer.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if a value is out of range, or the arguments contradict one another.
    """

    def __init__(
        self,
        *,
        steps: int | Sequence[int] | None,
        epochs: float | None,
        fraction: float | None,
        until: MetricsCondition | None,
        shape: Shape | Callable[[int], float] | None,
        start_factor: float | None,
        d_model: int | None,
    ) -> None:
        default: Shape = "linear" if until is None else "constant"
        self.shape = default if shape is None else shape
        self._steps, self._epochs, self._fraction = steps, epochs, fraction
        lengths = {"steps": steps, "epochs": epochs, "fraction": fraction, "until": until}
        _require_shape(self.shape)
        _require_one_length({k: v for k, v in lengths.items() if v is not None}, self.shape)
        _require_lengths(**lengths)
        self.until = until
        self.start_factor = _start_factor(start_factor, self.shape, until)
        if (self.shape == "noam") != (d_model is not None):
            raise ValueError(
                "`d_model` must be given with shape='noam' and with no other, got "
                f"{d_model!r} with {self.shape!r}. It is the width of the Transformer."
            )
        if d_model is not None and not is_count(d_model, least=1):
            raise ValueError(
                f"`d_model` must be an integer of at least 1, such as 512, got {d_model!r}."
            )
        self._d_model = d_model

    @property
    def condition(self) -> str:
        """What ends it, in words."""
        return getattr(self.until, "__qualname__", None) or str(self.until)

    @property
    def needs_betas(self) -> bool:
        """Whether its length comes from each group's β₂."""
        return self.shape in _WITH_BETAS

    @property
    def asked(self) -> list[float | None]:
        """What a length in steps is computed from; all ``None`` if it was given."""
        return [self._epochs, self._fraction]

    def lengths(self, trainer: pl.Trainer, num_optimizers: int) -> list[int | None]:
        """Return the length for each of so many optimizers, in their steps.

        In manual optimization, epochs and shares of the run are in batches.

        Raises:
            MisconfigurationException: if it cannot be known.
        """
        steps = self._steps
        if isinstance(steps, Sequence):
            if len(steps) != num_optimizers:
                raise MisconfigurationException(
                    "`steps` must be one number or one for each of the "
                    f"{num_optimizers} optimizers that are warmed up, got {len(steps)}."
                )
            return list(steps)
        if self._epochs is not None:
            found = steps_of_next_epochs(trainer, self._epochs)
            steps = _known(found, "epochs", self._epochs)
        elif self._fraction is not None:
            total = _known(steps_of_run(trainer), "fraction", self._fraction)
            steps = math.ceil(self._fraction * total - 1e-9)  # 0.07 * 100 is above 7
        return [steps if steps is None else max(steps, 1)] * num_optimizers

    def factor(self, step: int, *, length: int | None, beta2: float | None) -> float:
        """Return the factor at a step, counted from 0, while no condition has ended it.

        Raises:
            ValueError: if a function returns what is no factor.
        """
        if self.until is not None:
            return self.start_factor
        if not isinstance(self.shape, str):
            return _checked(self.shape(step), step)
        return warmup_factor(
            self.shape,
            step,
            warmup_steps=length,
            start_factor=self.start_factor,
            beta2=beta2,
            d_model=self._d_model,
        )

    def end(self, *, length: int | None, beta2: float | None) -> int | None:
        """Return the first step from which the factor is 1 for good, if that is known."""
        if self.until is not None or not isinstance(self.shape, str):
            return None
        return warmup_end(self.shape, warmup_steps=length, beta2=beta2)

    def __str__(self) -> str:
        if not isinstance(self.shape, str):
            return getattr(self.shape, "__name__", type(self.shape).__name__)
        if self.until is not None:
            return f"factor {self.start_factor:g} until {self.condition}"
        if self.shape in _WITH_START:
            return f"{self.shape} from factor {self.start_factor:g}"
        return str(self.shape)


def _require_shape(shape: Any) -> None:
    if callable(shape) or shape in get_args(Shape):
        return
    names = ", ".join(map(repr, get_args(Shape)))
    raise ValueError(
        f"`shape` must be one of {names}, or a function (step) -> factor of steps counted from 0, "
        f"got {shape!r}."
    )


def _require_one_length(given: dict[str, Any], shape: Any) -> None:
    got = ", ".join(f"{key}={value!r}" for key, value in given.items()) or "none"
    if shape in _WITH_BETAS or not isinstance(shape, str):
        if given:
            reason = "β₂ says how long it is" if isinstance(shape, str) else "the function says it"
            raise ValueError(f"No length must be given with shape={shape!r}, got {got}: {reason}.")
        return
    if len(given) != 1:
        raise ValueError(
            "Exactly one of `steps`, `epochs`, `fraction` and `until` must be given, got "
            f"{got}. Write `steps=500`, or shape='untuned' for a length that Adam's β₂ says."
        )
    if "until" in given and shape != "constant":
        raise ValueError(
            f"`shape` must be 'constant' with `until`, or left out, got {shape!r}: when the "
            "condition will hold is not known, so the factor is held until then."
        )


def _require_lengths(*, steps: Any, epochs: Any, fraction: Any, until: Any) -> None:
    each = steps if isinstance(steps, Sequence) and not isinstance(steps, str) else [steps]
    if steps is not None and not (each and all(is_count(n, least=1) for n in each)):
        raise ValueError(
            "`steps` must be an integer of at least 1, or a list of one for each optimizer, got "
            f"{steps!r}."
        )
    if epochs is not None and not (is_number(epochs) and 0 < epochs < math.inf):
        raise ValueError(
            f"`epochs` must be a positive number, such as 5 or 0.5, got {epochs!r}. To do without "
            "a warmup, leave the callback out."
        )
    if fraction is not None and not (is_number(fraction) and 0 < fraction <= 1):
        raise ValueError(f"`fraction` must be in (0, 1], such as 0.05, got {fraction!r}.")
    if until is not None and not callable(until):
        raise TypeError(
            "`until` must be a condition, such as ErrorBelow('train_error', 0.8), or a function "
            f"(metrics) -> bool, got {until!r}."
        )


def _start_factor(given: Any, shape: Any, until: Any) -> float:
    if given is None:
        return _HELD if shape == "constant" else 0.0
    if shape not in _WITH_START:
        raise ValueError(
            f"`start_factor` must be left out with shape={shape!r}, which says itself where it "
            f"begins, got {given!r}."
        )
    if not is_number(given) or not 0 <= given < 1:
        raise ValueError(f"`start_factor` must be in [0, 1), such as 0.1, got {given!r}.")
    if given == 0 and shape == "constant":
        raise ValueError(
            "`start_factor` must be above 0 where it is held, got 0: nothing would be trained"
            f"{'' if until is None else ', and the condition never hold'}. 0.1 is usual."
        )
    return float(given)


def _known(steps: int | None, name: str, value: float) -> int:
    if steps is not None:
        return steps
    known = {
        "epochs": "the data have no length, so the steps of an epoch are not known",
        "fraction": "the run has no end that is known",
    }[name]
    remedy = {
        "epochs": "limit_train_batches",
        "fraction": "max_epochs` with data that have a length, or `max_steps",
    }[name]
    raise MisconfigurationException(
        f"`{name}` must not be given here, got {value}: {known}. Write `steps=` with how many "
        f"optimizer steps the warmup takes, or give the Trainer `{remedy}`."
    )


def _checked(factor: Any, step: int) -> float:
    if not is_number(factor) or not 0 <= factor < math.inf:
        raise ValueError(
            f"`shape` must return a number of at least 0, got {factor!r} at step {step}."
        )
    return float(factor)
