"""NormSwap in a real Trainer."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import EMA, SWA, NormSwap, load_averaged, load_swapped
from lightning_optkit.methods import BatchRenorm, GhostBatchNorm, swap_norms
from tests.callbacks.averaging_modules import Stream, trainer_of, warned
from tests.contracts import assert_resumes, assert_same, run
from tests.modules import MODULES, image_loader, images

AT_ONCE = {"relax_from": 0, "r_max_at": 0, "d_max_at": 0}


class FakeTrainer(SimpleNamespace):
    """As much of a Trainer as a set-up asks for."""

    __hash__ = object.__hash__  # reports are kept by Trainer


class Net(pl.LightningModule):
    """A small classifier that says when it makes its layers."""

    made_in = "__init__"

    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.seen = []
        if self.made_in == "__init__":
            self.make()

    def make(self):
        width = self.hparams["width"]
        layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(16 * width, 8), nn.BatchNorm1d(8))
        generator = torch.Generator().manual_seed(5)
        for parameter in self.net.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5

    def setup(self, stage):
        if self.made_in == "setup" and not hasattr(self, "net"):
            self.make()

    def configure_model(self):
        if self.made_in == "configure_model" and not hasattr(self, "net"):
            self.make()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen.append(self(batch[0]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class InSetup(Net):
    made_in = "setup"


class InConfigureModel(Net):
    made_in = "configure_model"


def data(**options):
    return DataLoader(TensorDataset(*images()), **{"batch_size": 8} | options)


def fit(module, *callbacks, ckpt_path=None, loader=None, **options):
    defaults = {"epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0}
    trainer = trainer_of(*callbacks, **defaults | options)
    trainer.fit(module, data() if loader is None else loader, data(), ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def kinds(module):
    return [type(module.net[i]).__name__ for i in (1, 5)]


def momenta(trainer):
    (optimizer,) = trainer.optimizers
    return [
        optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.param_groups[0]["params"]
    ]


class Notes(pl.Callback):
    """Notes weights and momenta at the start of training."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights(pl_module)
        self.momenta = momenta(trainer) if trainer.optimizers[0].state else []


@pytest.fixture
def said(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        yield caplog


# -- in time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module_class", [Net, InSetup, InConfigureModel])
def test_layers_are_replaced_wherever_they_are_made(module_class, tmp_path, said):
    module, swap = module_class(), NormSwap(channels_per_group=2)
    trainer = fit(module, swap)
    assert kinds(module) == ["GroupNorm", "GroupNorm"]
    in_optimizer = trainer.optimizers[0].param_groups[0]["params"]
    assert [id(p) for p in in_optimizer] == [id(p) for p in module.parameters()]

    by_hand = Net()  # the same as if the module had been written with these layers
    swap_norms(by_hand, channels_per_group=2)
    fit(by_hand)
    assert_same(weights(module), weights(by_hand))

    path = tmp_path / "end.ckpt"
    trainer.save_checkpoint(path)
    again = module_class()
    tester = trainer_of(NormSwap(channels_per_group=2))
    tester.test(again, data(), ckpt_path=path, verbose=False)
    x = data().dataset.tensors[0][:8]
    assert torch.equal(again.seen[0], module.eval()(x))
    if module_class is not InSetup:
        assert torch.equal(load_swapped(module_class, path).eval()(x), module(x))
    else:
        with pytest.raises(ValueError, match="layers made in `setup` are not there yet"):
            load_swapped(module_class, path)
    assert said.text.count("NormSwap: 1 BatchNorm2d replaced by GroupNorm, 1 BatchNorm1d rep") == 2
    assert {"configure_model", "on_save_checkpoint"}.isdisjoint(vars(module))
    assert not module._load_state_dict_pre_hooks


def test_every_stage_in_any_order_and_a_second_fit(tmp_path, said):
    module, swap = Net(), NormSwap()
    trainer = trainer_of(swap, epochs=1, limit_train_batches=2)
    trainer.validate(module, data(), verbose=False)
    layers = [module.net[1], module.net[5]]
    trainer.fit(module, data(), data())
    trainer.test(module, data(), verbose=False)
    fit(module, swap, epochs=1)  # another Trainer, the same callback
    fit(module, NormSwap(), epochs=1)
    assert [module.net[1], module.net[5]] == layers
    assert [layer.status for layer in swap.report.layers] == ["swapped", "swapped"]
    assert said.text.count("NormSwap: 1 BatchNorm2d replaced by GroupNorm, 1 Batch") == 1
    assert swap.report.layers[0].layer == "BatchNorm2d(4)"
    path = tmp_path / "weights.ckpt"
    fit(module, swap, Saves(path), epochs=1)  # what it found done is in the checkpoint too
    assert kinds(load_swapped(Net, path)) == ["GroupNorm", "GroupNorm"]


class Saves(pl.Callback):
    """Writes a checkpoint of weights alone."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec")
def test_a_compiled_module(tmp_path):
    module = Net()
    fit(torch.compile(module, backend="eager"), NormSwap(), limit_train_batches=2, epochs=1)
    by_hand = Net()
    swap_norms(by_hand)
    fit(by_hand, limit_train_batches=2, epochs=1)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-6, atol=1e-7)


# -- resumed -----------------------------------------------------------------------------------


class NormGAN(pl.LightningModule):
    """Manual optimization of two nets with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 36))
        self.critic = nn.Sequential(nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        losses = (
            lambda: -self.critic(self.maker(x)).mean(),
            lambda: (self.critic(self.maker(x).detach()) - self.critic(x)).mean().square(),
        )
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.maker, self.critic)]


@pytest.mark.parametrize(
    ("settings", "module_name", "options"),
    [
        (
            {},
            "classifier",
            {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "limit_train_batches": 6},
        ),
        (
            {
                "target": "batch_renorm",
                "target_options": {"relax_from": 3, "r_max_at": 12, "d_max_at": 9},
            },
            "classifier",
            {},
        ),
        ({"target": "ghost", "target_options": {"chunk_size": 3}}, "norm gan", {}),
        ({"target": "none", "name": "all"}, "classifier", {"limit_train_batches": None}),
    ],
    ids=str,
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    settings, module_name, options, tmp_path, monkeypatch
):
    monkeypatch.setitem(MODULES, "norm gan", lambda: (NormGAN(), image_loader()))
    swap = assert_resumes(lambda: NormSwap(**settings), module_name, tmp_path, **options)
    assert swap.report.of("swapped")


def test_a_run_with_batch_norm_goes_on_with_group_norm_and_back(tmp_path, said):
    path = tmp_path / "batch.ckpt"
    trainer = fit(Net(), epochs=1)
    trainer.save_checkpoint(path)
    before, optimizer = weights(trainer.lightning_module), momenta(trainer)

    notes, module = Notes(), Net()
    trainer = fit(module, NormSwap(), notes, ckpt_path=path, epochs=2)
    assert trainer.global_step == 6
    assert_same(notes.momenta, optimizer)
    assert_same(notes.weights, {name: before[name] for name in notes.weights})
    assert list(notes.weights) == [n for n in before if "running" not in n and "num_" not in n]
    assert "drops running statistics of net.1, net.5. All else is taken from it" in said.text
    trainer.save_checkpoint(path := tmp_path / "group.ckpt")

    said.clear()
    notes, module = Notes(), Net()
    fit(module, NormSwap(), notes, ckpt_path=path, epochs=3)
    assert "statistics" not in said.text.replace("without running statistics", "")
    assert len(notes.momenta) == len(optimizer)

    module = Net()
    swap_norms(module)
    notes = Notes()
    with warned("callbacks used to create the checkpoint need to be provided"):
        fit(module, NormSwap("group", "batch", name="back"), notes, ckpt_path=path, epochs=3)
    assert kinds(module) == ["BatchNorm2d", "BatchNorm1d"]
    assert notes.weights["net.1.running_mean"].tolist() == [0.0] * 4
    assert module.net[1].num_batches_tracked == 3
    assert "begins new running statistics of net.1, net.5" in said.text


def test_batch_norm_hands_its_statistics_on_to_batch_renorm(tmp_path):
    path = tmp_path / "batch.ckpt"
    trainer = fit(Net(), epochs=1)
    trainer.save_checkpoint(path)
    before, notes = weights(trainer.lightning_module), Notes()
    settings = {"target_options": {"relax_from": 2, "r_max_at": 9, "d_max_at": 9}}
    module = Net()
    fit(module, NormSwap("batch", "batch_renorm", **settings), notes, ckpt_path=path, epochs=2)
    assert_same(notes.weights, before)
    assert module.net[1].num_batches_tracked == 6
    settings = {"target_options": {"relax_from": 6, "r_max_at": 9, "d_max_at": 9}}
    with warned("limits move after 6 batches, and 3 are to come"):  # after 3 that are over
        fit(Net(), NormSwap("batch", "batch_renorm", **settings), ckpt_path=path, epochs=2)


def test_a_resume_as_another_net_is_said(tmp_path):
    trainer = fit(Net(), NormSwap(channels_per_group=2), epochs=1)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    with warned("makes another net than the checkpoint had: there 2 layers by .*'channels_per_gr"):
        fit(Net(), NormSwap(channels_per_group=4), ckpt_path=path, epochs=2)


def test_parameters_that_an_optimizer_does_not_know_are_refused(tmp_path):
    class Instance(Net):
        def make(self):
            super().make()
            self.net[1] = nn.InstanceNorm2d(4)

    trainer = fit(Instance(), epochs=1)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=r"got one without γ and β of net\.1"):
        fit(Instance(), NormSwap("instance", "group"), ckpt_path=path)
    module = Instance()
    trainer_of(NormSwap("instance", "group")).test(module, data(), ckpt_path=path, verbose=False)
    assert module.net[1].weight.tolist() == [1.0] * 4


# -- averages of the new layers --------------------------------------------------------------------


@pytest.mark.parametrize(
    "swap",
    [
        NormSwap("batch", "batch_renorm", target_options=AT_ONCE),
        NormSwap("batch", "ghost", target_options={"chunk_size": 3}),
    ],
    ids=["renorm", "ghost"],
)
def test_swa_takes_the_statistics_of_the_new_layers(swap, tmp_path):
    module = Net()
    swa = SWA(start=0, refresh_norm_stats="layerwise")
    trainer = fit(module, swap, swa, limit_train_batches=None, precision="64-true")
    assert swa.summary.endswith("; normalization statistics from 64 samples")
    layer = module.net[1]
    assert isinstance(layer, (BatchRenorm, GhostBatchNorm))
    x = images()[0].double()
    values = module.net[0](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, values.mean(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_var, values.var(1), rtol=1e-10, atol=1e-10)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    again = load_swapped(Net, path).double()
    again.load_state_dict(load_averaged(path))
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_ema_of_a_net_with_group_norm():
    module, ema = Net(), EMA(0.5, warmup=False)
    fit(module, ema, NormSwap())
    assert ema.num_averaged == 6
    assert kinds(module) == ["GroupNorm", "GroupNorm"]


# -- a dry run ---------------------------------------------------------------------------------


def test_a_report_changes_nothing(tmp_path, said):
    without = run("classifier", [], tmp_path / "without")
    with_it = run("classifier", [swap := NormSwap(target="report")], tmp_path / "with")
    assert_same(without, with_it)
    table = [
        "name   layer           becomes          note",
        "net.1  BatchNorm2d(4)  GroupNorm(4, 4)  without running statistics",
    ]
    assert "NormSwap: would do, and does not:\n" + "\n".join(table) in said.text
    assert "BatchNorm takes its statistics over 8 samples, fewer than 16, however" in said.text
    assert swap.state_dict() == {}
    assert [layer.status for layer in swap.report.layers] == ["swapped"]  # it would be


@pytest.mark.parametrize(
    ("module", "options", "advised"),
    [
        (Net(), {"loader": data(batch_size=15)}, True),
        (Net(), {"loader": data(batch_size=16), "accumulate_grad_batches": 2}, False),
        (Net(), {"loader": data(batch_size=15), "accumulate_grad_batches": 2}, True),
        (Net(), {"loader": DataLoader([images(4)], batch_size=None)}, False),  # which does not say
    ],
    ids=["few", "enough", "few, accumulated", "unknown"],
)
def test_advice_where_batches_are_small(module, options, advised, said):
    fit(module, NormSwap(target="report"), epochs=1, limit_train_batches=1, **options)
    assert ("BatchNorm takes its statistics over" in said.text) == advised
    assert kinds(module) == ["BatchNorm2d", "BatchNorm1d"]


@pytest.mark.parametrize(("world_size", "samples"), [(1, 8), (2, 16)])
def test_synchronised_layers_have_the_samples_of_all_devices(
    world_size, samples, said, monkeypatch
):
    module = Net()
    swap_norms(module, "batch", "sync")
    monkeypatch.setattr("lightning_optkit.callbacks.norm_swap.batch_per_device", lambda _: 8)
    trainer = SimpleNamespace(world_size=world_size)
    NormSwap(target="report").on_train_start(trainer, module)
    assert ("BatchNorm takes its statistics over" in said.text) == (samples < 16)


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
def test_no_advice_for_layers_that_do_not_train_or_are_not_there(said):
    class Frozen(Net):
        def on_train_start(self):
            assert not self.net.training

    frozen = Frozen()
    frozen.net.eval()
    fit(frozen, NormSwap(target="report"), epochs=1)
    none = Net()
    swap_norms(none, "batch", "none")
    fit(none, NormSwap("layer", target="report"), epochs=1)
    assert "BatchNorm takes" not in said.text


# -- several swaps -----------------------------------------------------------------------------


def test_several_swaps_each_take_their_own(tmp_path):
    module = Net()
    first = NormSwap(where=["net.1"], channels_per_group=2, name="first")
    rest = NormSwap("batch", "ghost", name="rest")  # of all, but what another has replaced
    trainer = fit(module, first, rest, epochs=1)
    assert kinds(module) == ["GroupNorm", "GhostBatchNorm"]
    assert rest.report.layers[0].note == "replaced by another"
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    assert kinds(load_swapped(Net, path)) == ["GroupNorm", "GhostBatchNorm"]
    fit(
        Net(),
        NormSwap(where=["net.1"], channels_per_group=2, name="first"),
        NormSwap("batch", "ghost", name="rest"),
        ckpt_path=path,
        epochs=2,
    )
    with pytest.raises(
        ValueError,
        match=r"net\.1 GroupNorm.* replaced by another|net\.1 GroupNorm.*replaced by another",
    ):
        fit(Net(), NormSwap(), NormSwap("batch", "layer", name="again"))
    with pytest.raises(ValueError, match="replaced by another"):
        fit(Net(), NormSwap(), NormSwap("group", "instance", name="again"))
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type"):
        trainer_of(NormSwap(), NormSwap("batch", "layer"))


# -- logged and said ---------------------------------------------------------------------------


def test_the_swap_is_logged_as_an_event_once(tmp_path):
    logger = CSVLogger(tmp_path)
    swap = NormSwap()
    fit(Net(), swap, logger=logger, log_every_n_steps=1)
    trainer = fit(Net(), NormSwap(name="all"), logger=logger, log_every_n_steps=1, epochs=1)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    fit(Net(), NormSwap(name="all"), logger=logger, log_every_n_steps=1, ckpt_path=path)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["step"], row["optkit-events/norm_swap"]) for row in rows]
    assert [each for each in found if each[1]] == [("0", "2.0")]
    assert sum(bool(row["optkit-events/norm_swap_all"]) for row in rows) == 1


def test_what_is_left_alone_is_said(said):
    class Fused(nn.BatchNorm2d):
        pass

    module = Net()
    module.net[1] = Fused(4)
    fit(module, NormSwap(), epochs=1)
    assert (
        "1 BatchNorm1d replaced by GroupNorm. Left alone: net.1, Fused: a subclass of" in said.text
    )


def test_batch_renorm_that_is_batch_norm_to_the_end_is_said():
    text = (
        "trains BatchRenorm as BatchNorm to the end: its limits move after 5,000 batches, and 6 a"
    )
    with warned(text):
        fit(Net(), NormSwap("batch", "batch_renorm"))
    options = {"relax_from": 5, "r_max_at": 9, "d_max_at": 9}
    fit(Net(), NormSwap("batch", "batch_renorm", target_options=options))
    with warned("limits move after 6 batches, and 4 are to come"):
        fit(
            Net(),
            NormSwap("batch", "batch_renorm", target_options=options | {"relax_from": 6}),
            max_steps=2,
            accumulate_grad_batches=2,
            epochs=-1,
        )


# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module_class", [Net, InConfigureModel])
def test_a_swap_that_finds_nothing_is_refused_before_the_first_step(module_class):
    module = module_class()
    with pytest.raises(ValueError, match=r"got 'layer'\. Its norm layers: net\.1 BatchNorm2d"):
        fit(module, NormSwap("layer", "none"))
    assert {"configure_model", "on_save_checkpoint"}.isdisjoint(vars(module))
    assert not module._load_state_dict_pre_hooks
    with pytest.raises(ValueError, match=r"Each pattern of `where` must match .*, got 'nest\.\*'"):
        fit(module, NormSwap(where=["net.*", "nest.*"]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": "My swap"}, ValueError, "`name` must be snake_case, such as 'encoder', got 'My"),
        ({"where": "net.*"}, TypeError, "`where` must be a list of glob patterns, got the string"),
        ({"target": "reports"}, ValueError, "`target` must be one of 'group', .*, got 'reports'"),
        ({"target": "report", "source": "group", "num_groups": 0}, ValueError, "`num_groups` must"),
        ({"target": "ghost", "target_options": {"eps": -1}}, ValueError, "`eps` must be a number"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        NormSwap(**options)


@pytest.mark.parametrize(
    ("target", "synchronises", "world_size", "device", "text"),
    [
        (
            "ghost",
            True,
            2,
            "cuda",
            r"`target` must not be 'ghost' with `Trainer\(sync_batchnorm=Tr",
        ),
        ("batch_renorm", True, 2, "cpu", r"must not be 'batch_renorm' with `Trainer\(sync_batc"),
        ("sync", False, 2, "cpu", "`target='sync'` must have a GPU for each process, got CPUs"),
        ("sync", False, 1, "cpu", None),
        ("sync", True, 2, "cuda", None),
        ("group", True, 2, "cuda", None),
        ("report", True, 2, "cpu", None),
    ],
    ids=str,
)
def test_trainers_that_would_undo_it_are_refused(target, synchronises, world_size, device, text):
    swap, module = NormSwap("batch", target), Net()
    trainer = FakeTrainer(
        callbacks=[swap],
        loggers=[],
        world_size=world_size,
        strategy=SimpleNamespace(
            _layer_sync=object() if synchronises else None, root_device=torch.device(device)
        ),
    )
    if text is None:
        swap.setup(trainer, module, "fit")
        if target == "sync":
            assert kinds(module) == ["SyncBatchNorm", "SyncBatchNorm"]
        swap.teardown(trainer, module, "fit")
    else:
        with pytest.raises(MisconfigurationException, match=text):
            swap.setup(trainer, module, "fit")
        assert kinds(module) == ["BatchNorm2d", "BatchNorm1d"]


def test_an_iterable_without_an_end_has_enough_batches():
    class Regression(Net):
        def make(self):
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - batch[1]).square().mean()

    loader = DataLoader(Stream(), batch_size=None)
    trainer = fit(
        Regression(),
        NormSwap("batch", "batch_renorm"),
        loader=loader,
        limit_train_batches=None,
        epochs=1,
    )
    assert math.isinf(trainer.num_training_batches)
