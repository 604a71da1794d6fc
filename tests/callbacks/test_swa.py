"""SWA in a real Trainer."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from lightning_optkit import SWA
from lightning_optkit.board import tags
from lightning_optkit.bridge import statistics_pass
from lightning_optkit.bridge.averaging import span
from tests.callbacks.averaging_modules import (
    BATCHES,
    AdversarialNet,
    MadeInConfigureModel,
    MadeInSetup,
    Net,
    Odd,
    Raises,
    Snapshots,
    StopsAfter,
    Stream,
    assert_close,
    data,
    differs,
    fit,
    initialised,
    mean_of,
    samples,
    trainer_of,
    warned,
    weights_of,
)
from tests.contracts import assert_resumes, assert_same, rng_state, run
from tests.modules import DictImages

STAGES = ("validate", "test", "predict")


def epochs_of(snapshots, epochs):
    return [snapshots.by_epoch[e] for e in epochs]


def steps_of(snapshots, steps):
    return [snapshots.by_step[s] for s in steps]


# -- which models are averaged -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"start": 2}, [2, 3, 4, 5]),
        ({"start": 0}, [0, 1, 2, 3, 4, 5]),
        ({"start": 0.0}, [0, 1, 2, 3, 4, 5]),
        ({"start": 0.5}, [3, 4, 5]),
        ({"start": 0.75}, [4, 5]),
        ({"start": "5ep"}, [5]),
        ({"start": "9st"}, [1, 2, 3, 4, 5]),
        ({"start": "12st"}, [2, 3, 4, 5]),
        ({"start": 1, "every_n_epochs": 2}, [1, 3, 5]),
        ({"start": 2, "every_n_epochs": 2}, [2, 4]),
        ({"start": 0, "lr": 0.01, "cycle": 2}, [1, 3, 5]),
        ({"start": 1, "lr": 0.01, "cycle": 1, "every_n_epochs": 2}, [1, 3, 5]),
        ({"start": "9st", "lr": 0.01, "cycle": 2}, [3, 5]),  # cycles begin with epochs
    ],
    ids=str,
)
def test_the_average_is_the_mean_of_the_epochs_from_start_to_the_last(options, epochs):
    swa, snapshots, module = SWA(**options), Snapshots(), Net()
    fit(module, swa, snapshots, epochs=6, precision="64-true")
    expected = mean_of(epochs_of(snapshots, epochs))
    assert swa.num_averaged == len(epochs)
    assert_close(weights_of(module), expected, atol=1e-12)
    others = [e for e in range(6) if e not in epochs]
    for other in others:  # one more or one less would be seen
        with_it = mean_of(epochs_of(snapshots, [*epochs, other]))
        assert max((expected[n] - with_it[n]).abs().max() for n in expected) > 1e-6
    assert swa.summary.endswith(f", {span('epoch', epochs[0], epochs[-1])}")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"start": 2, "every_n_steps": 1}, list(range(12, 18))),
        ({"start": "9st", "every_n_steps": 3}, [9, 12, 15]),
        ({"start": "17st", "every_n_steps": 5}, [17]),
        ({"start": 0.5, "every_n_steps": 4}, [6, 10, 14]),  # in the epoch that reaches one half
    ],
    ids=str,
)
def test_the_average_is_the_mean_of_the_steps_from_start_on(options, steps):
    swa, snapshots, module = SWA(**options), Snapshots(), Net()
    fit(module, swa, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(steps_of(snapshots, steps)), atol=1e-12)
    assert swa.num_averaged == len(steps)
    assert swa.summary.endswith(f", {span('step', steps[0] + 1, steps[-1] + 1)}")


def test_steps_are_optimizer_steps_under_accumulation():
    swa, snapshots, module = SWA(start=1, every_n_steps=2), Snapshots(), Net()
    fit(module, swa, snapshots, precision="64-true", accumulate_grad_batches=2)
    steps = [7, 11, 15]  # batches that end steps 3, 5, 7 of steps 0 to 8, counted from epoch 1
    assert_close(weights_of(module), mean_of(steps_of(snapshots, steps)), atol=1e-12)


def test_polynomial_averaging_weighs_a_model_by_its_rising_factorial():
    swa, snapshots, module = SWA(start=1, average="polynomial"), Snapshots(), Net()
    fit(module, swa, snapshots, epochs=6, precision="64-true")
    weights = [t * (t + 1) * (t + 2) for t in range(1, 6)]  # Γ(t + η) / Γ(t), η = 3
    expected = mean_of(snapshots.by_epoch[1:], weights)
    assert_close(weights_of(module), expected, atol=1e-12)


def test_polynomial_averaging_with_power_zero_is_the_mean():
    swa, snapshots, module = SWA(start=1, average="polynomial", eta=0.0), Snapshots(), Net()
    fit(module, swa, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_validation_after_an_epoch_sees_the_average_with_that_epoch_in_it():
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    fit(module, swa, snapshots, epochs=4, precision="64-true")
    assert_close(module.seen["validate"][0], snapshots.by_epoch[0], atol=0)
    for epoch in (1, 2, 3):
        expected = mean_of(snapshots.by_epoch[1 : epoch + 1])
        assert_close(module.seen["validate"][epoch], expected, atol=1e-12)


def test_validation_within_an_epoch_sees_the_average_so_far():
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    fit(module, swa, snapshots, precision="64-true", val_check_interval=3)
    seen = module.seen["validate"]
    assert len(seen) == 6
    assert_close(seen[4], mean_of([snapshots.by_epoch[1]]), atol=1e-12)  # in epoch 2
    assert_close(seen[5], mean_of(snapshots.by_epoch[1:]), atol=1e-12)


@pytest.mark.parametrize("val", [True, False], ids=["validated", "not validated"])
def test_the_last_epoch_enters_where_nothing_is_validated(val):
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    fit(module, swa, snapshots, val=val, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


# -- how runs end ------------------------------------------------------------------------------


def test_it_finishes_on_early_stopping():
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    stopping = pl.callbacks.EarlyStopping("val_loss", min_delta=1e9, patience=2)
    fit(module, swa, snapshots, stopping, epochs=20, precision="64-true")
    assert len(snapshots.by_epoch) == 3
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"epochs": -1}], ids=["max_epochs", "no end of epochs"])
def test_it_finishes_on_max_steps_within_an_epoch(options):
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    fit(module, swa, snapshots, max_steps=15, precision="64-true", **options)
    assert len(snapshots.by_epoch) == 3
    assert_close(snapshots.by_epoch[2], snapshots.by_step[14], atol=0)
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_a_share_of_a_run_of_steps_alone_begins_in_the_epoch_that_reaches_it():
    swa, snapshots, module = SWA(start=0.5), Snapshots(), Net()
    fit(module, swa, snapshots, epochs=-1, max_steps=18, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_a_run_of_one_epoch_gives_its_weights():
    swa, snapshots, module = SWA(), Snapshots(), Net()
    fit(module, swa, snapshots, epochs=1, precision="64-true")
    assert swa.num_averaged == 1
    assert_close(weights_of(module), snapshots.at_end, atol=0)


def test_a_run_that_ends_before_start_keeps_its_trained_weights_and_says_so():
    swa, snapshots, module = SWA(start=10), Snapshots(), Net()
    with warned("`SWA` averaged nothing, and .* its trained weights: training ended before"):
        fit(module, swa, snapshots, StopsAfter(2), epochs=20)
    assert_close(weights_of(module), snapshots.at_end, atol=0)
    assert differs(weights_of(module), weights_of(initialised(Net())))
    assert swa.num_averaged == 0
    assert swa.summary == "SWA: nothing averaged"


def test_max_time_alone_needs_a_start_in_epochs_or_steps():
    with pytest.raises(MisconfigurationException, match="`start` must be an epoch or a step where"):
        fit(Net(), SWA(start=0.75), epochs=-1, max_time="00:00:00:30")
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    fit(module, swa, snapshots, StopsAfter(3), epochs=-1, max_time="00:00:00:30")
    assert swa.num_averaged == 2


def test_fast_dev_run():
    swa, snapshots, module = SWA(), Snapshots(), Net(norm=True)
    fit(module, swa, snapshots, fast_dev_run=True)
    assert swa.num_averaged == 1


def test_a_callback_object_is_as_new_in_another_run():
    reused = SWA(start=1)
    fit(Net(), reused, epochs=5)
    first, second = Net(norm=True), Net(norm=True)
    fresh = SWA(start=1)
    fit(first, reused)
    fit(second, fresh)
    assert_same(weights_of(second), weights_of(first))
    assert_same(fresh.state_dict(), reused.state_dict())


def test_a_second_fit_of_the_same_trainer_counts_anew():
    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    trainer = fit(module, swa, snapshots, precision="64-true")
    averaged = weights_of(module)
    snapshots.by_epoch.clear()
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, data(dtype=torch.float64), data(dtype=torch.float64))
    assert len(snapshots.by_epoch) == 3  # epochs 3 to 5
    assert_close(weights_of(module), mean_of(snapshots.by_epoch), atol=1e-12)
    assert differs(averaged, weights_of(module))


# -- training itself ---------------------------------------------------------------------------


class AtTrainEnd(pl.Callback):
    """Notes what training leaves before anything is handed over."""

    def on_train_end(self, trainer, pl_module):
        self.found = {
            "weights": weights_of(pl_module),
            "gradients": [p.grad.clone() for p in pl_module.parameters() if p.grad is not None],
            "optimizers": [o.state_dict() for o in trainer.optimizers],
            "rng": rng_state(),
            "num_training_steps": pl_module.num_training_steps,
            "training": [m.training for m in pl_module.modules()],
            "global_step": trainer.global_step,
            "metrics": {
                k: v
                for k, v in trainer.callback_metrics.items()
                if not k.startswith(("optkit", "val"))
            },
        }


@pytest.mark.parametrize("refresh", [True, "layerwise", 2, False])
@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["each epoch", "twice an epoch"])
def test_training_is_bit_identical_with_validation_on_the_average(refresh, interval):
    found, by_step = [], []
    for swa in ([], [SWA(start=1, refresh_norm_stats=refresh)]):
        pl.seed_everything(7, verbose=False)
        at_end, snapshots = AtTrainEnd(), Snapshots()
        loader = data(shuffle=True)
        fit(
            Net(norm=True), *swa, at_end, snapshots, loader=loader, epochs=4,
            val_check_interval=interval,
        )  # fmt: skip
        found.append(at_end.found)
        by_step.append(snapshots.by_step)
    assert_same(found[0], found[1])
    assert_same(by_step[0], by_step[1])


@pytest.mark.parametrize("module_name", ["classifier", "gan", "autoencoder"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_only_keeps_the_average_leaves_no_trace(module_name, precision, tmp_path):
    swa = SWA(start=0, use_for=(), refresh_norm_stats=True)
    without = run(module_name, [], tmp_path / "without", precision=precision)
    with_it = run(module_name, [swa], tmp_path / "with", precision=precision)
    assert_same(without, with_it)
    assert swa.num_averaged == 2
    assert bool(swa._statistics._num_samples) is (module_name == "classifier")


# -- the learning rate -------------------------------------------------------------------------


class Recording(torch.optim.SGD):
    """Notes the rates that it steps with."""

    used: list  # set by the test

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.used.append([group["lr"] for group in self.param_groups])
        super().step()
        return loss


def recording(module):
    groups = [{"params": module.net[0].parameters()}, {"params": module.net[2].parameters()}]
    groups[1]["lr"] = 0.2
    optimizer = Recording(groups, lr=0.1)
    optimizer.used = module.used = []
    return optimizer


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, 40)


def scheduled_rates(num_steps=4 * BATCHES):
    return [
        [lr * (1 + math.cos(math.pi * t / 40)) / 2 for lr in (0.1, 0.2)] for t in range(num_steps)
    ]


@pytest.mark.parametrize("anneal_epochs", [2, 1.5, 0])
@pytest.mark.parametrize("lr", [0.05, [0.05, 0.4]], ids=str)
def test_the_rate_goes_along_half_a_cosine_to_that_of_the_average(anneal_epochs, lr):
    module = Net(optimizer=recording, scheduler=cosine)
    fit(module, SWA(start=1, lr=lr, anneal_epochs=anneal_epochs), epochs=4)
    to = lr if isinstance(lr, list) else [lr, lr]
    for step, (used, scheduled) in enumerate(zip(module.used, scheduled_rates(), strict=True)):
        t = (step - BATCHES + 1) / BATCHES  # epochs of the phase at the end of this step
        if t <= 0:
            share = 0.0
        elif t >= anneal_epochs:
            share = 1.0
        else:
            share = 0.5 - math.cos(math.pi * t / anneal_epochs) / 2
        expected = [s + share * (goal - s) for s, goal in zip(scheduled, to, strict=True)]
        assert used == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("cycle", [1, 2])
def test_the_rate_falls_along_a_line_in_each_cycle(cycle):
    module = Net(optimizer=recording, scheduler=cosine)
    fit(module, SWA(start=1, lr=0.001, cycle=cycle), epochs=5)
    length = cycle * BATCHES
    for step, (used, scheduled) in enumerate(zip(module.used, scheduled_rates(30), strict=True)):
        in_cycle = (step - BATCHES) % length + 1
        share = 0.0 if step < BATCHES else in_cycle / length
        expected = [s + share * (0.001 - s) for s in scheduled]
        assert used == pytest.approx(expected, rel=1e-12), step


def test_the_schedulers_own_rate_is_clean():
    with_it, without = Snapshots(), Snapshots()
    fit(Net(optimizer=recording, scheduler=cosine), SWA(start=1, lr=0.05), with_it, epochs=4)
    fit(Net(optimizer=recording, scheduler=cosine), without, epochs=4)
    assert with_it.rates == without.rates


def test_without_a_rate_of_its_own_the_users_schedule_is_left_alone():
    module = Net(optimizer=recording, scheduler=cosine)
    fit(module, SWA(start=1), epochs=4)
    for used, scheduled in zip(module.used, scheduled_rates(), strict=True):
        assert used == pytest.approx(scheduled, rel=1e-12)


def test_the_rate_under_accumulation_is_that_at_the_end_of_the_batch_that_steps():
    module = Net(optimizer=recording)
    fit(module, SWA(start=1, lr=0.0, anneal_epochs=2), epochs=3, accumulate_grad_batches=2)
    for step, used in enumerate(module.used):
        t = max((step - 2) / 3, 0.0)
        assert used[0] == pytest.approx(0.1 * (1 + math.cos(math.pi * t / 2)) / 2), step


def rates_of(loader, **options):
    module = Net(optimizer=recording)
    fit(module, SWA(lr=0.0, **options), loader=loader, epochs=4)
    return [used[0] for used in module.used]


@pytest.mark.parametrize("options", [{"anneal_epochs": 2}, {"cycle": 1}, {"cycle": 2}], ids=str)
def test_data_without_a_length_have_that_of_the_epoch_before(options):
    unsized = rates_of(DataLoader(Stream(), batch_size=None), start=1, **options)
    assert unsized == rates_of(data(), start=1, **options)
    assert len(set(unsized)) > BATCHES


def test_the_first_epoch_of_data_without_a_length_has_one_rate():
    rates = rates_of(DataLoader(Stream(), batch_size=None), start=0, anneal_epochs=2)
    assert rates[:BATCHES] == pytest.approx([0.05] * BATCHES, abs=1e-12)
    assert rates[BATCHES:] == rates_of(data(), start=0, anneal_epochs=2)[BATCHES:]


def test_optimizers_are_as_before_once_it_has_gone():
    for swa in (SWA(start=1, lr=0.05), SWA(start=1)):
        trainer = fit(Net(), swa)
        assert "step" not in vars(trainer.optimizers[0])
        assert "lightning_module_state_dict" not in vars(trainer.strategy)


def test_two_optimizers_go_to_rates_of_their_own():
    module = AdversarialNet()
    rates = []

    class Watches(pl.Callback):
        def on_train_batch_end(self, *_):
            rates.append(swa._rate._rule.effective)

    swa = SWA(start=1, lr=[0.5, 0.25], anneal_epochs=0, refresh_norm_stats=False)
    fit(module, swa, Watches(), val=False, epochs=2)
    assert rates == [[[0.01], [0.01]]] * BATCHES + [[[0.5], [0.25]]] * BATCHES


def test_rates_of_another_number_than_groups_are_refused():
    with pytest.raises(MisconfigurationException, match="one for each of the 2 parameter groups"):
        fit(Net(optimizer=recording), SWA(lr=[0.1, 0.2, 0.3]))


# -- norm layers -------------------------------------------------------------------------------


class Deep(Net):
    """Three norm layers, one of them of instances, after one another."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(),
            nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1),
        )  # fmt: skip


def norm_layers(module):
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.BatchNorm1d)]


def statistics_of_one_batch(net, inputs):
    """Return mean and unbiased variance at each layer, settled one after another, in float64."""
    found = {}
    x = inputs.double()
    for name, layer in net.named_children():
        if isinstance(layer, nn.BatchNorm1d):
            mean, var = x.mean(0), x.var(0)
            found[name] = mean, var
            x = (x - mean) / (x.var(0, correction=0) + layer.eps).sqrt()  # as in training
            x = x * layer.weight.double() + layer.bias.double()
        elif isinstance(layer, nn.Linear):
            x = x @ layer.weight.double().T + layer.bias.double()
        else:
            x = layer(x)
    return found


def assert_statistics(net, inputs, *, atol=1e-6):
    expected = statistics_of_one_batch(net, inputs)
    assert expected
    for name, (mean, var) in expected.items():
        layer = net.get_submodule(name)
        assert torch.allclose(layer.running_mean.double(), mean.detach(), rtol=0, atol=atol), name
        assert torch.allclose(layer.running_var.double(), var.detach(), rtol=0, atol=atol), name


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"precision": "64-true"}],
    ids=str,
)
def test_statistics_are_those_of_one_big_batch(options):
    swa, module = SWA(start=1), Net(norm=True)
    fit(module, swa, epochs=3, **options)
    assert_statistics(module.net, samples()[0])
    assert swa.summary.endswith("normalization statistics from 24 samples")
    for weights in module.seen["validate"][1:]:  # each validation saw them too
        assert torch.equal(weights["net.0.running_var"], module.net[0].running_var)


def test_layerwise_statistics_of_a_deep_net_are_those_of_one_big_batch():
    swa, module = SWA(start=1, refresh_norm_stats="layerwise"), Deep()
    fit(module, swa, epochs=3)
    assert_statistics(module.net, samples()[0])


def test_without_a_pass_the_statistics_are_averaged():
    swa, snapshots, module = SWA(start=1, refresh_norm_stats=False), Snapshots(), Net(norm=True)
    fit(module, swa, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_a_pass_over_some_batches_takes_these():
    swa, module = SWA(start=1, refresh_norm_stats=2), Net(norm=True)
    fit(module, swa)
    assert_statistics(module.net, samples()[0][:8])
    assert "from 8 samples" in swa.summary


def test_a_pass_over_limited_training_batches_takes_these():
    swa, module = SWA(start=1), Net(norm=True)
    fit(module, swa, limit_train_batches=3)
    assert_statistics(module.net, samples()[0][:12])


def test_statistics_of_weights_that_are_not_the_average_would_be_others():
    swa, snapshots, module = SWA(start=0, use_for=()), Snapshots(), Deep()
    fit(module, swa, snapshots, epochs=4)
    with swa.averaged(module):
        averaged = weights_of(module)
        assert_statistics(module.net, samples()[0], atol=1e-1)  # batch by batch: near
    assert_close(weights_of(module), snapshots.at_end, atol=0)
    assert differs(averaged, snapshots.at_end)


def test_statistics_of_iterable_data():
    swa, module = SWA(start=1), Net(norm=True)
    fit(module, swa, loader=DataLoader(Stream(), batch_size=None))
    assert_statistics(module.net, samples()[0])


class DictNet(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(36), nn.Linear(36, 1))

    def loss(self, batch):
        return self.net(batch["image"].flatten(1)).square().mean()


def test_statistics_of_dict_batches():
    swa, module = SWA(start=1), DictNet()
    fit(module, swa, loader=DataLoader(DictImages(), 8), val=False)
    assert_statistics(module.net, DictImages().x.flatten(1))


def test_statistics_of_manual_optimization_with_norm_layers_in_both_nets():
    swa, module = SWA(start=1), AdversarialNet()
    trainer = fit(module, swa, val=False)
    assert module.calls == 3 * BATCHES
    assert trainer.global_step == 2 * 3 * BATCHES
    x = samples()[0].double()
    hidden = nn.functional.linear(x, module.maker[0].weight.double(), module.maker[0].bias.double())
    layer = module.maker[1]
    assert torch.allclose(layer.running_mean.double(), hidden.mean(0), rtol=0, atol=1e-6)
    var = torch.cat([hidden, hidden]).var(0)  # the step runs it twice
    assert torch.allclose(layer.running_var.double(), var, rtol=0, atol=1e-6)
    assert bool(torch.isfinite(module.critic[0].running_var).all())
    # The critic sees each batch three times: made, made, real.
    assert module.critic[0].running_mean.abs().max() > 0


def test_statistics_with_persistent_workers_and_validation_within_epochs():
    loader = data(num_workers=1, persistent_workers=True)
    swa, snapshots, module = SWA(start=0, every_n_steps=2), Snapshots(), Net(norm=True)
    fit(module, swa, snapshots, loader=loader, epochs=2, val_check_interval=0.5)
    without = Snapshots()
    fit(
        Net(norm=True), without, epochs=2, val_check_interval=0.5,
        loader=data(num_workers=1, persistent_workers=True),
    )  # fmt: skip
    assert_same(without.by_step, snapshots.by_step)
    assert_statistics(module.net, samples()[0])


class FreezesFirst(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].eval()


def test_a_layer_that_training_keeps_in_eval_mode_keeps_its_statistics():
    swa, module = SWA(start=0), Deep()
    module.net[0].running_mean.fill_(0.25)
    fit(module, swa, FreezesFirst(), precision="64-true")
    assert torch.equal(module.net[0].running_mean, torch.full((3,), 0.25).double())
    assert torch.equal(module.net[0].running_var, torch.ones(3).double())
    assert not torch.equal(module.net[2].running_var, torch.ones(5).double())


def test_the_pass_is_nothing_but_forward_passes_that_nobody_notices(tmp_path):
    """No optimizer step, no global step, no line in the log, no epoch, no user's counter."""
    rows, found = [], []
    for swa in ([], [SWA(start=0, every_n_steps=1)]):
        logger = CSVLogger(tmp_path, version=len(rows))
        module = Net(norm=True)
        trainer = fit(module, *swa, logger=logger, log_every_n_steps=1, val_check_interval=0.5)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            lines = [
                {k: v for k, v in row.items() if v and not k.startswith("optkit-")}
                for row in csv.DictReader(file)
            ]
        rows.append([{k: v for k, v in r.items() if k != "val_loss"} for r in lines if len(r) > 1])
        found.append((module.num_training_steps, trainer.global_step, trainer.current_epoch))
    assert found[0] == found[1] == (18, 18, 3)
    assert rows[0] == rows[1]


def test_a_module_without_norm_layers_runs_no_pass(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pass was run")

    monkeypatch.setattr(statistics_pass, "stream_batches", refuse)
    swa = SWA(start=0)
    fit(Net(), swa)
    assert "statistics" not in swa.summary
    with pytest.raises(MisconfigurationException, match="a pass was run"):
        fit(Net(norm=True), SWA(start=0))


def test_a_pass_is_run_once_for_each_average(monkeypatch, tmp_path):
    lengths = []
    real = statistics_pass.stream_batches

    def counted(*args, **options):
        lengths.append(options["num_batches"])
        return real(*args, **options)

    monkeypatch.setattr(statistics_pass, "stream_batches", counted)
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(Net(norm=True), SWA(start=1), epochs=4, val_check_interval=0.5, **options)
    assert lengths == [1, None, None, None]  # a rehearsal, and three models


def test_norm_layers_without_running_statistics_need_no_pass():
    class Untracked(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1))

    swa, snapshots, module = SWA(start=1), Snapshots(), Untracked()
    fit(module, swa, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)
    assert "statistics" not in swa.summary


def test_a_step_that_the_pass_cannot_run_raises_before_training():
    class Iterates(Net):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    module = Iterates(norm=True)
    with (
        warned("`dataloader_iter` step flavor"),
        pytest.raises(MisconfigurationException, match="dataloader_iter"),
    ):
        fit(module, SWA(start=2))
    assert module.num_training_steps == 0


def test_data_that_can_be_read_only_once_are_refused_before_training():
    x, y = samples()
    batches = (batch for batch in zip(x.split(4), y.split(4), strict=True))
    module = Net(norm=True)
    with pytest.raises(
        MisconfigurationException, match=r"readable twice.*refresh_norm_stats=False"
    ):
        fit(module, SWA(start=0), loader=batches, epochs=1)
    assert module.num_training_steps == 0


# -- modules -----------------------------------------------------------------------------------


def persistent_floats(module):
    names = dict(module.named_parameters()).keys() | {"trace"}
    return {n: w for n, w in weights_of(module).items() if n in names}


def test_tied_frozen_empty_and_integer_tensors_and_a_module_that_cannot_be_copied():
    swa, snapshots, module = SWA(start=1), Snapshots(), Odd()
    fit(module, swa, snapshots, precision="64-true")
    expected = mean_of(snapshots.by_epoch[1:])
    found = persistent_floats(module)
    assert_close(found, {name: expected[name] for name in found}, atol=1e-12)
    assert module.tied.weight is module.net[0].weight
    assert module.count == 3 * BATCHES  # the module's own
    assert torch.equal(module.scratch, snapshots.at_end["scratch"])
    assert torch.equal(module.mask, snapshots.at_end["mask"])
    assert_close(
        {"trace": module.trace}, {"trace": expected["trace"]}, atol=1e-12
    )  # averaged, though every step put another tensor there
    assert all(seen["count"] == BATCHES * (i + 1) for i, seen in enumerate(module.seen["validate"]))


@pytest.mark.parametrize("kind", [MadeInSetup, MadeInConfigureModel])
def test_parameters_made_in_setup_and_configure_model(kind):
    swa, snapshots, module = SWA(start=1), Snapshots(), kind()
    trainer = fit(module, swa, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)
    trainer.test(module, data(dtype=torch.float64), verbose=False)
    assert_same(module.seen["test"][0], weights_of(module))


def test_manual_optimization_of_two_nets():
    swa, snapshots, module = SWA(start=1, refresh_norm_stats=False), Snapshots(), AdversarialNet()
    fit(module, swa, snapshots, val=False, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_a_batch_in_which_two_optimizers_step_counts_once():
    swa, snapshots = SWA(start=1, every_n_steps=2, refresh_norm_stats=False), Snapshots()
    module = AdversarialNet()
    fit(module, swa, snapshots, val=False, precision="64-true")
    expected = mean_of(steps_of(snapshots, [6, 8, 10, 12, 14, 16]))
    counts = {n: w for n, w in snapshots.at_end.items() if not w.is_floating_point()}
    assert_close(weights_of(module), expected | counts, atol=1e-12)


def test_lbfgs():
    def lbfgs(module):
        return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    swa, snapshots, module = SWA(start=1), Snapshots(), Net(optimizer=lbfgs)
    fit(module, swa, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_a_layer_that_is_replaced_during_the_average_is_refused():
    class Replaces(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                pl_module.net[1] = nn.PReLU()

    with pytest.raises(
        ValueError, match=r"must stay the same while .* got changes in net.1.weight"
    ):
        fit(Net(), SWA(start=1), Replaces())


def test_a_layer_that_is_replaced_before_the_average_is_averaged():
    class Replaces(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[1] = nn.PReLU().double()

    swa, snapshots, module = SWA(start=1), Snapshots(), Net()
    fit(module, swa, Replaces(), snapshots, precision="64-true")
    assert "net.1.weight" in weights_of(module)
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)


def test_a_lazy_parameter_is_refused():
    module = Net()
    module.other = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"`other\.weight` must be initialized before training"):
        trainer_of(SWA()).fit(module, data(), data())


def test_the_average_on_another_device_or_in_half_precision_is_as_exact():
    swa, snapshots, module = SWA(start=0, device="cpu"), Snapshots(), Net()
    fit(module, swa, snapshots, precision="bf16-true", loader=data(dtype=torch.bfloat16), val=False)
    expected = mean_of(snapshots.by_epoch)
    for name, value in swa._weights.state(average_is_in_state_dict=True)["average"].items():
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), expected[name], rtol=1e-6), name
    for name, value in weights_of(module).items():
        assert torch.equal(value, expected[name].to(torch.bfloat16)), name


# -- not finite --------------------------------------------------------------------------------


class Spoils(pl.Callback):
    """Makes one weight NaN for the end of an epoch, and undoes it."""

    def __init__(self, epoch, index=-1):
        self.epoch = epoch
        self.index = index

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and trainer.is_last_batch:
            self.kept = pl_module.net[0].weight.detach().clone()
            pl_module.net[0].weight.data.view(-1)[self.index] = torch.nan

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.net[0].weight.data.copy_(self.kept)


def test_a_model_that_is_not_finite_is_left_out_with_a_warning():
    swa, snapshots, module = SWA(start=0), Snapshots(), Net()
    with warned("`SWA` leaves out the weights after step 12, which are"):
        fit(module, Spoils(1), swa, snapshots, precision="64-true", val=False)
    assert_close(weights_of(module), mean_of(epochs_of(snapshots, [0, 2])), atol=1e-12)
    assert "average of 2 models, epochs 0–2, 1 left out that were not finite" in swa.summary


# -- logged ------------------------------------------------------------------------------------


def rows_of(logger):
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_model_reaches_the_logger_on_the_trainers_axis(tmp_path):
    logger, snapshots = CSVLogger(tmp_path), Snapshots()
    swa, module = SWA(start=1, lr=0.01, anneal_epochs=0), Net()
    trainer = fit(module, swa, snapshots, logger=logger, epochs=4, precision="64-true")
    rows = [r for r in rows_of(logger) if r["optkit-averaging/num_averaged"]]
    models = [(int(r["step"]), float(r["optkit-averaging/num_averaged"])) for r in rows]
    assert models == [(11, 1.0), (17, 2.0), (23, 3.0), (23, 3.0)]  # the last one at the end
    assert [float(r["optkit-averaging/learning_rate"]) for r in rows] == [0.01] * 4
    for i, epoch in enumerate((1, 2, 3)):
        mean = mean_of(snapshots.by_epoch[1 : epoch + 1])
        raw = snapshots.by_epoch[epoch]
        square = sum((mean[n] - raw[n]).square().sum() for n in mean)
        norm = sum(raw[n].square().sum() for n in mean)
        expected = (square / norm).sqrt().item()
        assert float(rows[i]["optkit-averaging/distance"]) == pytest.approx(expected, abs=1e-6)
    events = [(int(r["step"]), r["optkit-events/averaging"]) for r in rows_of(logger)]
    assert [e for e in events if e[1]] == [(11, "1.0"), (23, "3.0")]
    found = {k for k in trainer.callback_metrics if k.startswith("optkit-averaging/")}
    assert found == {f"optkit-averaging/{tag.name}" for tag in tags.AVERAGING_SCALARS}


def test_a_named_average_logs_under_its_name(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Net(), SWA(start=1, name="late"), logger=logger)
    found = {key for row in rows_of(logger) for key in row if key.startswith("optkit")}
    assert found == {
        "optkit-averaging-late/num_averaged",
        "optkit-averaging-late/distance",
        "optkit-events/averaging_late",
    }


def test_the_summary_says_what_is_in_the_average(caplog):
    swa = SWA(start=1)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(Net(norm=True), swa, epochs=5)
    line = "SWA: average of 4 models, epochs 1–4; normalization statistics from 24 samples"
    assert swa.summary == line
    assert f"{line}. The module holds the average." in caplog.text
    kept = SWA(start=4, use_for=())
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(Net(), kept, epochs=5)
    assert "SWA: average of 1 model, epoch 4. The module holds its trained" in caplog.text


# -- resumed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_name", "options"),
    [
        ("classifier", {}),
        ("classifier", {"precision": "bf16-mixed"}),
        ("classifier", {"accumulate_grad_batches": 2}),
        ("autoencoder", {}),
        ("autoencoder", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
        ("gan", {}),
        ("gan", {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 2], ids=["during the average", "before the average"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(module_name, options, start, tmp_path):
    options = {"limit_train_batches": 6} | options if module_name != "gan" else options
    swa = assert_resumes(lambda: SWA(start=start), module_name, tmp_path, **options)
    assert swa.num_averaged == 3 - start


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.01, "anneal_epochs": 2},
        {"lr": [0.01], "cycle": 1},
        {"lr": 0.01, "cycle": 2},
        {"every_n_steps": 2},
        {"every_n_steps": 2, "lr": 0.01, "refresh_norm_stats": "layerwise"},
        {"average": "polynomial", "refresh_norm_stats": 1},
        {"use_for": ()},
        {"use_for": ("test",), "refresh_norm_stats": False},
        {"start": "7st", "every_n_steps": 1},
    ],
    ids=str,
)
def test_a_resumed_run_with_settings_ends_as_one_that_was_not_interrupted(options, tmp_path):
    swa = assert_resumes(lambda: SWA(**{"start": 1} | options), "classifier", tmp_path)
    assert swa.num_averaged


def test_an_average_in_half_precision_is_resumed(tmp_path):
    swa = assert_resumes(lambda: SWA(start=0), "autoencoder", tmp_path, precision="bf16-true")
    assert swa.num_averaged == 3


# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"start": 1.0}, ValueError, r"`start` must be a share of the run in \[0, 1\), an epoch"),
        ({"start": -1}, ValueError, "`start` must be .* got -1"),
        ({"start": "12"}, ValueError, "`start` must be .* '120ep' or '5000st', got '12'"),
        ({"start": True}, TypeError, "`start` must be .* got True"),
        ({"start": None}, TypeError, "`start` must be .* got None"),
        ({"average": "median"}, ValueError, "`average` must be 'uniform' or 'polynomial', got"),
        ({"eta": -1.0}, ValueError, "`eta` must be at least 0, got -1.0"),
        ({"cycle": 2}, ValueError, "`lr` must be given with `cycle=2`"),
        ({"lr": 0.1, "cycle": 0}, ValueError, "`cycle` must be an integer of at least 1"),
        ({"lr": 0.1, "cycle": 2, "every_n_epochs": 3}, ValueError, "a multiple of `cycle=2`"),
        (
            {"lr": 0.1, "cycle": 2, "every_n_steps": 3},
            ValueError,
            "a multiple of `cycle=2`.*, got every_n_epochs=None and every_n_steps=3",
        ),
        ({"lr": -0.1}, ValueError, "`lr` must be a number of at least 0, or a list of one"),
        ({"lr": []}, ValueError, "`lr` must be a number of at least 0"),
        ({"eta": "3"}, ValueError, "`eta` must be at least 0, got '3'"),
        ({"anneal_epochs": True}, ValueError, "`anneal_epochs` must be a number of at least 0"),
        ({"cycle": True, "lr": 0.1}, ValueError, "`cycle` must be an integer of at least 1"),
        ({"use_for": (["test"],)}, ValueError, "`use_for` must be a tuple of"),
        ({"lr": "0.1"}, ValueError, "`lr` must be a number of at least 0"),
        (
            {"anneal_epochs": -1},
            ValueError,
            "`anneal_epochs` must be a number of at least 0",
        ),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` must be"),
        ({"every_n_epochs": 1, "every_n_steps": 1}, ValueError, "At most one of `every_n_steps`"),
        ({"use_for": "validate"}, ValueError, "`use_for` must be a tuple of 'validate', 'test'"),
        ({"use_for": ("fit",)}, ValueError, "`use_for` must be a tuple of"),
        ({"name": "My SWA"}, ValueError, "`name` must be snake_case, such as 'slow', got 'My SWA'"),
        ({"refresh_norm_stats": 0}, ValueError, "`refresh_norm_stats` must be True, False, a"),
        ({"refresh_norm_stats": "all"}, ValueError, "`refresh_norm_stats` must be .* got 'all'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        SWA(**options)


@pytest.mark.parametrize(
    ("start", "options"), [(3, {}), ("18st", {"max_steps": 18}), ("3ep", {"max_steps": 30})]
)
def test_a_start_after_the_end_is_refused_before_the_first_step(start, options):
    module = Net()
    with pytest.raises(MisconfigurationException, match="`start` must lie before the end of"):
        fit(module, SWA(start=start), **options)
    assert module.num_training_steps == 0


def test_an_average_of_nothing_is_refused():
    swa, module = SWA(start=2), Net()
    with (
        pytest.raises(ValueError, match="`SWA` must have averaged a model before its average is"),
        swa.averaged(module),
    ):
        pass
    fit(module, swa)
    with (
        pytest.raises(ValueError, match="`pl_module` must be the module that was trained, got"),
        swa.averaged(Net()),
    ):
        pass


def test_an_error_in_training_leaves_the_weights_of_training():
    swa, snapshots, module = SWA(start=0), Snapshots(), Net()
    with pytest.raises(RuntimeError, match="gone"):
        fit(module, swa, snapshots, Raises("on_train_epoch_start", RuntimeError("gone"), epoch=2))
    assert_close(weights_of(module), snapshots.by_step[-1], atol=0)
    with swa.averaged(module):
        assert_close(weights_of(module), mean_of(snapshots.by_epoch), atol=1e-6)


def test_data_that_one_epoch_uses_up_is_refused_before_training():
    x, y = samples()
    batches = zip(x.split(4), y.split(4), strict=True)  # can be copied, but only before it is read
    with pytest.raises(
        MisconfigurationException, match="readable twice, got zip, which is an iter"
    ):
        fit(Net(norm=True), SWA(0.5), loader=batches, val=False, epochs=1)
