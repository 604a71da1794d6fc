"""Training on samples with a part of another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_optkit.bridge.batch_fields import Key, Setter
from lightning_optkit.bridge.mixing import MixingCallback, check_alpha, check_dims
from lightning_optkit.bridge.target_mixing import TargetMixing, TargetsOfCut
from lightning_optkit.figures.mixed_batch import mixed_batch_figure
from lightning_optkit.methods.mixing import Mixed, cutmix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_optkit.bridge.mixed_images import MixedImages

__all__ = ["CutMix"]


class CutMix(MixingCallback):
    r"""Trains on samples into which a box of another one is pasted, with the mixture of the losses.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not. Validation, test and what observers measure see batches as they are.

    The box takes the share 1 - λ of the image, λ ~ Beta(α, α), its centre lies anywhere, and what
    is over the border is cut off. λ is then the share that is left, and

    .. math:: \ell = \lambda\,\ell(y_i) + (1 - \lambda)\,\ell(y_j).

    ``training_step`` stays as it is: its loss is computed for both targets in one pass over the
    net, whatever the loss is, and mixed. Targets of the size of the inputs, such as label maps, are
    cut as these are; their loss needs no mixture.

    Args:
        alpha: α, positive; 1 gives all λ alike.
        per_sample: draw one λ and one box a sample, in place of one a batch.
        dims: the dimensions that are cut, counted with that of the batch; ``None`` = all after
            batch and channels. ``[1]`` for sequences ``(batch, length, features)``.
        probability: of a batch to be mixed, in [0, 1].
        targets: ``"proxy"`` as above; ``"cut"`` as the inputs; ``"soft"``, class probabilities for
            ``cross_entropy``, with ``num_classes``; ``"two_pass"``, the whole step twice;
            ``"direct"``, float targets mixed by λ; ``"none"``, inputs alone. ``"auto"`` takes
            ``"cut"`` for targets of the inputs' size, ``"direct"`` for floats, else ``"proxy"``,
            and says so.
        input_key: where the inputs are in a batch; see :class:`~lightning_optkit.Mixup`.
        target_key: the same of the targets.
        setter: ``(batch, inputs, targets) -> batch``, where a key is a function.
        num_classes: for ``targets="soft"``.
        stop_epoch: zero-based epoch from which batches are as they are; ``None`` = none.
        seed: of λ, partners, boxes and which batches are mixed.

    Logged keys:
        ``optkit-mixing/{mixing, share}`` whenever the Trainer logs (``log_every_n_steps``): see
        :data:`lightning_optkit.board.tags.MIXING_SCALARS`. ``optkit-mixing/batch``, a picture of
        the first mixed batch, where inputs look like images.

    Cost:
        One more batch of inputs in memory, and copying it: under 2 % of a step of a small net. The
        loss is computed twice, the net's pass is one; ``"two_pass"`` doubles a step. The first
        mixed batch is run three times more, to compare the losses.

    When it misleads:
        The label is mixed by area: where the box covers what the label speaks of, the target is
        wrong. Small images and short runs suffer. The training loss is that of mixtures and stays
        higher than without, also where the net is better.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CutMix(alpha=1.0, probability=0.5)], logger=False)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        per_sample: bool = False,
        dims: list[int] | None = None,
        probability: float = 1.0,
        targets: TargetsOfCut = "auto",
        input_key: Key | None = None,
        target_key: Key | None = None,
        setter: Setter | None = None,
        num_classes: int | None = None,
        stop_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.alpha = check_alpha("alpha", alpha)
        self._dims = check_dims(dims)
        super().__init__(
            TargetMixing(targets, num_classes=num_classes, can_cut=True, per_sample=per_sample),
            probability=probability,
            per_sample=per_sample,
            input_key=input_key,
            target_key=target_key,
            setter=setter,
            stop_epoch=stop_epoch,
            seed=seed,
        )

    def mix(self, inputs: Any, generator: torch.Generator, *, shared: torch.Generator) -> Mixed:
        return cutmix(
            inputs,
            self.alpha,
            per_sample=self._per_sample,
            dims=self._dims,
            generator=generator,
        )

    def figure(self, images: MixedImages) -> Figure:
        return mixed_batch_figure(images.images, images.mixing, images.labels, title="CutMix")
