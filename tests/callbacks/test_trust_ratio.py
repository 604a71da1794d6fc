"""Trust ratios on a module's own optimizers, against optimizers that have them built in."""

import contextlib
import copy
import csv
import gc
import logging
import math
import pickle
import weakref
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import EMA, LRWarmup, TrustRatio
from lightning_optkit.bridge.scalable_optimizers import of_optimizer
from lightning_optkit.optim import LAMB, LARS
from tests.contracts import assert_resumes, assert_same

BATCHES = 6


class Net(pl.LightningModule):
    """Two layers with BatchNorm between them, tied to a third; its optimizers are given."""

    def __init__(self, *optimizers, scale=lambda batch_idx: 1.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.again = nn.Linear(3, 4)
        self.again.weight = self.net[0].weight
        self.unused = nn.Linear(2, 2)
        self.optimizers_of = optimizers
        self.scale = scale
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            p.data = torch.rand(p.shape, generator=generator) - 0.4

    def loss(self, batch):
        return mse_loss(self.net(batch[0]), batch[1]) + self.again(batch[0]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * self.scale(batch_idx)

    def configure_optimizers(self):
        return [optimizer(self) for optimizer in self.optimizers_of]


LAYERS = ["net.0.weight", "net.3.weight"]  # that have a gradient


def samples(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4 * BATCHES, 3, generator=generator).to(dtype) for _ in range(2)]


def fit(module, *callbacks, epochs=2, **options):
    """Train for two epochs of 6 batches; return the Trainer."""
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False} | options,
    )
    trainer.fit(module, DataLoader(TensorDataset(*samples(dtype)), 4))
    return trainer


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_close(module, other, *, rtol):
    expected = weights(other)
    for name, found in weights(module).items():
        if name != "net.0.bias":  # before BatchNorm: its gradient is rounding, and Adam blows it up
            torch.testing.assert_close(found, expected[name], rtol=rtol, atol=rtol, msg=name)


def split(module):
    """Return the weights of layers and the other parameters, in groups with settings of each."""
    layers = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": layers, "weight_decay": 0.02},
        {"params": others, "weight_decay": 0.01, "lr": 0.07},
    ]


def built_in(groups):
    """Return the same groups as an optimizer with ratios of its own is told them."""
    layers, others = groups
    return [layers, others | {"layerwise": False}]


def sgd(module, **options):
    return torch.optim.SGD(split(module), lr=0.5, **{"momentum": 0.9} | options)


def adamw(module, **options):
    return torch.optim.AdamW(split(module), lr=0.05, eps=1e-6, **options)


# -- against optimizers that have it built in ---------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_with_sgd_it_is_lars(nesterov, foreach):
    options = {"momentum": 0.9, "nesterov": nesterov, "foreach": foreach}
    lars = Net(lambda m: LARS(built_in(split(m)), 0.5, trust_coefficient=0.02, eps=0.0, **options))
    ratio, module = TrustRatio(trust_coefficient=0.02), Net(lambda m: sgd(m, **options))
    fit(lars, precision="64-true")
    trainer = fit(module, ratio, precision="64-true")
    assert_close(module, lars, rtol=1e-13)
    (optimizer,) = lars.trainer.optimizers
    ratios = optimizer.last_trust_ratios()[: len(LAYERS)]
    assert list(ratio.last_trust_ratios) == LAYERS
    assert list(ratio.last_trust_ratios.values()) == pytest.approx(ratios.tolist(), rel=1e-12)
    assert [g["weight_decay"] for g in trainer.optimizers[0].param_groups] == [0.02, 0.01]


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_with_adamw_it_is_lamb(precision):
    lamb = Net(lambda m: LAMB(built_in(split(m)), 0.05, eps=1e-6))
    ratio, module = TrustRatio(), Net(adamw)
    fit(lamb, precision=precision)
    fit(module, ratio, precision=precision)
    # An update is a difference of weights, which are rounded: 12 times, to 1.2e-7 of a length whose
    # 0.05th part it is.
    rtol = 1e-11 if precision == "64-true" else 12 * 1.2e-7 / 0.05
    assert_close(module, lamb, rtol=rtol)
    ratios = lamb.trainer.optimizers[0].last_trust_ratios()[: len(LAYERS)]
    assert list(ratio.last_trust_ratios.values()) == pytest.approx(ratios.tolist(), rel=30 * rtol)


@pytest.mark.parametrize("comes_first", ["warmup", "ratios"])
def test_the_rate_is_that_of_the_step(comes_first):
    lamb = Net(lambda m: LAMB(built_in(split(m)), 0.05, eps=1e-6))
    module = Net(adamw)
    fit(lamb, LRWarmup(steps=7), precision="64-true")
    callbacks = [LRWarmup(steps=7), TrustRatio()]
    fit(module, *callbacks[:: 1 if comes_first == "warmup" else -1], precision="64-true")
    assert_close(module, lamb, rtol=1e-11)


# -- one step by hand --------------------------------------------------------------------------


def attached(callback, module, *optimizers, **options):
    """Start the callback as at the start of training, without training."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.strategy.optimizers = list(optimizers)
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    return trainer


def with_gradients(module):
    module.loss([part[:4] for part in samples()]).backward()
    return module


def norm(tensor):
    return float(tensor.detach().double().norm())


@pytest.mark.parametrize("max_ratio", [None, 0.03])
@pytest.mark.parametrize("of", ["gradient", "update"])
def test_a_step_in_closed_form(of, max_ratio):
    module = with_gradients(Net())
    before = weights(module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if "un" not in name}
    ratio = TrustRatio(of, 0.05, max_ratio=max_ratio)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.25, weight_decay=0.5)
    attached(ratio, module, optimizer)
    assert ratio.last_trust_ratios == {}
    optimizer.step()
    assert list(ratio.last_trust_ratios) == LAYERS
    for name, p in module.named_parameters():
        if name not in gradients:
            assert torch.equal(p, before[name])
            continue
        w, g = before[name], gradients[name]
        length = norm(g) + 0.5 * norm(w) if of == "gradient" else norm(g + 0.5 * w)
        expected = min(0.05 * norm(w) / length, max_ratio or math.inf) if name in LAYERS else 1.0
        assert ratio.last_trust_ratios.get(name, 1.0) == pytest.approx(expected, rel=1e-5)
        step = w - 0.25 * expected * (g + 0.5 * w)
        torch.testing.assert_close(p.detach(), step, rtol=1e-5, atol=1e-6)
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, LAYERS),
        ({"where": ["net.0.*"]}, ["net.0.weight"]),
        ({"where": ["net.3.*", "*.0.*"]}, LAYERS),
        ({"where": ["net.1.*"], "exclude_norm_and_bias": False}, ["net.1.weight", "net.1.bias"]),
    ],
)
def test_what_is_a_layer(options, layers):
    module = with_gradients(Net())
    ratio, optimizer = TrustRatio(**options), torch.optim.Adam(module.parameters())
    attached(ratio, module, optimizer)
    optimizer.step()
    assert list(ratio.last_trust_ratios) == layers


@pytest.mark.parametrize("of", ["gradient", "update"])
def test_where_a_norm_is_zero_the_step_is_the_optimizers(of):
    results = []
    for callback in (None, TrustRatio(of)):
        module = with_gradients(Net())
        with torch.no_grad():
            module.net[0].weight.zero_()
            module.net[3].weight.grad.zero_()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.25)
        if callback is not None:
            attached(callback, module, optimizer)
        optimizer.step()
        results.append(weights(module))
    assert_same(*results)
    assert callback.last_trust_ratios == dict.fromkeys(LAYERS, 1.0)


def test_optimizers_are_told_apart_and_each_is_scaled_in_its_way(caplog):
    module = with_gradients(Net())
    first = torch.optim.SGD(module.net[0].parameters(), lr=0.25)
    second = torch.optim.RMSprop(module.net[3].parameters(), lr=0.25)
    ratio = TrustRatio()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        attached(ratio, module, first, second)
    assert caplog.messages[-2:] == [
        "TrustRatio: gradients of SGD scaled by layer in 1 of 2 parameters, coefficient 0.001",
        "TrustRatio: updates of RMSprop scaled by layer in 1 of 2 parameters, coefficient 1",
    ]
    for optimizer, layer, coefficient in ((first, 0, 0.001), (second, 3, 1.0)):
        before = module.net[layer].weight.detach().clone()
        gradient = module.net[layer].weight.grad
        optimizer.step()
        moved = norm(before - module.net[layer].weight)
        assert moved == pytest.approx(0.25 * coefficient * norm(before), rel=1e-4)
        if layer == 0:
            expected = coefficient * norm(before) / norm(gradient)
            assert ratio.last_trust_ratios == {LAYERS[0]: pytest.approx(expected, rel=1e-5)}
    assert list(ratio.last_trust_ratios) == LAYERS


def test_only_the_optimizers_that_are_named():
    module = with_gradients(Net())
    first = torch.optim.LBFGS(module.net[0].parameters())  # would be refused
    second = torch.optim.SGD(module.net[3].parameters(), lr=0.25)
    ratio = TrustRatio(optimizers=[1])
    attached(ratio, module, first, second)
    assert "step" not in vars(first)
    second.step()
    assert list(ratio.last_trust_ratios) == LAYERS[1:]


def test_a_closure_runs_with_what_is_the_users():
    module = Net()
    optimizer = sgd(module)
    ratio = TrustRatio()
    attached(ratio, module, optimizer)
    found = []

    def closure():
        optimizer.zero_grad()
        with_gradients(module)
        found.append([group["weight_decay"] for group in optimizer.param_groups])
        return 7.0

    for _ in range(3):
        assert optimizer.step(closure) == 7.0
    assert found == [[0.02, 0.01]] * 3
    plain = Net()
    again = sgd(plain)
    attached(TrustRatio(), plain, again)
    for _ in range(3):
        again.zero_grad()
        with_gradients(plain)
        again.step()
    assert_same(weights(module), weights(plain))


class Fails(torch.optim.SGD):
    """Raises after the update of its first group."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        groups = self.param_groups
        self.param_groups = groups[:1]
        try:
            super().step()
        finally:
            self.param_groups = groups
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("of", ["gradient", "update"])
def test_an_update_that_fails_leaves_everything_as_the_optimizer_did(of):
    module = Net()
    optimizer = Fails(split(module), lr=0.5)
    ratio = TrustRatio(of)
    attached(ratio, module, optimizer)
    mine = []

    def closure():
        with_gradients(module)
        mine.extend((p, p.grad, p.grad.clone()) for p in module.net.parameters())

    before = weights(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.01]
    for p, gradient, values in mine:
        assert p.grad is gradient
        assert torch.equal(gradient, values)
    if of == "update":
        for name in LAYERS:
            p = module.get_parameter(name)
            expected = before[name] - 0.5 * (p.grad + 0.02 * before[name])
            torch.testing.assert_close(p.detach(), expected)
    assert ratio.last_trust_ratios == {}


class NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor, which would wait for its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func), "a tensor is read"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_step_reads_no_tensor(kind):
    module = with_gradients(Net())
    optimizer = kind(split(module), lr=0.1)
    ratio = TrustRatio(max_ratio=5.0)
    attached(ratio, module, optimizer)
    with NoReads():
        optimizer.step()
        with pytest.raises(AssertionError, match="a tensor is read"):
            float(module.net[0].weight[0, 0])
    assert list(ratio.last_trust_ratios) == LAYERS


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_on_a_gpu_a_step_waits_for_nothing_and_is_that_of_the_cpu(optimizer):
    results = []
    for device in ("cpu", "cuda"):
        module = with_gradients(Net())
        gradients = [None if p.grad is None else p.grad.to(device) for p in module.parameters()]
        module.to(device)
        for p, gradient in zip(module.parameters(), gradients, strict=True):
            p.grad = gradient
        made, ratio = optimizer(module), TrustRatio()
        attached(ratio, module, made)
        made.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(([p.detach().cpu() for p in module.parameters()], ratio.last_trust_ratios))
    (on_cpu, of_cpu), (on_gpu, of_gpu) = results
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)
    assert of_gpu == pytest.approx(of_cpu, rel=1e-3)


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("classifier", {}),
        ("classifier", {"accumulate_grad_batches": 2}),
        ("classifier", {"precision": "bf16-mixed"}),
        ("gan", {}),
    ],
    ids=str,
)
def test_training_interrupted_and_resumed_equals_training_that_was_not(module, options, tmp_path):
    ratio = assert_resumes(lambda: TrustRatio(trust_coefficient=0.1), module, tmp_path, **options)
    num_layers = {"classifier": 2, "gan": 4}[module]
    assert len(ratio.last_trust_ratios) == num_layers
    saved = torch.load(tmp_path / "mid-epoch.ckpt", weights_only=True)
    assert not any("TrustRatio" in key for key in saved["callbacks"])  # and nothing elsewhere
    for state, kind in zip(saved["optimizer_states"], saved["optimizer_states"], strict=True):
        assert all(group["weight_decay"] == 0 for group in state["param_groups"])
        assert kind["state"]


def amp(**options):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} | options


@pytest.mark.parametrize(
    ("of", "optimizer"),
    [
        ("gradient", sgd),
        ("update", lambda m: sgd(m, fused=True)),
        ("update", lambda m: adamw(m, fused=True)),
    ],
)
def test_steps_that_the_scaler_skips_move_nothing(of, optimizer):
    moved, before = [], {}

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            before.update(weights(pl_module))

        def on_train_batch_end(self, trainer, pl_module, *_):
            now = weights(pl_module)
            moved.append([not torch.equal(before[name], now[name]) for name in LAYERS])

    overflows = Net(optimizer, scale=lambda i: torch.inf if i in (1, 4) else 1.0)
    ratio = TrustRatio(of)
    fit(overflows, ratio, Looks(), **amp())
    assert moved == 2 * [[i not in (1, 4)] * 2 for i in range(BATCHES)]
    assert all(0 < value < 100 for value in ratio.last_trust_ratios.values())


def test_the_scale_of_the_scaler_does_not_enter_the_ratios():
    ratios = []
    for scale in (1.0, 2.0**10):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        ratio = TrustRatio()
        fit(Net(sgd), ratio, epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        ratios.append(ratio.last_trust_ratios)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-2)  # half precision


class Manual(Net):
    """Manual optimization by a closure, with a scaler or without."""

    def __init__(self, *optimizers, scaler=None):
        super().__init__(*optimizers)
        self.automatic_optimization = False
        self.scaler = scaler

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.scaler is None:
            optimizer.step(closure=lambda: self.manual_backward(self.loss(batch)))
            return
        self.scaler.scale(self.loss(batch)).backward()
        self.scaler.step(optimizer.optimizer)
        self.scaler.update()


def test_manual_optimization_by_a_closure_is_automatic_optimization():
    manual, automatic = Manual(sgd), Net(sgd)
    fit(manual, TrustRatio())
    fit(automatic, TrustRatio())
    assert_same(weights(manual), weights(automatic))


def test_a_scaler_of_the_users_own_with_a_fused_optimizer_is_refused_before_it_steps():
    module = Manual(lambda m: sgd(m, fused=True), scaler=torch.amp.GradScaler("cpu"))
    before = weights(module)
    with pytest.raises(ValueError, match=r"of SGD must be unscaled .* `fused=False`"):
        fit(module, TrustRatio())
    assert_same(weights(module), before)


def test_an_average_takes_the_scaled_weights():
    class Notes(pl.Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.steps.append(weights(pl_module))

    ema, notes = EMA(0.5, warmup=False), Notes()
    module = Net(sgd)
    lars = Net(lambda m: LARS(built_in(split(m)), 0.5, eps=0.0))
    fit(module, ema, TrustRatio(), notes, epochs=1)
    fit(lars, last := Notes(), epochs=1)
    assert_same(notes.steps, last.steps)
    average = notes.steps[0]
    for step in notes.steps[1:]:
        average = {name: 0.5 * w + 0.5 * step[name] for name, w in average.items()}
    for name, found in weights(module).items():
        torch.testing.assert_close(found, average[name])


def test_layers_that_are_unfrozen_in_training_are_scaled():
    class Finetuning(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.5)

    def head(module):
        return torch.optim.SGD(module.net[3].parameters(), lr=0.1)

    ratio = TrustRatio()
    fit(Net(head), Finetuning(), ratio, epochs=1)
    assert list(ratio.last_trust_ratios) == LAYERS[1:]
    fit(Net(head), Finetuning(), ratio, epochs=2)
    assert list(ratio.last_trust_ratios) == LAYERS[1:] + LAYERS[:1]


def test_a_second_fit_starts_anew_and_nothing_stays_behind():
    ratio, module, other = TrustRatio(), Net(sgd), Net(sgd)
    trainer = fit(module, ratio)
    (optimizer,) = trainer.optimizers
    assert "step" not in vars(optimizer)
    first = ratio.last_trust_ratios
    del ratio.log, ratio.log_dict  # Lightning's, of the module
    assert pickle.loads(pickle.dumps(ratio)).last_trust_ratios == first
    assert copy.deepcopy(ratio).last_trust_ratios == first
    fit(other, ratio)
    assert ratio.last_trust_ratios == first
    assert_same(weights(module), weights(other))
    with pytest.raises(MisconfigurationException):
        fit(Net(lambda m: torch.optim.LBFGS(m.parameters())), ratio)
    assert ratio.last_trust_ratios == {}


def test_nothing_keeps_the_module_alive():
    ratio, module = TrustRatio(), Net(sgd)
    fit(module, ratio, epochs=1)
    del ratio.log, ratio.log_dict
    weight = weakref.ref(module.net[0].weight)
    del module
    gc.collect()
    assert weight() is None
    assert list(ratio.last_trust_ratios) == LAYERS


def test_an_error_in_training_leaves_the_optimizer():
    class Raises(pl.Callback):
        def on_train_batch_end(self, *_):
            raise KeyError

    module = Net(sgd)
    with contextlib.suppress(KeyError):
        fit(module, Raises(), TrustRatio())
    assert "step" not in vars(module.trainer.optimizers[0])


# -- what is logged ----------------------------------------------------------------------------


def logged(folder):
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_ratios_are_logged_whenever_the_trainer_logs(tmp_path):
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(list(ratio.last_trust_ratios.values()))

    ratio = TrustRatio(name="net")
    loggers = [
        CSVLogger(tmp_path, "csv", version=0),
        TensorBoardLogger(tmp_path, "tb", version=0),
    ]
    trainer = fit(Net(sgd), ratio, Notes(), logger=loggers, log_every_n_steps=4)
    rows = [row for row in logged(tmp_path) if row["optkit-trust-net/mean"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    for row in rows:
        values = torch.tensor(seen[int(row["step"])])
        for name in ("mean", "min", "max"):
            expected = float(getattr(values, name)())
            assert float(row[f"optkit-trust-net/{name}"]) == pytest.approx(expected, rel=1e-6)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    found = events.Tensors("optkit-trust-net/trust_ratios")
    assert [event.step for event in found] == [3, 7, 11]
    assert list(found[-1].tensor_proto.float_val) == pytest.approx(seen[-1]) or (
        torch.frombuffer(
            bytearray(found[-1].tensor_proto.tensor_content), dtype=torch.float32
        ).tolist()
        == pytest.approx(seen[-1])
    )
    names = events.Tensors("optkit-trust-net/layer_names")[0].tensor_proto.string_val
    assert [name.decode() for name in names] == LAYERS
    assert "optkit-trust-net/max" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "steps"), [({"log": True}, [0, 1, 2, 3]), ({"log": False}, [])], ids=str
)
def test_each_step_is_logged_once_under_accumulation_or_not_at_all(options, steps, tmp_path):
    logger = CSVLogger(tmp_path, "csv", version=0)
    trainer = fit(
        Net(sgd), TrustRatio(**options), logger=logger, log_every_n_steps=1,
        accumulate_grad_batches=3,
    )  # fmt: skip
    found = trainer.callback_metrics.keys()
    assert ("optkit-trust/mean" in found) == bool(steps)
    if steps:
        assert [int(row["step"]) for row in logged(tmp_path)] == steps


def test_a_batch_without_a_step_has_no_ratios(tmp_path):
    class EverySecond(Manual):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, "csv", version=0)
    fit(EverySecond(sgd), TrustRatio(), epochs=1, logger=logger, log_every_n_steps=1)
    assert [int(row["step"]) for row in logged(tmp_path)] == [0, 2, 4]


def test_where_no_layer_has_a_gradient_nothing_is_logged():
    class Head(Net):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

    def untrained(module):
        return torch.optim.SGD([module.unused.weight, *module.net[1].parameters()], lr=0.1)

    ratio = TrustRatio()
    trainer = fit(Head(untrained), ratio, log_every_n_steps=1)
    assert ratio.last_trust_ratios == {}
    assert not any(key.startswith("optkit") for key in trainer.callback_metrics)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"of": "gradients"}, ValueError, "`of` must be 'auto', 'gradient' or 'update', got 'grad"),
        ({"trust_coefficient": 0}, ValueError, "`trust_coefficient` must be a positive .* got 0"),
        ({"trust_coefficient": True}, ValueError, "`trust_coefficient` must be .* got True"),
        ({"max_ratio": math.inf}, ValueError, "`max_ratio` must be a positive number, got inf"),
        ({"max_ratio": "10"}, ValueError, "`max_ratio` must be a positive number, got '10'"),
        ({"where": "net.*"}, ValueError, r"`where` must be a list of glob patterns .* 'net\.\*'"),
        ({"where": []}, ValueError, r"`where` must be a list of glob patterns .* got \[\]"),
        ({"where": [1]}, ValueError, r"`where` must be a list of glob patterns .* got \[1\]"),
        ({"exclude_norm_and_bias": 1}, TypeError, "`exclude_norm_and_bias` must be True or False"),
        ({"log": "yes"}, TypeError, "`log` must be True or False, got 'yes'"),
        ({"optimizers": [0, 0]}, ValueError, r"`optimizers` must be an index or .* got \[0, 0\]"),
        ({"optimizers": []}, ValueError, "`optimizers` must be an index"),
        ({"optimizers": [True]}, ValueError, "`optimizers` must be an index"),
        ({"optimizers": [-1]}, ValueError, "`optimizers` must be an index"),
        ({"name": "My net"}, ValueError, "`name` must be snake_case, .* got 'My net'"),
        ({"name": ""}, ValueError, "`name` must be snake_case"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TrustRatio(**options)


class Lookalike(torch.optim.Optimizer):
    """Of another library: what it does with its settings is not known."""

    def __init__(self, params, **defaults):
        super().__init__(params, {"lr": 0.1} | defaults)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


class FusedLAMB(Lookalike):
    """As one of Apex is called."""


def without_rate(module):
    optimizer = Lookalike(module.parameters())
    del optimizer.param_groups[0]["lr"]
    return optimizer


@pytest.mark.parametrize(
    ("options", "optimizer", "message"),
    [
        ({}, torch.optim.LBFGS, r"Optimizer 0 \(LBFGS\) must make one update a step"),
        ({}, lambda p: LARS(p, 0.1), r"\(LARS\) must not scale its layers itself"),
        ({}, LAMB, r"\(LAMB\) must not scale its layers itself"),
        ({}, FusedLAMB, r"\(FusedLAMB\) must not scale its layers itself"),
        ({}, torch.optim.Adafactor, r"\(Adafactor\) must not scale its layers itself"),
        ({"of": "gradient"}, torch.optim.AdamW, r"\(AdamW\) must be linear .* `of='update'`"),
        (
            {"of": "gradient"},
            torch.optim.Rprop,
            r"\(Rprop\) must be linear .* nothing would change",
        ),
        (
            {"of": "gradient"},
            lambda p: Lookalike(p, betas=(0.9, 0.99)),
            r"\(Lookalike\) must be linear in the gradient",
        ),
        (
            {"of": "gradient"},
            lambda p: Lookalike(p, weight_decay=0.1),
            r"\(Lookalike\) must have no weight decay",
        ),
        ({"optimizers": [1]}, torch.optim.SGD, r"`optimizers` must be indices below 1, .* \[1\]"),
        ({"where": ["body.*"]}, torch.optim.SGD, r"`where` must match .* 'body\.\*', .* net\.0\.w"),
        ({"where": ["net.*", "b"]}, torch.optim.SGD, "`where` must match names .*, got 'b', which"),
        ({"where": ["net.1.*"]}, torch.optim.SGD, "`TrustRatio` must find a layer to scale"),
    ],
)
def test_what_cannot_be_scaled_is_refused_before_the_first_step(options, optimizer, message):
    module = Net()
    made = optimizer(module.parameters())
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        attached(TrustRatio(**options), module, made)
    assert "step" not in vars(made)


def test_updates_without_a_rate_are_refused_but_gradients_are_not():
    module = with_gradients(Net())
    with pytest.raises(MisconfigurationException, match='one has no "lr"'):
        attached(TrustRatio(), module, without_rate(module))
    optimizer = Lookalike(module.net.parameters())
    ratio = TrustRatio("gradient")
    attached(ratio, module, optimizer)
    optimizer.step()
    assert list(ratio.last_trust_ratios) == LAYERS


def test_what_is_linear_in_the_gradient():
    class Subclass(torch.optim.SGD):
        pass

    parameters = [nn.Parameter(torch.ones(2, 2))]
    assert of_optimizer(Subclass(parameters, lr=0.1), "auto") == "gradient"
    assert of_optimizer(torch.optim.ASGD(parameters), "auto") == "update"
    module = with_gradients(Net())
    optimizer = torch.optim.ASGD(module.parameters(), lr=0.1, weight_decay=0.1)
    ratio = TrustRatio("gradient")
    attached(ratio, module, optimizer)
    optimizer.step()
    assert list(ratio.last_trust_ratios) == LAYERS


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "a real, dense .* got a complex one"),
        (lambda: nn.Embedding(3, 2, sparse=True), "a real, dense .* one with sparse gradients"),
        (lambda: nn.EmbeddingBag(3, 2, sparse=True), "a real, dense .* one with sparse gradients"),
        (lambda: nn.LazyLinear(2), "a shape before training, got a lazy parameter"),
    ],
)
def test_parameters_without_a_norm_to_go_by_are_refused(layer, message):
    module = Net()
    module.odd = layer()
    optimizers = torch.optim.SGD(module.net.parameters()), torch.optim.SGD(module.odd.parameters())
    with pytest.raises(MisconfigurationException, match=f"`odd.weight` must (be|have) {message}"):
        attached(TrustRatio(), module, *optimizers)
    if "lazy" not in message:
        attached(TrustRatio(where=["net.*"]), module, *optimizers)
        attached(TrustRatio(optimizers=[0]), module, *optimizers)


@pytest.mark.parametrize(
    ("options", "fused", "refused"),
    [({}, True, True), ({}, False, False), ({"of": "update"}, True, False)],
)
def test_a_fused_optimizer_under_a_scaler_has_no_gradients_to_scale(options, fused, refused):
    module = Net()
    optimizer = sgd(module, fused=fused)
    expected = pytest.raises(MisconfigurationException, match="must leave unscaling to the gradi")
    with expected if refused else contextlib.nullcontext():
        attached(TrustRatio(**options), module, optimizer, **amp())


def test_strategies_that_hide_parameters_are_refused():
    trainer = SimpleNamespace(strategy=object.__new__(FSDPStrategy))
    with pytest.raises(MisconfigurationException, match="`TrustRatio` needs whole parameters"):
        TrustRatio().on_train_start(trainer, Net())


def test_two_for_one_optimizer_or_of_one_name_are_refused():
    def two(first, second):
        module = Net()
        optimizers = [torch.optim.SGD(module.net[k].parameters(), lr=0.1) for k in (0, 3)]
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, callbacks=[first, second], enable_checkpointing=False
        )
        trainer.strategy.optimizers = optimizers
        for each in (first, second):
            each.on_train_start(trainer, module)

    two(TrustRatio(optimizers=[0]), TrustRatio(optimizers=[1], name="head"))
    with pytest.raises(MisconfigurationException, match=r"must be different, got \[1\] in both"):
        two(TrustRatio(), TrustRatio(optimizers=[1], name="head"))
    with pytest.raises(MisconfigurationException, match="`name` of two `TrustRatio` must be diff"):
        two(TrustRatio(optimizers=[0]), TrustRatio(optimizers=[1]))
