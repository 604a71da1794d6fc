r"""Running averages of weights: uniform, polynomial, exponential.

All of them are one update, and differ in the share s of the new model:

.. math:: \bar w \leftarrow \bar w + s_n\,(w - \bar w), \qquad s_0 = 1,

where n models are in the average already. As s₀ = 1, the first model is the first average: nothing
that was there before, such as the weights before training, ever enters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

__all__ = [
    "RunningAverage",
    "Share",
    "decay_of_half_life",
    "exponential_share",
    "polynomial_share",
    "uniform_share",
]

Share = Callable[[int], float]
"""How much of the next model enters, given how many are in the average: 1 for the first."""


def uniform_share(num_averaged: int) -> float:
    """Return the share that makes the average the plain mean of all models: 1 / (n + 1).

    Args:
        num_averaged: n, models in the average already.

    Example:
        >>> [uniform_share(n) for n in range(4)]
        [1.0, 0.5, 0.3333333333333333, 0.25]

    References:
        P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson, *Averaging Weights Leads
        to Wider Optima and Better Generalization*, UAI 2018, algorithm 1.
    """
    return 1 / (num_averaged + 1)


def polynomial_share(num_averaged: int, *, eta: float = 3.0) -> float:
    """Return the share of polynomial-decay averaging, (η + 1) / (t + η) with t = n + 1.

    Later models weigh more, in proportion to about t to the power η; η = 0 is the plain mean.

    Args:
        num_averaged: n, models in the average already.
        eta: η, at least 0.

    Example:
        >>> polynomial_share(0), polynomial_share(1), polynomial_share(1, eta=0.0)
        (1.0, 0.8, 0.5)

    References:
        O. Shamir, T. Zhang, *Stochastic Gradient Descent for Non-smooth Optimization: Convergence
        Results and Optimal Averaging Schemes*, ICML 2013, section 4.
    """
    return (eta + 1) / (num_averaged + 1 + eta)


def exponential_share(num_averaged: int, *, decay: float, warmup: bool = False) -> float:
    """Return the share of an exponential moving average: 1 - d, and 1 for the first model.

    Args:
        num_averaged: n, models in the average already.
        decay: d, in [0, 1).
        warmup: use min(d, (1 + n) / (10 + n)), so that the first models, which are the worst, are
            forgotten while the average is young.

    Example:
        >>> [round(exponential_share(n, decay=0.9), 3) for n in (0, 1, 2)]
        [1.0, 0.1, 0.1]
        >>> [round(exponential_share(n, decay=0.9, warmup=True), 3) for n in (0, 1, 2, 100)]
        [1.0, 0.818, 0.75, 0.1]
    """
    if num_averaged == 0:
        return 1.0
    if warmup:
        decay = min(decay, (1 + num_averaged) / (10 + num_averaged))
    return 1 - decay


def decay_of_half_life(half_life: float, *, every: int = 1) -> float:
    """Return the decay with which a model's weight halves in so many steps: 2^(-every / half_life).

    Args:
        half_life: in steps, positive.
        every: steps between updates of the average, at least 1.

    Example:
        >>> decay_of_half_life(1), round(decay_of_half_life(10) ** 10, 12)
        (0.5, 0.5)
    """
    return float(2.0 ** (-every / half_life))


class RunningAverage:
    """The running average of named tensors, with one copy of them as its memory.

    Half precision is averaged in float32: the share of an exponential average is below the spacing
    of half-precision numbers, which would never move.

    Args:
        share: how much of the next model enters.
        device: where the average lives; ``None`` = where the tensors do.
        agreed: whether all ranks say yes, given what this one says: a model is taken into the
            average by all of them or by none. ``None`` = there is one.

    Example:
        >>> average = RunningAverage(uniform_share)
        >>> [average.add({"w": torch.tensor(w)}) for w in (1.0, 2.0, 6.0)]
        [True, True, True]
        >>> average.tensors["w"], average.num_averaged
        (tensor(3.), 3)
    """

    def __init__(
        self,
        share: Share,
        *,
        device: torch.device | str | None = None,
        agreed: Callable[[bool], bool] | None = None,
    ) -> None:
        self._share = share
        self.device = device
        self._agreed = agreed or bool
        self._pairs: _Pairs | None = None
        self.tensors: dict[str, Tensor] = {}
        """The average, by name; empty before the first model."""
        self.num_averaged = 0
        """Models in the average."""

    @torch.no_grad()
    def add(self, model: Mapping[str, Tensor], *, thorough: bool = False) -> bool:
        """Take a model into the average, unless it is not finite; return whether it was taken.

        Args:
            model: tensors by name, floating-point or complex; the same names each time.
            thorough: look at every number. Else, but for the first model, the first of each tensor
                is looked at, which costs next to nothing: a loss or gradient that is not finite
                spreads to whole tensors in the step that follows it. What slips through is found
                by :meth:`is_finite`.
        """
        if self.num_averaged == 0:
            if taken := self._agreed(_all_finite(model.values())):
                self.load(model, num_averaged=1)
            return taken
        if self._pairs is None or not self._pairs.are_of(model):
            self._pairs = _Pairs(self.tensors, model)
        finite = self._pairs.first_elements_are_finite()
        if thorough:
            finite = finite and _all_finite(model.values())
        if taken := self._agreed(finite):
            self._pairs.lerp(self._share(self.num_averaged))
            self.num_averaged += 1
        return taken

    def is_finite(self) -> bool:
        """Return whether every averaged number is finite."""
        return self._agreed(_all_finite(self.tensors.values()))

    @torch.no_grad()
    def squares(self, model: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
        """Return ‖w̄ - w‖² and ‖w‖² over the named tensors, shape (2,), float64 on the CPU.

        Both add up over shards. Their ratio's square root is the relative distance of the model
        from the average.
        """
        squares = torch.zeros(2, dtype=torch.float64)
        for name in names:
            here = model[name].detach().to(self.tensors[name])
            for i, vector in enumerate((self.tensors[name] - here, here)):
                squares[i] += float(torch.linalg.vector_norm(vector)) ** 2
        return squares

    def load(self, tensors: Mapping[str, Tensor], *, num_averaged: int) -> None:
        """Go on from an average that was stored; it is copied.

        Args:
            tensors: by name, in any dtype, on any device.
            num_averaged: models in it.
        """
        self.tensors = {
            name: tensor.detach().to(self.device, _averaging_dtype(tensor), copy=True)
            for name, tensor in tensors.items()
        }
        self.num_averaged = num_averaged
        self._pairs = None


class _Pairs:
    """The tensors of an average and of a model, and what is known of them while they stay put.

    In a small net, asking the tensors from Python costs more than moving them.
    """

    def __init__(self, average: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
        self._average = list(average.values())
        self._new = [model[name] for name in average]  # kept alive: their addresses stay theirs
        self._names = list(average)
        self._addresses = [tensor.data_ptr() for tensor in self._new]
        firsts = [tensor.detach().as_strided((1,), (1,)) for tensor in self._new if tensor.numel()]
        devices = {first.device for first in firsts}
        self._firsts = [[f for f in firsts if f.device == device] for device in devices]
        self._are_alike = bool(average) and all(
            a.dtype == b.dtype and a.device == b.device
            for a, b in zip(self._average, self._new, strict=True)
        )

    def are_of(self, model: Mapping[str, Tensor]) -> bool:
        """Return whether the model's tensors are still these."""
        return self._addresses == [model[name].data_ptr() for name in self._names]

    def first_elements_are_finite(self) -> bool:
        return _all_finite(torch.cat(firsts) for firsts in self._firsts)

    def lerp(self, share: float) -> None:
        """Move the average by a share of the way to the model."""
        if self._are_alike:
            torch._foreach_lerp_(self._average, self._new, share)
        else:
            for average, new in zip(self._average, self._new, strict=True):
                average.lerp_(new.to(average), share)


def _averaging_dtype(tensor: Tensor) -> torch.dtype:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else tensor.dtype


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
