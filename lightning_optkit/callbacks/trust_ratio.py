"""Steps in proportion to the size of each layer's weights, by any optimizer."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.board import tags
from lightning_optkit.board.schema import names_array
from lightning_optkit.bridge.arguments import is_number
from lightning_optkit.bridge.cadence import logger_step
from lightning_optkit.bridge.chosen_optimizers import chosen_optimizers, optimizer_indices
from lightning_optkit.bridge.effective_rates import is_logged, optimizer_names
from lightning_optkit.bridge.optimizer_steps import UpdateInStep
from lightning_optkit.bridge.reduce import require_whole_parameters
from lightning_optkit.bridge.report import close_report, report
from lightning_optkit.bridge.scalable_optimizers import (
    Of,
    of_optimizer,
    parameters_of,
    require_layers,
    require_scalable,
)
from lightning_optkit.bridge.sharding import at_rest
from lightning_optkit.measures.trust_ratios import lamb_ratios, lars_ratios
from lightning_optkit.methods.trust_ratio import (
    Group,
    Layers,
    Ratios,
    scaled_gradients,
    scaled_updates,
)
from lightning_optkit.optim.groups import left_alone
from lightning_optkit.optim.norms import layout_of, local_norms, whole_norms

__all__ = ["TrustRatio"]

_COEFFICIENTS: dict[Of, float] = {"gradient": 0.001, "update": 1.0}  # of the two papers


class TrustRatio(pl.Callback):
    r"""Scales the step of each layer to the size of its weights, whatever the optimizer.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not. Inside ``optimizer.step()`` alone: gradients, weight decay and learning rates are the
    user's own before and after it, and checkpoints hold nothing of it.

    .. math:: \text{gradient:}\quad g \leftarrow \lambda\,(g + \beta w), \quad
        \lambda = \frac{c\,\|w\|}{\|g\| + \beta\,\|w\|} \qquad\qquad
        \text{update:}\quad w \leftarrow w_{old} - r\,u, \quad
        r = \frac{c\,\|w_{old}\|}{\|u\| / \gamma}

    with β the weight decay, γ the learning rate and u the update that the optimizer made. The first
    makes LARS of SGD with or without momentum, the second LAMB of AdamW. A ratio is 1 where either
    norm is zero. Each weight tensor is a layer; biases and parameters of norm layers are left as
    they are.

    Args:
        of: ``"gradient"``, for optimizers that are linear in it; ``"update"``, for any;
            ``"auto"`` = the gradient of ``torch.optim.SGD``, the update of all others.
        trust_coefficient: c, positive; 0.001 for gradients and 1 for updates by default.
        where: glob patterns of parameter names, such as ``["encoder.*"]``, which alone are scaled;
            ``None`` = all.
        exclude_norm_and_bias: leave biases and parameters of norm layers as the optimizer has them.
        max_ratio: largest ratio, positive; ``None`` = no limit.
        optimizers: which of the module's optimizers, by index; ``None`` = all.
        log: whether to log the ratios.
        name: tells several instances of one Trainer apart, each for optimizers of its own.

    Logged keys:
        ``optkit-trust/{mean, min, max}`` over the layers' ratios of the last step, whenever the
        Trainer logs (``log_every_n_steps``): see :data:`lightning_optkit.board.tags.TRUST_SCALARS`.
        With them, as arrays in TensorBoard, ``trust_ratios`` and ``layer_names``.

    Cost:
        Norms of weights and gradients, or updates; two or three passes over the parameters a step.
        Memory for one copy of the gradients, or of the weights, that are scaled, during a step.

    When it misleads:
        The learning rate means another thing with ratios than without: it has to be found anew.
        Ratios of gradients undo what clipping does to their length. Updates are differences of
        weights: of half-precision weights little is left of them.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrustRatio()], logger=False)
    """

    def __init__(
        self,
        of: Of | Literal["auto"] = "auto",
        trust_coefficient: float | None = None,
        *,
        where: Sequence[str] | None = None,
        exclude_norm_and_bias: bool = True,
        max_ratio: float | None = None,
        optimizers: int | Sequence[int] | None = None,
        log: bool = True,
        name: str | None = None,
    ) -> None:
        if of not in ("auto", "gradient", "update"):
            raise ValueError(
                f"`of` must be 'auto', 'gradient' or 'update', got {of!r}. 'auto' is LARS for SGD, "
                "and like LAMB for all others."
            )
        for key, value in (("trust_coefficient", trust_coefficient), ("max_ratio", max_ratio)):
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise ValueError(
                    f"`{key}` must be a positive number, got {value!r}. `None` takes the default."
                )
        for key, flag in (("exclude_norm_and_bias", exclude_norm_and_bias), ("log", log)):
            if not isinstance(flag, bool):
                raise TypeError(f"`{key}` must be True or False, got {flag!r}. Write one of them.")
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", str(name)):
            raise ValueError(
                f"`name` must be snake_case, such as 'critic', got {name!r}. It becomes part of "
                "tags."
            )
        self.topic = tags.TRUST if name is None else f"{tags.TRUST}-{name}"
        self._of: Of | Literal["auto"] = of
        self._coefficient = trust_coefficient
        self._where = _patterns(where)
        self._excludes = exclude_norm_and_bias
        self._max_ratio = max_ratio
        self._optimizers = optimizer_indices(optimizers)
        self._log = log
        self._update = UpdateInStep(self._around)
        self._start_anew()

    def _start_anew(self) -> None:
        self._layers: dict[Tensor, str] = {}  # what is scaled, and its name
        self._scaled: dict[int, Of] = {}  # what of the step of each optimizer
        self._last: dict[int, list[tuple[list[str], Tensor]]] = {}  # ratios of its last step
        self._is_new = False

    @property
    def last_trust_ratios(self) -> dict[str, float]:
        """Ratios of the last step of each optimizer, by name of the parameter; waits for them.

        Empty before the first step. Without those whose gradient was not there.
        """
        return {
            name: ratio
            for found in self._last.values()
            for names, ratios in found
            for name, ratio in zip(names, ratios.tolist(), strict=True)
        }

    # -- training ------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._leave()
            self._start_anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_whole_parameters(trainer.strategy, "TrustRatio")
        optimizers = chosen_optimizers(trainer, self._optimizers)
        self._require_alone(trainer, [i for i, _ in optimizers])
        for i, optimizer in optimizers:
            self._scaled[i] = of_optimizer(optimizer, self._of)
            require_scalable(trainer, i, optimizer, self._scaled[i])
        with at_rest(pl_module):  # parameters as their optimizers have them
            self._layers = self._selected(pl_module)
            require_layers(pl_module, [optimizer for _, optimizer in optimizers], self._layers)
        names = optimizer_names(trainer)
        for i, optimizer in optimizers:
            rank_zero_info(self._line(names[i], optimizer, self._scaled[i]))
        self._update.attach(trainer, [i for i, _ in optimizers])

    @contextmanager
    def _around(self, i: int, optimizer: Optimizer) -> Iterator[None]:
        block = scaled_gradients if self._scaled[i] == "gradient" else scaled_updates
        with block(optimizer, self._layers, norms=local_norms, ratios=self._ratios(i)) as found:
            yield
        self._last[i] = [([self._layers[p] for p in layers], ratios) for layers, ratios in found]
        self._is_new = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._log and self._is_new and is_logged(trainer):
            self._is_new = False
            self._report(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._leave()
        close_report(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        close_report(trainer)

    def _leave(self) -> None:
        self._update.detach()
        self._layers, self._scaled = {}, {}

    # -- ratios --------------------------------------------------------------------------------

    def _ratios(self, i: int) -> Ratios:
        of = self._scaled[i]
        return partial(
            _ratios_of_layers,
            rule=_lars if of == "gradient" else _lamb,
            coefficient=self._coefficient_of(of),
            max_ratio=math.inf if self._max_ratio is None else self._max_ratio,
        )

    def _coefficient_of(self, of: Of) -> float:
        return _COEFFICIENTS[of] if self._coefficient is None else self._coefficient

    def _report(self, trainer: pl.Trainer) -> None:
        ratios = self.last_trust_ratios
        if not ratios:  # no layer had a gradient
            return
        values = torch.tensor(list(ratios.values()))
        found = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        report(
            trainer,
            step=logger_step(trainer, after_batch=True),
            scalars={tags.tag(self.topic, name): float(value) for name, value in found.items()},
            arrays={
                tags.tag(self.topic, tags.TRUST_RATIOS): values.numpy(),
                tags.tag(self.topic, tags.LAYER_NAMES): names_array(list(ratios)),
            },
        )

    # -- before the first step -----------------------------------------------------------------

    def _require_alone(self, trainer: pl.Trainer, optimizers: list[int]) -> None:
        """Refuse two for one optimizer, or under one name."""
        for other in vars(trainer)["callbacks"]:  # which the Trainer does not declare
            if not isinstance(other, TrustRatio) or other is self:
                continue
            shared = sorted(other._scaled.keys() & set(optimizers))
            if shared:
                raise MisconfigurationException(
                    f"`optimizers` of two `TrustRatio` must be different, got {shared} in both: "
                    "both would multiply. Pass `optimizers=[...]` to each."
                )
            if other.topic == self.topic:
                raise MisconfigurationException(
                    f"`name` of two `TrustRatio` must be different, got {self.topic!r} for both. "
                    "Pass `name='critic'` to one of them."
                )

    def _selected(self, pl_module: pl.LightningModule) -> dict[Tensor, str]:
        """Return the parameters to scale, whoever optimizes them, with their names."""
        named = dict(pl_module.named_parameters())
        where = ["*"] if self._where is None else self._where
        for pattern in where:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
                raise ValueError(
                    f"`where` must match names of parameters, got {pattern!r}, which matches none. "
                    f"The names begin with: {', '.join(list(named)[:8])}."
                )
        left = set(left_alone(pl_module, ())) if self._excludes else set()
        return {
            p: name
            for name, p in named.items()
            if p not in left and any(fnmatch.fnmatchcase(name, pattern) for pattern in where)
        }

    def _line(self, name: str, optimizer: Optimizer, of: Of) -> str:
        """Return what is done to an optimizer."""
        parameters = parameters_of(optimizer)
        num_layers = sum(p in self._layers for p in parameters)
        return (
            f"TrustRatio: {of}s of {name} scaled by layer in {num_layers} of {len(parameters)} "
            f"parameters, coefficient {self._coefficient_of(of):g}"
        )


def _ratios_of_layers(
    layers: Layers,
    of_weights: Tensor,
    of_others: Tensor,
    *,
    rule: Callable[[Group, Tensor, Tensor, float], Tensor],
    coefficient: float,
    max_ratio: float,
) -> Tensor:
    """Return the ratios of layers of several groups; all ranks that hold shards must call it."""
    of_weights, of_others = whole_norms([of_weights, of_others], layout_of(layers.parameters[0]))
    found = [
        rule(settings, of_weights[where], of_others[where], coefficient)
        for settings, where in layers.by_group()
    ]
    return torch.cat(found).clamp(max=max_ratio)


def _lars(settings: Group, of_weights: Tensor, of_gradients: Tensor, coefficient: float) -> Tensor:
    return lars_ratios(
        of_weights,
        of_gradients,
        trust_coefficient=coefficient,
        weight_decay=settings.get("weight_decay", 0.0),
    )


def _lamb(settings: Group, of_weights: Tensor, of_updates: Tensor, coefficient: float) -> Tensor:
    return lamb_ratios(coefficient * of_weights, of_updates / settings["lr"])


def _patterns(where: Sequence[str] | None) -> list[str] | None:
    if where is None:
        return None
    is_list = isinstance(where, Sequence) and not isinstance(where, str)
    if not is_list or not where or not all(isinstance(pattern, str) for pattern in where):
        raise ValueError(
            f"`where` must be a list of glob patterns such as ['encoder.*'], got {where!r}. `None` "
            "takes all."
        )
    return list(where)
