"""What does the loss look like around the weights?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.board import tags
from lightning_optkit.bridge.arguments import is_count, is_number
from lightning_optkit.bridge.cadence import Cadence, logger_step
from lightning_optkit.bridge.fresh_statistics import FreshStatisticsSurface, held_statistics
from lightning_optkit.bridge.landscape_frame import LandscapeFrame, Plane, carried_along
from lightning_optkit.bridge.observer import Observer
from lightning_optkit.bridge.probe import Probe, StepLossFn
from lightning_optkit.bridge.run_trajectory import RunTrajectory
from lightning_optkit.bridge.trainer_progress import shown_progress
from lightning_optkit.measures import HessianOperator
from lightning_optkit.measures.basin import BasinRadius, basin_radius
from lightning_optkit.measures.directions import Normalization, TrajectoryPlane
from lightning_optkit.measures.landscape import LossLine, LossPlane, loss_line, plane_passes
from lightning_optkit.measures.loss_surface import LossSurface
from lightning_optkit.methods.norm_statistics import tracking_layers

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["LandscapeReport", "LossLandscape"]

_EARLY_SECONDS = 10.0  # before a coarse picture is reported, and between two


@dataclass(frozen=True, eq=False)
class LandscapeReport:
    """One picture of :class:`LossLandscape`.

    Attributes:
        picture: the losses.
        loss: at the weights of the run.
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
            line from the weights at the start of this run to those now; or the path of a
            checkpoint, for the line from here to there; or the paths of two, for the line from the
            first to the second, or of two or more for the plane through them and the weights now
            (of more, the plane nearest to them).
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
            BatchNorm takes each batch's own statistics at every point.
        norm_statistics: ``"kept"``: running statistics are those of the weights in the middle, and
            go along to checkpoints, as frozen weights and buffers do; or ``"estimated"``: of all
            held batches, anew at every point, which doubles the passes.
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
        forward pass of the step each, and a millisecond or two to leave no trace of it; twice as
        many passes with ``norm_statistics="estimated"``. About 300 losses for ``basin_rise``; 10
        to 40 Hessian-vector products for ``"hessian"``.

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
        directions: str | Path | Sequence[str | Path] = "random",
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
        norm_statistics: Literal["kept", "estimated"] = "kept",
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
        self._frame = LandscapeFrame(
            kind,
            directions,
            resolution=resolution,
            span=span,
            normalization=normalization,
            seed=seed,
        )
        if norm_statistics not in ("kept", "estimated"):
            raise ValueError(
                f"`norm_statistics` must be 'kept' or 'estimated', got {norm_statistics!r}."
            )
        if norm_statistics == "estimated" and mode == "train":
            raise ValueError(
                "`norm_statistics` must be 'kept' where `mode` is 'train', got 'estimated': each "
                "batch's own are taken there. Leave out `mode`."
            )
        if basin_rise is not None and (not is_number(basin_rise) or not 0 < basin_rise < math.inf):
            raise ValueError(
                f"`basin_rise` must be positive and finite or None, got {basin_rise!r}."
            )
        if not is_count(trajectory_bytes, least=1):
            raise ValueError(
                f"`trajectory_bytes` must be an integer of at least 1, got {trajectory_bytes!r}."
            )
        self._norm_statistics = norm_statistics
        self._log = log
        self._basin_rise = basin_rise
        self._path = RunTrajectory(trajectory_bytes)

    # -- hooks ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint is restored
            self._path.start_anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._frame.follows_path:
            self._path.start(pl_module, self.parameter_names(pl_module), trainer.global_step)
        if self._norm_statistics == "estimated" and not tracking_layers(pl_module):
            rank_zero_warn(
                f"`{type(self).__name__}(norm_statistics='estimated')` found no layer with running "
                "statistics: the picture is the same without."
            )
        self._frame.require_that_it_fits(pl_module, self.parameter_names(pl_module))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._frame.directions == "trajectory" and not trainer.fit_loop._should_accumulate():
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
        names = self.parameter_names(pl_module)
        terms = self.loss_terms(trainer, probe, names)
        operator = HessianOperator(**terms)
        around = self._refreshed(trainer, pl_module, operator)
        surface = around
        if self._frame.checkpoints:  # over what else is other in them, too
            others = carried_along(pl_module, probe, names, self._frame.checkpoints)
            terms |= {"params": terms["params"] | others}
            terms.pop("graphs")
            surface = self._refreshed(trainer, pl_module, LossSurface(**terms))
        loss = float(around.value())
        path = self._path.points
        steps = (*self._path.steps, _num_steps(trainer)) if self._frame.follows_path else ()
        trajectory = None
        picture: LossLine | LossPlane
        if self._frame.kind == "line":
            line = self._frame.line(operator, surface, path)
            picture = loss_line(line.surface, line.direction, line.positions)
        else:
            plane = self._frame.plane(operator, surface, path)
            trajectory = plane.trajectory
            picture = self._drawn(trainer, surface, plane, steps)
        basin = self._basin(around, loss)
        num_losses = self._frame.num_points + (0 if basin is None else basin.num_losses)
        num_samples = int(operator.total_weight)
        return LandscapeReport(picture, loss, basin, trajectory, steps, num_losses, num_samples)

    def _drawn(
        self, trainer: pl.Trainer, surface: LossSurface, plane: Plane, steps: tuple[int, ...]
    ) -> LossPlane:
        """Return the losses of a plane; coarse ones are reported early where it takes long."""
        last, due = 0, time.monotonic() + _EARLY_SECONDS
        passes = plane_passes(
            surface, plane.directions, resolution=self._frame.resolution, span=plane.span
        )
        # Closed before the probe is, also if Ctrl-C comes between two passes.
        shown = shown_progress(trainer, type(self).__name__, self._frame.num_points)
        with shown as tell, closing(passes):
            for picture in passes:
                num_known = int(picture.known.sum())
                tell(num_known)
                coarse = picture.coarse() if time.monotonic() >= due else None
                if coarse is not None and coarse[0] not in (last, 1):
                    found = LandscapeReport(
                        coarse[1], math.nan, None, plane.trajectory, steps, num_known, 0
                    )
                    self.report_early(trainer, found, {"num_losses": num_known})
                    last, due = coarse[0], time.monotonic() + _EARLY_SECONDS
        return picture

    def _basin(self, surface: LossSurface, loss: float) -> BasinRadius | None:
        if self._basin_rise is None or not math.isfinite(loss):
            return None
        generator = torch.Generator().manual_seed(self._seed)  # the same at each picture and rank
        return basin_radius(surface, rise=self._basin_rise, generator=generator)

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
            names = [Path(path).name for path in self._frame.checkpoints] or [""]
            if self._frame.directions == "init":
                first = result.path_steps[0]
                names = [f"step {first}" if first else "before training"]
            labels = (names[0], names[1]) if len(names) > 1 else ("here", names[0])
            return {tags.LANDSCAPE_FIGURE: line_figure(result.picture, labels=labels)}
        path, axes = None, ("first direction", "second direction")
        if result.trajectory is not None:
            path = result.trajectory.path.numpy()
            shares = [f"{share:.0%} of the path" for share in result.trajectory.explained.tolist()]
            axes = (f"first component, {shares[0]}", f"second component, {shares[1]}")
        elif self._frame.directions == "hessian":
            axes = ("eigenvector of the largest eigenvalue", "of the second largest")
        return {
            tags.LANDSCAPE_FIGURE: plane_figure(
                result.picture, path=path, names=axes, log=self._log
            )
        }

    # -- the loss -------------------------------------------------------------------------------

    def _refreshed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, surface: LossSurface
    ) -> LossSurface:
        """Return the loss with statistics of its own at every point, if that is asked for."""
        if self._norm_statistics == "kept" or not tracking_layers(pl_module):
            return surface
        make_probe = partial(self._probe, trainer, pl_module)
        statistics = held_statistics(trainer, pl_module, self.held_batches, make_probe)
        return FreshStatisticsSurface(surface, statistics)


def _num_steps(trainer: pl.Trainer) -> int:
    return logger_step(trainer, after_batch=False) + 1
