"""Checkpoints of real runs: the average and the weights of training, read without a callback."""

import pickle
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import EMA, SWA, load_averaged, load_raw, without_average
from lightning_optkit.bridge.averaged_checkpoint import raw_weights
from tests.contracts import ResumableLoader, assert_same


class Shared(pl.LightningModule):
    """Ties a weight, and has a norm layer under two names and a frozen layer."""

    def __init__(self, options=None):
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.ModuleList([self.first, self.norm])
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.norm(self.first(x)) + self.second(x)
        return ((self.head(self.dropout(self.frozen(x))) - y) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Keeper(pl.Callback):
    """Keeps copies of what the run itself has, at its end and before it hands the average over."""

    def __init__(self, *averages):
        self.averages = averages

    def on_train_end(self, trainer, pl_module):
        self.raw = copies(pl_module.state_dict())
        self.averaged = []
        for callback in self.averages:
            with callback.averaged(pl_module):
                self.averaged.append(copies(pl_module.state_dict()))


def copies(state_dict) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state_dict.items()}


def contents(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(24, 3, generator=generator), torch.randn(24, 1, generator=generator)
    )
    return DataLoader(data, batch_size=4)


def new_trainer(folder: Path, callbacks, **options) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, "enable_checkpointing": False} | options,
    )


def train(
    folder: Path, *averages: pl.Callback, module: pl.LightningModule | None = None, **options
) -> tuple[Path, Keeper]:
    """Train, and return a checkpoint of the end and what the run had then."""
    pl.seed_everything(7, verbose=False)
    module = Shared() if module is None else module
    keeper = Keeper(*averages)
    saver = pl.callbacks.ModelCheckpoint(folder, filename="end", save_on_train_epoch_end=True)
    options = {"enable_checkpointing": True, **options}
    trainer = new_trainer(folder, [*averages, keeper, saver], **options)
    trainer.fit(module, loader(), loader())
    return folder / "end.ckpt", keeper


KINDS = {
    "ema": lambda **options: EMA(decay=0.9, **options),
    "ema refreshed": lambda **options: EMA(decay=0.9, refresh_norm_stats=True, **options),
    "swa": lambda **options: SWA(start=1, refresh_norm_stats=False, **options),
    "swa on the CPU": lambda **options: SWA(
        start=1, refresh_norm_stats=False, device="cpu", average="polynomial", **options
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
USES = [("validate", "test"), ("test",), ()]


@each_kind
@pytest.mark.parametrize("use_for", USES)
def test_both_are_what_the_run_had(tmp_path, kind, use_for):
    path, had = train(tmp_path, KINDS[kind](use_for=use_for))
    assert_same(load_averaged(path), had.averaged[0])
    assert_same(load_raw(path), had.raw)
    differs = [n for n in had.raw if not torch.equal(had.raw[n], had.averaged[0][n])]
    assert {"first.weight", "second.weight", "layers.1.running_mean"} <= set(differs)
    held = contents(path)["state_dict"]
    assert_same(dict(held), had.averaged[0] if "validate" in use_for else had.raw)


@pytest.mark.parametrize("use_for", USES)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions(tmp_path, use_for, precision):
    path, had = train(tmp_path, EMA(decay=0.9, use_for=use_for), precision=precision)
    assert_same(load_averaged(path), had.averaged[0])
    assert_same(load_raw(path), had.raw)
    wanted = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert load_averaged(path)["head.weight"].dtype == wanted


@pytest.mark.parametrize("use_for", USES)
def test_they_load_into_a_module_of_ones_own(tmp_path, use_for):
    """Strictly; and of names that are one tensor, none brings back the other weights."""
    path, had = train(tmp_path, EMA(decay=0.9, use_for=use_for))
    for state_dict, truth in [(load_averaged(path), had.averaged[0]), (load_raw(path), had.raw)]:
        module = Shared()
        module.load_state_dict(state_dict)
        assert module.second.weight is module.first.weight
        assert_same(copies(module.state_dict()), truth)


def test_what_shares_memory_is_in_the_file_once(tmp_path):
    path, _ = train(tmp_path, EMA(decay=0.9))
    held = contents(path)["state_dict"]
    for first, second in [("first.weight", "second.weight"), ("norm.bias", "layers.1.bias")]:
        assert held[first].data_ptr() == held[second].data_ptr()
    assert held["first.bias"].data_ptr() != held["second.bias"].data_ptr()


class Partial(Shared):
    """Keeps a part of itself out of its checkpoints."""

    def on_save_checkpoint(self, checkpoint):
        del checkpoint["state_dict"]["head.bias"]


@pytest.mark.parametrize("use_for", [("validate",), ()])
def test_what_a_module_leaves_out_of_its_checkpoints_stays_out(tmp_path, use_for):
    path, had = train(tmp_path, EMA(decay=0.9, use_for=use_for), module=Partial())
    for found, truth in [(load_averaged(path), had.averaged[0]), (load_raw(path), had.raw)]:
        assert_same(found, {name: v for name, v in truth.items() if name != "head.bias"})


def test_a_path_may_be_a_string(tmp_path):
    path, had = train(tmp_path, EMA())
    assert_same(load_averaged(str(path)), had.averaged[0])
    assert_same(load_raw(str(path)), had.raw)


@pytest.mark.parametrize("use_for", [("validate",), ()])
def test_a_checkpoint_after_fit(tmp_path, use_for):
    """The module then holds the average, or its weights."""
    pl.seed_everything(7, verbose=False)
    ema = EMA(decay=0.9, use_for=use_for)
    keeper, module = Keeper(ema), Shared()
    trainer = new_trainer(tmp_path, [ema, keeper])
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(load_averaged(tmp_path / "after.ckpt"), keeper.averaged[0])
    assert_same(load_raw(tmp_path / "after.ckpt"), keeper.raw)


# -- several averages --------------------------------------------------------------------------


def two() -> tuple[EMA, EMA]:
    return EMA(decay=0.5, name="fast"), EMA(decay=0.95, name="slow", use_for=())


def test_of_two_averages_each_is_found_by_its_name(tmp_path):
    path, had = train(tmp_path, *two())
    fast, slow = had.averaged
    assert not torch.equal(fast["head.weight"], slow["head.weight"])
    assert_same(load_averaged(path, name="fast"), fast)
    assert_same(load_averaged(path, name="slow"), slow)
    assert_same(load_averaged(path), fast)  # which validation ran on
    assert_same(load_raw(path), had.raw)


def test_the_order_of_callbacks_does_not_matter(tmp_path):
    path, had = train(tmp_path, *reversed(two()))
    assert_same(load_averaged(path), had.averaged[1])
    assert_same(load_averaged(path, name="slow"), had.averaged[0])
    assert_same(load_raw(path), had.raw)


def test_of_two_averages_that_nothing_ran_on_one_must_be_named(tmp_path):
    averages = EMA(decay=0.5, name="fast", use_for=()), SWA(start=1, name="slow", use_for=())
    path, had = train(tmp_path, *averages)
    keys = "EMA[optkit-averaging-fast], SWA[optkit-averaging-slow]"
    message = f"`name` must say which average of {str(path)!r} it is, of {keys}."
    with pytest.raises(ValueError, match=re.escape(message)):
        load_averaged(path)
    assert_same(load_averaged(path, name="fast"), had.averaged[0])
    assert_same(load_averaged(path, name="slow"), had.averaged[1])


def test_of_two_averages_that_nothing_ran_on_the_one_without_a_name_needs_none(tmp_path):
    averages = EMA(decay=0.5, use_for=()), EMA(decay=0.9, name="slow", use_for=())
    path, had = train(tmp_path, *averages)
    assert_same(load_averaged(path), had.averaged[0])
    assert_same(load_averaged(path, name="slow"), had.averaged[1])


def test_a_name_of_which_another_is_the_beginning(tmp_path):
    averages = EMA(decay=0.5, name="a"), EMA(decay=0.9, name="ab", use_for=())
    path, had = train(tmp_path, *averages)
    assert_same(load_averaged(path, name="a"), had.averaged[0])
    assert_same(load_averaged(path, name="ab"), had.averaged[1])


# -- what is no such checkpoint ----------------------------------------------------------------

NONE = "`path` must be a checkpoint with an average in it, got {!r}. It was written"


def assert_no_average(path, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(NONE.format(str(path)))):
        load_averaged(path, **options)


def test_a_checkpoint_without_an_average(tmp_path):
    path, had = train(tmp_path)
    assert_no_average(path)
    with pytest.raises(ValueError, match=re.escape(NONE.format(str(path)))):
        without_average(path, tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()
    assert_same(load_raw(path), had.raw)


def test_an_average_of_another_name(tmp_path):
    path, _ = train(tmp_path, *two())
    assert_no_average(path, name="slo")
    assert_no_average(path, name="fast]")


def test_an_average_that_had_not_begun(tmp_path):
    pl.seed_everything(7, verbose=False)
    module, swa = Shared(), SWA(start=2, refresh_norm_stats=False)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = new_trainer(tmp_path, [swa, saver], enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    assert_no_average(tmp_path / "epoch=1.ckpt")
    early = load_raw(tmp_path / "epoch=1.ckpt")
    assert_same(early, dict(contents(tmp_path / "epoch=1.ckpt")["state_dict"]))
    assert not torch.equal(
        load_averaged(tmp_path / "epoch=2.ckpt")["head.bias"], early["head.bias"]
    )
    without_average(tmp_path / "epoch=1.ckpt", tmp_path / "plain.ckpt")
    assert_same(load_raw(tmp_path / "plain.ckpt"), early)


def test_weights_alone_are_what_validation_saw(tmp_path):
    ema = EMA(decay=0.9)
    pl.seed_everything(7, verbose=False)
    keeper = Keeper(ema)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="end", save_weights_only=True)
    trainer = new_trainer(tmp_path, [ema, keeper, saver], enable_checkpointing=True)
    trainer.fit(Shared(), loader(), loader())
    assert_no_average(tmp_path / "end.ckpt")
    assert_same(load_raw(tmp_path / "end.ckpt"), keeper.averaged[0])


def test_a_folder_that_is_no_checkpoint(tmp_path):
    folder = re.escape(repr(str(tmp_path)))
    for read in (load_averaged, load_raw):
        message = f"`path` must be a checkpoint.* got the folder {folder} without `meta.pt`"
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    message = f"`path` must be a file, got the folder {folder}, in which each rank has a part"
    with pytest.raises(ValueError, match=message):
        without_average(tmp_path, tmp_path / "other.ckpt")


class Options:
    """A class of the user's own."""

    width = 3


def test_a_file_that_holds_code_is_not_run(tmp_path):
    path, had = train(tmp_path, EMA(decay=0.9), module=Shared(Options()))
    for read in (load_averaged, load_raw, lambda path: without_average(path, tmp_path / "x")):
        with pytest.raises(
            ValueError, match=r"(?s)`path` must hold data alone.*add_safe_globals.*Opt"
        ):
            read(path)
    with torch.serialization.safe_globals([Options]):
        assert_same(load_averaged(path), had.averaged[0])


def test_code_in_a_file_does_not_run(tmp_path):
    class Run:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "callbacks": Run()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="could run code") as raised:
        load_raw(tmp_path / "bad.ckpt")
    assert isinstance(raised.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1, 2], torch.ones(2)])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    message = f"`path` must be a checkpoint of Lightning's, got {str(path)!r}, which has no `state_"
    for read in (load_averaged, load_raw, lambda path: without_average(path, tmp_path / "x")):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_averaged(tmp_path / "missing.ckpt")


# -- the callback's state ----------------------------------------------------------------------


def test_the_state_is_plain_data(tmp_path):
    path, _ = train(tmp_path, *two())
    checkpoint = contents(path)
    own = {key: state for key, state in checkpoint["callbacks"].items() if key.startswith("EMA")}
    assert len(own) == 2
    torch.save(own, tmp_path / "own.pt")
    assert_same(torch.load(tmp_path / "own.pt", weights_only=True), own)


def test_raw_weights_are_for_callbacks_that_are_not_there(tmp_path):
    path, had = train(tmp_path, *two())
    checkpoint = contents(path)
    fast, slow = [key for key in checkpoint["callbacks"] if key.startswith("EMA")]
    for present in ([], [slow], ["another"]):
        found = raw_weights(checkpoint, absent_from=present)
        assert {"head.weight", "second.weight"} <= set(found)
        assert_same(found, {name: had.raw[name] for name in found})
    assert raw_weights(checkpoint, absent_from=[fast]) == {}
    assert raw_weights({}, absent_from=[]) == {}


# -- resuming without --------------------------------------------------------------------------


class Saver(pl.Callback):
    """Saves in the middle of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 8:
            trainer.save_checkpoint(self.path)


def interrupted(folder: Path, averages) -> Path:
    pl.seed_everything(7, verbose=False)
    trainer = new_trainer(folder, [*averages, Saver(folder / "cut.ckpt")], max_steps=8)
    trainer.fit(Shared(), ResumableLoader(loader()), loader())
    return folder / "cut.ckpt"


def resumed(folder: Path, path: Path) -> dict:
    torch.manual_seed(11)
    module = Shared()
    trainer = new_trainer(folder, [])
    trainer.fit(module, ResumableLoader(loader()), loader(), ckpt_path=path)
    assert trainer.global_step == 18
    return {
        "module": copies(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
    }


@pytest.mark.parametrize(
    "averages",
    [
        lambda: [EMA(decay=0.9)],
        lambda: [EMA(decay=0.9, use_for=())],
        lambda: [SWA(start=0, every_n_steps=2, refresh_norm_stats=False)],
        lambda: [SWA(start=0, every_n_steps=2)],
        lambda: list(two()),
    ],
    ids=["ema", "ema beside", "swa", "swa refreshed", "two"],
)
def test_without_the_average_it_is_a_run_that_never_had_one(tmp_path, averages):
    """Within an epoch; the weights, the optimizer and all that follows."""
    plain, path = interrupted(tmp_path / "plain", []), interrupted(tmp_path / "own", averages())
    without_average(path, tmp_path / "without.ckpt")
    before, after = contents(plain), contents(tmp_path / "without.ckpt")
    assert_same(dict(after["state_dict"]), dict(before["state_dict"]))
    ours = {key for key in contents(path)["callbacks"] if "optkit" in key}
    assert len(ours) == len(averages())
    assert not any("optkit" in key for key in after["callbacks"])
    assert set(after) == set(before)
    assert_same(after["optimizer_states"], before["optimizer_states"])
    truth = resumed(tmp_path, plain)
    assert_same(resumed(tmp_path, tmp_path / "without.ckpt"), truth)
    without_average(path, path)  # in its own place, too
    assert_same(resumed(tmp_path, path), truth)
