r"""Mixup and cutmix of a batch, as plain functions of tensors.

Sample i is mixed with its partner j, another one of the batch, and weighs λ:

.. math:: x = \lambda x_i + (1 - \lambda) x_j, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha),

in mixup; in cutmix x is :math:`x_i` with a box of :math:`x_j` pasted in, and λ the share that is
left of :math:`x_i`. The loss is :math:`\lambda\,\ell(y_i) + (1 - \lambda)\,\ell(y_j)`.

References:
    H. Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.
    S. Yun et al., *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features*, ICCV 2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optkit.methods.mixed_target import MixedTarget, Mixing

__all__ = ["Box", "Mixed", "cutmix", "drawn_box", "drawn_mixing", "mixup", "pasted"]


@dataclass(frozen=True)
class Mixed:
    """Mixed inputs, and how to mix what belongs to them.

    Attributes:
        inputs: like the ones given.
        partners: with which sample of the batch each is mixed, shape ``(batch,)``.
        mixing: λ, how much each sample itself weighs: a number, or one a sample, ``(batch,)``.
        box: what was pasted, in cutmix.
    """

    inputs: Any
    partners: Tensor
    mixing: float | Tensor
    box: Box | None = None

    def target(self, target: Tensor) -> MixedTarget:
        """Return a target that stands for both, for any loss; see :class:`MixedTarget`.

        Example:
            >>> mixed = mixup(torch.randn(4, 5))
            >>> loss = torch.nn.functional.cross_entropy(
            ...     mixed.inputs, mixed.target(torch.arange(4))
            ... )
        """
        return MixedTarget.of(target.clone(), self.second(target), Mixing(self.mixing))

    def second(self, target: Tensor) -> Tensor:
        """Return the partners' targets."""
        return target.index_select(0, _on(self.partners, target))

    def soft(self, target: Tensor, num_classes: int, *, dtype: torch.dtype | None = None) -> Tensor:
        r"""Return the class probabilities :math:`\lambda e_{y_i} + (1 - \lambda) e_{y_j}`.

        Args:
            target: labels, shape ``(batch, ...)``.
            num_classes: of them.
            dtype: of the result; torch's default dtype if ``None``.

        Returns:
            Shape ``(batch, num_classes, ...)``, as ``cross_entropy`` takes them.
        """
        hot = one_hot(target.long(), num_classes).movedim(-1, 1)
        return self.direct(hot.to(dtype or torch.get_default_dtype()))

    def direct(self, target: Tensor) -> Tensor:
        """Return float targets mixed as the samples are, shape ``(batch, ...)``."""
        return _mixed_up(target, self.partners, self.mixing)

    def cut(self, target: Tensor, *, dims: Sequence[int]) -> Tensor:
        """Return targets of which the box is pasted as in the inputs, such as label maps.

        Args:
            target: shape ``(batch, ...)``.
            dims: the dimensions that the box spans, one for each of its sides.
        """
        assert self.box is not None
        return pasted(target, self.partners, self.box, dims=dims)


@dataclass(frozen=True)
class Box:
    """A box in each sample: where it starts and ends, by dimension.

    Attributes:
        sizes: of what it lies in, by dimension.
        low: where it starts, ``(k,)`` for one box, ``(batch, k)`` for one a sample.
        high: where it ends, itself left out.
    """

    sizes: tuple[int, ...]
    low: Tensor
    high: Tensor

    @property
    def share(self) -> Tensor:
        """What it covers of a sample, in float64, shape ``()`` or ``(batch,)``."""
        sides = (self.high - self.low).double()
        return sides.prod(-1) / math.prod(self.sizes)


def mixup(
    inputs: Any,
    alpha: float = 0.2,
    *,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> Mixed:
    r"""Return each sample mixed with another one, :math:`\lambda x_i + (1 - \lambda) x_j`.

    Args:
        inputs: a float tensor with the batch in its first dimension, or a nest of such.
        alpha: α of the Beta distribution of λ, positive. Near 0 one sample of the two weighs nearly
            all, at 1 all λ are alike.
        per_sample: draw one λ a sample, in place of one a batch.
        generator: draws λ and partners, on the CPU; ``None`` = one with a fixed seed.

    Raises:
        TypeError: for inputs that are no floats.
        ValueError: for another α, or inputs of several batch sizes.

    Example:
        >>> mixed = mixup(torch.eye(3), alpha=1.0)
        >>> bool((mixed.inputs.sum(1) == 1).all())
        True
    """
    for leaf in tree_leaves(inputs):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"`inputs` must be floats to be mixed, got {leaf.dtype}. Convert images first, "
                "`images.float() / 255`; of token numbers mix the embeddings, or use cutmix."
            )
    generator = _or_fixed(generator)
    size = _batch_size(inputs)
    mixing = drawn_mixing(alpha, size if per_sample else None, generator=generator)
    partners = torch.randperm(size, generator=generator)
    mixed = tree_map(lambda leaf: _mixed_up(leaf, partners, mixing), inputs)
    return Mixed(mixed, partners, mixing)


def cutmix(
    inputs: Any,
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    dims: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Mixed:
    r"""Return each sample with a box of another one pasted into it.

    The box has the share 1 - λ before it is clipped at the border; λ is then what is really left.

    Args:
        inputs: a tensor of any dtype with the batch in its first dimension, or a nest of such of
            the same size.
        alpha: α of the Beta distribution of λ, positive.
        per_sample: draw one λ and one box a sample, in place of one a batch.
        dims: the dimensions that are cut. ``None`` = all after batch and channels: height and
            width of images ``(batch, channels, height, width)``, the length of sequences
            ``(batch, channels, length)``, and that of ``(batch, length)``.
        generator: draws λ, partners and boxes, on the CPU; ``None`` = one with a fixed seed.

    Raises:
        ValueError: for another α, if there are no such dimensions, or inputs are not of one size.

    Example:
        >>> mixed = cutmix(torch.eye(3).expand(2, 1, 3, 3) + torch.arange(2).view(2, 1, 1, 1))
        >>> float(mixed.mixing) == 1 - float(mixed.box.share)
        True
    """
    generator = _or_fixed(generator)
    size = _batch_size(inputs)
    sizes = {tuple(leaf.shape[dim] for dim in cut_dims(leaf, dims)) for leaf in tree_leaves(inputs)}
    if len(sizes) != 1:
        raise ValueError(
            f"`inputs` must be of one size to be cut, got {sorted(sizes)}. Cut one of them, or use "
            "mixup."
        )
    mixing = drawn_mixing(alpha, size if per_sample else None, generator=generator)
    partners = torch.randperm(size, generator=generator)
    box = drawn_box(sizes.pop(), mixing, generator=generator)
    mixed = tree_map(lambda leaf: pasted(leaf, partners, box, dims=cut_dims(leaf, dims)), inputs)
    left = 1 - box.share
    return Mixed(mixed, partners, left if per_sample else float(left), box)


def drawn_mixing(
    alpha: float, size: int | None = None, *, generator: torch.Generator | None = None
) -> Any:
    r"""Return λ ~ Beta(α, α): :math:`I^{-1}_u(\alpha, \alpha)` of a uniform number u.

    The mean is 1/2, the variance :math:`1 / (4 (2 \alpha + 1))`.

    Args:
        alpha: positive.
        size: how many; ``None`` = one, as a number.
        generator: ``None`` = one with a fixed seed.

    Returns:
        A number, or shape ``(size,)`` in float64 on the CPU.

    Example:
        >>> 0 <= drawn_mixing(0.2) <= 1, drawn_mixing(0.2, 3).shape
        (True, torch.Size([3]))
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be a positive number, such as 0.2, got {alpha}.")
    shape = (1 if size is None else size,)
    uniform = torch.rand(shape, dtype=torch.float64, generator=_or_fixed(generator))
    mixing = torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))
    return float(mixing) if size is None else mixing


def drawn_box(
    sizes: Sequence[int], mixing: float | Tensor, *, generator: torch.Generator | None = None
) -> Box:
    r"""Return a box of the share 1 - λ, its centre anywhere, clipped at the border.

    Of k dimensions it takes :math:`\lfloor s (1 - \lambda)^{1/k} \rfloor` of the size s in each.

    Args:
        sizes: of what it lies in, by dimension.
        mixing: λ, a number for one box, or shape ``(batch,)`` for one a sample.
        generator: ``None`` = one with a fixed seed.

    Example:
        >>> drawn_box((8, 8), 1.0).share
        tensor(0., dtype=torch.float64)
    """
    shares = 1 - torch.as_tensor(mixing, dtype=torch.float64)
    whole = torch.tensor(tuple(sizes))
    sides = (whole * shares.unsqueeze(-1) ** (1 / len(whole))).floor().long()
    uniform = torch.rand(sides.shape, dtype=torch.float64, generator=_or_fixed(generator))
    low = (uniform * whole).floor().long() - sides // 2
    return Box(tuple(sizes), low.clamp(min=0), (low + sides).minimum(whole))


def pasted(inputs: Tensor, partners: Tensor, box: Box, *, dims: Sequence[int]) -> Tensor:
    """Return the inputs with the partners' box in its place.

    Args:
        inputs: shape ``(batch, ...)``.
        partners: shape ``(batch,)``.
        box: one for all, or one a sample.
        dims: the dimensions that it spans, one for each of its sides.

    Example:
        >>> box = Box((4,), torch.tensor([1]), torch.tensor([3]))
        >>> pasted(torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2]]), torch.tensor([1, 0]), box, dims=[1])
        tensor([[1, 2, 2, 1],
                [2, 1, 1, 2]])
    """
    if box.low.dim() == 1:
        index: list[Any] = [slice(None)] * inputs.dim()
        for dim, low, high in zip(dims, box.low.tolist(), box.high.tolist(), strict=True):
            index[dim] = slice(low, high)
        result = inputs.clone()
        part = inputs[tuple(index)]
        result[tuple(index)] = part.index_select(0, _on(partners, inputs))
        return result
    inside = torch.ones((), dtype=torch.bool, device=inputs.device)
    for k, dim in enumerate(dims):
        place = torch.arange(inputs.shape[dim], device=inputs.device)
        low, high = (_on(bound[:, k : k + 1], inputs) for bound in (box.low, box.high))
        shape = [1] * inputs.dim()
        shape[0], shape[dim] = len(inputs), inputs.shape[dim]
        inside = inside & ((low <= place) & (place < high)).view(shape)
    return torch.where(inside, inputs.index_select(0, _on(partners, inputs)), inputs)


def cut_dims(inputs: Tensor, dims: Sequence[int] | None = None) -> list[int]:
    """Return the dimensions of inputs that are cut, counted from 0.

    Raises:
        ValueError: if there are none.

    Example:
        >>> cut_dims(torch.zeros(2, 3, 8, 8)), cut_dims(torch.zeros(2, 8, 3), [-2])
        ([2, 3], [1])
    """
    ndim = inputs.dim()
    if dims is None:
        found = list(range(2 if ndim > 2 else 1, ndim))
    else:
        found = [dim + ndim if dim < 0 else dim for dim in dims]
    if not found or len({*found}) < len(found) or not all(0 < dim < ndim for dim in found):
        raise ValueError(
            "`dims` must name dimensions to cut after that of the batch, got "
            f"{'none' if dims is None else list(dims)} for inputs of the shape "
            f"{tuple(inputs.shape)}. Use mixup for inputs that have no place."
        )
    return found


def _mixed_up(inputs: Tensor, partners: Tensor, mixing: float | Tensor) -> Tensor:
    others = inputs.index_select(0, _on(partners, inputs))
    if isinstance(mixing, float):
        return others.mul_(1 - mixing).add_(inputs, alpha=mixing)
    weight = _on(mixing, inputs).view(-1, *[1] * (inputs.dim() - 1))
    ours = weight.to(inputs.dtype)
    return others.mul_((1 - weight).to(inputs.dtype)).add_(ours * inputs)


def _batch_size(inputs: Any) -> int:
    sizes = {len(leaf) for leaf in tree_leaves(inputs)}
    if len(sizes) != 1:
        raise ValueError(f"`inputs` must be of one batch, got sizes {sorted(sizes)}.")
    return sizes.pop()


def _on(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, non_blocking=True)


def _or_fixed(generator: torch.Generator | None) -> torch.Generator:
    return generator if generator is not None else torch.Generator().manual_seed(0)
