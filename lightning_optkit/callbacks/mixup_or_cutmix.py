"""Training on mixtures of samples, in one of two ways for each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_optkit.bridge.batch_fields import Key, Setter
from lightning_optkit.bridge.mixing import MixingCallback, check_alpha, check_dims, check_share
from lightning_optkit.bridge.target_mixing import TargetMixing, Targets
from lightning_optkit.figures.mixed_batch import mixed_batch_figure
from lightning_optkit.methods.mixing import Mixed, cutmix, mixup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_optkit.bridge.mixed_images import MixedImages

__all__ = ["MixupOrCutMix"]


class MixupOrCutMix(MixingCallback):
    r"""Trains on batches that are mixed by mixup or by cutmix, drawn for each batch.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not. Validation, test and what observers measure see batches as they are.

    A batch is mixed with ``probability``, and then by cutmix with ``switch_probability``, by mixup
    else: see :class:`~lightning_optkit.CutMix` and :class:`~lightning_optkit.Mixup`. All ranks draw
    the same way, each its own λ, partners and boxes.

    Args:
        mixup_alpha: α of mixup, positive.
        cutmix_alpha: α of cutmix, positive.
        switch_probability: of cutmix, in [0, 1].
        per_sample: draw one λ a sample, in place of one a batch.
        dims: the dimensions that cutmix cuts; see :class:`~lightning_optkit.CutMix`.
        probability: of a batch to be mixed, in [0, 1].
        targets: as of :class:`~lightning_optkit.Mixup`. ``"auto"`` cuts targets of the inputs' size
            where the inputs are cut.
        input_key: where the inputs are in a batch; see :class:`~lightning_optkit.Mixup`.
        target_key: the same of the targets.
        setter: ``(batch, inputs, targets) -> batch``, where a key is a function.
        num_classes: for ``targets="soft"``.
        stop_epoch: zero-based epoch from which batches are as they are; ``None`` = none.
        seed: of all that is random.

    Logged keys:
        ``optkit-mixing/{mixing, share}`` whenever the Trainer logs (``log_every_n_steps``): see
        :data:`lightning_optkit.board.tags.MIXING_SCALARS`. ``optkit-mixing/batch``, a picture of
        the first mixed batch, where inputs look like images.

    Cost:
        That of the one that is drawn: one more batch of inputs in memory, and under 2 % of a step
        of a small net.

    When it misleads:
        Two methods and five numbers to choose: try each alone first. What misleads about either
        does so here.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MixupOrCutMix(switch_probability=0.3)], logger=False)
    """

    def __init__(
        self,
        mixup_alpha: float = 0.2,
        cutmix_alpha: float = 1.0,
        *,
        switch_probability: float = 0.5,
        per_sample: bool = False,
        dims: list[int] | None = None,
        probability: float = 1.0,
        targets: Targets = "auto",
        input_key: Key | None = None,
        target_key: Key | None = None,
        setter: Setter | None = None,
        num_classes: int | None = None,
        stop_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.mixup_alpha = check_alpha("mixup_alpha", mixup_alpha)
        self.cutmix_alpha = check_alpha("cutmix_alpha", cutmix_alpha)
        check_share("switch_probability", switch_probability, "1 is cutmix alone.")
        self._switch_probability = switch_probability
        self._dims = check_dims(dims)
        super().__init__(
            TargetMixing(targets, num_classes=num_classes, can_cut=False, per_sample=per_sample),
            probability=probability,
            per_sample=per_sample,
            input_key=input_key,
            target_key=target_key,
            setter=setter,
            stop_epoch=stop_epoch,
            seed=seed,
        )

    def mix(self, inputs: Any, generator: torch.Generator, *, shared: torch.Generator) -> Mixed:
        draw = torch.rand((), dtype=torch.float64, generator=shared)
        options: dict[str, Any] = {"per_sample": self._per_sample, "generator": generator}
        if draw < self._switch_probability:
            return cutmix(inputs, self.cutmix_alpha, dims=self._dims, **options)
        return mixup(inputs, self.mixup_alpha, **options)

    def figure(self, images: MixedImages) -> Figure:
        title = "CutMix" if images.is_cut else "Mixup"
        return mixed_batch_figure(images.images, images.mixing, images.labels, title=title)
