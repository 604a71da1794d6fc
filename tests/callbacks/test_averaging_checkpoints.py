"""Who runs on the average, what checkpoints hold, and what is resumed from them."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_optkit import EMA, SWA, load_averaged, load_raw, without_average
from tests.callbacks.averaging_modules import (
    BATCHES,
    MadeInConfigureModel,
    Net,
    Odd,
    Raises,
    Snapshots,
    StopsAfter,
    assert_close,
    data,
    differs,
    fit,
    held_out,
    initialised,
    mean_of,
    samples,
    trainer_of,
    warned,
    weights_of,
)
from tests.contracts import ResumableLoader, assert_same

CALLBACKS = {
    "SWA": lambda **options: SWA(start=1, **options),
    "EMA": lambda **options: EMA(0.8, **options),
}
both = pytest.mark.parametrize("kind", list(CALLBACKS))
STAGES = ("validate", "test", "predict")


def run_stage(stage, trainer, module, **options):
    """Run a stage and return the weights that it ran on."""
    loader = held_out()
    match stage:
        case "validate":
            trainer.validate(module, loader, verbose=False, **options)
        case "test":
            trainer.test(module, loader, verbose=False, **options)
        case "predict":
            trainer.predict(module, loader, **options)
    return module.seen[stage][-1]


def checkpoint_of(trainer, folder, name="end.ckpt", **options):
    path = folder / name
    trainer.save_checkpoint(path, **options)
    return path


def state_dict_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


class Saves(pl.callbacks.Checkpoint):
    """Writes a checkpoint in a hook of its own, in one epoch, after all other callbacks."""

    def __init__(self, hook, path, *, epoch=1, batch_idx=None, **options):
        self.path = path
        self.epoch = epoch
        self.batch_idx = batch_idx
        self.options = options
        setattr(self, hook, self._save)

    def _save(self, trainer, pl_module, *args):
        if trainer.sanity_checking or trainer.current_epoch != self.epoch:
            return
        if self.batch_idx is None or args[-1] == self.batch_idx:
            trainer.save_checkpoint(self.path, **self.options)


def checkpointing(folder, *callbacks, **options):
    return {"enable_checkpointing": True, "default_root_dir": folder} | options


# -- stages ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_on_the_average_in_memory_and_from_a_checkpoint(kind, stage, tmp_path):
    callback, snapshots, module = CALLBACKS[kind](), Snapshots(), Net(norm=True)
    trainer = fit(module, callback, snapshots)
    average = weights_of(module)
    assert differs(average, snapshots.at_end)
    assert_same(average, run_stage(stage, trainer, module))
    path = checkpoint_of(trainer, tmp_path)
    assert_same(average, run_stage(stage, trainer, module, ckpt_path=path))
    assert_same(average, weights_of(module))
    other = trainer_of(CALLBACKS[kind]())  # in another process
    assert_same(average, run_stage(stage, other, Net(norm=True), ckpt_path=path))
    without = trainer_of()
    with warned("callbacks used to create the checkpoint need to be provided"):
        seen = run_stage(stage, without, Net(norm=True), ckpt_path=path)
    assert_same(average, seen)


@both
@pytest.mark.parametrize(
    "use_for", [("validate",), ("test",), ("predict",), ("test", "predict"), ()], ids=str
)
def test_stages_that_are_not_named_run_on_the_weights_of_training(kind, use_for, tmp_path):
    callback, snapshots, module = CALLBACKS[kind](use_for=use_for), Snapshots(), Net(norm=True)
    saves = Saves("on_train_epoch_end", tmp_path / "end.ckpt", epoch=2)
    trainer = fit(module, callback, snapshots, saves, **checkpointing(tmp_path))
    raw = snapshots.at_end
    with callback.averaged(module):
        average = weights_of(module)
    assert differs(raw, average)
    assert differs(module.seen["validate"][-1], raw) is ("validate" in use_for)
    assert_same(average if "validate" in use_for else raw, weights_of(module))
    for stage in STAGES:
        fresh = trainer_of(CALLBACKS[kind](use_for=use_for))
        seen = run_stage(stage, fresh, Net(norm=True), ckpt_path=saves.path)
        assert_same(average if stage in use_for else raw, seen)
    if "validate" not in use_for:  # else the module has the average in it, until another fit
        for stage in STAGES:
            seen = run_stage(stage, trainer, module)
            assert_same(average if stage in use_for else raw, seen)
            assert_same(raw, weights_of(module))


@both
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_before_training_runs_on_the_module_as_it_is(kind, stage):
    module = initialised(Net(norm=True))
    before = weights_of(module)
    trainer = trainer_of(CALLBACKS[kind]())
    assert_same(before, run_stage(stage, trainer, module))
    assert_same(before, weights_of(module))
    trainer.fit(module, data(), data())
    assert differs(before, run_stage(stage, trainer, module))


def test_another_module_is_left_alone_and_so_is_the_trained_one():
    class During(pl.Callback):
        def on_test_batch_start(self, *_):
            self.found = weights_of(trained)

    trained, snapshots, during = Net(), Snapshots(), During()
    trainer = fit(trained, EMA(use_for=("test",)), snapshots, during)
    other = initialised(Net(), seed=9)
    before = weights_of(other)
    assert_same(before, run_stage("test", trainer, other))
    assert_same(before, weights_of(other))
    assert_same(snapshots.at_end, during.found)


@both
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_written_after_a_stage_from_a_file_says_what_it_holds(kind, stage, tmp_path):
    module, snapshots = Net(norm=True), Snapshots()
    trainer = fit(module, CALLBACKS[kind](use_for=("validate",)), snapshots)
    path = checkpoint_of(trainer, tmp_path)
    run_stage(stage, trainer, module, ckpt_path=path)
    again = checkpoint_of(trainer, tmp_path, "again.ckpt", weights_only=False)
    assert_same(load_averaged(path), load_averaged(again))
    assert_same(load_raw(path), load_raw(again))


@both
def test_tests_that_write_a_buffer_can_be_repeated(kind):
    """Tests run in inference mode, whose tensors cannot be written outside of it."""

    class Writes(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("score", torch.tensor(3.0))

        def on_test_epoch_end(self):
            self.score = self.score + 1.0

    callback, snapshots, module = CALLBACKS[kind](use_for=("test",)), Snapshots(), Writes()
    trainer = fit(module, callback, snapshots)
    for i in (1, 2, 3):
        run_stage("test", trainer, module)
        assert float(module.score) == 3.0 + i
        assert differs(module.seen["test"][0], snapshots.at_end)
        assert torch.equal(module.net[0].weight, snapshots.at_end["net.0.weight"])


@both
def test_predictions_are_those_of_the_average(kind):
    callback, module = CALLBACKS[kind](), Net()
    trainer = fit(module, callback)
    predictions = torch.cat(trainer.predict(module, held_out()))
    with callback.averaged(module), torch.no_grad():
        expected = module(torch.cat([x for x, _ in held_out()]))
    assert torch.allclose(predictions, expected, rtol=0, atol=1e-6)


# -- what ModelCheckpoint stores ---------------------------------------------------------------


def validation_loss(state_dict, norm=True):
    """Return the validation loss of stored weights, as the Trainer computes it."""
    module = Net(norm=norm)
    module.load_state_dict(state_dict)
    trainer = trainer_of()
    return float(trainer.validate(module, held_out(), verbose=False)[0]["val_loss"])


class Losses(pl.Callback):
    """Notes what was logged by each validation, and on which weights it was."""

    def __init__(self):
        self.logged = {}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.logged[trainer.global_step] = float(trainer.callback_metrics["val_loss"])


@both
@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["each epoch", "twice an epoch"])
@pytest.mark.parametrize("refresh", [True, False])
def test_the_best_checkpoint_is_what_validation_saw_bit_for_bit(kind, interval, refresh, tmp_path):
    best = ModelCheckpoint(
        tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1, save_last=True
    )
    losses = Losses()
    callback = CALLBACKS[kind](refresh_norm_stats=refresh)
    fit(
        Net(norm=True), callback, losses, best, epochs=4, val_check_interval=interval,
        **checkpointing(tmp_path),
    )  # fmt: skip
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == (4 if interval == 1.0 else 8)
    for path in files:
        step = torch.load(path, weights_only=True)["global_step"]
        assert validation_loss(state_dict_of(path)) == losses.logged[step], path.name
        if step > 2 * BATCHES + 3:  # SWA has two models
            assert validation_loss(load_averaged(path)) == losses.logged[step]
            assert validation_loss(load_raw(path)) != losses.logged[step]
    assert best.best_model_score == min(losses.logged.values())
    assert validation_loss(state_dict_of(best.best_model_path)) == min(losses.logged.values())
    last = state_dict_of(tmp_path / "last.ckpt")
    assert validation_loss(last) == losses.logged[4 * BATCHES]


@both
def test_the_best_checkpoint_is_tested_as_it_was_validated(kind, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    losses, module = Losses(), Net(norm=True)
    trainer = fit(module, CALLBACKS[kind](), losses, best, **checkpointing(tmp_path))
    for path in ("best", best.best_model_path):
        found = trainer.test(module, held_out(), ckpt_path=path, verbose=False)
        assert found[0]["test_loss"] == min(losses.logged.values())


@both
def test_weights_alone_are_those_that_validation_saw(kind, tmp_path):
    losses = Losses()
    alone = ModelCheckpoint(
        tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1, save_weights_only=True
    )
    module = Net(norm=True)
    fit(module, CALLBACKS[kind](), losses, alone, **checkpointing(tmp_path))
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == 3
    for path in files:
        checkpoint = torch.load(path, weights_only=True)
        assert "callbacks" not in checkpoint
        step = checkpoint["global_step"]
        assert validation_loss(checkpoint["state_dict"]) == losses.logged[step]
    with pytest.raises(ValueError, match="`save_weights_only=True`: then its `state_dict` is what"):
        load_averaged(files[0])


@both
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("use_for", [STAGES, ()], ids=["validate", "nothing"])
@pytest.mark.parametrize("batch_idx", [2, BATCHES - 1])
def test_statistics_in_a_checkpoint_are_those_of_the_average_also_within_an_epoch(
    kind, weights_only, use_for, batch_idx, tmp_path
):
    make = {"SWA": SWA, "EMA": EMA}[kind]
    callback = make(
        refresh_norm_stats=True, use_for=use_for, **{"EMA": {}, "SWA": {"start": 0}}[kind]
    )
    saves = Saves(
        "on_train_batch_end", tmp_path / "then.ckpt", batch_idx=batch_idx,
        weights_only=weights_only,
    )  # fmt: skip
    with_it, without = Snapshots(), Snapshots()
    fit(Net(norm=True), callback, saves, with_it, **checkpointing(tmp_path))
    x = samples()[0].double()
    if use_for:
        found = state_dict_of(saves.path)
    elif weights_only:
        return
    else:
        found = load_averaged(saves.path)
    assert torch.allclose(found["net.0.running_mean"].double(), x.mean(0), rtol=0, atol=1e-6)
    assert torch.allclose(found["net.0.running_var"].double(), x.var(0), rtol=0, atol=1e-6)
    fit(Net(norm=True), without)
    assert_same(without.by_step, with_it.by_step)


@both
def test_load_from_checkpoint_gives_the_average(kind, tmp_path):
    module = Net()
    trainer = fit(module, CALLBACKS[kind]())
    loaded = Net.load_from_checkpoint(checkpoint_of(trainer, tmp_path), weights_only=True)
    assert_same(weights_of(module), weights_of(loaded))


@both
@pytest.mark.parametrize(
    ("hook", "batch_idx"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", BATCHES - 1),
        ("on_validation_start", None),
        ("on_validation_batch_end", None),
        ("on_validation_epoch_end", None),
        ("on_validation_end", None),
        ("on_train_epoch_end", None),
    ],
)
@pytest.mark.parametrize("use_for", [STAGES, ("test",)], ids=["validate", "test"])
def test_a_checkpoint_of_any_hook_holds_both_and_is_resumed(
    kind, hook, batch_idx, use_for, tmp_path
):
    def make():
        return CALLBACKS[kind](use_for=use_for)

    snapshots = Snapshots()
    saves = Saves(hook, tmp_path / "then.ckpt", batch_idx=batch_idx)
    whole = Net(norm=True)
    callback = make()
    fit(whole, callback, snapshots, saves, epochs=4, loader=resumable(), **checkpointing(tmp_path))
    step = BATCHES + (BATCHES - 1 if batch_idx is None else batch_idx)
    raw = snapshots.by_step[step]
    assert_same(raw, {n: load_raw(saves.path)[n] for n in raw})
    if hook == "on_train_batch_end" and batch_idx == 2 and kind == "SWA":
        with pytest.raises(ValueError, match="before the first model entered"):
            load_averaged(saves.path)
    elif kind == "SWA":  # one model
        found = load_averaged(saves.path)
        names = dict(whole.named_parameters())
        assert_close({n: found[n] for n in names}, {n: raw[n] for n in names}, atol=0)
    else:
        assert differs(raw, load_averaged(saves.path))
    resumed, again = Net(norm=True), make()
    rest = Snapshots()
    fit(
        resumed, again, rest, epochs=4, ckpt_path=saves.path, initialise=False,
        loader=resumable(),
    )  # fmt: skip
    assert_same(snapshots.at_end, rest.at_end)
    assert_same(weights_of(whole), weights_of(resumed))
    assert callback.summary == again.summary


@both
def test_a_file_of_weights_alone_is_tested_as_it_is(kind, tmp_path):
    module, snapshots = Net(norm=True), Snapshots()
    trainer = fit(module, CALLBACKS[kind](use_for=("test",)), snapshots)
    path = checkpoint_of(trainer, tmp_path, weights_only=True)
    assert differs(snapshots.at_end, run_stage("test", trainer, module))
    with warned(f"`{kind}` finds no average of its own in the checkpoint"):
        tested = run_stage("test", trainer, module, ckpt_path=path)
    assert_same(snapshots.at_end, tested)


def resumable():
    return ResumableLoader(data())


class Sparse(Net):
    """Leaves a frozen backbone out of its checkpoints, as users of big models do."""

    def __init__(self):
        super().__init__(norm=True)
        self.net[1].requires_grad_(False)
        self.strict_loading = False

    def state_dict(self, *args, **options):
        found = super().state_dict(*args, **options)
        return {name: value for name, value in found.items() if not name.startswith("net.1.")}


@both
def test_a_module_that_drops_keys_of_its_state_dict_keeps_them_dropped(kind, tmp_path):
    module, snapshots = Sparse(), Snapshots()
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    fit(module, CALLBACKS[kind](), snapshots, saves, **checkpointing(tmp_path))
    checkpoint = torch.load(saves.path, weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("net.1.")]
    assert not [name for name in load_averaged(saves.path) if name.startswith("net.1.")]
    assert not [name for name in load_raw(saves.path) if name.startswith("net.1.")]
    backbone = module.net[1].weight.clone()
    resumed, rest = Sparse(), Snapshots()
    initialised(resumed)  # the backbone comes from elsewhere
    fit(resumed, CALLBACKS[kind](), rest, ckpt_path=saves.path, initialise=False)
    assert_same(snapshots.at_end, rest.at_end)
    assert_same(weights_of(module), weights_of(resumed))
    assert torch.equal(resumed.net[1].weight, backbone)


@both
def test_odd_tensors_are_stored_and_resumed(kind, tmp_path):
    module, snapshots = Odd(), Snapshots()
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    fit(module, CALLBACKS[kind](), snapshots, saves, **checkpointing(tmp_path))
    resumed, rest = Odd(), Snapshots()
    fit(resumed, CALLBACKS[kind](), rest, ckpt_path=saves.path, initialise=False)
    del snapshots.at_end["scratch"], rest.at_end["scratch"]  # no checkpoint holds it
    assert_same(snapshots.at_end, rest.at_end)
    left, right = weights_of(module), weights_of(resumed)
    del left["scratch"], right["scratch"]
    assert_same(left, right)
    stored = state_dict_of(saves.path)
    assert stored["tied.weight"].data_ptr() == stored["net.0.weight"].data_ptr()


@both
def test_parameters_made_in_configure_model_are_resumed(kind, tmp_path):
    module, snapshots = MadeInConfigureModel(), Snapshots()
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    module.configure_model()
    fit(module, CALLBACKS[kind](), snapshots, saves, **checkpointing(tmp_path))
    resumed = MadeInConfigureModel()
    fit(resumed, CALLBACKS[kind](), ckpt_path=saves.path, initialise=False)
    assert_same(weights_of(module), weights_of(resumed))


@both
def test_a_checkpoint_of_the_end_holds_the_average_and_its_size_is_that_of_two(kind, tmp_path):
    def wide():
        return Net(width=2000, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-4))

    trainer = fit(wide(), CALLBACKS[kind]())
    path = checkpoint_of(trainer, tmp_path)
    plain = checkpoint_of(fit(wide()), tmp_path, "plain.ckpt")
    parameters = 4 * sum(p.numel() for p in wide().parameters())
    extra = path.stat().st_size - plain.stat().st_size
    assert parameters <= extra < 1.1 * parameters


# -- resumed -----------------------------------------------------------------------------------


@both
def test_a_finished_run_is_taken_up_where_training_left_it(kind, tmp_path):
    """The hand-over of the average must not be what the next epoch trains."""
    first = fit(Net(norm=True), CALLBACKS[kind](), epochs=3)
    path = checkpoint_of(first, tmp_path)
    longer, whole = Snapshots(), Net(norm=True)
    fit(whole, CALLBACKS[kind](), longer, epochs=5)
    rest, resumed = Snapshots(), Net(norm=True)
    fit(resumed, CALLBACKS[kind](), rest, epochs=5, ckpt_path=path, initialise=False)
    assert_same(longer.by_step[18:], rest.by_step)
    assert_same(weights_of(whole), weights_of(resumed))


def last_of(folder):
    return ModelCheckpoint(folder, save_last=True, save_top_k=0)


@both
@pytest.mark.parametrize(
    ("callbacks", "options"),
    [([StopsAfter(3)], {"epochs": 20}), ([], {"epochs": 20, "max_steps": 18})],
    ids=["early", "max_steps"],
)
def test_a_run_that_stopped_early_is_taken_up_where_training_left_it(
    kind, callbacks, options, tmp_path
):
    options = checkpointing(tmp_path) | options
    fit(Net(norm=True), CALLBACKS[kind](), last_of(tmp_path), *callbacks, **options)
    longer, whole = Snapshots(), Net(norm=True)
    fit(whole, CALLBACKS[kind](), longer, epochs=5)
    rest, resumed = Snapshots(), Net(norm=True)
    fit(
        resumed, CALLBACKS[kind](), rest, last_of(tmp_path), epochs=5,
        ckpt_path=tmp_path / "last.ckpt", initialise=False, **checkpointing(tmp_path),
    )  # fmt: skip
    assert_same(longer.by_step[18:], rest.by_step)
    assert_same(weights_of(whole), weights_of(resumed))


class First(pl.Callback):
    """Notes the weights that training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.found = weights_of(pl_module)


@both
def test_a_run_that_stopped_within_an_epoch_trains_on_from_there(kind, tmp_path):
    longer, rest, first, module = Snapshots(), Snapshots(), First(), Net(norm=True)
    fit(module, CALLBACKS[kind](), longer, epochs=4, loader=resumable())
    stopped = fit(Net(norm=True), CALLBACKS[kind](), max_steps=15, loader=resumable())
    path = checkpoint_of(stopped, tmp_path)
    fit(
        Net(norm=True), CALLBACKS[kind](), first, rest, epochs=4, ckpt_path=path,
        initialise=False, loader=resumable(),
    )  # fmt: skip
    assert_same(longer.by_step[14], first.found)


@both
def test_a_run_that_early_stopping_ended_says_so_and_hands_the_average_over(kind):
    module, snapshots = Net(), Snapshots()
    stopping = EarlyStopping("val_loss", min_delta=1e9, patience=1)
    callback = CALLBACKS[kind]()
    fit(module, callback, snapshots, stopping, epochs=20, precision="64-true")
    assert len(snapshots.by_epoch) == 2
    with callback.averaged(module):
        assert_same(weights_of(module), weights_of(module))
    assert differs(weights_of(module), snapshots.at_end) is (kind == "EMA")


@both
def test_a_resumed_run_without_the_callback_and_a_raw_state_dict(kind, tmp_path, recwarn):
    """With `use_for` without "validate", anyone can take the run up."""
    longer, rest = Snapshots(), Snapshots()
    fit(Net(norm=True), longer, epochs=4)
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    callback = CALLBACKS[kind](use_for=("test",))
    fit(Net(norm=True), callback, saves, epochs=4, **checkpointing(tmp_path))
    with warned(r"callbacks used to create the checkpoint .*load_averaged\(path\)"):
        fit(Net(norm=True), rest, epochs=4, ckpt_path=saves.path, initialise=False)
    assert_same(longer.at_end, rest.at_end)


@both
def test_a_resumed_run_without_the_callback_from_a_file_without_average(kind, tmp_path):
    longer, rest = Snapshots(), Snapshots()
    fit(Net(norm=True), longer, epochs=4)
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    fit(Net(norm=True), CALLBACKS[kind](), saves, epochs=4, **checkpointing(tmp_path))
    without_average(saves.path, tmp_path / "without.ckpt")
    path = tmp_path / "without.ckpt"
    fit(Net(norm=True), rest, epochs=4, ckpt_path=path, initialise=False)
    assert_same(longer.by_step[12:], rest.by_step)
    assert_same(longer.at_end, rest.at_end)


@both
def test_a_resumed_run_without_the_callback_is_warned_where_the_average_is(kind, tmp_path):
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    fit(Net(), CALLBACKS[kind](), saves, **checkpointing(tmp_path))
    with warned(rf"{kind}\[optkit-averaging\].*load_averaged\(path\).*load_raw\(path\)"):
        fit(Net(), ckpt_path=saves.path, initialise=False)


@both
def test_a_run_that_began_without_the_callback_is_resumed_with_it(kind, tmp_path):
    longer, rest = Snapshots(), Snapshots()
    fit(Net(), longer, epochs=4)
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    fit(Net(), saves, epochs=4, **checkpointing(tmp_path))
    callback, module = CALLBACKS[kind](), Net()
    fit(module, callback, rest, epochs=4, ckpt_path=saves.path, initialise=False)
    assert_same(longer.at_end, rest.at_end)
    assert callback.num_averaged == (2 if kind == "SWA" else 12)
    if kind == "SWA":
        assert_close(weights_of(module), mean_of(rest.by_epoch), atol=1e-6)


@both
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"use_for": ()}),
        ({"use_for": ()}, {}),
        ({}, {"refresh_norm_stats": True}),
        ({"refresh_norm_stats": True}, {"refresh_norm_stats": False}),
        ({"name": "one"}, {"name": "another"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_settings_may_change_where_a_run_is_resumed(kind, before, after, tmp_path):
    longer, rest = Snapshots(), Snapshots()
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt")
    whole = CALLBACKS[kind](**before)
    fit(Net(norm=True), whole, longer, saves, epochs=4, **checkpointing(tmp_path))
    callback, module = CALLBACKS[kind](**after), Net(norm=True)
    fit(module, callback, rest, epochs=4, ckpt_path=saves.path, initialise=False)
    assert_same(longer.at_end, rest.at_end)
    is_new = "name" in after
    assert (callback.num_averaged == whole.num_averaged) is not is_new
    if not is_new:
        with whole.averaged(whole._weights.module), callback.averaged(module):
            expected = whole._weights.module.net[1].weight
            assert torch.equal(expected, module.net[1].weight)


# -- the average by hand -----------------------------------------------------------------------


@both
def test_the_average_can_be_looked_at_during_training(kind):
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if callback.num_averaged:
                with callback.averaged(pl_module), callback.averaged(pl_module), torch.no_grad():
                    pl_module.loss(batch)

    with_it, without = Snapshots(), Snapshots()
    callback = CALLBACKS[kind](refresh_norm_stats=False)
    module, other = Net(), Net()
    fit(module, callback, Looks(), with_it)
    fit(other, CALLBACKS[kind](refresh_norm_stats=False), without)
    assert_same(without.by_step, with_it.by_step)
    assert_same(weights_of(other), weights_of(module))


@both
def test_a_stage_within_the_block_runs_on_the_average_and_leaves_it_there(kind):
    callback, snapshots, module = CALLBACKS[kind](use_for=("test",)), Snapshots(), Net()
    trainer = fit(module, callback, snapshots)
    with callback.averaged(module):
        average = weights_of(module)
        assert_same(average, run_stage("test", trainer, module))
        assert_same(average, run_stage("validate", trainer, module))
        assert_same(average, weights_of(module))
    assert_same(snapshots.at_end, weights_of(module))
    with pytest.raises(RuntimeError, match="gone"), callback.averaged(module):
        raise RuntimeError("gone")
    assert_same(snapshots.at_end, weights_of(module))


# -- exceptions --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "hook",
    ["on_validation_start", "on_validation_batch_start", "on_validation_epoch_end",
     "on_validation_end"],
)  # fmt: skip
@pytest.mark.parametrize("error", [RuntimeError("gone"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_validation_puts_the_weights_of_training_back(kind, hook, error):
    snapshots, module = Snapshots(), Net(norm=True)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(module, CALLBACKS[kind](), snapshots, Raises(hook, error, epoch=2), epochs=5)
    assert_same(snapshots.by_step[-1], weights_of(module))


@both
@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_train_batch_start"])
def test_a_run_after_an_error_is_as_any_other(kind, hook, tmp_path):
    """With the same Trainer, callback and module: nothing is left of the first."""
    callback, module = CALLBACKS[kind](), Net(norm=True)
    trainer = trainer_of(callback, Snapshots(), raises := Raises(hook, RuntimeError("gone")))
    with pytest.raises(RuntimeError, match="gone"):
        trainer.fit(initialised(module), data(), held_out())
    raises.epoch = None
    path = checkpoint_of(fit(Net(norm=True), CALLBACKS[kind](), epochs=2), tmp_path)
    module.train()
    trainer.fit(module, data(), held_out(), ckpt_path=path)
    other = Net(norm=True)
    fit(other, CALLBACKS[kind]())
    assert_same(weights_of(other), weights_of(module))
    assert "step" not in vars(trainer.optimizers[0])
    assert "lightning_module_state_dict" not in vars(trainer.strategy)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_an_error_in_a_stage_puts_the_weights_of_training_back(stage):
    class Fails(Net):
        def on_test_epoch_end(self):
            raise RuntimeError("gone")

        def on_predict_epoch_end(self):
            raise RuntimeError("gone")

    snapshots, module = Snapshots(), Fails()
    trainer = fit(module, EMA(use_for=("test", "predict")), snapshots)
    with pytest.raises(RuntimeError, match="gone"):
        run_stage(stage, trainer, module)
    assert differs(module.seen[stage][-1], snapshots.at_end)
    assert_same(snapshots.at_end, weights_of(module))


@both
@pytest.mark.filterwarnings("ignore:.*`.fit\\(ckpt_path=None\\)`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_checkpoint_on_an_exception_is_resumed(kind, hook, first, tmp_path):
    """Whether it is written before or after the weights of training are put back."""
    saves = OnExceptionCheckpoint(tmp_path, filename="error")
    callbacks = [saves, CALLBACKS[kind]()] if first else [CALLBACKS[kind](), saves]
    snapshots = Snapshots()
    with pytest.raises(RuntimeError, match="gone"):
        fit(
            Net(norm=True), *callbacks, snapshots, Raises(hook, RuntimeError("gone"), epoch=2),
            epochs=4, loader=resumable(), **checkpointing(tmp_path),
        )  # fmt: skip
    raw = snapshots.by_step[-1]
    path = Path(saves.ckpt_path)
    assert_same(raw, {n: load_raw(path)[n] for n in raw})
    assert_same(dict(state_dict_of(path)), load_averaged(path))
    average, name = load_averaged(path), "net.1.weight"
    if kind == "SWA":
        expected = mean_of(snapshots.by_epoch[1:] + ([raw] if "validation" in hook else []))
        assert_close({name: average[name]}, {name: expected[name]}, atol=1e-6)
    else:
        assert not torch.equal(average[name], raw[name])
    first, again = First(), CALLBACKS[kind]()
    options = {"initialise": False, "ckpt_path": path, "loader": resumable()}
    trainer = fit(Net(norm=True), again, first, epochs=4, **options)
    assert_same(raw, first.found)
    assert again.num_averaged == (3 if kind == "SWA" else trainer.global_step)


@pytest.mark.filterwarnings("ignore:.*`.fit\\(ckpt_path=None\\)`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
def test_no_step_is_run_for_the_checkpoint_of_an_exception(tmp_path):
    """What has just failed would fail again, or one rank would wait for the others."""

    class Fails(Net):
        num_after = 0

        def training_step(self, batch, batch_idx):
            self.num_after += self.num_training_steps > 8
            if self.num_training_steps > 8:
                raise RuntimeError("gone")
            return super().training_step(batch, batch_idx)

    saves, snapshots, module = OnExceptionCheckpoint(tmp_path), Snapshots(), Fails(norm=True)
    ema = EMA(0.8, refresh_norm_stats=True)
    with pytest.raises(RuntimeError, match="gone"):
        fit(module, ema, snapshots, saves, **checkpointing(tmp_path))
    assert module.num_after == 1
    raw = snapshots.by_step[-1]
    assert_same(raw, {n: load_raw(saves.ckpt_path)[n] for n in raw})
    assert differs(raw, load_averaged(saves.ckpt_path))


# -- two averages ------------------------------------------------------------------------------


def two():
    return [SWA(start=1), EMA(0.8, use_for=(), name="slow", refresh_norm_stats=True)]


def test_two_averages_in_one_trainer_are_each_right():
    swa, ema = two()
    snapshots, module = Snapshots(), Net()
    fit(module, swa, ema, snapshots, precision="64-true")
    assert_close(weights_of(module), mean_of(snapshots.by_epoch[1:]), atol=1e-12)
    alone, other = EMA(0.8), Net()
    fit(other, alone, precision="64-true")
    handed_over = weights_of(module)
    with ema.averaged(module):
        assert_close(weights_of(module), weights_of(other), atol=1e-14)
    assert_same(handed_over, weights_of(module))
    with swa.averaged(module):
        assert_same(handed_over, weights_of(module))


def test_two_averages_are_stored_and_resumed(tmp_path):
    saves = Saves("on_train_epoch_end", tmp_path / "then.ckpt", epoch=2)
    whole, longer = Net(norm=True), Snapshots()
    callbacks = two()
    fit(whole, *callbacks, longer, saves, epochs=4, **checkpointing(tmp_path))
    resumed, rest, again = Net(norm=True), Snapshots(), two()
    fit(resumed, *again, rest, epochs=4, ckpt_path=saves.path, initialise=False)
    assert_same(longer.at_end, rest.at_end)
    assert_same(weights_of(whole), weights_of(resumed))
    for before, now in zip(callbacks, again, strict=True):
        assert_same(before.state_dict(), now.state_dict())
        with before.averaged(whole), now.averaged(resumed):
            assert_same(weights_of(whole), weights_of(resumed))
    names = dict(whole.named_parameters())
    swa, ema = load_averaged(saves.path), load_averaged(saves.path, name="slow")
    assert_close(
        {n: swa[n] for n in names},
        {n: w for n, w in mean_of(longer.by_epoch[1:3]).items() if n in names},
        atol=1e-6,
    )
    assert differs(swa, ema)
    assert_same(swa, dict(state_dict_of(saves.path)))


@pytest.mark.parametrize("kept", [0, 1], ids=["SWA", "EMA"])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_a_run_of_two_averages_is_resumed_with_one_of_them(kept, hook, tmp_path):
    saves = Saves(hook, tmp_path / "then.ckpt", epoch=2)
    longer, rest = Snapshots(), Snapshots()
    whole = two()
    fit(Net(norm=True), *whole, longer, saves, epochs=4, **checkpointing(tmp_path))
    callback, module = two()[kept], Net(norm=True)
    with warned("callbacks used to create the checkpoint need to be provided"):
        fit(module, callback, rest, epochs=4, ckpt_path=saves.path, initialise=False)
    assert_same(longer.at_end, rest.at_end)
    assert callback.summary == whole[kept].summary
    assert differs(weights_of(module), rest.at_end) is (kept == 0)


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (
            lambda: [SWA(start=1), EMA(use_for=())],
            r"and 'optkit-averaging', and no stage in both\. Pass `name='swa'` to",
        ),
        (
            lambda: [SWA(start=1), EMA(name="slow")],
            r"stage, .* \['predict', 'test', 'validate'\] in both\. Pass `use_for=\(\)` to",
        ),
        (
            lambda: [SWA(start=1, use_for=("test",)), EMA(name="slow", use_for=("test",))],
            r"\['test'\] in both",
        ),
        (lambda: [SWA(start=1), EMA()], "Pass `use_for=\\(\\)` and `name='swa'` to one of them"),
    ],
)
def test_two_averages_for_one_purpose_are_refused_with_what_to_write(callbacks, text):
    module = Net()
    with pytest.raises(MisconfigurationException, match=text):
        fit(module, *callbacks())
    assert module.num_training_steps == 0


def test_two_averages_of_one_kind_without_names_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match=r"`callback\.state_key` must be unique"):
        trainer_of(EMA(), EMA())
    fit(Net(), EMA(0.5), EMA(0.9, name="slow", use_for=()))


def test_two_averages_may_share_the_stages_between_them(tmp_path):
    snapshots, module = Snapshots(), Net()
    callbacks = [SWA(start=1, use_for=("validate",)), EMA(0.8, use_for=("test",), name="slow")]
    saves = Saves("on_train_epoch_end", tmp_path / "end.ckpt", epoch=2)
    fit(module, *callbacks, snapshots, saves, **checkpointing(tmp_path))
    fresh = [SWA(start=1, use_for=("validate",)), EMA(0.8, use_for=("test",), name="slow")]
    seen = run_stage("validate", trainer_of(*fresh), Net(), ckpt_path=saves.path)
    assert_close(seen, mean_of(snapshots.by_epoch[1:]), atol=1e-6)
    seen = run_stage("test", trainer_of(*fresh), Net(), ckpt_path=saves.path)
    stored = load_averaged(saves.path, name="slow")
    assert_same({n: stored[n] for n in seen}, seen)
    raw = load_raw(saves.path)
    seen = run_stage("predict", trainer_of(*fresh), Net(), ckpt_path=saves.path)
    assert_same({n: raw[n] for n in seen}, seen)


# -- the average of a module with a frozen backbone --------------------------------------------


def test_what_was_never_trained_is_stored_once(tmp_path):
    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(300, 300).requires_grad_(False)

    trainer = fit(Frozen(), EMA())
    with_it = checkpoint_of(trainer, tmp_path)
    plain = checkpoint_of(fit(Frozen()), tmp_path, "plain.ckpt")
    assert with_it.stat().st_size - plain.stat().st_size < 20_000
    resumed = Frozen()
    fit(resumed, EMA(), epochs=4, ckpt_path=with_it, initialise=False)
    assert torch.equal(resumed.backbone.weight, state_dict_of(with_it)["backbone.weight"])
