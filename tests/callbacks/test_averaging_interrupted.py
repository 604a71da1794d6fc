"""What becomes of an average when a run is interrupted, goes on from a file, or is over."""

from __future__ import annotations

import gc
import pickle
import signal
import threading
import warnings
from contextlib import contextmanager
from datetime import timedelta
from types import FunctionType, ModuleType

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_optkit import EMA, SWA, is_probing, load_averaged, load_raw
from lightning_optkit.bridge.exchange import Exchange
from tests.callbacks.averaging_modules import (
    BATCHES,
    Net,
    Raises,
    Snapshots,
    Stream,
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

REFRESHING = {
    "SWA": lambda **options: SWA(start=1, every_n_steps=1, **options),
    "EMA": lambda **options: EMA(0.8, refresh_norm_stats=True, **options),
}
CALLBACKS = {
    "SWA": lambda **options: SWA(start=1, **options),
    "EMA": lambda **options: EMA(0.8, **options),
}
both = pytest.mark.parametrize("kind", list(CALLBACKS))
on_exception = [
    pytest.mark.filterwarnings("ignore:.*`.fit\\(ckpt_path=None\\)`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning"),
]
STATISTICS = ("net.0.running_mean", "net.0.running_var")
ENDS = (RuntimeError, KeyboardInterrupt, SystemExit)


def resumable():
    return ResumableLoader(data())


def validated_on(trainer, module):
    trainer.validate(module, held_out(), verbose=False)
    return module.seen["validate"][-1]


def assert_statistics_of_the_data(weights):
    x = samples()[0].double()
    mean, var = (weights[name].double() for name in STATISTICS)
    assert torch.allclose(mean, x.mean(0), rtol=0, atol=1e-6)
    assert torch.allclose(var, x.var(0), rtol=0, atol=1e-6)


@contextmanager
def recorded():
    """Hand out the list of all warnings' messages of the block."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(warning.message) for warning in caught)


class Interrupts(pl.Callback):
    """Raises after one batch of one epoch."""

    def __init__(self, *, epoch, batch_idx, error=None):
        self.error = RuntimeError("gone") if error is None else error
        self.at = (epoch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise self.error


# -- statistics that are not the average's -----------------------------------------------------


@both
@pytest.mark.parametrize("error", [RuntimeError("gone"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("val", "origin"), [(False, "of the last model"), (True, "of an earlier average")]
)
def test_an_interrupted_average_is_used_with_a_warning(kind, error, val, origin):
    callback, snapshots, module = REFRESHING[kind](), Snapshots(), Net(norm=True)
    trainer = trainer_of(
        callback, snapshots, Interrupts(epoch=2, batch_idx=1, error=error),
        epochs=5, limit_val_batches=1.0 if val else 0,
    )  # fmt: skip
    with pytest.raises(ENDS):
        trainer.fit(initialised(module), data(), held_out())
    raw = snapshots.by_step[-1]
    assert_same(raw, weights_of(module))
    assert callback.summary.endswith(f"; normalization statistics {origin}")
    text = f"`{kind}` is used with normalization statistics {origin}, because training was inter"
    with warned(text), callback.averaged(module):
        averaged = weights_of(module)
    if kind == "SWA":
        models = mean_of(snapshots.by_step[BATCHES:])
        names = dict(module.named_parameters())
        assert_close({n: averaged[n] for n in names}, {n: models[n] for n in names}, atol=1e-6)
    assert differs(averaged, raw)
    if val:
        assert_statistics_of_the_data(averaged)
    else:
        assert_same([raw[name] for name in STATISTICS], [averaged[name] for name in STATISTICS])
    trainer.limit_val_batches = 1.0
    with warned(text):
        seen = validated_on(trainer, module)
    assert_same(averaged, seen)
    assert_same(raw, weights_of(module))


@both
def test_an_average_with_its_own_statistics_is_used_without_a_warning(kind):
    callback, module = REFRESHING[kind](), Net(norm=True)
    interrupts = Raises("on_train_batch_start", RuntimeError("gone"), epoch=2)  # after a validation
    with pytest.raises(RuntimeError, match="gone"):
        fit(module, callback, interrupts)
    assert callback.summary.endswith("; normalization statistics from 24 samples")
    with callback.averaged(module):
        assert_statistics_of_the_data(weights_of(module))


@both
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_statistics_are_taken_where_a_hook_looks_at_the_average(kind, hook):
    found = []

    class Looks(pl.Callback):
        def look(self, trainer, pl_module, *_):
            if callback.num_averaged:
                with callback.averaged(pl_module):
                    found.append(weights_of(pl_module))

    setattr(Looks, hook, Looks.look)
    callback, with_it, without = REFRESHING[kind](), Snapshots(), Snapshots()
    fit(Net(norm=True), callback, Looks(), with_it, val=False)
    assert len(found) == (2 if kind == "SWA" else 3) * (6 if "batch" in hook else 1)
    for weights in found:
        assert_statistics_of_the_data(weights)
    fit(Net(norm=True), without, val=False)
    assert_same(without.by_step, with_it.by_step)


class FailsLate(Net):
    """Whose step cannot be run by a pass any more from some step on."""

    def __init__(self, step):
        super().__init__(norm=True)
        self.fails_from = step

    def training_step(self, batch, batch_idx):
        if is_probing() and self.global_step >= self.fails_from:
            raise OSError("disk is gone")
        return super().training_step(batch, batch_idx)


@both
@pytest.mark.parametrize(
    ("step", "origin"), [(BATCHES + 1, "of the last model"), (15, "of an earlier average")]
)
def test_a_pass_that_fails_late_does_not_stop_training_and_is_named(kind, step, origin):
    options = {"SWA": {}, "EMA": {"start_step": BATCHES}}[kind]
    callback = REFRESHING[kind](**options)
    snapshots, plain, module = Snapshots(), Snapshots(), FailsLate(step)
    with recorded() as messages:
        fit(module, callback, snapshots)
    failed = f"keeps those {origin}; training goes on. OSError: disk is gone"
    used = f"`{kind}` is used with normalization statistics {origin}"
    assert any(failed in message for message in messages), messages
    assert any(used in message for message in messages), messages
    assert callback.summary.endswith(f"; normalization statistics {origin}")
    assert "samples" not in callback.summary
    assert len(snapshots.by_step) == 3 * BATCHES
    fit(Net(norm=True), plain)
    assert_same(plain.by_step, snapshots.by_step)
    assert_same(weights_of(module), module.seen["validate"][-1] | {
        name: weights_of(module)[name]
        for name in (STATISTICS if origin == "of the last model" else ())
    })  # fmt: skip


# -- interrupted within an exchange ------------------------------------------------------------


def values():
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (2, 3), "b": (3,), "mean": (2,), "c": (4,), "d": (1,)}
    here = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    aside = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    aside["c"] = aside["c"].double()  # is cloned
    return here, aside


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def raises_at(monkeypatch, number, act):
    """Call ``act`` in the midst of the exchanges, at the tensor of this number, from 1 on."""
    one = Exchange._exchange_one
    calls = []

    def exchange_one(self, *args):
        calls.append(args[0])
        if len(calls) == number:
            act()
        one(self, *args)

    monkeypatch.setattr(Exchange, "_exchange_one", exchange_one)
    return calls


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("there", [True, False], ids=["there", "back"])
def test_ctrl_c_waits_for_the_end_of_an_exchange(number, there, monkeypatch):
    here, aside = values()
    own, others = copies(here), copies(aside)
    exchange = Exchange(["mean"])
    if not there:
        exchange.exchange(here, aside)
    before = signal.getsignal(signal.SIGINT)
    calls = raises_at(monkeypatch, number, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        exchange.exchange(here, aside)
    assert len(calls) == 5
    assert exchange.is_exchanged is there
    expected = {n: v.float() for n, v in others.items()} if there else own
    assert_same(expected, here)
    assert signal.getsignal(signal.SIGINT) is before
    if there:
        exchange.exchange(here, aside)
    assert_same((own, others), (here, aside))


def test_other_signals_wait_and_are_handed_on_in_their_order(monkeypatch):
    here, aside = values()
    exchange, received = Exchange(["mean"]), []
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM]
    before = {number: signal.getsignal(number) for number in set(numbers)}

    def handler(number, frame):
        received.append((number, exchange.is_exchanged))

    try:
        for number in before:
            signal.signal(number, handler)
        raises_at(monkeypatch, 2, lambda: [signal.raise_signal(number) for number in numbers])
        exchange.exchange(here, aside)
        assert [signal.getsignal(number) for number in before] == [handler, handler]
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
    assert received == [(number, True) for number in numbers]


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("there", [True, False], ids=["there", "back"])
def test_an_error_in_the_midst_of_an_exchange_undoes_it(number, there, monkeypatch):
    def fail():
        raise RuntimeError("gone")

    here, aside = values()
    exchange = Exchange(["mean"])
    if not there:
        exchange.exchange(here, aside)
    before = copies(here), copies(aside)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    raises_at(monkeypatch, number, fail)
    with pytest.raises(RuntimeError, match="gone"):
        exchange.exchange(here, aside)
    assert_same(before, (here, aside))
    assert exchange.is_exchanged is not there
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()
    exchange.exchange(here, aside)  # nothing is left of it
    exchange.exchange(here, aside)
    assert_same(before, (here, aside))


@pytest.mark.parametrize(("name", "shape"), [("mean", (5,)), ("d", (3,)), ("b", (1,)), ("b", (2,))])
def test_values_of_another_shape_are_not_exchanged(name, shape):
    """Those of one number, too, which would fill all that are there."""
    here, aside = values()
    aside[name] = torch.ones(shape)
    before = copies(here), copies(aside)
    exchange = Exchange(["mean"])
    text = rf"must keep their shapes .* got `{name}` .* average is of shape \({shape[0]},\)"
    with pytest.raises(ValueError, match=text):
        exchange.exchange(here, aside)
    assert_same(before, (here, aside))
    assert not exchange.is_exchanged


def test_an_exchange_in_a_thread_needs_no_signals():
    here, aside = values()
    own, others = copies(here), copies(aside)
    exchange, failed = Exchange(["mean"]), []

    def there_and_back():
        try:
            exchange.exchange(here, aside)
            assert_same(others["a"], here["a"])
            exchange.exchange(here, aside)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=there_and_back)
    thread.start()
    thread.join()
    assert not failed
    assert_same((own, others), (here, aside))


def test_ctrl_c_within_any_exchange_of_a_run_leaves_the_weights_of_training(monkeypatch):
    """Of a validation, of a pass for statistics, and back."""
    calls, num_before_end = raises_at(monkeypatch, 0, lambda: None), []

    class Ends(pl.Callback):
        def on_train_end(self, *_):
            num_before_end.append(len(calls))

    fit(Net(norm=True), SWA(start=1), Ends())
    first = [i for i, name in enumerate(calls, start=1) if name == calls[0]]
    last = [i - 1 for i in first[1:]]
    numbers = [i for i in (*first, *last) if i <= num_before_end[0]]
    assert len(numbers) == 16  # there and back, in two validations, each with a pass
    for number in numbers:
        monkeypatch.undo()
        raises_at(monkeypatch, number, lambda: signal.raise_signal(signal.SIGINT))
        snapshots, module = Snapshots(), Net(norm=True)
        with pytest.raises(ENDS):
            fit(module, SWA(start=1), snapshots)
        assert_same(snapshots.by_step[-1], weights_of(module), f"after exchange {number}")


# -- interrupted before the callback's own hook ------------------------------------------------


MISSED = {
    "SWA": lambda: SWA(start=1),
    "SWA, steps": lambda: SWA(start=1, every_n_steps=4),
    "SWA, cycle": lambda: SWA(start=0, lr=0.01, cycle=2),
    "EMA": lambda: EMA(0.8),
    "EMA, steps": lambda: EMA(0.8, every_n_steps=4),
}


@pytest.mark.parametrize("name", list(MISSED))
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("epoch", "batch_idx"), [(1, BATCHES - 1), (1, 1), (2, BATCHES - 1)])
def test_what_an_error_of_another_callback_left_out_is_made_up_for(
    name, after, epoch, batch_idx, tmp_path
):
    """In whose hook, after a step, the run ended: its model is taken where the run goes on."""
    whole, longer = Net(norm=True), Snapshots()
    callback = MISSED[name]()
    fit(whole, callback, longer, epochs=4, loader=resumable(), val=False)
    saves, interrupts = (
        OnExceptionCheckpoint(tmp_path),
        Interrupts(epoch=epoch, batch_idx=batch_idx),
    )
    others = [MISSED[name](), interrupts] if after else [interrupts, MISSED[name]()]
    with pytest.raises(RuntimeError, match="gone"):
        fit(
            Net(norm=True), *others, saves, epochs=4, loader=resumable(), val=False,
            enable_checkpointing=True, default_root_dir=tmp_path,
        )  # fmt: skip
    again, resumed, rest = MISSED[name](), Net(norm=True), Snapshots()
    fit(
        resumed, again, rest, epochs=4, loader=resumable(), val=False, initialise=False,
        ckpt_path=saves.ckpt_path,
    )  # fmt: skip
    assert_same(longer.at_end, rest.at_end)
    assert_same(weights_of(whole), weights_of(resumed))
    assert callback.summary == again.summary


test_what_an_error_of_another_callback_left_out_is_made_up_for.pytestmark += [
    mark.mark for mark in on_exception
]


# -- what a stage from a file leaves -----------------------------------------------------------


def average_of(callback, module):
    with callback.averaged(module):
        return weights_of(module)


def checkpoint_of(trainer, folder, **options):
    path = folder / "then.ckpt"
    trainer.save_checkpoint(path, **options)
    return path


@both
def test_weights_from_a_file_take_the_averages_place(kind, tmp_path):
    callback, module = CALLBACKS[kind](), Net(norm=True)
    path = checkpoint_of(fit(Net(norm=True), CALLBACKS[kind]()), tmp_path, weights_only=True)
    trainer = fit(module, callback, epochs=4)
    trainer.test(module, held_out(), ckpt_path=path, verbose=False)
    file = torch.load(path, weights_only=True)["state_dict"]
    assert_same({n: file[n] for n in weights_of(module)}, weights_of(module))
    for use in (callback.averaged, callback.raw):
        with pytest.raises(ValueError, match="must have averaged a model"), use(module):
            pass
    assert (callback.num_averaged, callback.summary) == (0, f"{kind}: nothing averaged")


@both
def test_a_full_checkpoint_takes_the_averages_place(kind, tmp_path):
    first, callback, module = CALLBACKS[kind](), CALLBACKS[kind](), Net(norm=True)
    other = Net(norm=True)
    path = checkpoint_of(fit(other, first), tmp_path)
    trainer = fit(module, callback, epochs=4)
    longer = average_of(callback, module)
    assert callback.num_averaged > first.num_averaged
    trainer.test(module, held_out(), ckpt_path=path, verbose=False)
    assert callback.num_averaged == first.num_averaged
    assert callback.summary == first.summary
    assert_same(average_of(first, other), average_of(callback, module))
    assert differs(longer, average_of(callback, module))
    with first.raw(other), callback.raw(module):
        assert_same(weights_of(other), weights_of(module))


@both
@pytest.mark.parametrize("weights_only", [False, True])
def test_an_average_kept_aside_stays_through_a_stage_from_a_file(kind, weights_only, tmp_path):
    callback, module = CALLBACKS[kind](use_for=()), Net(norm=True)
    shorter = fit(Net(norm=True), CALLBACKS[kind](use_for=()))
    path = checkpoint_of(shorter, tmp_path, weights_only=weights_only)
    trainer = fit(module, callback, epochs=4)
    before, summary, raw = average_of(callback, module), callback.summary, weights_of(module)
    trainer.test(module, held_out(), ckpt_path=path, verbose=False)
    assert differs(raw, weights_of(module))  # those of the file
    after = average_of(callback, module)
    count = "net.0.num_batches_tracked"  # of integers, which are the module's own
    assert int(after.pop(count)) == 3 * BATCHES < int(before.pop(count))
    assert_same(before, after)
    assert callback.summary == summary


@both
@pytest.mark.parametrize("fits", [True, False], ids=["after fit", "in another process"])
def test_a_stage_that_finds_no_average_of_its_own_says_so(kind, fits, tmp_path):
    trainer = fit(Net(), CALLBACKS[kind](use_for=("test",)))
    path = checkpoint_of(trainer, tmp_path, weights_only=True)
    trainer = trainer if fits else trainer_of(CALLBACKS[kind](use_for=("test",)))
    module = Net()
    text = f"`{kind}` finds no average of its own in the checkpoint, whose weights are used as they"
    with warned(text):
        trainer.test(module, held_out(), ckpt_path=path, verbose=False)
    file = torch.load(path, weights_only=True)["state_dict"]
    assert_same({n: file[n] for n in module.seen["test"][-1]}, module.seen["test"][-1])
    with recorded() as messages:  # a stage that is not to run on it
        trainer.validate(module, held_out(), ckpt_path=path, verbose=False)
    assert not any("average" in message for message in messages), messages


class SavesInTheStep(Net):
    """As a signal of a cluster does, which may come at any time."""

    def __init__(self, path):
        super().__init__(norm=True)
        self.path = path
        self.num_calls = 0

    def training_step(self, batch, batch_idx):
        self.num_calls += 1
        if not is_probing() and self.global_step == 15:
            self.trainer.save_checkpoint(self.path)
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_in_the_midst_of_a_step_runs_no_pass(tmp_path):
    path, module = tmp_path / "step.ckpt", SavesInTheStep(tmp_path / "step.ckpt")
    swa = SWA(start=1, every_n_steps=4)  # whose average is new at step 15, and not validated on
    fit(module, swa, val=False)
    assert load_averaged(path)["net.1.weight"].isfinite().all()
    saved = torch.load(path, weights_only=True)["state_dict"]
    raw = load_raw(path)
    assert_same(saved["net.0.running_mean"], raw["net.0.running_mean"])  # those of the last model
    assert not torch.equal(saved["net.1.weight"], raw["net.1.weight"])
    assert module.num_calls == 18  # what a pass adds is put back


@both
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_a_state_is_found_whatever_its_key_says_in_other_words(kind, tmp_path):
    whole, longer, callback = Net(norm=True), Snapshots(), CALLBACKS[kind]()
    path = checkpoint_of(fit(Net(norm=True), CALLBACKS[kind]()), tmp_path)
    fit(whole, callback, longer, epochs=4)
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["callbacks"]
    (key,) = [key for key in states if key.startswith(kind)]
    assert key == callback.state_key
    states[f"{kind}[optkit-averaging] (as an older version said)"] = states.pop(key)
    torch.save(checkpoint, path)
    again, resumed, rest = CALLBACKS[kind](), Net(norm=True), Snapshots()
    fit(resumed, again, rest, epochs=4, ckpt_path=path, initialise=False)
    assert_same(longer.at_end, rest.at_end)
    assert_same(weights_of(whole), weights_of(resumed))
    assert callback.summary == again.summary
    tested = Net(norm=True)
    trainer_of(CALLBACKS[kind](use_for=("test",))).test(
        tested, held_out(), ckpt_path=path, verbose=False
    )
    file = checkpoint["state_dict"]
    assert_same({n: file[n] for n in tested.seen["test"][0]}, tested.seen["test"][0])


# -- the callback afterwards -------------------------------------------------------------------


@both
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_callback_can_be_pickled_with_its_average(kind, interrupted):
    callback, module = REFRESHING[kind](), Net(norm=True)
    interrupts = Raises("on_train_batch_start", RuntimeError("gone"), epoch=2 if interrupted else 9)
    try:
        fit(module, callback, interrupts)
    except RuntimeError:
        assert interrupted
    copy = pickle.loads(pickle.dumps(callback))
    assert (copy.num_averaged, copy.summary) == (callback.num_averaged, callback.summary)
    twin = copy._weights.module
    assert twin is not module
    assert_same(average_of(callback, module), average_of(copy, twin))
    with callback.raw(module), copy.raw(twin):
        assert_same(weights_of(module), weights_of(twin))


def reached_from(start, *, without):
    """Return all that is kept alive by an object, but not by way of another."""
    found, left = {id(without): without}, [start]
    while left:
        each = left.pop()
        if id(each) in found or isinstance(each, (type, ModuleType)):
            continue
        found[id(each)] = each
        if isinstance(each, FunctionType):  # but for the globals of its file
            left += [each.__closure__, each.__defaults__, each.__kwdefaults__, vars(each)]
        else:
            left += gc.get_referents(each)
    return list(found.values())


@both
@pytest.mark.parametrize("stage", [None, "validate", "file"])
def test_a_callback_keeps_no_trainer_alive(kind, stage, tmp_path):
    """Lightning's module does, and is the callback's to keep."""
    callback, module = REFRESHING[kind](use_for=("test",)), Net(norm=True)
    trainer = fit(module, callback)
    if stage == "validate":
        trainer.validate(module, held_out(), verbose=False)
    elif stage == "file":
        path = checkpoint_of(trainer, tmp_path)
        trainer.test(module, held_out(), ckpt_path=path, verbose=False)
    reached = reached_from(callback, without=module)
    assert any(each is callback._weights for each in reached)
    assert not [each for each in reached if isinstance(each, (pl.Trainer, Strategy, Optimizer))]
    average_of(callback, module)


@both
def test_the_average_of_a_compiled_module_is_asked_for_by_either(kind):
    class Silent(Net):
        def training_step(self, batch, batch_idx):  # logging cannot be compiled
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

    module = initialised(Silent(norm=True))
    compiled = torch.compile(module, backend="eager")
    callback, snapshots = CALLBACKS[kind](use_for=("test",)), Snapshots()
    fit(compiled, callback, snapshots, initialise=False)
    average = average_of(callback, module)
    assert differs(average, snapshots.at_end)
    with callback.averaged(compiled):
        assert_same(average, weights_of(module))
        with callback.raw(compiled):
            assert_same(snapshots.at_end, weights_of(module))
    assert_same(snapshots.at_end, weights_of(module))
    other = torch.compile(Net(norm=True), backend="eager")
    with pytest.raises(ValueError, match="must be the module that was trained"):
        average_of(callback, other)


@both
def test_the_weights_of_training_can_be_looked_at_after_the_hand_over(kind):
    callback, snapshots, module = CALLBACKS[kind](), Snapshots(), Net(norm=True)
    fit(module, callback, snapshots)
    average = weights_of(module)
    assert differs(average, snapshots.at_end)
    with callback.raw(module):
        assert_same(snapshots.at_end, weights_of(module))
        with callback.averaged(module):
            assert_same(average, weights_of(module))
            with callback.raw(module), callback.raw(module):
                assert_same(snapshots.at_end, weights_of(module))
            assert_same(average, weights_of(module))
        assert_same(snapshots.at_end, weights_of(module))
    assert_same(average, weights_of(module))
    with pytest.raises(RuntimeError, match="gone"), callback.raw(module):
        raise RuntimeError("gone")
    assert_same(average, weights_of(module))
    with pytest.raises(ValueError, match="must be the module that"), callback.raw(Net(norm=True)):
        pass
    with pytest.raises(ValueError, match="must have averaged a model"), SWA().raw(module):
        pass


# -- rates -------------------------------------------------------------------------------------


class Records(pl.Callback):
    """Notes the rates that optimizers stepped with, by batch, before the callback asks for them."""

    def __init__(self, swa):
        self.swa = swa
        self.rates = []

    def on_train_batch_end(self, *_):
        self.rates.append(self.swa._rate._rule.effective)


def test_a_group_that_is_added_in_training_keeps_its_schedule():
    class Thaws(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                parameters = list(self.net[2].parameters())
                self.optimizers().optimizer.add_param_group({"params": parameters, "lr": 0.3})

    def of_two_groups(module):
        weight, bias = module.net[0].parameters()
        return torch.optim.SGD([{"params": [weight]}, {"params": [bias], "lr": 0.2}], lr=0.1)

    module, swa = Thaws(optimizer=of_two_groups), SWA(start=1, lr=[0.01, 0.02], anneal_epochs=0)
    records = Records(swa)
    trainer = fit(module, swa, records, val=False)
    scheduled, ours = [[0.1, 0.2]], [[0.01, 0.02]]
    assert records.rates == [scheduled] * 6 + [ours] * 6 + [[[0.01, 0.02, 0.3]]] * 6
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("start", [0, 1])
def test_cycles_of_data_without_a_length_are_those_of_data_with_one(start):
    """Once an epoch has shown it."""
    found = []
    for loader in (DataLoader(Stream(), batch_size=None), data()):
        swa = SWA(start=start, lr=0.01, cycle=2)
        records = Records(swa)
        fit(Net(), swa, records, loader=loader, epochs=4)
        found.append(records.rates)
    unknown, known = found
    assert unknown[BATCHES:] == known[BATCHES:]
    shares = [(t % (2 * BATCHES) + 1) / (2 * BATCHES) for t in range((4 - start) * BATCHES)]
    expected = [0.05] * start * BATCHES + [(1 - s) * 0.05 + s * 0.01 for s in shares]
    assert [rates[0][0] for rates in known] == pytest.approx(expected, abs=1e-12)
    if start == 0:
        assert [rates[0][0] for rates in unknown[:BATCHES]] == [
            (0.05 + 0.01) / 2
        ] * BATCHES  # as at its end


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_cycles_of_data_without_a_length_are_resumed(hook, epoch, tmp_path):
    class ResumableStream(DataLoader):
        """By Lightning's protocol, also within an epoch."""

        num_read = left_at = 0

        def __iter__(self):
            self.num_read, self.left_at = self.left_at, 0
            for batch in self.dataset.batches[self.num_read :]:
                self.num_read += 1
                yield batch

        def state_dict(self):
            is_ahead = 0 < self.num_read < BATCHES  # Lightning reads a batch before it is due
            return {"num_read": self.num_read - is_ahead}

        def load_state_dict(self, state_dict):
            self.left_at = state_dict["num_read"]

    class Saves(pl.callbacks.Checkpoint):
        def save(self, trainer, *args):
            is_then = "batch" not in hook or args[-1] == 2
            if trainer.current_epoch == epoch and is_then and not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "then.ckpt")

    setattr(Saves, hook, Saves.save)

    def run(*callbacks, **options):
        swa, module, snapshots = SWA(start=0, lr=0.01, cycle=2), Net(norm=True), Snapshots()
        records, loader = Records(swa), ResumableStream(Stream(), batch_size=None)
        fit(module, swa, records, snapshots, *callbacks, loader=loader, epochs=4, **options)
        return records.rates[-2 * BATCHES :], snapshots.at_end, weights_of(module), swa.summary

    whole = run(Saves(), enable_checkpointing=True, default_root_dir=tmp_path)
    assert_same(whole, run(ckpt_path=tmp_path / "then.ckpt", initialise=False))


# -- words and starts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (lambda: SWA(start=0), "1 model, epoch 0"),
        (lambda: SWA(start=1), "2 models, epochs 1–2"),
        (lambda: SWA(start="4st", every_n_steps=99), "1 model, step 5"),
        (lambda: SWA(start="4st", every_n_steps=10), "2 models, steps 5–15"),
        (lambda: EMA(start_step=4, every_n_steps=99), "1 model, step 5"),
        (lambda: EMA(start_step=4), "14 models, steps 5–18"),
    ],
)
def test_the_summary_says_from_where_to_where(callback, words):
    callback = callback()
    fit(Net(), callback, epochs=1 if words.endswith("epoch 0") else 3)
    assert callback.summary == f"{type(callback).__name__}: average of {words}"


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 1}], ids=str)
def test_a_start_at_once_needs_no_end_of_the_run(options):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = (trainer.current_epoch, batch_idx) == (1, BATCHES - 1)

    swa, snapshots, module = SWA(start=0.0, **options), Snapshots(), Net()
    fit(module, swa, snapshots, Stops(), epochs=-1, max_time=timedelta(hours=1))
    assert len(snapshots.by_step) == 2 * BATCHES
    models = snapshots.by_step if options else snapshots.by_epoch
    assert swa.num_averaged == len(models)
    assert_close(weights_of(module), mean_of(models), atol=1e-6)
