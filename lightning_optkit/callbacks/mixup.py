"""Training on convex combinations of two samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_optkit.bridge.batch_fields import Key, Setter
from lightning_optkit.bridge.mixing import MixingCallback, check_alpha
from lightning_optkit.bridge.target_mixing import TargetMixing, Targets
from lightning_optkit.figures.mixed_batch import mixed_batch_figure
from lightning_optkit.methods.mixing import Mixed, mixup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_optkit.bridge.mixed_images import MixedImages

__all__ = ["Mixup"]


class Mixup(MixingCallback):
    r"""Trains on mixtures of two samples, with the mixture of their losses.

    **Intervener.** A run that was interrupted and resumed ends with the weights of one that was
    not. Validation, test and what observers measure see batches as they are.

    .. math:: x = \lambda x_i + (1 - \lambda) x_j, \qquad
        \ell = \lambda\,\ell(y_i) + (1 - \lambda)\,\ell(y_j), \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha),

    where j is another sample of the batch. ``training_step`` stays as it is: its loss is computed
    for both targets in one pass over the net, whatever the loss is, and mixed. Metrics of the
    module count the label that weighs more; :class:`~lightning_optkit.MixedAccuracy` counts both.

    Args:
        alpha: α, positive: near 0 batches are nearly as they were, at 1 all λ are alike.
        per_sample: draw one λ a sample, in place of one a batch.
        probability: of a batch to be mixed, in [0, 1].
        targets: ``"proxy"`` as above; ``"soft"``, class probabilities for ``cross_entropy``, with
            ``num_classes``; ``"two_pass"``, the whole step twice; ``"direct"``, float targets mixed
            as the inputs are; ``"none"``, inputs alone. ``"auto"`` takes ``"direct"`` for floats,
            else ``"proxy"``, and says so.
        input_key: where the inputs are in a batch: an index, a key or attribute name, a path of
            them such as ``"view.image"``, or a function. ``None`` = the first of a tuple or list,
            or what goes by a common name.
        target_key: the same of the targets; ``None`` = the second, or by name.
        setter: ``(batch, inputs, targets) -> batch``, where a key is a function.
        num_classes: for ``targets="soft"``.
        stop_epoch: zero-based epoch from which batches are as they are; ``None`` = none.
        seed: of λ, partners and which batches are mixed.

    Logged keys:
        ``optkit-mixing/{mixing, share}`` whenever the Trainer logs (``log_every_n_steps``): see
        :data:`lightning_optkit.board.tags.MIXING_SCALARS`. ``optkit-mixing/batch``, a picture of
        the first mixed batch, where inputs look like images.

    Cost:
        One more batch of inputs in memory, and reading and writing it: under 2 % of a step of a
        small net. The loss is computed twice, the net's pass is one; ``"two_pass"`` doubles a step.
        The first mixed batch is run three times more, to compare the losses.

    When it misleads:
        The training loss is that of mixtures: it stays higher than without, also where the net is
        better, and training accuracy lies below that of validation. A large α underfits small nets
        and short runs. For regression, mixed targets are another method with assumptions of its
        own: the function is taken as a straight line between samples.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Mixup(alpha=0.2)], logger=False)
    """

    def __init__(
        self,
        alpha: float = 0.2,
        *,
        per_sample: bool = False,
        probability: float = 1.0,
        targets: Targets = "auto",
        input_key: Key | None = None,
        target_key: Key | None = None,
        setter: Setter | None = None,
        num_classes: int | None = None,
        stop_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.alpha = check_alpha("alpha", alpha)
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
        return mixup(inputs, self.alpha, per_sample=self._per_sample, generator=generator)

    def figure(self, images: MixedImages) -> Figure:
        return mixed_batch_figure(images.images, images.mixing, images.labels, title="Mixup")
