import contextlib
import copy
import inspect
import itertools
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.bridge.optimizer_steps import RateInStep, StepWatch, UpdateInStep
from tests.contracts import assert_resumes, assert_same

BATCHES = 8


class Seen(torch.optim.SGD):
    """Notes the rates that it updates with; as many subclasses do, it calls `super().step()`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def rates(self):
        return [float(group["lr"]) for group in self.param_groups]

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.seen.append(self.rates())
        super().step()
        return loss


SCHEDULERS = {
    "none": None,
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=40),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
}


class Net(pl.LightningModule):
    """A small net whose optimizer and scheduler are given."""

    def __init__(self, optimizer, scheduler=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.inside = []  # rates that the step finds

    def training_step(self, batch, batch_idx):
        self.inside.append([g.get("lr") for o in self.trainer.optimizers for g in o.param_groups])
        self.log("level", 1.0)  # never better: a plateau that does not depend on the weights
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self)
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler | {"monitor": "level"}}


def seen(module):
    """Return an optimizer with two groups and momentum."""
    first, second = module.net[0], module.net[2]
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.03}]
    return Seen(groups, lr=0.1, momentum=0.9)


class Manual(Net):
    """Manual optimization in which a test says what happens."""

    def __init__(self, *optimizers, step):
        super().__init__(None)
        self.automatic_optimization = False
        self.optimizers_of = optimizers
        self.step_of = step

    def training_step(self, batch, batch_idx):
        self.step_of(self, lambda: self.backward_of(batch))

    def backward_of(self, batch):
        self.zero_grad()
        self.manual_backward(mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return [optimizer(self) for optimizer in self.optimizers_of]


def factor(steps):
    """Return a factor that no power of two hides, for a step counted from 0."""
    return (steps + 1) / 7 if steps < 6 else 1.0


class Attends(pl.Callback):
    """Watches the steps and multiplies their rates by `factor`; notes what others find."""

    def __init__(self, active=True):
        self.watch = StepWatch()
        self.rates = RateInStep(lambda i, j, rate: rate * factor(self.watch.num_steps[i]))
        self.active = active
        self.stepped = []
        self.effective = []
        self.stored = []

    def setup(self, trainer, pl_module, stage):
        self.watch.start()

    def on_train_start(self, trainer, pl_module):
        self.before = [dict(vars(optimizer)) for optimizer in trainer.optimizers]
        if self.active:
            self.watch.attach(trainer)
            self.rates.attach(trainer)

    def on_train_batch_start(self, trainer, *_):
        self.store(trainer)

    def on_before_optimizer_step(self, trainer, *_):
        self.store(trainer)

    def on_train_batch_end(self, trainer, *_):
        self.store(trainer)
        self.stepped.append(self.watch.stepped())
        self.effective.append(self.rates.effective)

    def on_train_epoch_end(self, trainer, pl_module):
        self.store(trainer)

    def store(self, trainer):
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        self.stored.append([float(group["lr"]) for group in groups])

    def on_train_end(self, trainer, pl_module):
        self.leave()

    def on_exception(self, trainer, *_):
        self.leave()

    def leave(self):
        self.watch.detach()
        self.rates.detach()

    def state_dict(self):
        return {"watch": self.watch.state_dict()}

    def load_state_dict(self, state_dict):
        self.watch.load_state_dict(state_dict["watch"])


def fit(module, *callbacks, epochs=2, **options):
    """Train for two epochs of 8 batches; return the Trainer."""
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    x, y = (torch.randn(4 * BATCHES, n, generator=generator) for n in (3, 1))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=list(callbacks), max_epochs=epochs,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), 4))
    return trainer


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def times(value):
    """Return an intervener that multiplies every rate by a number."""
    return RateInStep(lambda i, j, rate: rate * value)


class Rules(pl.Callback):
    """Attaches what it is given, and detaches it."""

    def __init__(self, *ruling):
        self.ruling = ruling

    def on_train_start(self, trainer, pl_module):
        for each in self.ruling:
            each.attach(trainer)

    def on_train_end(self, trainer, pl_module):
        for each in self.ruling:
            each.detach()


# -- every scheduler ---------------------------------------------------------------------------


class ScaledByItself(Seen):
    """What must come out, by other means: an optimizer that knows the factor."""

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        scheduled = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * factor(len(self.seen))
        super().step()
        for group, rate in zip(self.param_groups, scheduled, strict=True):
            group["lr"] = rate
        return loss


def scaled_by_itself(module):
    optimizer = seen(module)
    optimizer.__class__ = ScaledByItself
    optimizer._patch_step_function()
    return optimizer


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # OneCycle, accumulation
@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_is_made_at_the_factor_times_the_scheduled_rate(name, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    without, attends = Attends(active=False), Attends()
    standard, module = Net(seen, SCHEDULERS[name]), Net(seen, SCHEDULERS[name])
    reference = fit(standard, without, **options)
    trainer = fit(module, attends, **options)
    plain, ruled = reference.optimizers[0], trainer.optimizers[0]

    num_steps = 2 * -(-BATCHES // accumulate)
    assert len(ruled.seen) == num_steps
    assert ruled.seen == [[lr * factor(t) for lr in lrs] for t, lrs in enumerate(plain.seen)]
    assert module.inside == standard.inside
    assert attends.stored == without.stored
    assert attends.effective[-1] == [ruled.seen[-1]]
    schedulers = [config.scheduler.state_dict() for config in reference.lr_scheduler_configs]
    assert schedulers == [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    for left, right in zip(ruled.param_groups, plain.param_groups, strict=True):
        assert_same({**left, "params": None}, {**right, "params": None})

    steps = [(b + 1) % accumulate == 0 or b + 1 == BATCHES for b in range(BATCHES)]
    assert attends.stepped == 2 * steps
    assert attends.watch.num_steps == [num_steps]

    itself = Net(scaled_by_itself, SCHEDULERS[name])
    other = fit(itself, **options).optimizers[0]
    assert other.seen == ruled.seen
    assert_same(weights(module), weights(itself))
    assert vars(ruled).keys() - {"_opt_called"} == attends.before[0].keys()  # a flag of torch
    assert vars(ruled).get("step") is attends.before[0].get("step")


@pytest.mark.parametrize("name", ["classifier", "gan", "autoencoder"])
def test_training_interrupted_and_resumed_equals_training_that_was_not(name, tmp_path):
    attends = assert_resumes(Attends, name, tmp_path)
    assert attends.watch.num_steps == ([15, 15] if name == "gan" else [15])
    clean = {"classifier": 0.05 * 0.5, "gan": 1e-2 * 0.9**9, "autoencoder": 1e-2}[name]
    saved = torch.load(tmp_path / "mid-epoch.ckpt", weights_only=True)
    rates = [o["param_groups"][0]["lr"] for o in saved["optimizer_states"]]
    assert rates == pytest.approx([clean] * len(rates), rel=1e-12)
    state = saved["callbacks"]["Attends"]["watch"]
    steps = [9] * len(rates)
    assert state == {"num_steps": steps, "asked": sum(steps)}


def test_accumulated_training_interrupted_and_resumed_equals_training_that_was_not(tmp_path):
    options = {"accumulate_grad_batches": 2}
    attends = assert_resumes(Attends, "classifier", tmp_path, **options)
    assert attends.watch.num_steps == [9]


class StepsItsOwn(Net):
    """A scheduler stepped by hand in `training_step`, which runs inside `optimizer.step()`."""

    def training_step(self, batch, batch_idx):
        self.own.step()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = self.optimizer(self)
        self.own = SCHEDULERS[self.scheduler](optimizer)
        optimizer.step()  # schedulers want one first; there are no gradients yet
        return optimizer


@pytest.mark.parametrize("name", ["exponential", "cosine", "lambda", "one_cycle"])
def test_a_scheduler_stepped_inside_the_closure_goes_on_from_its_own_rate(name):
    without, attends = Attends(active=False), Attends()
    plain = fit(StepsItsOwn(seen, name), without).optimizers[0]
    ruled = fit(StepsItsOwn(seen, name), attends).optimizers[0]
    scaled = [[lr * factor(t) for lr in lrs] for t, lrs in enumerate(plain.seen[1:])]
    assert ruled.seen[1:] == scaled
    assert attends.stored == without.stored
    assert len({lrs[0] for lrs in attends.stored}) > BATCHES


def test_a_constant_rate_over_a_moving_schedule():
    _, optimizer, trainer = by_hand()
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    constant = 0.05  # one object, at every step
    RateInStep(lambda i, j, rate: constant).attach(trainer)
    for k in range(4):
        optimizer.step(lambda: None)
        assert optimizer.rates() == [0.1 * 0.5**k]
        scheduler.step()
    assert optimizer.seen == [[0.05]] * 4


# -- what counts as a step -----------------------------------------------------------------------


class Overflows(Net):
    """Its gradient is infinite in some batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in (1, 4, 5) else loss


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_skipped_by_the_scaler_do_not_count(kind, fused):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module, attends = Overflows(lambda m: kind(m.parameters(), lr=0.1, fused=fused)), Attends()
    moved = Moved(module)
    fit(module, attends, moved, plugins=[precision])
    steps = [batch not in (1, 4, 5) for batch in range(BATCHES)]
    assert moved.moved == 2 * steps  # and this is what happened
    assert attends.stepped == 2 * steps
    assert attends.watch.num_steps == [10]
    rates = [0.1 * factor(sum((2 * steps)[:b])) for b in range(2 * BATCHES)]
    made = [rate for rate, step in zip(rates, 2 * steps, strict=True) if step]
    got = [e[0][0] for e, step in zip(attends.effective, 2 * steps, strict=True) if step]
    assert got == made


class Moved(pl.Callback):
    """Notes in which batches the weights moved."""

    def __init__(self, module):
        self.moved = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = weights(pl_module)
        self.moved.append(any(not torch.equal(now[k], v) for k, v in self.before.items()))


def test_a_scaler_used_by_hand_in_manual_optimization():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(module, backward):
        optimizer = module.trainer.optimizers[0]
        x = torch.ones(2, 3)
        bad = module.trainer.fit_loop.epoch_loop.batch_progress.current.ready % 3 == 0
        optimizer.zero_grad()
        scaler.scale(module.net(x).sum() * (float("nan") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    attends = Attends()
    fit(Manual(lambda m: torch.optim.Adam(m.parameters(), fused=True), step=step), attends)
    assert attends.watch.num_steps == [12]
    assert attends.stepped == 2 * [b % 3 != 2 for b in range(BATCHES)]


def test_found_inf_is_looked_up_only_when_asked(monkeypatch):
    reads = []
    real = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: reads.append(1) or real(t))
    watch = StepWatch()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module = Overflows(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, fused=True))
    fit(module, Rules(watch), plugins=[precision])
    assert not reads
    assert watch.num_steps == [10]
    assert watch.num_steps == [10]
    assert len(reads) == 1


def test_optimizers_of_manual_optimization_count_for_themselves():
    def step(module, backward):
        first, second = module.optimizers()
        for _ in range(3):
            backward()
            first.step()
        if module.trainer.fit_loop.epoch_loop.batch_progress.current.ready % 2 == 0:
            second.step(closure=backward)

    def of(layer):
        return lambda module: Seen(module.net[layer].parameters(), lr=0.1)

    attends = Attends()
    trainer = fit(Manual(of(0), of(2), step=step), attends)
    assert attends.watch.num_steps == [48, 8]
    for optimizer, steps in zip(trainer.optimizers, (48, 8), strict=True):
        assert optimizer.seen == [[0.1 * factor(t)] for t in range(steps)]


def test_lbfgs_makes_one_step_of_many_closures_at_one_rate():
    def lbfgs(lr):
        return lambda module: torch.optim.LBFGS(module.parameters(), lr=lr, max_iter=7)

    module, expected, attends = Net(lbfgs(0.1)), Net(lbfgs(0.05)), Attends()
    fit(module, Rules(times(0.5)))
    fit(expected)
    assert_same(weights(module), weights(expected))
    trainer = fit(Net(lbfgs(0.1)), attends)
    evaluations = trainer.optimizers[0].state_dict()["state"][0]["func_evals"]
    assert evaluations > 2 * BATCHES
    assert attends.watch.num_steps == [2 * BATCHES]
    assert attends.stepped == [True] * (2 * BATCHES)


def test_stepped_is_said_once():
    watch, optimizer, trainer = by_hand()
    watch.attach(trainer)
    assert not watch.stepped()
    optimizer.step()
    optimizer.step()
    assert watch.stepped()
    assert not watch.stepped()
    optimizer.step()
    watch.attach(trainer)  # again: what nobody asked about is still new
    assert watch.stepped()
    assert watch.num_steps == [3]
    optimizer.step()
    assert watch.stepped()
    watch.detach()
    optimizer.step()
    assert not watch.stepped()
    watch.detach()
    assert watch.num_steps == [4]
    watch.start()
    assert watch.num_steps == []


def by_hand(optimizer=None):
    """Return a watch, an optimizer and what stands for its Trainer."""
    if optimizer is None:
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = Seen([p], lr=0.1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy._optimizers = [optimizer]
    return StepWatch(), optimizer, trainer


# -- steps that fail, rates that others write ----------------------------------------------------


class Fails(Seen):
    """Raises in the middle of the update, on its third step."""

    def step(self, closure=None):
        loss = super().step(closure)
        if len(self.seen) == 3:
            raise RuntimeError("out of memory")
        return loss


def test_after_a_step_that_failed_the_scheduled_rate_is_back_at_once():
    module, attends = Net(lambda m: Fails(m.parameters(), lr=0.1)), Attends()
    found = []

    class Looks(pl.Callback):
        def on_exception(self, trainer, *_):
            found.append((trainer.optimizers[0], trainer.optimizers[0].param_groups[0]["lr"]))

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, Looks(), attends)  # `Looks` comes before `detach`, as a checkpoint may
    optimizer, lr = found[0]
    assert optimizer.seen == [[0.1 * factor(t)] for t in range(3)]
    assert lr == 0.1
    assert "step" not in vars(optimizer)
    assert attends.watch.num_steps == [2]


def test_training_that_goes_on_after_a_failed_step():
    def step(module, backward):
        optimizer = module.trainer.optimizers[0]
        try:
            module.optimizers().step(closure=backward)
        except RuntimeError:
            assert len(optimizer.seen) == 3
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # what a chainable scheduler does

    attends = Attends()
    trainer = fit(Manual(lambda m: Fails(m.parameters(), lr=0.1), step=step), attends)
    lrs = itertools.accumulate(range(15), lambda lr, _: lr * 0.9, initial=0.1)
    counted = [0, 1, 2, *range(2, 15)]  # the third did not count
    expected = [[lr * factor(t)] for t, lr in zip(counted, lrs, strict=True)]
    assert trainer.optimizers[0].seen == expected
    assert attends.watch.num_steps == [15]


def test_a_closure_that_fails_leaves_the_scheduled_rate():
    watch, optimizer, trainer = by_hand()
    rates = times(0.5)
    watch.attach(trainer)
    rates.attach(trainer)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert watch.num_steps == [0]


def test_a_rate_that_fails_leaves_the_scheduled_rates():
    _, optimizer, trainer = by_hand()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    RateInStep(lambda i, j, rate: [rate / 2][j]).attach(trainer)
    with pytest.raises(IndexError):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


class Rewrites(Seen):
    """Writes a learning rate of its own during the update."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            if isinstance(group["lr"], torch.Tensor) and self.in_place:
                group["lr"].fill_(0.7)
            else:
                group["lr"] = torch.tensor(0.7) if isinstance(group["lr"], torch.Tensor) else 0.7
        return loss


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_rate_written_during_the_update_is_kept(lr, in_place):
    optimizer = Rewrites([nn.Parameter(torch.ones(2))], lr=copy.deepcopy(lr))
    optimizer.in_place = in_place
    _, _, trainer = by_hand(optimizer)
    rates = times(0.5)
    rates.attach(trainer)
    optimizer.step()
    assert optimizer.seen == [[pytest.approx(0.05, rel=1e-6)]]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.7, rel=1e-6)
    optimizer.step()
    assert optimizer.seen[1] == [pytest.approx(0.35, rel=1e-6)]


# -- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_stays_the_same_and_is_put_back_to_the_bit(dtype, shape):
    lr = torch.full(shape, 0.1, dtype=dtype)
    kept = lr.clone()
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Seen([{"params": [first]}, {"params": [second]}], lr=lr)
    assert all(group["lr"] is lr for group in optimizer.param_groups)  # torch shares it
    watch, _, trainer = by_hand(optimizer)
    asked, inside = [], []
    rates = RateInStep(lambda i, j, rate: asked.append(rate) or rate * factor(watch.num_steps[0]))
    watch.attach(trainer)
    rates.attach(trainer)
    for t in range(8):
        optimizer.step(lambda: inside.append(optimizer.rates()))
        expected = float(kept * factor(t))
        assert optimizer.seen[-1] == [expected, expected]
        assert inside[-1] == [float(kept)] * 2
        assert rates.effective == [[expected, expected]]
        assert all(group["lr"] is lr for group in optimizer.param_groups)
        assert torch.equal(lr, kept)
    assert all(rate is not lr and torch.equal(rate, kept) for rate in asked)


def test_a_number_fills_a_tensor_and_a_tensor_gives_a_number():
    tensor = torch.tensor(0.1)
    _, optimizer, trainer = by_hand(Seen([nn.Parameter(torch.ones(1))], lr=tensor))
    RateInStep(lambda i, j, rate: 0.25).attach(trainer)
    optimizer.step()
    assert optimizer.seen == [[0.25]]
    assert optimizer.param_groups[0]["lr"] is tensor
    assert tensor == torch.tensor(0.1)
    _, optimizer, trainer = by_hand()
    RateInStep(lambda i, j, rate: torch.tensor(0.25)).attach(trainer)
    optimizer.step()
    assert optimizer.seen == [[0.25]]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_a_tensor_that_requires_a_gradient_can_be_filled():
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = WithoutRate([nn.Parameter(torch.ones(1))])
    optimizer.param_groups[0]["lr"] = lr
    _, _, trainer = by_hand(optimizer)
    rates = times(0.5)
    rates.attach(trainer)
    optimizer.step(lambda: None)
    assert rates.effective == [[float(torch.tensor(0.1) * 0.5)]]
    assert torch.equal(lr, torch.tensor(0.1))
    assert lr.is_leaf


@pytest.mark.parametrize("name", ["exponential", "one_cycle"])
def test_a_scheduler_of_a_tensor_rate(name):
    def tensors(module):
        return Seen(module.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))

    without, attends = Attends(active=False), Attends()
    plain = fit(Net(tensors, SCHEDULERS[name]), without).optimizers[0]
    ruled = fit(Net(tensors, SCHEDULERS[name]), attends).optimizers[0]
    assert ruled.seen == [[lr * factor(t) for lr in lrs] for t, lrs in enumerate(plain.seen)]
    assert attends.stored == without.stored


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}])
def test_on_a_gpu_a_step_waits_for_nothing(options):
    p = nn.Parameter(torch.ones(4, device="cuda"))
    lr = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.Adam([p], lr=lr, **options)
    watch, _, trainer = by_hand(optimizer)
    rates = times(0.5)
    watch.attach(trainer)
    rates.attach(trainer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.found_inf = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == torch.tensor(0.1).item()
    assert watch.num_steps == [2]
    assert rates.effective == [[(torch.tensor(0.1) * 0.5).item()]]
    assert torch.allclose(p, torch.full_like(p, 0.9), atol=1e-5)  # Adam moves by the rate


# -- several at once, and what they leave behind -------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("leaving", list(itertools.permutations(range(3))))
def test_several_compose_in_the_order_of_attach_and_leave_in_any(leaving, scheduled):
    watch, optimizer, trainer = by_hand()
    if scheduled:
        lr_scheduler.StepLR(optimizer, 1)
    before = dict(vars(optimizer))
    ruling = [
        RateInStep(lambda i, j, rate: rate * 0.3),
        RateInStep(lambda i, j, rate: rate + 1),
        watch,
    ]
    for each in ruling:
        each.attach(trainer)
    inside = []
    optimizer.step(lambda: inside.append(optimizer.rates()))
    assert optimizer.seen == [[0.1 * 0.3 + 1]]
    assert inside == [[0.1]]
    assert [each.effective for each in ruling[:2]] == [[[0.1 * 0.3 + 1]]] * 2
    left = {0, 1}
    for k in leaving:
        ruling[k].detach()
        left -= {k}
        optimizer.step()
        expected = (0.1 * 0.3 if 0 in left else 0.1) + (1 if 1 in left else 0)
        assert optimizer.seen[-1] == [expected]
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert {k: v for k, v in vars(optimizer).items() if k != "_opt_called"} == {
        k: v for k, v in before.items() if k != "_opt_called"
    }
    assert vars(optimizer).get("step") is before.get("step")


def test_attach_twice_and_detach_twice():
    watch, optimizer, trainer = by_hand()
    rates = times(0.5)
    for _ in range(2):
        watch.attach(trainer)
        rates.attach(trainer)
    optimizer.step()
    assert optimizer.seen == [[0.05]]
    assert watch.num_steps == [1]
    for _ in range(2):
        watch.detach()
        rates.detach()
    optimizer.step()
    assert optimizer.seen[-1] == [0.1]
    assert "step" not in vars(optimizer)


def test_a_scheduler_made_in_the_meantime_keeps_working():
    watch, optimizer, trainer = by_hand()
    rates = times(0.5)
    watch.attach(trainer)
    rates.attach(trainer)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    wrapper = vars(optimizer)["step"]
    optimizer.step()
    scheduler.step()
    second = times(3.0)
    second.attach(trainer)  # finds the others behind the scheduler's wrapper
    optimizer.step()
    for each in (rates, watch, second):
        each.detach()
    assert vars(optimizer)["step"] is wrapper  # the scheduler's: it was wrapped around ours
    optimizer.step()
    scheduler.step()
    watch.attach(trainer)
    optimizer.step()
    assert optimizer.seen == [[0.05], [0.05 * 0.5 * 3.0], [0.05], [0.025]]
    assert watch.num_steps == [3]


def test_neither_checkpoints_nor_copies_hold_anything_of_it():
    watch, optimizer, trainer = by_hand()
    state = copy.deepcopy(optimizer.state_dict())
    pickled = pickle.dumps(optimizer.__reduce_ex__(2)[2])
    rates = times(0.5)
    watch.attach(trainer)
    rates.attach(trainer)
    optimizer.step()
    for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        duplicate.seen = []
        duplicate.step()
        assert duplicate.seen == [[0.1]]
    assert watch.num_steps == [1]
    assert optimizer.state_dict() == state
    watch.detach()
    rates.detach()
    optimizer.param_groups[0]["params"][0].data.fill_(1.0)
    assert pickle.dumps(optimizer.__reduce_ex__(2)[2]) == pickled


def test_the_signature_that_a_scaler_looks_at_is_kept():
    class Handles(Seen):
        def step(self, closure=None, *, grad_scaler=None):
            return super().step(closure)

    watch, optimizer, trainer = by_hand(Handles([nn.Parameter(torch.ones(1))], lr=0.1))
    before = inspect.signature(optimizer.step)
    watch.attach(trainer)
    assert inspect.signature(optimizer.step) == before
    optimizer.step(grad_scaler=None)
    assert watch.num_steps == [1]


# -- optimizers of all kinds ---------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """A wrapper as many write them: without `super().__init__()`, so torch has no hooks in it."""

    def __init__(self, base):
        self.base = base
        self.param_groups = base.param_groups
        self.state = base.state
        self.defaults = base.defaults

    def step(self, closure=None):
        return self.base.step(closure)

    def state_dict(self):
        return self.base.state_dict()

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


@pytest.mark.parametrize(
    "optimizer",
    [lambda m: Lookahead(seen(m)), lambda m: LightningOptimizer(seen(m))],
    ids=["wrapper", "Lightning's own"],
)
def test_optimizers_wrapped_by_others(optimizer):
    attends, expected = Attends(), Net(seen)
    module = Net(optimizer)
    trainer = fit(module, attends)
    fit(expected, Attends())
    wrapped = trainer.optimizers[0]
    wrapped = wrapped.base if isinstance(wrapped, Lookahead) else wrapped
    rates = [[lr * factor(t) for lr in (0.1, 0.03)] for t in range(2 * BATCHES)]
    assert wrapped.seen == rates
    assert attends.watch.num_steps == [2 * BATCHES]
    assert_same(weights(module), weights(expected))
    assert {lr[0] for lr in attends.stored} == {0.1}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_step(when):
    def make(lr):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        return torch.optim.SGD([p], lr=torch.tensor(lr, dtype=torch.float64), foreach=False)

    watch, optimizer, trainer = by_hand(make(0.1))
    rates = times(0.5)
    if when == "before":
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    watch.attach(trainer)
    rates.attach(trainer)
    if when == "after":
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    expected = make(0.05)
    for _ in range(3):
        optimizer.step()
        expected.step()
    assert watch.num_steps == [3]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert_same(*(o.param_groups[0]["params"][0].data for o in (optimizer, expected)))


def test_groups_that_are_added_during_training():
    class Finetuning(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.5)

    def head(module):
        return Seen(module.net[2].parameters(), lr=0.1)

    attends = Attends()
    seen_rates = fit(Net(head), Finetuning(), attends).optimizers[0].seen
    lrs = [[0.1]] * BATCHES + [[0.1, 0.5]] * BATCHES
    assert seen_rates == [[lr * factor(t) for lr in each] for t, each in enumerate(lrs)]
    assert attends.effective[-1] == [[0.1, 0.5]]


def test_a_group_added_inside_the_closure():
    _, optimizer, trainer = by_hand()
    times(0.5).attach(trainer)
    added = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.3}
    optimizer.step(lambda: optimizer.add_param_group(added))
    assert optimizer.seen == [[0.05, 0.15]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def test_a_second_fit_starts_anew_with_its_new_optimizer():
    attends, module = Attends(), Net(seen)
    fit(module, attends, epochs=1)
    trainer = fit(module, attends, epochs=1)
    assert attends.watch.num_steps == [BATCHES]
    assert trainer.optimizers[0].seen[0] == [0.1 * factor(0), 0.03 * factor(0)]


def test_momentum_is_left_to_one_cycle():
    without, attends = Noted(), Noted()
    fit(Net(seen, SCHEDULERS["one_cycle"]), without)
    fit(Net(seen, SCHEDULERS["one_cycle"]), attends, Rules(times(0.5)))
    assert attends.momenta == without.momenta
    assert len(set(without.momenta)) == 2 * BATCHES


class Noted(pl.Callback):
    def __init__(self):
        self.momenta = []

    def on_train_batch_end(self, trainer, *_):
        self.momenta.append(trainer.optimizers[0].param_groups[0]["momentum"])


# -- what is refused -----------------------------------------------------------------------------


class NotTorchs:
    """An optimizer of another kind, which Lightning itself takes."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, {}

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self):
        self.base.zero_grad()

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        return closure()


NO_OPTIMIZER = "ignore:.*configure_optimizers` returned `None`"


@pytest.mark.filterwarnings(NO_OPTIMIZER)
@pytest.mark.parametrize("attended", [StepWatch, lambda: times(0.5)])
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda m: NotTorchs(seen(m)), "Optimizer 0 must be a .*Optimizer`, got NotTorchs"),
        (lambda m: None, "`configure_optimizers` must return an optimizer, got none"),
    ],
)
def test_optimizers_that_cannot_be_attended_are_refused_before_the_first_step(
    optimizer, message, attended
):
    module = Net(optimizer)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, Rules(attended()))


def test_an_optimizer_without_a_rate_can_be_watched_but_not_ruled():
    watch = StepWatch()
    fit(Net(lambda m: WithoutRate(m.parameters())), Rules(watch))
    assert watch.num_steps == [2 * BATCHES]
    with pytest.raises(MisconfigurationException, match=r"Optimizer 0 \(WithoutRate\) must have"):
        fit(Net(lambda m: WithoutRate(m.parameters())), Rules(times(0.5)))


# -- some optimizers, and roles ----------------------------------------------------------------


def test_only_the_optimizers_that_are_named_are_ruled():
    halved = times(0.5)
    module = Manual(seen, seen, step=steps_both)
    attach_to_second = Rules()
    attach_to_second.on_train_start = lambda trainer, _: halved.attach(trainer, [1])
    trainer = fit(module, attach_to_second, epochs=1)
    first, second = trainer.optimizers
    assert first.seen == [[0.1, 0.03]] * BATCHES
    assert second.seen == [[0.05, 0.015]] * BATCHES
    assert halved.effective == [[], [0.05, 0.015]]
    halved.detach()


def steps_both(module, backward):
    for optimizer in module.optimizers():
        backward()
        optimizer.step()


def test_two_in_one_role_are_refused_and_leave_nothing():
    first, second = (RateInStep(lambda i, j, rate: rate, role="warmup") for _ in range(2))
    other = times(0.5)
    module = Net(seen)
    with pytest.raises(MisconfigurationException, match="Optimizer 0 must have one warmup of its"):
        fit(module, Rules(first, other, second))
    for each in (first, other, second):
        each.detach()
    assert "step" not in vars(module.trainer.optimizers[0])


@pytest.mark.parametrize(
    ("left", "right", "remedy"),
    [
        (None, None, "Remove one of the callbacks, or give"),
        ("write `A(0)`", None, "Write `A(0)`, or give"),
        (None, "leave out `B`", "Leave out `B`, or give"),
        ("write `A(0)`", "leave out `B`", "Write `A(0)`, leave out `B`, or give"),
        ("leave out `B`", "leave out `B`", "Leave out `B`, or give"),
    ],
)
def test_two_in_one_role_say_what_to_write(left, right, remedy):
    _, _, trainer = by_hand()
    first, second = (
        RateInStep(lambda i, j, rate: rate, role="warmup", without=text) for text in (left, right)
    )
    first.attach(trainer)
    with pytest.raises(MisconfigurationException) as error:
        second.attach(trainer)
    assert f"both would multiply. {remedy} them different optimizers." in str(error.value)
    first.detach()


def test_shown_rates_are_those_of_the_coming_step_and_change_nothing():
    class Looks(Attends):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            group = trainer.optimizers[0].param_groups[0]
            before, used = group["lr"], self.rates.effective
            with self.rates.shown(), other.shown():  # twice is once
                self.looked.append(group["lr"])
            assert (group["lr"], self.rates.effective) == (before, used)
            with pytest.raises(KeyError), self.rates.shown():
                raise KeyError
            assert group["lr"] == before

    looks, other = Looks(), times(0.5)
    looks.looked = []
    module = Net(seen, lambda o: lr_scheduler.ExponentialLR(o, 0.9))
    trainer = fit(module, looks, Rules(other))
    assert looks.looked == [rates[0] for rates in trainer.optimizers[0].seen]
    assert len(set(looks.looked)) == 2 * BATCHES


# -- around an update --------------------------------------------------------------------------


class Surrounds(pl.Callback):
    """Notes what it finds around each update."""

    def __init__(self, name="it", around=None, diary=None):
        self.name = name
        self.diary = [] if diary is None else diary
        self.update = UpdateInStep(around or self.around)

    @contextlib.contextmanager
    def around(self, i, optimizer):
        assert not torch.is_grad_enabled()
        p = optimizer.param_groups[0]["params"][0]
        before, gradient = p.clone(), p.grad.clone()
        lr = optimizer.param_groups[0]["lr"]
        self.diary.append((self.name, "begin", i, lr))
        yield
        assert optimizer.param_groups[0]["lr"] == lr
        assert torch.equal(p.grad, gradient)
        self.diary.append((self.name, "end", i, not torch.equal(p, before)))

    def on_train_start(self, trainer, pl_module):
        self.update.attach(trainer)

    def on_train_end(self, trainer, pl_module):
        self.update.detach()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_update_is_surrounded_without_its_closure_at_the_rate_of_the_step(accumulate):
    diary = []
    inner, outer = Surrounds("inner", diary=diary), Surrounds("outer", diary=diary)
    module = Net(seen)
    module.training_step = lambda batch, i, step=module.training_step: (
        diary.append("closure"),
        step(batch, i),
    )[1]
    trainer = fit(
        module, outer, Rules(times(0.5)), inner, epochs=1, accumulate_grad_batches=accumulate
    )
    begin, end = [("begin", 0, 0.05)], [("end", 0, True)]
    a_step = [("outer", *begin[0]), ("inner", *begin[0]), ("inner", *end[0]), ("outer", *end[0])]
    assert [each for each in diary if each != "closure"] == a_step * trainer.global_step
    assert diary[: accumulate + 4] == ["closure"] * accumulate + a_step
    assert "step" not in vars(trainer.optimizers[0])


def test_lbfgs_makes_an_update_after_each_closure():
    around = Surrounds()
    calls = []
    module = Net(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3))
    module.training_step = lambda batch, i, step=module.training_step: (
        calls.append(i),
        step(batch, i),
    )[1]
    around.update._around = counted(begun := [], ended := [])
    fit(module, around, epochs=1)
    assert len(begun) == len(ended) == len(calls) > BATCHES


def counted(begun, ended):
    @contextlib.contextmanager
    def around(i, optimizer):
        begun.append(i)
        try:
            yield
        finally:
            ended.append(i)

    return around


@pytest.mark.parametrize("where", ["update", "closure", "begin", "end"])
def test_a_failure_reaches_what_surrounds_it_and_is_raised(where):
    module = nn.Linear(2, 1)
    optimizer = (Fails if where == "update" else Seen)(module.parameters(), lr=0.1)
    optimizer.seen = [None] * 2  # the next is the third step
    told = []

    @contextlib.contextmanager
    def around(i, optimizer):
        if where == "begin":
            raise RuntimeError("begin")
        try:
            yield
        except RuntimeError as error:
            told.append(str(error))
            raise
        if where == "end":
            raise RuntimeError("end")

    def closure():
        if where == "closure":
            raise RuntimeError("closure")
        module(torch.ones(1, 2)).sum().backward()

    update, rates = UpdateInStep(around), times(0.5)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.optimizers = [optimizer]
    update.attach(trainer)
    rates.attach(trainer)
    with pytest.raises(RuntimeError, match="out of memory" if where == "update" else where):
        optimizer.step(closure)
    assert bool(told) == (where == "update")
    assert optimizer.param_groups[0]["lr"] == 0.1
    update.detach()
    rates.detach()
    assert "step" not in vars(optimizer)
