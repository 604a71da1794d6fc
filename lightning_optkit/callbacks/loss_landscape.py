"""What does the loss look like around the weights?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.board import tags
from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.cadence import Cadence, logger_step
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, StepLossFn
from lightning_optkit.bridge.run_trajectory import RunTrajectory
from lightning_optkit.bridge.stored_weights import stored_weights
from lightning_optkit.bridge.trainer_progress import shown_progress
from lightning_optkit.measures import HessianOperator
from lightning_optkit.measures.basin import BasinRadius, basin_radius
from lightning_optkit.measures.directions import (
    Normalization,
    TrajectoryPlane,
    random_directions,
    trajectory_plane,
)
from lightning_optkit.measures.eigenpairs import top_eigenpairs
from lightning_optkit.measures.landscape import LossLine, LossPlane, loss_line, plane_passes
from lightning_optkit.measures.loss_surface import LossSurface

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["LandscapeReport", "LossLandscape"]

_KINDS = ("line", "plane")
_DIRECTIONS = ("random", "trajectory", "hessian", "init")
_MARGIN = 0.2  # of a path's extent, around it


@dataclass(frozen=True, eq=False)
class LandscapeReport:
    """One picture of :class:`LossLandscape`.

    Attributes:
        picture: the losses.
        loss: in its middle.
        basin: the distance to the rim, if asked for.
        trajectory: the path and its plane, where directions are those of the path.
        path_steps: steps of training behind each point of that path; else empty.
        num_losses: spent.
        num_samples: held by all ranks together.
    """

    picture: LossLine | LossPlane
    loss: float
    basin: BasinRadius | None
    trajectory: TrajectoryPlane | None
    path_steps: tuple[int, ...]
    num_losses: int
    num_samples: int


class LossLandscape(Observer[LandscapeReport]):
    r"""Draws the loss along a line or on a plane through the weights.

    **Observer.** Training is bit-identical with or without it.

    Args:
        kind: ``"line"`` or ``"plane"``.
        directions: ``"random"``, filter-normalized; ``"trajectory"``, the plane of the two
            principal components of the path of training, with the path in it; ``"hessian"``, the
            eigenvectors of the two largest eigenvalues, as long as the weights; ``"init"``, the
            line from the weights before training to those now; or the path of a checkpoint, for
            the line from here to there; or the paths of two, for the line from the first to the
            second, or of two or more for the plane through them and the weights now (of more, the
            plane nearest to them).
        resolution: points of a line, or along either side of a plane; odd, and the weights are one
            of them.
        span: how far to go either way, in multiples of a direction; of a trajectory, in multiples
            of what holds the path. A line to other weights goes from 0 to 1.
        normalization: of random directions: ``"filter"``, ``"layer"`` or ``"none"``.
        every_n_epochs: epochs between pictures; ``None`` = the end alone.
        at_end: draw one at the end of training.
        num_batches: training batches held; ``None`` takes all of ``data``.
        log: whether the picture's levels grow by factors; ``None`` = where that shows more.
        basin_rise: measure the distance at which the loss has risen by this, along 20 random
            directions; ``None`` = do not.
        trajectory_bytes: memory on the CPU, and space in checkpoints, for the path.
        parameters: glob patterns of parameter names; ``None`` takes all trainable ones.
        mode: ``"eval"`` (dropout off, running statistics of BatchNorm) or ``"train"``, in which
            BatchNorm takes each batch's own statistics at every point. In ``"eval"`` a line to
            other weights takes their running statistics along.
        loss_fn: ``(pl_module, batch) -> loss`` in place of ``training_step``.
        data: a ``DataLoader`` or batches in place of the training dataloader.
        seed: seeds the choice of batches and directions.
        loss_index: which ``manual_backward`` of a step gives the loss, counted from 0.
        max_overhead: largest share of the training time to spend, in (0, 1]; ``None`` = no limit.
            The end of training is drawn in any case.
        name: tells several instances of one Trainer apart.

    Logged keys:
        ``optkit-landscape/{loss, lowest, highest, num_gaps, num_losses, explained, log_radius,
        log_radius_standard_error, num_samples, seconds}`` at each picture: see
        :data:`lightning_optkit.board.tags.LANDSCAPE_SCALARS`. To TensorBoard also the losses, their
        positions and the path as arrays, and at the end of fit the figure.

    Cost:
        ``resolution`` losses for a line, its square for a plane, on ``num_batches`` batches: a
        forward pass of the step each, and some milliseconds to leave no trace of it. About 300
        losses for ``basin_rise``; 10 to 40 Hessian-vector products for ``"hessian"``.

    When it misleads:
        A plane is two directions of a million: what it shows as a bowl may be a saddle. Random
        directions miss the few sharp ones. Absolute distances mean nothing where layers can be
        rescaled (Dinh et al.): hence filter normalization. The plane of a path explains most of
        any random walk too.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LossLandscape("line", resolution=51)], logger=False)
    """

    def __init__(
        self,
        kind: Literal["line", "plane"] = "plane",
        directions: str | Sequence[str] = "random",
        *,
        resolution: int = 25,
        span: float = 1.0,
        normalization: Normalization = "filter",
        every_n_epochs: int | None = None,
        at_end: bool = True,
        num_batches: int | None = 4,
        log: bool | None = None,
        basin_rise: float | None = None,
        trajectory_bytes: int = 64 * 2**20,
        parameters: list[str] | None = None,
        mode: Literal["eval", "train"] = "eval",
        loss_fn: StepLossFn | None = None,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        loss_index: int = 0,
        max_overhead: float | None = 0.05,
        name: str | None = None,
    ) -> None:
        if every_n_epochs is None and not at_end:
            raise ValueError(
                "`every_n_epochs` must be given where `at_end` is False, got None: nothing would "
                "ever be drawn. Write `every_n_epochs=1`."
            )
        super().__init__(
            topic=tags.LANDSCAPE,
            name=name,
            cadence=Cadence(
                every_n_epochs=every_n_epochs,
                max_overhead=max_overhead,
                at_end="alone" if at_end and every_n_epochs is None else at_end,
            ),
            parameters=parameters,
            num_batches=num_batches,
            mode=mode,
            loss_fn=loss_fn,
            loss_index=loss_index,
            data=data,
            seed=seed,
        )
        if kind not in _KINDS:
            raise ValueError(f"`kind` must be 'line' or 'plane', got {kind!r}.")
        paths = _paths_of(directions)
        if kind == "plane" and (directions == "init" or len(paths) == 1):
            raise ValueError(
                f"`kind` must be 'line' where `directions` is {directions!r}: two points span a "
                "line. Write `kind='line'`, or give the paths of two checkpoints."
            )
        if kind == "line" and len(paths) > 2:
            raise ValueError(
                f"`directions` must be one or two checkpoints for a line, got {len(paths)}. Write "
                "`kind='plane'` for the plane nearest to them."
            )
        if kind == "line" and directions == "trajectory":
            raise ValueError(
                "`kind` must be 'plane' where `directions` is 'trajectory', got 'line'. For the "
                "line from the first weights write `directions='init'`."
            )
        if not is_count(resolution, least=2):
            raise ValueError(f"`resolution` must be an integer of at least 2, got {resolution!r}.")
        if not is_number(span) or not 0 < span < math.inf:
            raise ValueError(f"`span` must be positive and finite, got {span!r}.")
        if normalization not in ("filter", "layer", "none"):
            raise ValueError(
                f"`normalization` must be 'filter', 'layer' or 'none', got {normalization!r}."
            )
        if basin_rise is not None and (not is_number(basin_rise) or not 0 < basin_rise < math.inf):
            raise ValueError(
                f"`basin_rise` must be positive and finite or None, got {basin_rise!r}."
            )
        if not is_count(trajectory_bytes, least=1):
            raise ValueError(
                f"`trajectory_bytes` must be an integer of at least 1, got {trajectory_bytes!r}."
            )
        self._kind = kind
        self._directions = directions if isinstance(directions, str) else "checkpoints"
        self._checkpoints = paths
        self._resolution = resolution
        self._span = float(span)
        self._normalization = normalization
        self._log = log
        self._basin_rise = basin_rise
        self._path = RunTrajectory(trajectory_bytes)

    # -- hooks ----------------------------------------------------------------------------------

    @property
    def _follows_path(self) -> bool:
        return self._directions in ("trajectory", "init")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint is restored
            self._path.start_anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._follows_path:
            self._path.start(pl_module, self.parameter_names(pl_module))
        for path in self._checkpoints:  # what does not fit is told before the first step
            stored_weights(path, self._tensors_of_line(pl_module))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._directions == "trajectory" and not trainer.fit_loop._should_accumulate():
            num_steps = logger_step(trainer, after_batch=True) + 1
            self._path.after_step(pl_module, self.parameter_names(pl_module), num_steps)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"path": self._path.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._path.load_state_dict(state_dict["path"])

    # -- one picture ----------------------------------------------------------------------------

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, probe: Probe
    ) -> LandscapeReport:
        """Return the losses of the picture on the held batches."""
        operator = HessianOperator(
            **self.loss_terms(trainer, probe, self.parameter_names(pl_module))
        )
        num_losses = self._resolution ** (2 if self._kind == "plane" else 1)
        trajectory = None
        picture: LossLine | LossPlane
        with shown_progress(trainer, type(self).__name__, num_losses) as tell:
            if self._kind == "plane":
                surface: LossSurface = operator
                if self._checkpoints:
                    surface = self._surface_with_buffers(pl_module, probe, trainer)
                directions, span, trajectory = self._plane(operator, surface)
                for picture in plane_passes(
                    surface, directions, resolution=self._resolution, span=span
                ):
                    tell(int(picture.known.sum()))
            else:
                surface, direction, positions = self._line(operator, pl_module, probe, trainer)
                picture = loss_line(surface, direction, positions)
        basin = self._basin(operator)
        return LandscapeReport(
            picture,
            float(operator.value()),
            basin,
            trajectory,
            (*self._path.steps, _num_steps(trainer)) if self._follows_path else (),
            num_losses + (0 if basin is None else basin.num_losses),
            int(operator.total_weight),
        )

    def scalars(self, result: LandscapeReport) -> dict[str, float]:
        """Return those of :data:`~lightning_optkit.board.tags.LANDSCAPE_SCALARS` that are defined.

        The seconds are the base class's.
        """
        losses = result.picture.losses
        finite = losses[torch.isfinite(losses)]
        found = {
            "loss": result.loss,
            "num_gaps": float(result.picture.num_gaps),
            "num_losses": float(result.num_losses),
            "num_samples": float(result.num_samples),
        }
        if len(finite):
            found |= {"lowest": float(finite.min()), "highest": float(finite.max())}
        if result.trajectory is not None:
            found["explained"] = float(result.trajectory.explained.sum())
        if result.basin is not None and bool(torch.isfinite(result.basin.radii).all()):
            found["log_radius"] = result.basin.mean_log_radius
            found["log_radius_standard_error"] = result.basin.standard_error
        return found

    def arrays(self, result: LandscapeReport) -> dict[str, np.ndarray[Any, Any]]:
        """Return the losses, their positions and the path."""
        picture = result.picture
        axes = (picture.positions,) if isinstance(picture, LossLine) else (picture.x, picture.y)
        found = {
            tags.LANDSCAPE_LOSSES: picture.losses.float().numpy(),
            tags.LANDSCAPE_AXES: torch.stack(axes).float().numpy(),
        }
        if result.trajectory is not None:
            found[tags.LANDSCAPE_PATH] = result.trajectory.path.float().numpy()
        if result.path_steps:
            found[tags.LANDSCAPE_PATH_STEPS] = torch.tensor(result.path_steps).float().numpy()
        return found

    def figures(self, result: LandscapeReport) -> dict[str, Figure]:
        """Return the picture."""
        # matplotlib takes a second to import: only once training is over
        from lightning_optkit.figures.landscape import line_figure, plane_figure

        if isinstance(result.picture, LossLine):
            names = [Path(path).name for path in self._checkpoints] or [""]
            if self._directions == "init":
                names = ["before training"]
            labels = (names[0], names[1]) if len(names) > 1 else ("here", names[0])
            return {tags.LANDSCAPE_FIGURE: line_figure(result.picture, labels=labels)}
        path, axes = None, ("first direction", "second direction")
        if result.trajectory is not None:
            path = result.trajectory.path.numpy()
            shares = [f"{share:.0%} of the path" for share in result.trajectory.explained.tolist()]
            axes = (f"first component, {shares[0]}", f"second component, {shares[1]}")
        elif self._directions == "hessian":
            axes = ("eigenvector of the largest eigenvalue", "of the second largest")
        return {
            tags.LANDSCAPE_FIGURE: plane_figure(
                result.picture, path=path, names=axes, log=self._log
            )
        }

    # -- directions -----------------------------------------------------------------------------

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)  # the same at each picture, on each rank

    def _plane(
        self, operator: HessianOperator, surface: LossSurface
    ) -> tuple[Tensor, tuple[float, float, float, float], TrajectoryPlane | None]:
        """Return two directions, how far to go, and the path if they are its."""
        square = (-self._span, self._span, -self._span, self._span)
        if self._directions == "trajectory" or self._checkpoints:
            here = surface.vector()
            points = [point.to(here.dtype) for point in self._path.points]
            points += [self._stored(path, surface).cpu() for path in self._checkpoints]
            trajectory = trajectory_plane([*points, here.cpu()])
            span = _around(trajectory.path, self._span)
            return trajectory.directions.to(here), span, trajectory
        if self._directions == "hessian":
            return self._eigenvectors(operator, 2), square, None
        return self._random(operator, 2), square, None

    def _random(self, operator: LossSurface, num_directions: int) -> Tensor:
        return random_directions(
            operator.params,
            num_directions,
            normalization=self._normalization,
            generator=self._generator(),
        )

    def _eigenvectors(self, operator: HessianOperator, num_vectors: int) -> Tensor:
        """Return eigenvectors of the largest eigenvalues, as long as the weights."""
        top = top_eigenpairs(
            operator, num_vectors, which="largest", rtol=1e-2, generator=self._generator()
        )
        return top.vectors[:num_vectors] * operator.parameter_norm()

    def _line(
        self,
        operator: HessianOperator,
        pl_module: pl.LightningModule,
        probe: Probe,
        trainer: pl.Trainer,
    ) -> tuple[LossSurface, Tensor, Tensor]:
        """Return a surface, a direction in it and the positions along that."""
        both_ways = torch.linspace(-self._span, self._span, self._resolution, dtype=torch.float64)
        there_and_back = torch.linspace(0, 1, self._resolution, dtype=torch.float64)
        if self._directions == "random":
            return operator, self._random(operator, 1)[0], both_ways
        if self._directions == "hessian":
            return operator, self._eigenvectors(operator, 1)[0], both_ways
        if self._directions == "init":
            here = operator.vector()
            return operator, self._path.points[0].to(here) - here, there_and_back
        surface = self._surface_with_buffers(pl_module, probe, trainer)
        *first, last = self._checkpoints
        if first:
            surface = surface.at(stored_weights(first[0], surface.params))
        return surface, self._stored(last, surface) - surface.vector(), there_and_back

    def _surface_with_buffers(
        self, pl_module: pl.LightningModule, probe: Probe, trainer: pl.Trainer
    ) -> LossSurface:
        """Return the loss of parameters and running statistics, which go along to other weights."""
        terms = self.loss_terms(trainer, probe, self.parameter_names(pl_module))
        terms.pop("graphs")
        terms["params"] |= self._float_buffers(pl_module)
        return LossSurface(**terms)

    def _stored(self, path: str, surface: LossSurface) -> Tensor:
        return surface.at(stored_weights(path, surface.params)).vector()

    def _tensors_of_line(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        params = dict(pl_module.named_parameters())
        chosen = {name: params[name] for name in self.parameter_names(pl_module)}
        return chosen | self._float_buffers(pl_module)

    def _float_buffers(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Return the running statistics that a line takes along, by name."""
        stored = pl_module.state_dict().keys()
        return {
            name: buffer.detach().float() if buffer.dtype.itemsize < 4 else buffer.detach()
            for name, buffer in pl_module.named_buffers()
            if buffer.is_floating_point() and name in stored
        }

    def _basin(self, operator: HessianOperator) -> BasinRadius | None:
        if self._basin_rise is None:
            return None
        return basin_radius(operator, rise=self._basin_rise, generator=self._generator())


def _paths_of(directions: object) -> tuple[str, ...]:
    """Return the checkpoints among directions: none of those that have a name."""
    if isinstance(directions, str):
        return () if directions in _DIRECTIONS else (directions,)
    if not isinstance(directions, Sequence) or not all(isinstance(p, str) for p in directions):
        raise TypeError(
            f"`directions` must be one of {', '.join(map(repr, _DIRECTIONS))}, the path of a "
            f"checkpoint or a list of such paths, got {directions!r}."
        )
    if len(directions) < 2:
        raise ValueError(
            f"`directions` must be at least two checkpoints, got {list(directions)}. For the line "
            "from here to one, write its path alone."
        )
    return tuple(directions)


def _num_steps(trainer: pl.Trainer) -> int:
    return logger_step(trainer, after_batch=False) + 1


def _around(path: Tensor, span: float) -> tuple[float, float, float, float]:
    """Return the rectangle that holds a path, with a margin, times ``span`` about its middle."""
    low, high = path.min(0).values, path.max(0).values
    middle, half = (low + high) / 2, (high - low) * (0.5 + _MARGIN) * span
    (x0, y0), (x1, y1) = (middle - half).tolist(), (middle + half).tolist()
    return x0, x1, y0, y1
