"""What the callbacks that mix do to batches, targets and steps, without a Trainer."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_optkit import CutMix, Mixup, MixupOrCutMix
from lightning_optkit.bridge.probe import is_probing
from lightning_optkit.methods.mixed_target import MixedTarget, MixedTargetError
from tests.bridge.mixed_runs import BATCH, CLASSES, FEATURES, Busy, Net, data, stepped
from tests.contracts import assert_same, public_state, rng_state

MIXERS = {
    "mixup": lambda **kw: Mixup(1.0, **kw),
    "cutmix": lambda **kw: CutMix(1.0, **kw),
    "either": lambda **kw: MixupOrCutMix(1.0, 1.0, **kw),
}


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


def two_losses(module, mixed, x, y):
    """Return the loss of a batch that was mixed so, computed apart for both targets."""
    losses = [module.loss(module.net(mixed.inputs), target) for target in (y, mixed.second(y))]
    return mixed.mixing * losses[0] + (1 - mixed.mixing) * losses[1]


def assert_loss_and_gradients(module, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    for one, other in zip(gradients(module, loss), gradients(module, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# -- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["auto", "proxy", "soft", "two_pass"])
@pytest.mark.parametrize("name", MIXERS)
def test_the_loss_is_the_mixture_of_two(name, targets):
    options = {"num_classes": CLASSES} if targets == "soft" else {}
    loss = F.cross_entropy
    if targets == "soft":  # which are in torch's default precision
        loss = lambda z, y: F.cross_entropy(z, y.double() if y.is_floating_point() else y)  # noqa: E731
    callback, module = MIXERS[name](targets=targets, **options), Net(loss)
    x, y = data()
    for i in range(4):
        found, mixed = stepped(callback, module, (x, y), batch_idx=i)
        assert type(found) is torch.Tensor
        expected = two_losses(module, mixed, x, y)
        if targets == "soft":
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert_loss_and_gradients(module, found, expected)


@pytest.mark.parametrize("name", MIXERS)
def test_one_lambda_a_sample(name):
    callback, module = MIXERS[name](per_sample=True), Net()
    x, y = data()
    found, mixed = stepped(callback, module, (x, y))
    logits = module.net(mixed.inputs)
    losses = [F.cross_entropy(logits, t, reduction="none") for t in (y, mixed.second(y))]
    expected = (mixed.mixing * losses[0] + (1 - mixed.mixing) * losses[1]).mean()
    assert mixed.mixing.shape == (BATCH,)
    assert_loss_and_gradients(module, found, expected)


FLOATS = {
    "bce": (F.binary_cross_entropy_with_logits, lambda y: F.one_hot(y, CLASSES).double()),
    "bce, weighted": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5]).double()),
        lambda y: F.one_hot(y, CLASSES).double(),
    ),
    "probabilities": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda y: F.softmax(F.one_hot(y, CLASSES).double(), 1),
    ),
    "one value": (
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y),
        lambda y: (y > 0).double(),
    ),
}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", FLOATS)
def test_losses_that_are_linear_in_float_targets_are_exact_when_these_are_mixed(name, per_sample):
    loss, target_of = FLOATS[name]
    callback, module = Mixup(1.0, per_sample=per_sample), Net(loss)
    x, y = data()
    y = target_of(y)
    found, mixed = stepped(callback, module, (x, y))
    if per_sample:
        targets = mixed.mixing.view(-1, *[1] * (y.dim() - 1))
        targets = targets * y + (1 - targets) * mixed.second(y)
        expected = loss(module.net(mixed.inputs), targets)
    else:
        expected = two_losses(module, mixed, x, y)
    assert_loss_and_gradients(module, found, expected)


def test_regression_mixes_targets_and_can_mix_losses():
    x, _ = data()
    y = x.sum(1, keepdim=True)
    module = Net(F.mse_loss, outputs=1)
    found, mixed = stepped(Mixup(1.0), module, (x, y))
    between = mixed.mixing * y + (1 - mixed.mixing) * mixed.second(y)
    assert_loss_and_gradients(module, found, F.mse_loss(module.net(mixed.inputs), between))
    found, mixed = stepped(Mixup(1.0, targets="proxy"), Net(F.mse_loss, outputs=1), (x, y))
    torch.testing.assert_close(found, two_losses(module, mixed, x, y), rtol=1e-13, atol=0)


def test_several_targets_are_mixed_each_in_its_way():
    def loss(z, targets):
        classes, box = targets["class"], targets["box"]
        return F.cross_entropy(z[:, :CLASSES], classes) + F.l1_loss(z[:, CLASSES:], box)

    x, y = data()
    batch = (x, {"class": y, "box": x[:, :2] ** 2})
    module = Net(loss, outputs=CLASSES + 2)
    found, mixed = stepped(Mixup(1.0), module, batch)
    box = mixed.direct(batch[1]["box"])
    z = module.net(mixed.inputs)
    losses = [loss(z, {"class": t, "box": box}) for t in (y, mixed.second(y))]
    assert_loss_and_gradients(
        module, found, mixed.mixing * losses[0] + (1 - mixed.mixing) * losses[1]
    )


def test_inputs_alone():
    module = Net(lambda z, y: z.square().mean())
    x, y = data()
    found, mixed = stepped(Mixup(1.0, targets="none"), module, (x, y))
    torch.testing.assert_close(found, module.net(mixed.inputs).square().mean())

    class Alone(Net):
        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

    module = Alone()
    found, mixed = stepped(Mixup(1.0, targets="none"), module, x)
    torch.testing.assert_close(found, module.net(mixed.inputs).square().mean())


def test_manual_optimization_mixes_at_its_backward():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(self.net(batch[0]), batch[1])
            (2 * loss).backward()
            self.shown = loss.detach()

    module = Manual()
    x, y = data()
    output, mixed = stepped(Mixup(1.0), module, (x, y))
    found = [p.grad.clone() for p in module.parameters()]
    assert output is None
    expected = two_losses(module, mixed, x, y)
    for one, other in zip(found, gradients(module, 2 * expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert type(module.shown) is torch.Tensor
    torch.testing.assert_close(module.shown, expected.detach())


# -- targets of the inputs' size ---------------------------------------------------------------


class Pixels(Net):
    """A label for each pixel, or each place of a sequence."""

    def __init__(self, channels, *, conv):
        super().__init__()
        self.net = conv(channels, CLASSES, 1).double()

    def training_step(self, batch, batch_idx):
        self.fed = batch
        z = self.net(batch[0])
        if batch[1].is_floating_point():
            return F.mse_loss(z[:, 0], batch[1].view_as(z[:, 0]))
        return F.cross_entropy(z, batch[1])


@pytest.mark.parametrize("per_sample", [False, True])
def test_label_maps_are_cut_with_the_images(per_sample):
    x = torch.arange(BATCH * 36).view(BATCH, 1, 6, 6).double()
    labels = (x[:, 0] % CLASSES).long()
    for target in (labels, x[:, 0], x):
        module = Pixels(1, conv=nn.Conv2d)
        found, mixed = stepped(CutMix(per_sample=per_sample), module, (x, target))
        assert type(module.fed[1]) is torch.Tensor
        if target is labels:
            assert torch.equal(module.fed[1], (mixed.inputs[:, 0] % CLASSES).long())
            torch.testing.assert_close(
                found, F.cross_entropy(module.net(mixed.inputs), module.fed[1])
            )
        else:
            assert torch.equal(module.fed[1].view_as(mixed.inputs), mixed.inputs)


def test_sequences_are_cut_and_mixup_mixes_their_losses():
    tokens = torch.arange(BATCH * 10).view(BATCH, 10) % 7
    x = F.one_hot(tokens, 7).double()

    class Tagger(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(7, CLASSES).double()

        def training_step(self, batch, batch_idx):
            self.fed = batch
            return F.cross_entropy(self.net(batch[0]).transpose(1, 2), batch[1])

    batch = (x, tokens % CLASSES)
    module = Tagger()
    _, mixed = stepped(CutMix(dims=[1]), module, batch)
    assert torch.equal(module.fed[1], mixed.inputs.argmax(2) % CLASSES)
    module = Tagger()
    found, mixed = stepped(Mixup(1.0), module, batch)
    module.loss = lambda z, y: F.cross_entropy(z.transpose(1, 2), y)
    assert_loss_and_gradients(module, found, two_losses(module, mixed, *batch))


def test_either_cuts_maps_where_it_cuts_images():
    x = torch.arange(BATCH * 36).view(BATCH, 1, 6, 6).double()
    labels = (x[:, 0] % CLASSES).long()
    callback, module, ways = MixupOrCutMix(1.0), Pixels(1, conv=nn.Conv2d), []
    for i in range(8):
        found, mixed = stepped(callback, module, (x, labels), batch_idx=i)
        ways.append(mixed.box is not None)
        z = module.net(mixed.inputs)
        if mixed.box is not None:
            assert torch.equal(module.fed[1], (mixed.inputs[:, 0] % CLASSES).long())
            expected = F.cross_entropy(z, module.fed[1])
        else:
            a, b = (F.cross_entropy(z, t) for t in (labels, mixed.second(labels)))
            expected = mixed.mixing * a + (1 - mixed.mixing) * b
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert len({*ways}) == 2


def test_floats_as_long_as_a_sequence_may_be_either():
    x, y = torch.ones(BATCH, 2, CLASSES).double(), torch.ones(BATCH, CLASSES).double()
    with pytest.raises(MisconfigurationException, match=r"targets='cut'` for one value at each"):
        stepped(CutMix(), Pixels(2, conv=nn.Conv1d), (x, y))
    for targets in ("cut", "direct"):
        stepped(CutMix(targets=targets), Pixels(2, conv=nn.Conv1d), (x, y))
    stepped(Mixup(), Pixels(2, conv=nn.Conv1d), (x, y))


# -- two passes, and the passes beside ---------------------------------------------------------


@pytest.mark.parametrize("targets", ["proxy", "two_pass"])
def test_a_step_leaves_what_it_leaves_without_mixing(targets):
    """But for what its targets say: those of the first in two passes, the heavier in one."""
    callback, module = Mixup(1.0, targets=targets, seed=4), Busy()
    x, y = data()
    plain = copy.deepcopy(module)
    before = rng_state()
    for i in range(2):
        _, mixed = stepped(callback, module, (x, y), batch_idx=i)
        after = rng_state()
        torch.set_rng_state(before["torch"])
        expected = y if targets == "two_pass" or mixed.mixing >= 0.5 else mixed.second(y)
        plain.training_step([mixed.inputs.clone(), expected], i)
        assert_same(after, rng_state())
        before = after
    for each in (module, plain):  # what has a graph
        each.losses, each.logged = len(each.losses), list(each.logged)
    left, right = (dict(sorted(public_state(each).items())) for each in (module, plain))
    for state in (left, right):
        for key in [*state]:
            if ".last" in key or "mixed." in key:
                state.pop(key)
    if targets == "two_pass":
        assert_same(right, left)
        assert_same(
            [*plain.buffers(), plain.collection.compute()],
            [*module.buffers(), module.collection.compute()],
        )
    else:
        assert torch.equal(module.seen, plain.seen)
        assert torch.equal(module.norm.running_mean, plain.norm.running_mean)
        assert torch.equal(
            module.collection.compute()["confusion"], plain.collection.compute()["confusion"]
        )


def test_what_leaves_a_step_is_plain_and_metrics_get_the_heavier_label():
    callback, module, state = Mixup(1.0), Busy(), torch.get_rng_state()
    x, y = data()
    output, mixed = stepped(callback, module, (x, y))
    weight, second = mixed.mixing, mixed.second(y)
    heavier = y if weight >= 0.5 else second
    assert {type(v) for v in output.values()} == {torch.Tensor}
    assert torch.equal(output["labels"], heavier)
    assert type(module.fed[0]) is torch.Tensor
    assert torch.equal(module.fed[0], heavier)
    assert type(module.logged["loss"]) is torch.Tensor
    assert not module.logged["loss"].requires_grad
    torch.testing.assert_close(module.logged["loss"], output["loss"].detach())
    assert module.last == pytest.approx(float(output["loss"].detach()), abs=1e-15)
    assert float(torch.stack(module.losses).mean().detach()) == pytest.approx(module.last)
    assert isinstance(module.logged["accuracy"], MulticlassAccuracy)
    hits = []
    for target in (y, second):
        other = Busy()
        torch.set_rng_state(state)
        other.training_step([mixed.inputs.clone(), target], 0)
        hits.append(float(other.logged["hits"]))
    expected = weight * hits[0] + (1 - weight) * hits[1]
    assert float(module.logged["hits"]) == pytest.approx(expected, abs=1e-15)


def test_mixed_accuracy_gets_both():
    module, (x, y) = Busy(), data()
    stepped(Mixup(1.0), module, (x, y))
    found = float(module.collection["mixed"].compute())
    assert found == pytest.approx(float(module.logged["hits"]), abs=1e-7)
    assert float(module.collection["confusion"].compute().sum()) == BATCH


def test_metrics_that_are_not_found_count_the_heavier_label_too():
    class Hides(Net):
        def __init__(self):
            super().__init__()
            self.metrics = {"hidden": MulticlassAccuracy(CLASSES, average="micro")}
            self.found = MulticlassAccuracy(CLASSES, average="micro")

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.found.update(logits, batch[1])
            self.metrics["hidden"].update(logits, batch[1])
            return F.cross_entropy(logits, batch[1])

    callback, module = Mixup(1.0), Hides()
    for i in range(3):
        stepped(callback, module, data(), batch_idx=i)
    hidden = module.metrics["hidden"]
    assert hidden.compute() == module.found.compute()
    assert {type(hidden.tp), type(hidden.fn)} == {torch.Tensor}


def test_an_error_in_the_step_puts_all_back():
    class Fails(Busy):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("no")

    module = Fails()
    update = vars(module.accuracy)["update"]
    for targets in ("proxy", "two_pass"):
        callback = Mixup(1.0, targets=targets)
        with pytest.raises(RuntimeError, match="no"):
            stepped(callback, module, data())
        callback.teardown(module._trainer, module, "fit")
        assert vars(module.accuracy)["update"] is update
        assert {"log", "log_dict", "training_step"}.isdisjoint(vars(module))
        assert not is_probing()


@pytest.mark.parametrize("targets", ["proxy", "two_pass"])
def test_passes_beside_see_the_same_numbers_and_leave_no_trace(targets):
    calls = []

    class Counts(Busy):
        def training_step(self, batch, batch_idx):
            found = super().training_step(batch, batch_idx)
            calls.append((is_probing(), rng_state()["torch"], self.generator.get_state()))
            return found

    callback, module = Mixup(1.0, targets=targets), Counts()
    for i in range(3):
        stepped(callback, module, data(), batch_idx=i)
    expected = [True] * 3 + [False] * 3 if targets == "proxy" else [True, False] * 3
    assert [probing for probing, *_ in calls] == expected
    in_first = 4 if targets == "proxy" else 2
    for _, torch_state, own in calls[1:in_first]:
        assert torch.equal(torch_state, calls[0][1])
        assert torch.equal(own, calls[0][2])
    assert len(module.losses) == 3


def test_outputs_of_two_passes():
    class Returns(Net):
        def __init__(self, outputs):
            super().__init__()
            self.returned = iter(outputs)

        def training_step(self, batch, batch_idx):
            kind = next(self.returned)
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "extra": 1} if kind == "dict" else (loss if kind else None)

    callback = Mixup(1.0, targets="two_pass")
    output, _ = stepped(callback, Returns(["dict", "dict"]), data())
    assert output["extra"] == 1
    assert output["loss"].requires_grad
    assert stepped(Mixup(targets="two_pass"), Returns([None, None]), data())[0] is None
    with pytest.raises(MixedTargetError, match=r"must return a loss for both .* got NoneTy"):
        stepped(Mixup(targets="two_pass"), Returns([True, None]), data())


# -- the first batch is checked ----------------------------------------------------------------


def by_numbers(z, y):
    return F.cross_entropy(z, y) / (y == 0).sum().item() if (y == 0).any() else z.sum()


def by_arrays(z, y):
    weights = torch.from_numpy(np.array([1.0, 5.0, 0.2])[y.numpy()])
    return (weights * F.cross_entropy(z, y, reduction="none")).mean()


def by_one_number(z, y):
    return F.cross_entropy(z, y) * F.cross_entropy(z, y).item()


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("loss", [by_arrays, by_one_number])
@pytest.mark.parametrize("per_sample", [False, True])
def test_numbers_taken_out_of_the_target_are_found(loss, per_sample):
    with pytest.raises(MixedTargetError, match=r"must be 0\.3 times the loss of .*two_pass"):
        stepped(Mixup(0.2, per_sample=per_sample), Net(loss), data())
    if not per_sample:
        x, y = data()
        module = Net(loss)
        found, mixed = stepped(Mixup(1.0, targets="two_pass"), module, (x, y))
        torch.testing.assert_close(found, two_losses(module, mixed, x, y))


def test_a_step_that_is_random_by_itself_is_let_be():
    dice = random.Random(0)

    def loss(z, y):
        return F.cross_entropy(z, y) * (1 + dice.random())

    found, _ = stepped(Mixup(1.0), Net(loss), data())
    assert found.requires_grad


def test_losses_that_are_not_finite_are_let_be():
    stepped(Mixup(1.0), Net(lambda z, y: F.cross_entropy(z, y) * torch.inf), data())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. :DeprecationWarning")
def test_a_loss_that_no_mixed_target_reaches_is_refused():
    for loss in (lambda z, y: z.square().mean(), torch.jit.script(F.cross_entropy)):
        with pytest.raises(MixedTargetError, match=r"must be .*two_pass"):
            stepped(Mixup(1.0), Net(loss), data())

    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.net(batch[0]).square().mean().backward()

    with pytest.raises(MixedTargetError, match="computed from the mixed targets, got one that is"):
        stepped(Mixup(1.0), Manual(), data())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_step_that_is_compiled_into_one_graph_is_refused_with_what_to_write():
    module = Net()
    module.training_step = torch.compile(module.training_step, backend="eager", fullgraph=True)
    with pytest.raises(MixedTargetError, match=r"`fullgraph=True`.*`targets='soft'`"):
        stepped(Mixup(1.0), module, data())
    module = Net(lambda z, y: F.cross_entropy(z, y.double()))
    module.training_step = torch.compile(module.training_step, backend="eager", fullgraph=True)
    found, _ = stepped(Mixup(1.0, targets="soft", num_classes=CLASSES), module, data())
    assert found.requires_grad


def test_a_batch_that_is_skipped_is_no_missing_loss():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    callback, module = Mixup(1.0), Skips()
    assert stepped(callback, module, data())[0] is None
    assert stepped(callback, module, data(), batch_idx=1)[0].requires_grad


# -- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["proxy", "two_pass", "soft"])
def test_the_batch_of_the_user_stays_as_it_is(targets):
    class Writes(Net):
        def training_step(self, batch, batch_idx):
            batch["image"] += 1
            if not batch["label"].is_floating_point():
                batch["label"].clamp_(max=1)
            batch["new"] = 1
            return self.loss(self.net(batch["image"]), batch["label"])

    x, y = data()
    batch = {"image": x.clone(), "label": y.clone(), "names": ["a"]}
    options = {"num_classes": CLASSES} if targets == "soft" else {}
    loss = lambda z, y: F.cross_entropy(z, y if y.dtype is torch.long else y.double())  # noqa: E731
    stepped(Mixup(1.0, targets=targets, **options), Writes(loss), batch)
    assert torch.equal(batch["image"], x)
    assert torch.equal(batch["label"], y)
    assert list(batch) == ["image", "label", "names"]


@pytest.mark.parametrize("targets", ["auto", "two_pass"])
def test_a_batch_of_one_sample_is_not_mixed(targets):
    x, y = data(1)
    module = Net()
    callback = Mixup(1.0, targets=targets)
    found, mixed = stepped(callback, module, (x, y))
    assert mixed is None
    assert torch.equal(found, F.cross_entropy(module.net(x), y))
    assert callback._latest is None
    assert stepped(callback, module, data(7))[1].inputs.shape == (7, FEATURES)


@pytest.mark.parametrize(
    ("batch", "options", "text"),
    [
        ((torch.ones(4, 3), torch.ones(5)), {}, r"one entry a sample, got \[4, 5\]"),
        ((torch.ones(4, 3), torch.tensor(1.0)), {}, "`target_key` must lead to .* got a number"),
        ({"x": torch.ones(4, 3), "y": ["a"] * 4}, {}, "`target_key` must lead to .* got str"),
        (
            (torch.ones(4, 3), torch.arange(4)),
            {"targets": "direct"},
            "floats as targets, got torch",
        ),
        (
            (torch.ones(4, 3), torch.ones(4)),
            {"targets": "soft", "num_classes": 4},
            "labels as targets, got torch.float32",
        ),
        (
            (torch.ones(4, 3), torch.tensor([0, -100, 1, 2])),
            {"targets": "soft", "num_classes": 4},
            r"labels in \[0, 4\), got -100 to 2",
        ),
        (
            (torch.ones(4, 3), torch.tensor([0, 4, 1, 2])),
            {"targets": "soft", "num_classes": 4},
            r"labels in \[0, 4\), got 0 to 4",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(batch, options, text):
    with pytest.raises(MisconfigurationException, match=text):
        stepped(Mixup(**options), Net(), batch)


def test_targets_that_cannot_be_cut_are_refused():
    x = torch.ones(4, 1, 6, 6)
    for target in (torch.ones(4, 6, 5), torch.ones(4, 36), torch.ones(4), torch.ones(6, 6)[:4]):
        with pytest.raises(
            MisconfigurationException, match=r"end in the size of .*, \(6, 6\), got"
        ):
            stepped(CutMix(targets="cut"), Net(), (x, target))


def test_inputs_that_cannot_be_mixed_are_refused():
    with pytest.raises(TypeError, match=r"must be floats to be mixed, got torch\.uint8"):
        stepped(Mixup(), Net(), (torch.ones(4, 3).byte(), torch.arange(4)))
    with pytest.raises(ValueError, match="`dims` must name dimensions to cut"):
        stepped(CutMix(), Net(), (torch.ones(4), torch.arange(4)))


# -- random numbers ----------------------------------------------------------------------------


def draws(make, *, epochs=(0, 1), batches=range(6), rank=None, **options):
    callback, module = make(**options), Net()
    found = []
    for epoch in epochs:
        for i in batches:
            _, mixed = stepped(callback, module, data(), epoch=epoch, batch_idx=i, rank=rank)
            found.append(mixed and (mixed.mixing, mixed.partners.tolist(), mixed.box is None))
    return found


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_drawn_depends_on_seed_epoch_batch_and_rank_alone(name):
    make = MIXERS[name]
    whole = draws(make)
    assert draws(make) == whole
    assert draws(make, epochs=(1,), batches=[3, 5]) == [whole[9], whole[11]]
    assert draws(make, rank=0) == whole  # one process of one
    others = [draws(make, rank=1), draws(make, rank=2), draws(make, seed=1)]
    for other in others:
        assert not set(map(str, other)) & set(map(str, whole))
    assert len(set(map(str, whole))) == 12


@pytest.mark.parametrize("name", MIXERS)
def test_ranks_mix_the_same_batches_in_the_same_way(name):
    ranks = [draws(MIXERS[name], rank=rank, probability=0.5, batches=range(20)) for rank in (0, 1)]
    ways = [[each and each[2] for each in rank] for rank in ranks]
    assert ways[0] == ways[1]
    assert None in ways[0]
    assert ranks[0] != ranks[1]


def test_no_random_stream_is_touched():
    modules, batch = (Net(), Net()), data()
    before = rng_state()
    stepped(Mixup(1.0), modules[0], batch)
    stepped(CutMix(per_sample=True), modules[1], batch)
    assert_same(rng_state(), before)


def test_the_share_that_is_mixed_is_the_probability():
    n = 200
    mixed = draws(MIXERS["mixup"], epochs=(0,), batches=range(n), probability=0.3)
    share = sum(each is not None for each in mixed) / n
    assert abs(share - 0.3) <= 4 * (0.3 * 0.7 / n) ** 0.5
    cut = draws(MIXERS["either"], epochs=(0,), batches=range(n), switch_probability=0.2)
    share = sum(not each[2] for each in cut) / n
    assert abs(share - 0.2) <= 4 * (0.2 * 0.8 / n) ** 0.5


@pytest.mark.parametrize(("probability", "share"), [(0, 0), (1, 1)])
def test_ends_of_the_probability(probability, share):
    found = draws(MIXERS["mixup"], probability=probability)
    assert sum(each is not None for each in found) == share * len(found)
    found = draws(MIXERS["either"], switch_probability=probability)
    assert sum(not each[2] for each in found) == share * len(found)


def test_it_stops_at_an_epoch():
    found = draws(MIXERS["mixup"], epochs=(0, 1, 2), batches=range(2), stop_epoch=2)
    assert [each is not None for each in found] == [True] * 4 + [False] * 2


# -- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"probability": 1.5}, ValueError, r"`probability` must be a number in \[0, 1\], got 1.5"),
        ({"probability": True}, ValueError, "`probability` must be a number"),
        ({"stop_epoch": 0}, ValueError, "`stop_epoch` must be an integer of at least 1, got 0"),
        ({"stop_epoch": 1.5}, ValueError, "`stop_epoch` must be"),
        ({"seed": -1}, ValueError, "`seed` must be an integer of at least 0, got -1"),
        ({"seed": None}, ValueError, "`seed` must be"),
        ({"per_sample": "yes"}, TypeError, "`per_sample` must be True or False, got 'yes'"),
        ({"targets": "hard"}, ValueError, "`targets` must be one of 'auto', .*, got 'hard'"),
        ({"targets": "soft"}, ValueError, "`num_classes` must be an integer of at least 2"),
        ({"num_classes": 3}, ValueError, "`num_classes` must be given with `targets='soft'` alone"),
        ({"targets": "two_pass", "per_sample": True}, ValueError, "`per_sample` must be False"),
        ({"input_key": -1}, TypeError, "`input_key` must be an index of at least 0"),
    ],
)
def test_bad_arguments_are_refused(name, options, error, text):
    with pytest.raises(error, match=text):
        MIXERS[name](**options)


@pytest.mark.parametrize("value", [0, -1.0, True, "1", float("nan"), float("inf"), None])
def test_alpha_must_be_positive(value):
    for make in (Mixup, CutMix, MixupOrCutMix, lambda a: MixupOrCutMix(cutmix_alpha=a)):
        with pytest.raises(
            ValueError, match=r"alpha` must be a positive number, such as 0\.2, got"
        ):
            make(value)


@pytest.mark.parametrize("dims", [[], [0], 2, [1.5], [True], "23"])
def test_dims_must_be_dimensions(dims):
    for make in (CutMix, MixupOrCutMix):
        with pytest.raises(ValueError, match="`dims` must be a list of dimensions without 0"):
            make(dims=dims)
    with pytest.raises(ValueError, match="`switch_probability` must be a number in"):
        MixupOrCutMix(switch_probability=2)


def test_only_what_cuts_can_cut_targets():
    CutMix(targets="cut")
    for make in (Mixup, MixupOrCutMix):
        with pytest.raises(ValueError, match="'direct', 'none', got 'cut'"):
            make(targets="cut")


def test_a_module_that_steps_by_itself_cannot_run_twice():
    module = Net()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="must go with automatic optimization"):
        stepped(Mixup(targets="two_pass"), module, data())


def test_two_of_them_are_refused():
    module = Net()
    stepped(Mixup(), module, data())
    with pytest.raises(MisconfigurationException, match="`MixupOrCutMix` draws one of its two"):
        CutMix().setup(module._trainer, module, "fit")


def test_the_target_of_the_step_is_what_is_said():
    """The batch that a step gets holds both targets, with the weights of the batch."""
    seen = []

    def loss(z, y):
        seen.append(y)
        return F.cross_entropy(z, y)

    x, y = data()
    callback, module = Mixup(1.0), Net(loss)
    stepped(callback, module, (x, y))
    seen.clear()
    real = callback._mixed_step

    def noting(step, batch, mixing):
        target = batch[1]
        seen.append((type(target), target._first.clone(), target._second, mixing.weight))
        return real(step, batch, mixing)

    callback._mixed_step = noting
    _, mixed = stepped(callback, module, (x, y))
    kind, first, second, weight = seen[0]
    assert kind is MixedTarget
    assert torch.equal(first, y)
    assert torch.equal(second, mixed.second(y))
    assert weight == mixed.mixing
