"""The velocity over rates that change, against SGD that does not fold the rate into it."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optkit.bridge.momentum_correction import MomentumCorrection
from lightning_optkit.optim import LARS

RATES = [0.1, 0.1, 0.4, 0.05, 0.0, 0.3, 0.3, 1.2]


class Folds(torch.optim.Optimizer):
    """v ← m v + η g, w ← w − v, as Goyal et al. write it in equation (10)."""

    def __init__(self, params, lr, momentum=0.9, **others):
        super().__init__(params, {"lr": lr, "momentum": momentum, **others})
        self.seen = []  # momenta

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.seen.append([group["momentum"] for group in self.param_groups])
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad * group["lr"])
                p.sub_(v)


def parameters(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).double()) for n in sizes]


def groups_of(*lrs, **options):
    weights = parameters(*[3] * len(lrs))
    return [{"params": [p], "lr": lr, **options} for p, lr in zip(weights, lrs, strict=True)]


def trainer_of(*optimizers):
    return SimpleNamespace(optimizers=list(optimizers))


def step(optimizer, t, rates=None):
    """Make step t: gradients from t alone, and these rates."""
    generator = torch.Generator().manual_seed(100 + t)
    for j, group in enumerate(optimizer.param_groups):
        if rates is not None:
            group["lr"] = rates[j]
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).double()
    optimizer.step()


def weights(optimizer):
    return torch.cat([p.detach() for group in optimizer.param_groups for p in group["params"]])


def attached(chosen, *optimizers, only=None):
    correction = MomentumCorrection(chosen)
    correction.attach(trainer_of(*optimizers), range(len(optimizers)) if only is None else only)
    return correction


def scheduled(t):
    """Rates of two groups, which change at other steps."""
    return RATES[t], RATES[-1 - t] + 0.01


def test_a_folded_velocity_goes_over_to_each_new_rate():
    """After a rate of zero it begins anew: all that it held was of that rate."""
    folds = Folds(groups_of(0.1, 0.2, fold_lr=True), 0.1)
    correction = attached(None, folds)
    sgd = torch.optim.SGD(groups_of(0.1, 0.2), momentum=0.9)
    for t in range(len(RATES)):
        step(folds, t, scheduled(t))
        if t and RATES[t - 1] == 0:
            sgd.state[sgd.param_groups[0]["params"][0]]["momentum_buffer"].zero_()
        step(sgd, t, scheduled(t))
        torch.testing.assert_close(weights(folds), weights(sgd), rtol=1e-12, atol=1e-13)
        assert [group["momentum"] for group in folds.param_groups] == [0.9, 0.9]
    first = [0.9 * (b / a if a else 1) for a, b in zip(RATES[:1] + RATES, RATES, strict=False)]
    assert [momentum for momentum, _ in folds.seen] == first
    correction.detach()
    assert "step" not in vars(folds)


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_lars_with_a_folded_rate_does_as_without(dampening):
    folded, plain = (
        LARS(groups_of(0.1, 0.2), lr=0.1, weight_decay=0.1, dampening=dampening, fold_lr=fold_lr)
        for fold_lr in (True, False)
    )
    attached(None, folded, plain)
    for t, rate in enumerate(rate for rate in RATES if rate):
        step(folded, t, [rate, 2 * rate])
        step(plain, t, [rate, 2 * rate])
        torch.testing.assert_close(weights(folded), weights(plain), rtol=1e-12, atol=1e-14)


def test_without_the_correction_it_does_not():
    folds, sgd = Folds(groups_of(0.1), 0.1), torch.optim.SGD(groups_of(0.1), momentum=0.9)
    for t in range(3):
        step(folds, t, [RATES[t]])
        step(sgd, t, [RATES[t]])
    assert (weights(folds) - weights(sgd)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("chosen", "options", "is_corrected"),
    [
        (None, {"fold_lr": True}, True),
        (None, {"fold_lr": False}, False),
        (None, {}, False),
        (True, {}, True),
        (True, {"fold_lr": False}, True),
        (False, {"fold_lr": True}, False),
    ],
)
def test_which_groups_are_corrected(chosen, options, is_corrected):
    optimizer = Folds(groups_of(0.1, **options), 0.1)
    attached(chosen, optimizer)
    for t, rate in enumerate([0.1, 0.4]):
        step(optimizer, t, [rate])
    assert optimizer.seen == [[0.9], [0.9 * 4 if is_corrected else 0.9]]


@pytest.mark.parametrize("chosen", [None, True])
def test_groups_without_a_momentum_are_left_alone(chosen):
    optimizer = torch.optim.Adam(groups_of(0.1, fold_lr=True))
    attached(chosen, optimizer)
    step(optimizer, 0)
    assert "momentum" not in optimizer.param_groups[0]


def test_only_the_optimizers_that_are_named():
    first, second = (Folds(groups_of(0.1, fold_lr=True), 0.1) for _ in range(2))
    attached(None, first, second, only=[1])
    for t, rate in enumerate([0.1, 0.4]):
        step(first, t, [rate])
        step(second, t, [rate])
    assert (first.seen[1], second.seen[1]) == ([0.9], [0.9 * 4])


def test_a_group_that_is_added_later_begins_by_itself():
    optimizer = Folds(groups_of(0.1, fold_lr=True), 0.1, fold_lr=True)
    attached(None, optimizer)
    step(optimizer, 0)
    optimizer.add_param_group({"params": parameters(2), "lr": 0.3})
    step(optimizer, 1, [0.2, 0.3])
    step(optimizer, 2, [0.2, 0.9])
    assert optimizer.seen == [[0.9], [1.8, 0.9], pytest.approx([0.9, 2.7], rel=1e-15)]


def test_a_resumed_run_corrects_from_the_rate_of_the_last_step():
    whole, first = (Folds(groups_of(0.1, 0.2, fold_lr=True), 0.1) for _ in range(2))
    attached(None, whole)
    correction = attached(None, first)
    for t in range(len(RATES)):
        step(whole, t, scheduled(t))
    for t in range(3):
        step(first, t, scheduled(t))
    state = pickle.loads(pickle.dumps(correction.state_dict()))
    correction.detach()
    resumed = MomentumCorrection(None)
    resumed.load_state_dict(state)
    resumed.attach(trainer_of(first), [0])
    for t in range(3, len(RATES)):
        step(first, t, scheduled(t))
    assert torch.equal(weights(first), weights(whole))
    assert first.seen == whole.seen
    correction.start()
    assert correction.state_dict() == {"rates": {}}
    assert state["rates"][0] == {0: 0.4, 1: 0.3 + 0.01}  # its own copy


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_skipped_update_is_no_step(kind):
    optimizer = Folds(groups_of(0.1, fold_lr=True), 0.1)
    correction = attached(None, optimizer)
    step(optimizer, 0)
    for found_inf in (1.0, 0.0):
        optimizer.found_inf = torch.tensor([found_inf]) if kind == "tensor" else found_inf
        step(optimizer, 1, [0.4])
    assert optimizer.seen == [[0.9], [0.9 * 4], [0.9 * 4]]  # the scaler skips the second
    assert correction.state_dict()["rates"] == {0: {0: 0.4}}


def test_a_tensor_is_read_and_a_failure_leaves_the_momentum_as_it_was():
    optimizer = Folds(groups_of(torch.tensor(0.1, dtype=torch.float64), fold_lr=True), 0.1)
    correction = attached(None, optimizer)
    step(optimizer, 0)
    step(optimizer, 1, [torch.tensor(0.2, dtype=torch.float64)])
    assert optimizer.seen[1] == [1.8]
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.param_groups[0]["lr"] = torch.tensor(0.7, dtype=torch.float64)
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert correction.state_dict()["rates"] == {0: {0: 0.2}}


def test_nesterovs_momentum_is_refused_where_it_is_corrected():
    optimizer = torch.optim.SGD(groups_of(0.1), lr=0.1, momentum=0.9, nesterov=True)
    attached(None, optimizer)
    with pytest.raises(MisconfigurationException, match=r"Optimizer 0 \(SGD\) must not use Nest"):
        attached(True, optimizer)
    attached(True, optimizer, only=[])
