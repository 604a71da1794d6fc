"""Stability thresholds against the optimizers of torch themselves, on quadratics."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    LBFGS,
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from lightning_optkit.measures import (
    CurvatureError,
    HessianOperator,
    PreconditionedHessian,
    stability_threshold,
    step_along_gradient,
)
from lightning_optkit.measures.update_rules import is_known
from tests.distributed import run_in_new_process
from tests.quadratics import MatrixOperator, Quadratic, orthogonal, symmetric

# -- the optimizers of torch, their preconditioner held still --------------------------------------

ADAM = {"lr": 0.01, "betas": (0.9, 0.99)}
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd decay": (SGD, {"lr": 0.1, "weight_decay": 3.0}),
    "sgd foreach": (SGD, {"lr": 0.1, "foreach": True}),
    "heavy ball": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampened": (SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.5}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
    "adam": (Adam, ADAM),
    "adam tensor rate": (Adam, ADAM | {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "adam without momentum": (Adam, {"lr": 0.01, "betas": (0.0, 0.99)}),
    "adam decay": (Adam, ADAM | {"weight_decay": 2.0}),
    "adam amsgrad": (Adam, ADAM | {"amsgrad": True}),
    "adam foreach": (Adam, ADAM | {"foreach": True}),
    "adam fused": (Adam, ADAM | {"fused": True}),
    "adam large eps": (Adam, ADAM | {"eps": 0.5}),
    "adamw": (AdamW, {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 3.0}),
    "adamw amsgrad": (AdamW, ADAM | {"weight_decay": 3.0, "amsgrad": True}),
    "nadam": (NAdam, ADAM),
    "nadam decay": (NAdam, ADAM | {"weight_decay": 2.0}),
    "nadam decoupled": (NAdam, ADAM | {"weight_decay": 5.0, "decoupled_weight_decay": True}),
    "radam": (RAdam, ADAM | {"eps": 0.5}),
    "radam decoupled": (RAdam, ADAM | {"weight_decay": 5.0, "decoupled_weight_decay": True}),
    "adamax": (Adamax, ADAM | {"weight_decay": 0.3}),
    "rmsprop": (RMSprop, {"lr": 0.01, "eps": 0.1}),
    "rmsprop momentum": (RMSprop, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop centered": (RMSprop, {"lr": 0.01, "centered": True}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.05, "eps": 0.2, "weight_decay": 0.1}),
}
STEPS = [2, 4, 40]  # RAdam divides by the variance from step 6 on
TINY = 1e-12  # parameters so small that their gradients leave the second moments as they are


class Frozen:
    """An optimizer whose preconditioner and step count are put back around every step."""

    def __init__(self, optimizer: Optimizer, step: int, *, seed: int = 0) -> None:
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        generator = torch.Generator().manual_seed(seed)
        self.frozen: list[dict[str, Any]] = []
        for _ in range(3):  # the state comes into being
            for p in self.params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.frozen.append(self._frozen_state(group, p, step, generator))
        self.write(torch.zeros_like(self.read()))
        self.step(torch.zeros(sum(p.numel() for p in self.params)))

    def _frozen_state(
        self, group: dict[str, Any], p: Tensor, step: int, generator: torch.Generator
    ) -> dict[str, Any]:
        """Return what the state must be before a step, for it to be the wanted one after it."""

        def positive() -> Tensor:
            return torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.2

        beta2 = group["betas"][1] if "betas" in group else group.get("alpha", 1.0)
        state = self.optimizer.state[p]
        before: dict[str, Any] = {}
        for key in ("exp_avg_sq", "exp_inf", "square_avg", "sum"):
            if key in state:
                before[key] = positive() / beta2
        if "max_exp_avg_sq" in state:
            before["max_exp_avg_sq"] = positive() + 2
        if "grad_avg" in state:
            before["grad_avg"] = 0.3 * positive()
        if "step" in state:
            before["step"] = torch.tensor(float(step - 1))
        if "mu_product" in state:
            decay = group["momentum_decay"]
            mus = [group["betas"][0] * (1 - 0.5 * 0.96 ** (k * decay)) for k in range(1, step)]
            before["mu_product"] = torch.tensor(math.prod(mus), dtype=torch.float64)
        return before

    def step(self, gradient: Tensor) -> None:
        """Make one step of the optimizer with this gradient."""
        pieces = gradient.split([p.numel() for p in self.params])
        for p, piece, frozen in zip(self.params, pieces, self.frozen, strict=True):
            p.grad = piece.reshape(p.shape).clone().to(p.dtype)
            for key, value in frozen.items():
                self.optimizer.state[p][key] = value.clone()
        self.optimizer.step()

    @property
    def buffers(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.params]
        keys = ("exp_avg", "momentum_buffer")
        found = [state.get(key) for state in states for key in keys]
        return [buffer for buffer in found if buffer is not None]

    def write(self, vector: Tensor) -> None:
        """Set parameters and running means."""
        targets = [p.data for p in self.params] + self.buffers
        for target, piece in zip(targets, vector.split([t.numel() for t in targets]), strict=True):
            target.copy_(piece.reshape(target.shape))

    def read(self) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in [*self.params, *self.buffers]])

    def map(self, hessian: Tensor) -> Tensor:
        """Return the matrix of one step on this quadratic, as the optimizer really makes it."""
        size, columns = len(self.read()), []
        for unit in torch.eye(size, dtype=torch.float64):
            self.write(TINY * unit)
            self.step(hessian @ self.read()[: len(hessian)])
            columns.append(self.read() / TINY)
        return torch.stack(columns, dim=1)

    def growth(self, hessian: Tensor, num_steps: int = 200) -> float:
        """Return by how much the parameters grow in the second half of so many steps."""
        self.write(TINY * torch.ones_like(self.read()))
        halfway = 0.0
        for i in range(num_steps):
            theta = self.read()[: len(hessian)]
            if i == num_steps // 2:
                halfway = float(theta.norm())
            if theta.norm() > 1e6 * TINY:
                return math.inf
            self.step(hessian @ theta)
        return float(self.read()[: len(hessian)].norm()) / halfway


def parameters(*sizes: int) -> list[Tensor]:
    return [torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def frozen(name: str, step: int, *sizes: int) -> Frozen:
    kind, options = OPTIMIZERS[name]
    return Frozen(kind(parameters(*sizes), **copy.deepcopy(options)), step)


def found_for(optimizer: Optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return stability_threshold(optimizer, {str(i): p for i, p in enumerate(params)})


def hessian_at(optimizer: Optimizer, ratio: float, *, lowest: float = 0.0, seed: int = 0) -> Tensor:
    """Return a rotated Hessian whose largest preconditioned eigenvalue is at this ratio."""
    found = found_for(optimizer)
    root = found.preconditioner.sqrt()
    n = len(root)
    values = torch.linspace(lowest, 1.0, n, dtype=torch.float64) if n > 1 else torch.ones(1)
    scaled = found.threshold * ratio * symmetric(values.double(), seed=seed)
    return scaled / root / root[:, None] - torch.diag(found.decay)


# -- the thresholds ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("sizes", [(1,), (1, 2)], ids=["1-D", "3-D"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_where_the_step_of_torch_becomes_unstable(name, sizes, step):
    """The spectral radius of the linear map that the real optimizer applies crosses 1."""
    optimizer = frozen(name, step, *sizes)
    radii = [
        float(
            torch.linalg.eigvals(optimizer.map(hessian_at(optimizer.optimizer, ratio))).abs().max()
        )
        for ratio in (0.99, 1 - 1e-6, 1 + 1e-6)
    ]
    at_zero = 1.0 if sizes != (1,) else 0.0  # the flat direction of the 3-D quadratic stays
    assert max(radii[0], at_zero) <= 1 + 1e-9
    assert radii[1] <= 1 + 1e-9
    assert radii[2] > 1 + 1e-7


@pytest.mark.parametrize("sizes", [(1,), (1, 2)], ids=["1-D", "3-D"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_of_torch_converges_below_it_and_diverges_above(name, sizes):
    optimizer = frozen(name, 40, *sizes)
    assert optimizer.growth(hessian_at(optimizer.optimizer, 0.98, lowest=0.5)) < 0.5
    assert optimizer.growth(hessian_at(optimizer.optimizer, 1.02, lowest=0.5)) > 2


@pytest.mark.parametrize(
    ("optimizer", "options", "threshold"),
    [
        (SGD, {"lr": 0.1}, 20.0),
        (SGD, {"lr": 0.1, "momentum": 0.9}, 38.0),
        (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, 76.0),
        (SGD, {"lr": 0.1, "momentum": 0.5, "nesterov": True}, 15.0),
        (RMSprop, {"lr": 0.1}, 20.0),
        (RMSprop, {"lr": 0.1, "momentum": 0.9}, 38.0),
        (Adagrad, {"lr": 0.1}, 20.0),
    ],
)
def test_published_formulas(optimizer, options, threshold):
    made = optimizer(parameters(2), **options)
    Frozen(made, 1)
    assert found_for(made).threshold == pytest.approx(threshold, rel=1e-12)


def test_adam_late_in_training_has_the_published_threshold():
    """Cohen et al. 2022: (2 + 2 beta1) / ((1 - beta1) lr), 38 / lr for the default beta1."""
    for kind in (Adam, AdamW):
        made = kind(parameters(3), lr=1e-3, weight_decay=0.0)
        Frozen(made, 1_000_000)
        found = found_for(made)
        assert found.threshold == pytest.approx(38 / 1e-3, rel=1e-9)
        root = made.state[made.param_groups[0]["params"][0]]["exp_avg_sq"].sqrt()
        torch.testing.assert_close(found.preconditioner, 1 / (root + 1e-8), rtol=1e-9, atol=0)


def test_bias_corrections_are_those_of_the_present_step():
    made = Adam(parameters(2), lr=0.5, betas=(0.9, 0.999))
    (p,) = made.param_groups[0]["params"]
    for gradient in ([3.0, -1.0], [2.0, 2.0]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        made.step()
    found = found_for(made)
    assert found.threshold == pytest.approx(3.8 * (1 - 0.9**2) / (0.1 * 0.5), rel=1e-12)
    second = torch.tensor([9 * 0.999 + 4, 1 * 0.999 + 4], dtype=torch.float64) / (1 + 0.999)
    torch.testing.assert_close(found.preconditioner, 1 / (second.sqrt() + 1e-8), rtol=1e-9, atol=0)


# -- several parameter groups ----------------------------------------------------------------------


def mixed(kind: type[Optimizer], *options: dict[str, Any], step: int = 40) -> Frozen:
    groups = [{"params": parameters(2), **each} for each in options]
    return Frozen(kind(groups, lr=0.1), step)


MIXTURES = {
    "rates": (Adam, {"lr": 0.1}, {"lr": 0.003}),
    "betas": (Adam, {"betas": (0.9, 0.99)}, {"betas": (0.2, 0.9), "lr": 0.02}),
    "decays": (AdamW, {"weight_decay": 4.0}, {"weight_decay": 0.0, "betas": (0.5, 0.9)}),
    "momenta": (SGD, {"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.5, "nesterov": True}),
    "coupled": (SGD, {"momentum": 0.9, "weight_decay": 1.0}, {"lr": 0.5, "weight_decay": 0.0}),
    "frozen group": (SGD, {"lr": 0.0}, {"lr": 0.1}),
    "nadam": (NAdam, {"betas": (0.9, 0.99)}, {"betas": (0.3, 0.9), "weight_decay": 1.0}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lowest", [0.2, -0.7], ids=["bowl", "saddle"])
@pytest.mark.parametrize("name", MIXTURES)
def test_one_threshold_holds_for_any_mixture_of_groups(name, lowest, seed):
    """A mode that alternates in sign has an eigenvalue of -1; no other crosses for a bowl."""
    optimizer = mixed(*MIXTURES[name])
    found = found_for(optimizer.optimizer)
    n = len(found.preconditioner)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(n, n, generator=generator, dtype=torch.float64)
    hessian = raw @ raw.T + 0.1 * torch.eye(n, dtype=torch.float64)
    if lowest < 0:
        hessian -= 0.5 * float(torch.linalg.eigvalsh(hessian)[-1]) * torch.eye(n).double()
    root = found.preconditioner.sqrt()

    def ratio(scale: float) -> float:
        matrix = root[:, None] * (scale * hessian + torch.diag(found.decay)) * root
        return float(torch.linalg.eigvalsh(matrix)[-1]) / found.threshold

    low, high = 0.0, 1e6
    for _ in range(200):  # the scale at which the ratio is 1
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    for factor, unstable in ((0.999, False), (1.001, True)):
        eigenvalues = torch.linalg.eigvals(optimizer.map(factor * low * hessian))
        alternating = eigenvalues.real[eigenvalues.imag.abs() < 1e-9] < -1
        assert bool(alternating.any()) == unstable
        if lowest > 0:  # of a bowl, nothing else grows
            assert (float(eigenvalues.abs().max()) > 1 + 1e-9) == unstable


def test_it_is_stated_for_the_first_group_that_learns():
    optimizer = mixed(SGD, {"lr": 0.0}, {"lr": 0.1}, {"lr": 0.4}).optimizer
    found = found_for(optimizer)
    assert found.learning_rate == 0.1
    assert found.threshold == 20.0
    assert found.preconditioner.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 4.0, 4.0])


def test_a_learning_rate_of_zero_is_stable_at_any_curvature():
    found = found_for(SGD(parameters(2), lr=0.0))
    assert found.threshold == math.inf
    assert found.preconditioner.tolist() == [1.0, 1.0]


def test_earlier_hyperparameters_take_the_place_of_the_present():
    made = SGD(parameters(2), lr=0.1)
    earlier = [{**made.param_groups[0], "lr": 0.4}]
    params = {"w": made.param_groups[0]["params"][0]}
    assert stability_threshold(made, params, groups=earlier).threshold == 5.0


# -- which parameter is which ----------------------------------------------------------------------


def test_the_preconditioner_follows_the_order_of_the_parameters():
    first, second = parameters(2, 3)
    made = Adam([first, second], eps=1e-30)
    first.grad, second.grad = torch.full((2,), 2.0).double(), torch.full((3,), 4.0).double()
    made.step()
    found = stability_threshold(made, {"b": second, "a": first})
    assert found.preconditioner.tolist() == pytest.approx([0.25] * 3 + [0.5] * 2)
    part = stability_threshold(made, {"a": first})
    assert part.preconditioner.tolist() == pytest.approx([0.5] * 2)


def test_a_parameter_without_a_gradient_does_not_move():
    moved, unused = parameters(1, 2)
    made = Adam([moved, unused])
    moved.grad = torch.ones(1).double()
    made.step()
    before = copy.deepcopy(made.state_dict())
    found = stability_threshold(made, {"unused": unused, "moved": moved})
    assert found.preconditioner.tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert unused not in made.state
    assert made.state_dict() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_in_half_precision(dtype):
    (p,) = [torch.zeros(2, dtype=dtype, requires_grad=True)]
    made = Adam([p], eps=1e-8)
    p.grad = torch.tensor([0.5, 0.0], dtype=dtype)
    made.step()
    found = stability_threshold(made, {"p": p})
    assert found.preconditioner.dtype == torch.float32
    assert found.preconditioner.tolist() == pytest.approx([2.0, 1e8], rel=2e-2)


# -- the operator ----------------------------------------------------------------------------------


def test_products_are_those_of_the_dense_matrix():
    hessian = symmetric([-3.0, 0.0, 1.0, 2.0, 9.0])
    scale = torch.tensor([0.1, 4.0, 0.0, 100.0, 1.0]).double()
    decay = torch.tensor([0.0, 0.5, 2.0, 0.1, 0.0]).double()
    operator = PreconditionedHessian(MatrixOperator(hessian), scale, decay)
    dense = scale.sqrt().diag() @ (hessian + decay.diag()) @ scale.sqrt().diag()
    block = orthogonal(5, seed=3)[:, :3]
    torch.testing.assert_close(operator @ block, dense @ block, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator @ block[:, 0], dense @ block[:, 0], rtol=1e-12, atol=1e-12)
    similar = torch.linalg.eigvals(scale.diag() @ (hessian + decay.diag())).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(dense), similar, rtol=1e-9, atol=1e-9)


def test_it_takes_after_the_hessian():
    operator = HessianOperator(Quadratic(symmetric([1.0, 2.0])), {"w": torch.ones(2)})
    scaled = PreconditionedHessian(operator, torch.ones(2, dtype=torch.float64))
    assert (scaled.shape, scaled.dtype, scaled.device) == ((2, 2), torch.float32, operator.device)
    assert scaled.works_in_blocks == operator.works_in_blocks
    operator.noise, operator.failure = 1e-3, ValueError("on this rank")
    assert scaled.noise == 1e-3
    assert scaled.failure is operator.failure


@pytest.mark.parametrize(
    ("scale", "decay", "message"),
    [
        ([1.0, 2.0], None, r"`preconditioner` must have the shape \(3,\), got \(2,\)"),
        ([1.0, 1.0, 1.0], [0.0], r"`decay` must have the shape \(3,\), got \(1,\)"),
        ([1.0, -1.0, 1.0], None, r"must lie in \[0, inf\), got values from -1.0 to 1.0"),
        ([1.0, math.nan, 1.0], None, r"must lie in \[0, inf\)"),
        ([1.0, math.inf, 1.0], None, r"must lie in \[0, inf\)"),
    ],
)
def test_bad_diagonals_are_refused(scale, decay, message):
    with pytest.raises(ValueError, match=message):
        PreconditionedHessian(
            torch.eye(3), torch.tensor(scale), None if decay is None else torch.tensor(decay)
        )


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1, 1), ()])
def test_bad_vectors_are_refused(shape):
    operator = PreconditionedHessian(torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"`vectors` must have the shape \(3,\) or \(3, k\)"):
        _ = operator @ torch.ones(shape)


# -- what has no threshold -------------------------------------------------------------------------


class OwnStep(SGD):
    def step(self, closure=None):
        return super().step(closure)


class OwnDefaults(Adam):
    def __init__(self, params):
        super().__init__(params, lr=0.25)


class ThirdParty(Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("kind", [LBFGS, OwnStep, ThirdParty])
def test_unknown_optimizers_are_refused_with_the_names_of_the_known(kind):
    made = kind(parameters(2))
    assert not is_known(made)
    with pytest.raises(TypeError, match=rf"\(SGD, Adam, .*Adagrad\), got {kind.__name__}\."):
        found_for(made)


def test_a_subclass_with_the_same_step_is_known():
    for _ in range(2):  # torch wraps `step` when the first one is made
        made = OwnDefaults(parameters(2))
        assert is_known(made)
        assert is_known(SGD(parameters(2), lr=0.1))
    torch.optim.lr_scheduler.StepLR(made, 1)  # wraps the instance's step
    assert is_known(made)


def test_a_subclass_is_known_before_its_base_was_ever_made():
    """torch wraps `step` of the class that is made first: then the two differ."""
    run_in_new_process(makes_a_subclass_first)


def makes_a_subclass_first():
    class Own(Adam):
        pass

    made = Own(parameters(1))
    assert Own.step is not Adam.step
    assert is_known(made)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: SGD(parameters(2), lr=0.1, maximize=True), "must minimize, got `maximize=True`"),
        (lambda: Adam(parameters(2)), "must have made a step, got Adam without a state"),
        (lambda: Adagrad(parameters(2)), "must have made a step, got Adagrad without a state"),
        (lambda: SGD(parameters(2), lr=0.1, momentum=1.5), "It diverges on any loss"),
        (lambda: SGD(parameters(2), lr=0.1, momentum=0.5, dampening=2), "It diverges on any loss"),
    ],
)
def test_what_has_no_threshold_is_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        found_for(optimizer())


def test_decay_that_diverges_alone_is_refused():
    made = mixed(AdamW, {"weight_decay": 21.0}).optimizer
    with pytest.raises(ValueError, match=r"a product of 2\.1.* It diverges on any loss"):
        found_for(made)


def test_parameters_of_another_are_refused_by_name():
    ours, theirs = parameters(1, 1)
    made = SGD([ours], lr=0.1)
    with pytest.raises(ValueError, match=r"owns, got theirs\. Pass the module's own parameters"):
        stability_threshold(made, {"ours": ours, "theirs": theirs})
    with pytest.raises(ValueError, match="owns, got none"):
        stability_threshold(made, {})


# -- the step along the gradient -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-25], ids=["", "tiny gradient"])
def test_the_step_reaches_the_minimum_of_a_quadratic_along_the_gradient(size):
    hessian = symmetric([0.5, 1.0, 4.0, 9.0])
    w = size * torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    operator = HessianOperator(Quadratic(hessian), {"w": w})
    found = step_along_gradient(operator)
    g = hessian @ w
    assert found.step == pytest.approx(float(g @ g / (g @ hessian @ g)), rel=1e-12)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    assert found.curvature == pytest.approx(1 / found.step, rel=1e-12)
    moved = w - found.step * g
    assert float(g @ hessian @ moved) == pytest.approx(0, abs=1e-12 * size**2)  # orthogonal
    fallen = float(w @ hessian @ w / 2 - moved @ hessian @ moved / 2)
    assert found.decrease == pytest.approx(fallen, rel=1e-12)


def test_it_costs_one_product():
    operator = HessianOperator(
        Quadratic(symmetric([1.0, 2.0])), {"w": torch.ones(2).double()}, self_check=False
    )
    step_along_gradient(operator)
    assert operator.num_matvecs == 1


def test_a_small_gradient_in_single_precision_does_not_underflow():
    operator = HessianOperator(
        lambda p: (2 * p["w"].square()).sum(), {"w": torch.full((3,), 1e-25)}, self_check=False
    )
    assert step_along_gradient(operator).step == pytest.approx(0.25, rel=1e-6)


def step_at(loss, w: list[float], **options):
    return step_along_gradient(HessianOperator(loss, {"w": torch.tensor(w).double()}, **options))


def test_where_the_loss_has_no_minimum_along_the_gradient():
    falling = step_at(lambda p: -p["w"].square().sum(), [1.0, 2.0])
    assert (falling.step, falling.decrease) == (math.inf, math.inf)
    assert falling.curvature == pytest.approx(-2.0)
    flat = step_at(lambda p: p["w"].sum() + 0 * p["w"].square().sum(), [1.0, 2.0])
    assert (flat.step, flat.curvature) == (math.inf, 0.0)
    # g = (1, 1) at the origin, and g'Hg = 0 between the eigenvalues 1 and -1
    saddle = step_at(lambda p: p["w"].sum() + (p["w"][0] ** 2 - p["w"][1] ** 2) / 2, [0.0, 0.0])
    assert saddle.step == math.inf


def test_a_curvature_within_rounding_has_no_minimum():
    saddle = HessianOperator(
        lambda p: p["w"].sum() + (p["w"][0] ** 2 - (1 - 1e-6) * p["w"][1] ** 2) / 2,
        {"w": torch.zeros(2)},
    )
    found = step_along_gradient(saddle)
    assert 0 < found.curvature < saddle.noise
    assert found.step == math.inf


def test_a_gradient_of_zero_has_no_step():
    found = step_at(lambda p: p["w"].square().sum(), [0.0, 0.0])
    assert math.isnan(found.step)
    assert math.isnan(found.curvature)
    assert (found.gradient_norm, found.decrease) == (0.0, 0.0)


def test_an_infinite_product_is_refused():
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        step_at(lambda p: p["w"].abs().pow(1.5).sum(), [1.0, 0.0], self_check=False)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"foreach": True}])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_states_on_the_device(kind, options):
    found = []
    for device, extra in (("cpu", {}), ("cuda", options)):
        p = torch.zeros(3, device=device, requires_grad=True)
        made = kind([p], lr=0.1, **extra)
        for i in (1.0, 2.0):
            p.grad = torch.tensor([i, -1.0, 0.1], device=device)
            made.step()
        found.append(stability_threshold(made, {"p": p}))
    assert found[1].preconditioner.device.type == "cuda"
    assert found[1].threshold == pytest.approx(found[0].threshold, rel=1e-6)
    torch.testing.assert_close(found[1].preconditioner.cpu(), found[0].preconditioner)
