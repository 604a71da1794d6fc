"""Mixup in a real Trainer."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_optkit import EMA, CutMix, MixedAccuracy, Mixup
from lightning_optkit.bridge.probe import Probe
from tests.contracts import assert_resumes, assert_same, run
from tests.modules import MODULES, Classifier, image_loader, images

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`"
)


class Manual(Classifier):
    """A classifier that steps by itself, with two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net, self.head)]


class Net(pl.LightningModule):
    """Trains, validates and tests with one step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        self.accuracy = Accuracy(task="multiclass", num_classes=4)
        self.mixed_accuracy = MixedAccuracy()
        self.seen = defaultdict(list)
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        if self.trainer.training:
            self.losses.append(loss)
        self.accuracy(logits, y)
        self.mixed_accuracy(logits, y)
        stage = self.trainer.state.stage.value
        self.log(f"{stage}_loss", loss)
        self.log(f"{stage}_accuracy", self.accuracy)
        self.log(f"{stage}_mixed_accuracy", self.mixed_accuracy)
        self.seen[stage].append((x.clone(), y))
        return {"loss": loss, "labels": y}

    def on_train_epoch_end(self):
        self.log("mean_loss", torch.stack(self.losses).mean())
        self.losses.clear()

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(n=22, **options):
    """Return batches of 4, and the last of 2."""
    return DataLoader(TensorDataset(*images(n)), 4, **options)


def trainer_of(*callbacks, **options):
    defaults = {"logger": False, "max_epochs": 2, "log_every_n_steps": 1}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )


def logged(folder):
    path = Path(folder) / "csv" / "version_0" / "metrics.csv"
    with path.open() as file:
        return list(csv.DictReader(file))


# -- the contract ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "module_name", "options", "at"),
    [
        (Mixup, "classifier", {}, ("epoch end", "mid-epoch")),
        (
            lambda: Mixup(1.0, probability=0.6, stop_epoch=2),
            "classifier",
            {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
            ("mid-epoch",),
        ),
        (lambda: Mixup(targets="two_pass"), "classifier", {}, ("mid-epoch",)),
        (lambda: Mixup(per_sample=True), "manual", {}, ("mid-epoch",)),
        (lambda: Mixup(targets="none"), "gan", {}, ("epoch end",)),
    ],
)
def test_resumes(make, module_name, options, at, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULES, "manual", lambda: (Manual(), image_loader()))
    callback = assert_resumes(make, module_name, tmp_path, at=at, **options)
    epoch, num_batches, num_mixed = callback._counted
    assert (epoch, num_batches) == (2, 5)
    assert num_mixed == (0 if callback._stop_epoch else 5)
    assert callback._module is None


def test_without_a_mixed_batch_training_is_bit_identical(tmp_path):
    traces = [
        run("classifier", callbacks, tmp_path / str(len(callbacks)))
        for callbacks in ([], [Mixup(probability=0)])
    ]
    assert_same(*traces)


def test_weights_are_those_of_training_on_two_losses():
    callback, module = Mixup(1.0, seed=3), Net()
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    by_hand.load_state_dict(module.net.state_dict())
    mixes = noted(callback)
    trainer_of(callback).fit(module, loader())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    assert len(mixes) == 12
    batches = list(loader()) * 2
    for (_, y), mixed in zip(batches, mixes, strict=True):
        logits = by_hand(mixed.inputs)
        optimizer.zero_grad()
        losses = [F.cross_entropy(logits, t) for t in (y, mixed.second(y))]
        (mixed.mixing * losses[0] + (1 - mixed.mixing) * losses[1]).backward()
        optimizer.step()
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], weight, rtol=0, atol=1e-6)


def noted(callback):
    """Return a list to which the callback adds how it mixed each batch."""
    mixes, mix = [], callback.mix

    def noting(*args, **kwargs):
        mixes.append(mix(*args, **kwargs))
        return mixes[-1]

    callback.mix = noting
    return mixes


# -- who sees what -----------------------------------------------------------------------------


def test_logs_stages_and_the_picture(tmp_path, caplog):
    callback, module = Mixup(1.0), Net()
    mixes, losses, seen, drawn = noted(callback), [], [], []
    draw = callback.figure
    callback.figure = lambda images: drawn.append(images) or draw(images)

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch)
            losses.append(outputs["loss"])
            with Probe(trainer, pl_module) as probe:  # as observers do
                found = probe.loss_fn(batch)({})
            expected = F.cross_entropy(pl_module.net(batch[0]), batch[1])
            torch.testing.assert_close(found, expected)

    trainer = trainer_of(
        callback, Looks(), logger=CSVLogger(tmp_path, name="csv", version=0), limit_test_batches=2
    )
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, loader(), loader())
    text = "`Mixup` mixes, targets='proxy': the loss is computed for both targets in one pass"
    assert caplog.text.count(text) == 1
    trainer.test(module, loader(), verbose=False)
    plain = list(loader())
    for found, expected in (
        (module.seen["validate"], plain * 2),
        (module.seen["test"], plain[:2]),
        (module.seen["sanity_check"], plain[:2]),
        (seen, plain * 2),  # after the step the batch is the user's
    ):
        for (x, y), (other_x, other_y) in zip(found, expected, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
    assert [type(loss) for loss in losses] == [torch.Tensor] * 12

    rows = [row for row in logged(tmp_path) if row["optkit-mixing/mixing"]]
    assert [int(row["step"]) for row in rows] == list(range(12))
    assert [float(row["optkit-mixing/mixing"]) for row in rows] == [m.mixing for m in mixes]
    assert {float(row["optkit-mixing/share"]) for row in rows} == {1.0}
    steps = [row for row in logged(tmp_path) if row["train_loss"]]
    assert [float(row["train_loss"]) for row in steps] == pytest.approx([float(x) for x in losses])
    means = [float(row["mean_loss"]) for row in logged(tmp_path) if row["mean_loss"]]
    assert means == pytest.approx([float(sum(losses[i : i + 6])) / 6 for i in (0, 6)])
    assert (tmp_path / "csv/version_0/optkit-mixing-batch.png").stat().st_size > 5_000
    (images_drawn,) = drawn  # of the first mixed batch
    torch.testing.assert_close(torch.from_numpy(images_drawn.images), mixes[0].inputs)
    assert images_drawn.mixing.tolist() == [mixes[0].mixing] * 4
    labels = plain[0][1]
    assert images_drawn.labels == (labels.tolist(), mixes[0].second(labels).tolist())
    assert "training_step" not in vars(module)


def test_share_of_an_epoch_and_batches_of_one_sample(tmp_path):
    callback = Mixup(1.0, probability=0.5, seed=1)
    mixes = noted(callback)
    logger = CSVLogger(tmp_path, name="csv", version=0)
    trainer_of(callback, logger=logger).fit(Net(), loader(21))
    rows = [row for row in logged(tmp_path) if row["optkit-mixing/mixing"]]
    weights = [float(row["optkit-mixing/mixing"]) for row in rows]
    assert weights[5] == weights[11] == 1.0  # of one sample
    assert [w for w in weights if w != 1.0] == [mixed.mixing for mixed in mixes]
    for first in (0, 6):
        is_mixed = [w != 1.0 for w in weights[first : first + 6]]
        shares = [sum(is_mixed[: i + 1]) / (i + 1) for i in range(6)]
        found = [float(row["optkit-mixing/share"]) for row in rows[first : first + 6]]
        assert found == pytest.approx(shares)
        assert 0 < shares[-1] < 1
    resumed = Mixup()
    resumed.load_state_dict(callback.state_dict())
    assert resumed._counted == callback._counted == (1, 6, sum(is_mixed))


def test_a_second_fit_and_another_module():
    callback, module = Mixup(1.0), Net()
    mixes = noted(callback)
    for net in (module, module, Net()):
        trainer_of(callback, max_epochs=1).fit(net, loader())
        assert "training_step" not in vars(net)
    weights = [mixed.mixing for mixed in mixes]
    assert weights == weights[:6] * 3
    assert len({*weights}) == 6
    trainer = trainer_of(callback, max_epochs=1)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())  # goes on with the second epoch
    assert [mixed.mixing for mixed in mixes[18:24]] == weights[:6]
    assert not {*weights} & {mixed.mixing for mixed in mixes[24:]}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start", "setup"])
def test_it_leaves_when_training_fails(hook):
    class Fails(pl.Callback):
        pass

    def fail(self, trainer, *args, **kwargs):
        if not trainer.sanity_checking:
            raise RuntimeError("no")

    setattr(Fails, hook, fail)
    callback, module = Mixup(), Net()
    with pytest.raises(RuntimeError, match="no"):
        trainer_of(callback, Fails()).fit(module, loader(), loader())
    assert "training_step" not in vars(module)
    trainer_of(Mixup(), max_epochs=1).fit(module.train(), loader())


def test_beside_averages_of_the_weights():
    """One of which copies the module while its step is intercepted."""
    alone, together = Net(), Net()
    together.load_state_dict(alone.state_dict())
    trainer_of(Mixup()).fit(alone, loader())
    ours, theirs = EMA(0.5, use_for=()), EMAWeightAveraging(decay=0.5)
    trainer_of(ours, Mixup(), theirs).fit(together, loader())
    assert ours.num_averaged == 12
    assert theirs._average_model is None or "training_step" not in vars(together)


def test_it_stands_around_training_alone():
    class Looks(pl.Callback):
        def on_test_start(self, trainer, pl_module):
            assert "training_step" not in vars(pl_module)
            assert callback._module is None

    callback, module = Mixup(), Net()
    trainer = trainer_of(callback, Looks())
    trainer.test(module, loader(), verbose=False)
    assert "training_step" not in vars(module)


def test_two_that_mix_are_refused():
    with pytest.raises(MisconfigurationException, match="`MixupOrCutMix` draws one of its two"):
        trainer_of(Mixup(), CutMix()).fit(Net(), loader())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_step_trains_as_one_that_is_not():
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1].long(), label_smoothing=0.1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    eager, compiled = Plain(), Plain()
    compiled.load_state_dict(eager.state_dict())
    trainer_of(Mixup(1.0), max_epochs=1).fit(eager, loader(20))
    trainer_of(Mixup(1.0), max_epochs=1).fit(torch.compile(compiled, backend="eager"), loader(20))
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other)
