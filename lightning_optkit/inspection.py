"""The loss surface at a checkpoint, after the fact: ``lightning-optkit inspect``."""

from __future__ import annotations

import importlib
import inspect
import logging
import pickle
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_optkit.bridge.measuring import MeasuringCallback
from lightning_optkit.measures import (
    CriticalPoint,
    Eigenpairs,
    GaussNewtonOperator,
    GradientStep,
    HessianOperator,
    Spectrum,
    StabilityThreshold,
    critical_point,
    hessian_spectrum,
    layer_spectra,
    stability_threshold,
    step_along_gradient,
    top_eigenpairs,
)

__all__ = [
    "OPERATORS",
    "Inspection",
    "InspectionError",
    "InspectionSettings",
    "OptimizerStability",
    "inspect_checkpoint",
    "one_line",
]

OPERATORS: dict[str, type[HessianOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
}
"""What ``curvature`` may be, and what is measured then."""

# An eigenvalue to four digits is what a table shows; docs/benchmarks.md measures this tolerance.
_PAIR_RTOL = 1e-4

_UNREADABLE = (
    "{} must be a checkpoint of Lightning, got a file that torch cannot load. Write one with "
    "`trainer.save_checkpoint(...)`."
)


class InspectionError(Exception):
    """What was asked for cannot be loaded; the message is one line and says what to do."""


@dataclass(frozen=True)
class InspectionSettings:
    """How to measure; as in :class:`~lightning_optkit.HessianSpectrum`.

    Attributes:
        num_batches: training batches to measure on.
        num_matvecs: Lanczos steps of one probe.
        num_probes: probes.
        tol_rel: eigenvalues within ``tol_rel * max|lambda|`` of zero count as zero, or ``"auto"``.
        mode: ``"eval"`` or ``"train"``, how dropout and BatchNorm behave.
        parameters: glob patterns of parameter names; ``None`` takes all trainable ones.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        top_k: how many eigenvalues of largest size to find.
        exact_below: largest number of parameters for which all eigenvalues are computed.
        curvature: ``"hessian"``, or ``"gauss_newton"``: without the curvature of the net itself.
        graphs: ``"cached"`` keeps one gradient graph for each batch; ``"lockstep"`` one at a time.
        per_layer: measure each layer's own block too.
        seed: seeds the choice of batches and the probes.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.
    """

    num_batches: int = 4
    num_matvecs: int = 80
    num_probes: int = 4
    tol_rel: float | Literal["auto"] = 1e-3
    mode: Literal["eval", "train"] = "eval"
    parameters: tuple[str, ...] | None = None
    loss_index: int = 0
    top_k: int = 5
    exact_below: int = 1000
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    graphs: Literal["cached", "lockstep"] = "cached"
    per_layer: bool = False
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class OptimizerStability:
    """The largest curvature against what the checkpoint's optimizer is stable at.

    Attributes:
        optimizer: name of its class.
        learning_rate: of the next step.
        threshold: the largest curvature that is stable.
        lambda_max: largest eigenvalue of the Hessian as the optimizer scales it.
        lambda_max_error: estimate of its error.
    """

    optimizer: str
    learning_rate: float
    threshold: float
    lambda_max: float
    lambda_max_error: float

    @property
    def ratio(self) -> float:
        """``lambda_max / threshold``: above 1 a step along the sharpest direction overshoots."""
        return self.lambda_max / self.threshold


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Inspection:
    """What was found at a checkpoint.

    Attributes:
        checkpoint: path of the file.
        module: import path of the module's class.
        epoch: at which the checkpoint was written; ``None`` if it does not say.
        global_step: likewise.
        settings: how it was measured.
        loss: on the held batches.
        num_samples: in the held batches.
        spectrum: the eigenvalues.
        pairs: those of largest size, with residuals.
        point: the kind of point, with the evidence.
        step: along the gradient.
        stability: with the optimizer in the checkpoint, or one line why it is not known.
        layers: spectrum of each layer's block; empty unless asked for.
        num_products: Hessian-vector products spent in all.
        seconds: wall time spent, loading apart.
    """

    checkpoint: str
    module: str
    epoch: int | None
    global_step: int | None
    settings: InspectionSettings
    loss: float
    num_samples: int
    spectrum: Spectrum
    pairs: Eigenpairs
    point: CriticalPoint
    step: GradientStep
    stability: OptimizerStability | str
    layers: dict[str, Spectrum]
    num_products: int
    seconds: float


def inspect_checkpoint(
    checkpoint: str | Path,
    *,
    module: str,
    data: str | None = None,
    module_args: Mapping[str, Any] | None = None,
    data_args: Mapping[str, Any] | None = None,
    settings: InspectionSettings | None = None,
    trust: bool = False,
) -> Inspection:
    """Return the curvature of the training loss at a checkpoint of Lightning.

    A Trainer sets module and data up as for training and stops before the first step, so that
    layers made in ``setup`` or ``configure_model`` are there and batches arrive as they did. The
    weights measured are the checkpoint's, to the bit.

    Args:
        checkpoint: a file that Lightning wrote.
        module: import path of the LightningModule's class, ``package.module.Class`` or
            ``package.module:Class``.
        data: import path of a LightningDataModule, or of a ``DataLoader`` or list of batches, or of
            a function that returns one of these; ``None`` is the module's own ``train_dataloader``.
        module_args: arguments of the class, before the hyperparameters in the checkpoint.
        data_args: arguments of the data, before those in the checkpoint.
        settings: how to measure.
        trust: unpickle a checkpoint that holds objects other than tensors and plain values, which
            can run any code.

    Raises:
        InspectionError: if something cannot be imported, or does not fit the checkpoint.
    """
    settings = settings or InspectionSettings()
    content = _content(Path(checkpoint), trust=trust)
    model = _module(Path(checkpoint), module, dict(module_args or {}), trust=trust)
    if data is None and not is_overridden("train_dataloader", model):
        raise InspectionError(
            f"--data must name the training data, got none: {module} has no `train_dataloader`."
        )
    source = _data(Path(checkpoint), data, dict(data_args or {}), content, trust=trust)
    inspector = _Inspector(content, settings, _without_training(model))
    try:
        with _quiet():
            trainer = _trainer(content["state_dict"], inspector, settings)
            datamodule = source if isinstance(source, pl.LightningDataModule) else None
            loader = None if datamodule is not None else _loader(source)
            trainer.fit(model, train_dataloaders=loader, datamodule=datamodule)
    except _InspectedError:
        pass
    found = inspector.found
    if found is None:
        raise InspectionError(
            "The training dataloader must yield at least one batch, got none. Check the data that "
            "`--data` names."
        )
    return Inspection(
        checkpoint=str(checkpoint),
        module=module,
        epoch=content.get("epoch"),
        global_step=content.get("global_step"),
        settings=settings,
        **found,
    )


class _InspectedError(Exception):
    """Ends ``fit`` once everything is measured, before the first training step."""


class _Inspector(MeasuringCallback):
    """Measures at the start of ``fit``, at given weights, and ends it."""

    def __init__(
        self, content: dict[str, Any], settings: InspectionSettings, failures: list[Exception]
    ) -> None:
        super().__init__(
            topic="optkit-inspection",
            parameters=None if settings.parameters is None else list(settings.parameters),
            num_batches=settings.num_batches,
            mode=settings.mode,
            loss_index=settings.loss_index,
            seed=settings.seed,
            graphs=settings.graphs,
        )
        self._state_dict = content["state_dict"]
        self._optimizer_states = content.get("optimizer_states") or []
        self._failures = failures  # of `configure_optimizers`
        self._settings = settings
        self.found: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the module its weights, now that all of its layers are there."""
        self._load(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and end."""
        self._load(pl_module)  # whatever the module's own hooks did to them
        self._open(trainer, pl_module)
        started = time.perf_counter()
        limit = self._limit(trainer, pl_module)  # in a probe all optimizers are inert
        with self._probe(trainer, pl_module) as probe:
            terms = self.loss_terms(trainer, probe, self.parameter_names(pl_module))
            self.found = self._measured(pl_module, terms, limit)
        self.found["seconds"] = time.perf_counter() - started
        raise _InspectedError

    def _load(self, pl_module: pl.LightningModule) -> None:
        try:
            pl_module.load_state_dict(self._state_dict, strict=pl_module.strict_loading)
        except RuntimeError as error:
            raise InspectionError(_misfit(type(pl_module).__name__, error)) from error

    def _measured(
        self,
        pl_module: pl.LightningModule,
        terms: dict[str, Any],
        limit: StabilityThreshold | str,
    ) -> dict[str, Any]:
        settings = self._settings
        operator = OPERATORS[settings.curvature](**terms)
        of_spectrum: dict[str, Any] = {
            "num_matvecs": settings.num_matvecs,
            "num_probes": settings.num_probes,
            "tol_rel": settings.tol_rel,
            "exact_below": settings.exact_below,
        }
        spectrum = hessian_spectrum(operator, **of_spectrum, generator=self._generator())
        layers: dict[str, Spectrum] = {}
        if settings.per_layer:
            layers = layer_spectra(operator, **of_spectrum, generator=self._generator())
        pairs = top_eigenpairs(
            operator, settings.top_k, rtol=_PAIR_RTOL, generator=self._generator()
        )
        return {
            "spectrum": spectrum,
            "layers": layers,
            "pairs": pairs,
            "point": critical_point(operator, spectrum),
            "step": step_along_gradient(operator),
            "stability": limit if isinstance(limit, str) else self._stability(limit, operator),
            "loss": float(operator.loss()),
            "num_samples": int(operator.total_weight),
            "num_products": operator.num_matvecs + sum(s.num_matvecs for s in layers.values()),
        }

    def _stability(
        self, limit: StabilityThreshold, operator: HessianOperator
    ) -> OptimizerStability:
        """Return the largest curvature that the optimizer sees, against its limit."""
        top = top_eigenpairs(
            limit.precondition(operator),
            1,
            which="largest",
            rtol=_PAIR_RTOL,
            generator=self._generator(),
        )
        return OptimizerStability(
            optimizer=limit.optimizer,
            learning_rate=float(limit.learning_rate),
            threshold=float(limit.threshold),
            lambda_max=float(top.values[0]),
            lambda_max_error=float(top.errors[0]),
        )

    def _limit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> StabilityThreshold | str:
        """Return what the checkpoint's optimizer is stable at, or one line why it is not known."""
        if self._settings.curvature != "hessian":
            return "the limit is one of the Hessian's: leave out --curvature"
        named = dict(pl_module.named_parameters())
        params = {name: named[name] for name in self.parameter_names(pl_module)}
        try:
            found = stability_threshold(self._optimizer(trainer, params), params)
        except Exception as error:  # an optimizer's own, too
            return one_line(error)
        if len(found.preconditioner) != sum(p.numel() for p in params.values()):
            return "the optimizer's state does not fit the parameters"
        return found

    def _optimizer(self, trainer: pl.Trainer, params: Mapping[str, Tensor]) -> Optimizer:
        """Return the optimizer of these parameters, in the state of the checkpoint.

        Raises:
            InspectionError: if there is none.
        """
        if self._failures:
            raise InspectionError(f"`configure_optimizers` failed: {one_line(self._failures[0])}")
        if not self._optimizer_states:
            raise InspectionError("the checkpoint holds no optimizer's state")
        wanted = {id(p) for p in params.values()}
        for optimizer, state in zip(trainer.optimizers, self._optimizer_states, strict=False):
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if wanted <= owned:
                optimizer.load_state_dict(state)
                return optimizer
        raise InspectionError("no optimizer owns all parameters that are measured: --parameters")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._settings.seed)


# -- loading ----------------------------------------------------------------------------------


def _content(checkpoint: Path, *, trust: bool) -> dict[str, Any]:
    """Return what is in the file, on the CPU."""
    if not checkpoint.is_file():
        kind = "a folder" if checkpoint.is_dir() else "nothing there"
        raise InspectionError(f"The checkpoint must be a file, got {str(checkpoint)!r}: {kind}.")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe and not trust:
            raise InspectionError(
                f"{checkpoint} must hold tensors and plain values, got {unsafe[1]}. Unpickling "
                "that can run any code: pass --trust if the file is your own."
            ) from error
        raise InspectionError(_UNREADABLE.format(checkpoint)) from error
    except Exception as error:
        raise InspectionError(_UNREADABLE.format(checkpoint)) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InspectionError(
            f"{checkpoint} must be a checkpoint of Lightning, got a file without 'state_dict'. "
            "Write one with `trainer.save_checkpoint(...)`."
        )
    return content


def _module(
    checkpoint: Path, name: str, arguments: dict[str, Any], *, trust: bool
) -> pl.LightningModule:
    found = _imported(name, "--module")
    if not (isinstance(found, type) and issubclass(found, pl.LightningModule)):
        raise InspectionError(f"--module must name a LightningModule's class, got {name!r}.")
    options = _loading(found, trust)
    try:
        try:
            model = found.load_from_checkpoint(
                checkpoint, map_location="cpu", **options, **arguments
            )
        except RuntimeError:  # layers that `setup` makes are not there yet
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found keys that are")
                model = found.load_from_checkpoint(
                    checkpoint, map_location="cpu", strict=False, **options, **arguments
                )
    except TypeError as error:
        raise InspectionError(
            f"{name} cannot be made from the checkpoint's hyperparameters: {one_line(error)}. "
            "Pass what is missing: --module-args name=value."
        ) from error
    except Exception as error:
        raise InspectionError(_misfit(name, error)) from error
    return model


def _data(
    checkpoint: Path,
    name: str | None,
    arguments: dict[str, Any],
    content: dict[str, Any],
    *,
    trust: bool,
) -> Any:
    if name is None:
        return None
    found = _imported(name, "--data")
    if isinstance(found, (pl.LightningDataModule, str)) or not callable(found):
        return found
    try:
        known = isinstance(found, type) and issubclass(found, pl.LightningDataModule)
        if known and found.CHECKPOINT_HYPER_PARAMS_KEY in content:
            return found.load_from_checkpoint(
                checkpoint, map_location="cpu", **_loading(found, trust), **arguments
            )
        return found(**arguments)
    except Exception as error:
        raise InspectionError(
            f"{name} cannot be called: {one_line(error)}. Pass its arguments: --data-args "
            "name=value."
        ) from error


def _loader(source: Any) -> Any:
    """Return what ``fit`` takes: to Lightning a list of batches is a list of loaders."""
    if isinstance(source, (list, tuple)) and not any(isinstance(s, DataLoader) for s in source):
        return DataLoader(cast(Any, source), batch_size=None, collate_fn=_unchanged)
    return source


def _unchanged(batch: Any) -> Any:
    return batch


def _loading(found: Any, trust: bool) -> dict[str, Any]:
    """Return Lightning's argument for safe loading, which came with Lightning 2.6."""
    takes = "weights_only" in inspect.signature(found.load_from_checkpoint).parameters
    return {"weights_only": not trust} if takes else {}


def _imported(name: str, option: str) -> Any:
    """Return the object at ``package.module:attribute`` or ``package.module.attribute``."""
    module_name, colon, attributes = name.partition(":")
    if not colon:
        module_name, _, attributes = name.rpartition(".")
    if not module_name or not attributes:
        raise InspectionError(f"{option} must be like package.module.Class, got {name!r}.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        raise InspectionError(
            f"{option} {name!r} cannot be imported: {one_line(error)}. It is looked for in the "
            "current folder and among installed packages."
        ) from error
    return found


def _without_training(model: pl.LightningModule) -> list[Exception]:
    """Let ``fit`` start where only training would need more: callbacks, and optimizers that fail.

    A manual step asks for its optimizers, so they are made where they can be.

    Returns:
        What will have kept them from being made.
    """
    configure = model.configure_optimizers
    failures: list[Exception] = []

    def optimizers_if_any() -> Any:
        try:
            return configure()
        except Exception as error:
            failures.append(error)
            return None

    model.configure_optimizers = optimizers_if_any  # type: ignore[method-assign]
    model.configure_callbacks = list  # type: ignore[method-assign]
    return failures


def _trainer(
    state_dict: dict[str, Tensor], inspector: _Inspector, settings: InspectionSettings
) -> pl.Trainer:
    accelerator, _, index = settings.device.partition(":")
    double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in state_dict.values())
    return pl.Trainer(
        accelerator=accelerator,
        devices=[int(index)] if index else 1,
        precision="64-true" if double else "32-true",
        max_epochs=1,
        logger=False,
        callbacks=[inspector],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Lightning says about training, which does not happen, from the screen."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for about in (
                ".*configure_optimizers` returned `None`",
                ".*does not have many workers",
                ".*is smaller than the logging interval",
                "GPU available but not used",
                ".*LeafSpec",
            ):
                warnings.filterwarnings("ignore", about)
            yield
    finally:
        log.setLevel(level)


def _misfit(name: str, error: Exception) -> str:
    return (
        f"The checkpoint does not fit {name}: {one_line(error)}. Is it of this class, with these "
        "arguments? --module-args name=value changes them."
    )


def one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks, not too long to read."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"no key {text}"
    return text[:300].rstrip(" .")
