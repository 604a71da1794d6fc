"""Any LightningModule's training loss as a pure function of its parameters."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optkit.bridge.batch_copy import copied
from lightning_optkit.bridge.muting import (
    CapturedLosses,
    LossFoundError,
    ProbeError,
    mute,
    trainer_muted,
)
from lightning_optkit.bridge.sharding import (
    at_rest,
    mute_setters,
    resharded_after,
    sharding_hidden,
    whole,
)
from lightning_optkit.bridge.snapshot import Snapshot, put_back
from lightning_optkit.measures.module_loss import tensors_replaced

__all__ = [
    "Probe",
    "ProbeError",
    "StepLossFn",
    "in_full_precision",
    "is_probing",
    "probing",
    "require_batch_step",
    "select_parameters",
]

StepLossFn = Callable[[pl.LightningModule, Any], Any]
"""``(pl_module, batch) -> loss``, or ``(loss, outputs)`` where the net's outputs are asked for."""

_PROBING: ContextVar[bool] = ContextVar("lightning_optkit_probing", default=False)


def is_probing() -> bool:
    """Return whether ``training_step`` is being run by an observer rather than by the Trainer.

    An observer's extra calls leave no trace in anything that hangs on the module, the Trainer's
    loggers or the global random generators. What cannot be undone from outside, guard with this:

    * random generators, counters and files that the module does not own;
    * calls of an experiment tracker's global functions, such as ``wandb.log``, and of a logger that
      the module keeps in an attribute of its own;
    * attributes of classes with ``__slots__``, and datasets reached from the step.

    Example:
        >>> is_probing()
        False
    """
    return _PROBING.get()


class Probe:
    """Calls of ``training_step`` as pure functions, while this context is open.

    Every call starts from the same state (module attributes, metrics, buffers, train or eval mode,
    random generators) and leaves it as it found it. Logging, printing, optimizers and schedulers
    are inert; a loss given to ``manual_backward`` is captured. The loss is that of one micro-batch,
    not divided by ``accumulate_grad_batches``, in full precision whatever the Trainer's.

    Args:
        trainer: the Trainer, fitting.
        pl_module: its module.
        mode: ``"eval"`` switches dropout off and takes BatchNorm's running statistics;
            ``"train"`` leaves every layer as it is, with one fixed dropout mask for each batch.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        seed: seeds the random layers of ``mode="train"``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        loss_index: int = 0,
        seed: int = 0,
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._mode = mode
        self._loss_fn = loss_fn
        self._loss_index = loss_index
        self._seed = seed
        self._is_open = False
        self._captured = CapturedLosses(loss_index)  # while the step is held
        self._held_at: tuple[dict[str, Tensor], Snapshot] | None = None
        self._originals: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Probe:
        """Open the probe: remember everything that a step may change."""
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            stack.enter_context(probing())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_eager())
            stack.enter_context(_default_dtype(_measuring_dtype(self._module)))
            stack.enter_context(trainer_muted(self._trainer))
            stack.enter_context(at_rest(self._module))
            schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
            self._roots = (
                self._module,
                *[optimizer.param_groups for optimizer in self._trainer.optimizers],
                *[vars(scheduler) for scheduler in schedulers],
            )
            self._snapshot = Snapshot(*self._roots)
            stack.callback(self._snapshot.restore)
            self._stack = stack.pop_all()
        self._is_open = True
        return self

    def __exit__(self, *exception: object) -> None:
        """Put everything back."""
        self._is_open = False
        self._stack.close()

    def parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return copies of the named parameters, to differentiate by; float32 or float64.

        Shards are gathered: all ranks must call it.
        """
        self._copy_parameters()
        return {name: self._copies[name] for name in names}

    def loss_fn(self, batch: Any, batch_idx: int = 0) -> Callable[[dict[str, Tensor]], Tensor]:
        """Return the loss on ``batch`` as a function of ``{name: parameter}``.

        Parameters that are left out keep their values. Shards are gathered here: all ranks must
        call this method, but not the function that it returns.
        """
        self._copy_parameters()
        return _StepLoss(self, batch, batch_idx)

    def forward(
        self, batch: Any, batch_idx: int = 0, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Run the step to its end without a gradient, for the sake of what its layers see.

        The step need not return a loss. Shards are gathered: all ranks must call it.
        """
        self._copy_parameters()
        self._unsharded(parameters or {}, batch, batch_idx, CapturedLosses(wanted=None))

    def _copy_parameters(self) -> None:
        if not self._copies:
            self._originals = {name: whole(p) for name, p in self._module.named_parameters()}
            self._copies = {
                name: in_full_precision(p.clone()) for name, p in self._originals.items()
            }

    def backward(self, batch: Any, batch_idx: int = 0, *, weight: float = 1.0) -> Tensor:
        """Run the step on the module's own parameters, and the backward of ``weight * loss``.

        FSDP2 takes part, so all ranks must call it equally often. What is added to the gradients
        is the caller's to take out again: see :mod:`~lightning_optkit.bridge.sharded_gradient`.

        Returns:
            The loss, on this rank and without the weight.
        """
        with resharded_after(self._module):
            mute_setters(self._module)
            try:
                captured = CapturedLosses(self._loss_index)
                output = self._run({}, batch, batch_idx, captured)
                loss, _ = self._loss_and_outputs(output, captured)
                _require_graph(loss)
                (weight * loss).backward()
            finally:
                self._snapshot.restore()
        return loss.detach()

    def _call(self, parameters: Mapping[str, Tensor], batch: Any, batch_idx: int) -> Any:
        captured = CapturedLosses(self._loss_index)
        output = self._unsharded(parameters, batch, batch_idx, captured)
        loss, outputs = self._loss_and_outputs(output, captured)
        if any(p.requires_grad for p in parameters.values()):
            _require_graph(loss)
        return loss if outputs is None else (loss, outputs)

    @contextmanager
    def _held(self, parameters: Mapping[str, Tensor]) -> Iterator[Snapshot]:
        """Prepare the step once for many calls at these tensors, of any batch.

        Yields what puts everything back between two calls, but for these tensors' values.
        """
        if self._held_at is not None:  # for the loss of another batch
            held, snapshot = self._held_at
            if any(held.get(name) is not p for name, p in parameters.items()):
                raise RuntimeError("The losses of one probe must be held at the same tensors.")
            yield snapshot
            return
        others = {n: p.detach() for n, p in self._copies.items() if n not in parameters}
        try:
            with sharding_hidden(self._module):
                self._prepare(self._captured)
                for name, p in self._module.named_parameters():  # which a step may ask for
                    if name in parameters:
                        parameters[name].requires_grad_(p.requires_grad)
                substitutes = self._own_buffers() | others | dict(parameters)
                with tensors_replaced(self._module, substitutes):
                    snapshot = Snapshot(*self._roots, skip=parameters.values())
                    self._held_at = dict(parameters), snapshot
                    yield snapshot
        finally:
            self._held_at = None
            if self._is_open:  # else all is back already, and training may have gone on
                self._snapshot.restore()
                self._repair_parameters()

    def _held_loss(self, snapshot: Snapshot, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch while the step is held."""
        try:
            output = self._step_on(batch, batch_idx)
            loss, _ = self._loss_and_outputs(output, self._captured)
            return loss.detach().clone()
        finally:
            snapshot.restore()
            self._captured.losses.clear()

    def _unsharded(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        batch_idx: int,
        captured: CapturedLosses,
    ) -> Any:
        """Run the step on whole parameters, and put everything back."""
        substitutes = {name: p.detach() for name, p in self._copies.items()} | dict(parameters)
        given = [(p, p.detach().clone()) for p in parameters.values()]
        try:
            with sharding_hidden(self._module):
                return self._run(substitutes, batch, batch_idx, captured)
        finally:
            self._snapshot.restore()
            self._repair_parameters()
            for tensor, saved in given:
                put_back(tensor, saved)

    def _run(
        self,
        substitutes: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        captured: CapturedLosses,
    ) -> Any:
        """Run the step once, mute; what it changes is for the caller to put back."""
        self._prepare(captured)
        with tensors_replaced(self._module, self._own_buffers() | substitutes):
            return self._step_on(batch, batch_idx)

    def _prepare(self, captured: CapturedLosses) -> None:
        if self._mode == "eval":
            self._module.eval()
        mute(self._module, captured)

    def _own_buffers(self) -> dict[str, Tensor]:
        """Return buffers that a step may write into."""
        return {
            name: in_full_precision(buffer.detach().clone())
            for name, buffer in self._module.named_buffers()
        }

    def _step_on(self, batch: Any, batch_idx: int) -> Any:
        seed_global_generators(self._seed + batch_idx)
        own_batch = apply_to_collection(copied(batch), Tensor, in_full_precision)
        try:
            if self._loss_fn is not None:
                return self._loss_fn(self._module, own_batch)
            return self._training_step(own_batch, batch_idx)
        except LossFoundError:
            return None

    def _training_step(self, batch: Any, batch_idx: int) -> Any:
        if self._takes_batch_idx:
            return self._module.training_step(batch, batch_idx)
        return self._module.training_step(batch)

    @cached_property
    def _takes_batch_idx(self) -> bool:
        return is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)

    def _loss_and_outputs(self, output: Any, captured: CapturedLosses) -> tuple[Tensor, Any]:
        outputs = None
        if self._loss_fn is not None and isinstance(output, tuple) and len(output) == 2:
            output, outputs = output
        return _loss_of(output, captured, self._module), outputs

    def _repair_parameters(self) -> None:
        """Undo what a step wrote into our copies: a target network's average, a clipped weight."""
        for name, original in self._originals.items():
            put_back(self._copies[name], in_full_precision(original))


def select_parameters(
    pl_module: nn.Module, patterns: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters whose names match one of the glob ``patterns``.

    Raises:
        ValueError: if nothing is trainable, or nothing matches.

    Example:
        >>> list(select_parameters(nn.Linear(2, 1), ["b*"]))
        ['bias']
    """
    trainable = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
    for name, p in trainable.items():
        if is_lazy(p):
            raise ValueError(
                f"`{name}` must be initialized before training to be measured, got a lazy "
                "parameter. Run one batch through the module in its `setup` or `configure_model`."
            )
    if not trainable:
        raise ValueError(
            f"{type(pl_module).__name__} must have a trainable parameter, got none with "
            "`requires_grad=True`."
        )
    if patterns is None:
        return trainable
    chosen = {
        name: p
        for name, p in trainable.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        names = ", ".join(list(trainable)[:8])
        raise ValueError(
            f"`parameters` must match the name of a trainable parameter, got {list(patterns)!r}. "
            f"The names begin with: {names}."
        )
    return chosen


def require_batch_step(pl_module: pl.LightningModule) -> None:
    """Refuse steps that fetch their own batches: there is none to call them with.

    Raises:
        MisconfigurationException: for ``training_step(self, dataloader_iter)``.
    """
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "`training_step` must take a batch to be measured, got one that takes "
            "`dataloader_iter`. Pass `loss_fn=(pl_module, batch) -> loss`."
        )


class _StepLoss:
    """The loss of one batch as a function of parameters, which can be held for many points."""

    def __init__(self, probe: Probe, batch: Any, batch_idx: int) -> None:
        self._probe = probe
        self._batch = batch, batch_idx

    def __call__(self, parameters: Mapping[str, Tensor]) -> Any:
        """Return the loss at these parameters, or loss and outputs."""
        return self._probe._call(parameters, *self._batch)

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor]) -> Iterator[Callable[[], Tensor]]:
        """Open the loss at what these very tensors hold when it is called."""
        with self._probe._held(parameters) as snapshot:
            yield partial(self._probe._held_loss, snapshot, *self._batch)


def _loss_of(output: Any, captured: CapturedLosses, module: pl.LightningModule) -> Tensor:
    if captured.losses or not (module.automatic_optimization or isinstance(output, Tensor)):
        return captured.chosen
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ProbeError(
            "`training_step` must return the loss, a tensor or a dict with the key 'loss', got "
            f"{type(output).__name__}. A step that skips batches or keeps its loss elsewhere needs "
            "`loss_fn=(pl_module, batch) -> loss`."
        )
    if loss.numel() != 1:
        raise ProbeError(
            "`training_step` or `loss_fn` must return a scalar loss, got the shape "
            f"{tuple(loss.shape)}. Reduce it with `.mean()`."
        )
    return loss.reshape(())


def _require_graph(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ProbeError(
            "`training_step` must return a loss that depends on the parameters, got one "
            "without a gradient. Was it detached, turned into a number, or computed under "
            "`torch.no_grad()`? If so, pass `loss_fn=(pl_module, batch) -> loss`."
        )


def seed_global_generators(seed: int) -> None:
    """Seed torch, NumPy and Python; only within an open probe, which isolates them."""
    devices = (torch.cuda, torch.xpu, torch.backends.mps)
    if any(device.is_available() for device in devices):
        torch.manual_seed(seed)
    else:  # without a note, with its traceback, for each kind of device that is not there
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from it
    random.seed(seed)


def in_full_precision(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32; any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _measuring_dtype(module: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in module.parameters()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


@contextmanager
def probing() -> Iterator[None]:
    """Let :func:`is_probing` say so, for a call of the step that is undone."""
    token = _PROBING.set(True)
    try:
        yield
    finally:
        _PROBING.reset(token)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _eager() -> Any:
    """Return a context in which compiled modules run uncompiled: theirs is one derivative only."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch >= 2.6
    return set_stance("force_eager") if set_stance is not None else nullcontext()
