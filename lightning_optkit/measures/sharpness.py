"""How much does the loss rise around these parameters?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.measures.ball_maximum import ball_maximum
from lightning_optkit.measures.box_maximum import box_maximum
from lightning_optkit.measures.errors import CurvatureError
from lightning_optkit.measures.loss_surface import LossSurface

__all__ = [
    "AverageSharpness",
    "BallSharpness",
    "EpsilonSharpness",
    "average_sharpness",
    "ball_sharpness",
    "epsilon_sharpness",
]


@dataclass(frozen=True)
class EpsilonSharpness:
    """Keskar's sharpness, with what each of two maximisers found.

    Attributes:
        value: φ by the largest loss found, in per cent of 1 + loss.
        corners: φ by corners of the box alone.
        quasi_newton: φ by L-BFGS-B alone, from the centre as Keskar et al. start it.
        loss: at the parameters.
        epsilon: size of the box.
        subspace_dim: dimension of the random subspace; ``None`` = all parameters.
        num_gradients: losses with gradients spent.
    """

    value: float
    corners: float
    quasi_newton: float
    loss: float
    epsilon: float
    subspace_dim: int | None
    num_gradients: int

    @property
    def lower(self) -> float:
        """The smaller of what the two maximisers found: near ``value``, both are trustworthy."""
        return min(self.corners, self.quasi_newton)


@dataclass(frozen=True)
class BallSharpness:
    """Rise of the loss to the largest one found in a ball.

    Attributes:
        value: the rise, in units of the loss; at least 0.
        one_step: the rise after the first step of ascent, as sharpness-aware minimization takes it.
        loss: at the parameters.
        rho: radius of the ball.
        adaptive: whether lengths are relative to each parameter.
        num_gradients: losses with gradients spent.
    """

    value: float
    one_step: float
    loss: float
    rho: float
    adaptive: bool
    num_gradients: int


@dataclass(frozen=True)
class AverageSharpness:
    """Mean rise of the loss under random perturbations.

    Attributes:
        value: the mean, in units of the loss; negative where the loss falls on average.
        standard_error: of the mean.
        loss: at the parameters.
        rho: standard deviation of a perturbation.
        adaptive: whether it is relative to each parameter.
        num_samples: perturbations drawn.
    """

    value: float
    standard_error: float
    loss: float
    rho: float
    adaptive: bool
    num_samples: int


def epsilon_sharpness(
    surface: LossSurface,
    *,
    epsilon: float = 1e-3,
    subspace_dim: int | None = None,
    num_iterations: int = 10,
    generator: torch.Generator | None = None,
) -> EpsilonSharpness:
    r"""Return Keskar's sharpness: the largest loss in a small box, relative to the loss.

    .. math:: \phi = 100 \, \frac{\max_{z \in C} L(x + A z) - L(x)}{1 + L(x)}, \qquad
        C = \{z : |z_i| \le \epsilon \, (|(A^+ x)_i| + 1)\}

    with A the identity, or n × p with independent N(0, 1) entries (columns of length 1, which some
    take, give values hundreds of times smaller). The maximum is searched by
    :func:`~lightning_optkit.measures.box_maximum.box_maximum`: φ is a lower bound, the two ways of
    which are reported beside it. Where a loss in the box is infinite or NaN, φ is infinite, and the
    two ways tell the largest finite ones.

    Args:
        surface: the loss.
        epsilon: size of the box, positive; Keskar et al. take 1e-3 and 5e-4.
        subspace_dim: p, in [1, n]; Keskar et al. take 100. Memory for n × p numbers.
        num_iterations: of each maximiser, at least 1.
        generator: source of A and of signs, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range.
        CurvatureError: if the loss is not finite, or at most -1, where φ is not defined.

    Example:
        >>> import torch
        >>> h = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> start = {"w": torch.zeros(2, dtype=torch.float64)}
        >>> surface = LossSurface(lambda p: (h * p["w"] ** 2).sum() / 2, start)
        >>> round(epsilon_sharpness(surface, epsilon=1e-3).value * 1e6, 6)  # 50 ε² Σh
        200.0

    References:
        N. S. Keskar et al., "On large-batch training for deep learning: generalization gap and
        sharp minima", 2017, metric 2.1.
    """
    _check_positive("epsilon", epsilon)
    _check_count("num_iterations", num_iterations)
    generator = generator or torch.Generator().manual_seed(0)
    loss = _loss(surface)
    if loss <= -1:
        raise CurvatureError(
            f"Keskar's sharpness needs a loss above -1, got {loss}: it is relative to 1 + loss. "
            "Add a constant to the loss, or measure in a ball."
        )
    x = surface.vector()
    if subspace_dim is None:
        basis, bounds = None, epsilon * (x.double().cpu().abs() + 1)
    else:
        _check_subspace(subspace_dim, len(x))
        basis = torch.randn(len(x), subspace_dim, generator=generator, dtype=torch.float64)
        inside = torch.linalg.lstsq(basis, x.double().cpu()[:, None]).solution[:, 0]
        bounds = epsilon * (inside.abs() + 1)
        basis = basis.to(x)

    def inside_box(u: Tensor) -> tuple[float, Tensor]:
        z = bounds * u
        offset = z.to(x) if basis is None else basis @ z.to(x)
        found, gradient = surface.loss_and_gradient(offset)
        gradient = gradient if basis is None else basis.T @ gradient
        return float(found), bounds * gradient.double().cpu()

    most = box_maximum(inside_box, len(bounds), num_iterations=num_iterations, generator=generator)

    def phi(largest: float) -> float:
        return 100 * (max(largest, loss) - loss) / (1 + loss)

    return EpsilonSharpness(
        math.inf if most.num_not_finite else phi(most.value),
        phi(most.corners),
        phi(most.quasi_newton),
        loss,
        epsilon,
        subspace_dim,
        most.num_evaluations,
    )


def ball_sharpness(
    surface: LossSurface,
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    num_steps: int = 10,
    generator: torch.Generator | None = None,
) -> BallSharpness:
    r"""Return the rise to the largest loss found in a ball around the parameters.

    .. math:: \max_{\|\delta\|_2 \le \rho} L(w + \delta) - L(w)

    or, adaptive, with :math:`\|\delta / |w|\,\|_2 \le \rho`, elementwise: then no rescaling of
    layers that leaves the net's function alone changes it. (Kwon et al. add 0.01 to :math:`|w|`,
    which breaks that.) It is infinite where a loss in the ball is infinite or NaN.

    Args:
        surface: the loss.
        rho: radius, positive: in units of parameters, or adaptive relative to each.
        adaptive: measure lengths relative to each parameter.
        num_steps: of ascent, at least 1.
        generator: source of a direction at a stationary point, on the CPU; ``None`` is a fixed
            seed.

    Raises:
        ValueError: if an argument is out of range.
        CurvatureError: if the loss is not finite.

    Example:
        >>> import torch
        >>> h = torch.tensor([1.0, 4.0], dtype=torch.float64)
        >>> start = {"w": torch.zeros(2, dtype=torch.float64)}
        >>> surface = LossSurface(lambda p: (h * p["w"] ** 2).sum() / 2, start)
        >>> round(ball_sharpness(surface, rho=0.1, num_steps=40).value, 6)  # ½ ρ² λmax
        0.02

    References:
        P. Foret et al., "Sharpness-aware minimization for efficiently improving generalization",
        2021, section 2. J. Kwon et al., "ASAM: adaptive sharpness-aware minimization for
        scale-invariant learning of deep neural networks", 2021, section 3.
    """
    _check_positive("rho", rho)
    _check_count("num_steps", num_steps)
    generator = generator or torch.Generator().manual_seed(0)
    loss = _loss(surface)
    scale = _scale(surface, adaptive)
    spent = 0

    def value(u: Tensor) -> float:
        return float(surface.loss(scale * u))

    def value_and_gradient(u: Tensor) -> tuple[float, Tensor]:
        nonlocal spent
        spent += 1
        found, gradient = surface.loss_and_gradient(scale * u)
        return float(found), scale * gradient

    def rise(steps: int) -> float:
        most = ball_maximum(
            value_and_gradient,
            value,
            torch.zeros_like(scale),
            radius=rho,
            num_steps=steps,
            generator=generator,
        )
        return max(most - loss, 0.0)

    one = rise(1)
    most = one if num_steps == 1 else max(one, rise(num_steps))
    return BallSharpness(most, one, loss, rho, adaptive, spent)


def average_sharpness(
    surface: LossSurface,
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    num_samples: int = 20,
    generator: torch.Generator | None = None,
) -> AverageSharpness:
    r"""Return the mean rise of the loss under Gaussian perturbations, with its standard error.

    .. math:: E_\delta \, L(w + \delta) - L(w), \qquad \delta_i \sim \rho \, N(0, 1)
        \;\text{ or, adaptive, }\; \rho\, |w_i| \, N(0, 1)

    Each perturbation is taken with its opposite, so that the gradient has no part in it: on a
    quadratic the mean is :math:`\rho^2\, \mathrm{tr} H / 2`.

    Args:
        surface: the loss.
        rho: standard deviation, positive.
        adaptive: relative to each parameter.
        num_samples: perturbations, even, at least 4.
        generator: source of the perturbations, on the CPU; ``None`` is a fixed seed.

    Raises:
        ValueError: if an argument is out of range.
        CurvatureError: if the loss is not finite.

    Example:
        >>> import torch
        >>> params = {"w": torch.ones(1000, dtype=torch.float64)}
        >>> found = average_sharpness(LossSurface(lambda p: p["w"].square().sum(), params), rho=0.1)
        >>> abs(found.value - 10.0) < 4 * found.standard_error < 1.0  # ρ² n
        True

    References:
        M. Andriushchenko et al., "A modern look at the relationship between sharpness and
        generalization", 2023, section 3.
    """
    _check_positive("rho", rho)
    if isinstance(num_samples, bool) or num_samples < 4 or num_samples % 2:
        raise ValueError(
            f"`num_samples` must be an even integer of at least 4, got {num_samples!r}: each "
            "perturbation comes with its opposite, and an error needs two pairs."
        )
    generator = generator or torch.Generator().manual_seed(0)
    loss = _loss(surface)
    scale = _scale(surface, adaptive) * rho
    pairs = []
    for _ in range(num_samples // 2):
        offset = scale * torch.randn(len(scale), generator=generator, dtype=torch.float64).to(scale)
        pairs.append((float(surface.loss(offset)) + float(surface.loss(-offset))) / 2)
    rises = torch.tensor(pairs, dtype=torch.float64) - loss
    error = float(rises.std()) / math.sqrt(len(pairs))
    return AverageSharpness(float(rises.mean()), error, loss, rho, adaptive, num_samples)


def _loss(surface: LossSurface) -> float:
    loss = float(surface.loss())
    if not math.isfinite(loss):
        raise CurvatureError.not_finite()
    return loss


def _scale(surface: LossSurface, adaptive: bool) -> Tensor:
    """Return what one unit of length is, by parameter, shape ``(n,)``."""
    x = surface.vector()
    return x.abs() if adaptive else torch.ones_like(x)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def _check_subspace(dim: int, n: int) -> None:
    if isinstance(dim, bool) or not 1 <= dim <= n:
        raise ValueError(
            f"`subspace_dim` must be between 1 and the number of parameters, {n}, got {dim!r}. "
            "`None` takes all parameters."
        )
