"""HessianSpectrum in a real Trainer."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_optkit import HessianSpectrum
from lightning_optkit.board import tags
from lightning_optkit.bridge.reduce import require_whole_parameters
from lightning_optkit.measures import HessianOperator, hessian_spectrum
from tests.contracts import assert_observer
from tests.modules import MODULES, image_loader, images


def every_step(**options) -> HessianSpectrum:
    defaults = {"every_n_steps": 1, "max_overhead": None, "num_batches": 2}
    return HessianSpectrum(**defaults | {"num_matvecs": 4, "num_probes": 1} | options)


def by_lanczos(**options) -> HessianSpectrum:
    """Return one that measures these small nets as it does larger ones: in a few products."""
    return every_step(exact_below=0, **options)


def train(module, data, *callbacks, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "logger": False,
            "enable_checkpointing": False,
            "max_epochs": 1,
            "limit_train_batches": 3,
        }
        | options,
    )
    trainer.fit(module, data)
    return trainer


# -- the observer's contract -------------------------------------------------------------------


@pytest.mark.parametrize("module_name", MODULES)
def test_training_is_bit_identical(module_name, tmp_path):
    assert_observer(by_lanczos, module_name, tmp_path, limit_train_batches=3)


def test_training_is_bit_identical_where_the_spectrum_is_exact(tmp_path):
    assert_observer(every_step, "classifier", tmp_path, limit_train_batches=1)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
        {"detect_anomaly": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_training_is_bit_identical_under(options, tmp_path):
    assert_observer(by_lanczos, "classifier", tmp_path, limit_train_batches=3, **options)


@pytest.mark.parametrize("module_name", ["classifier", "gan"])
def test_training_is_bit_identical_in_train_mode(module_name, tmp_path):
    assert_observer(lambda: by_lanczos(mode="train"), module_name, tmp_path, limit_train_batches=3)


def test_training_is_bit_identical_with_bf16_and_two_optimizers(tmp_path):
    options = {"precision": "bf16-mixed", "limit_train_batches": 3}
    assert_observer(by_lanczos, "gan", tmp_path, **options)


# -- what it measures --------------------------------------------------------------------------


class Plain(pl.LightningModule):
    def __init__(self, learning_rate=0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh(), nn.Linear(3, 4))
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def test_logged_numbers_are_those_of_the_final_weights():
    x, y = images(14)
    data = [(x[:10], y[:10]), (x[10:], y[10:])]  # uneven: the loss is the mean over samples
    module = Plain().double()
    data = [(a.double(), b) for a, b in data]
    trainer = train(
        module, DataLoader(data, batch_size=None), every_step(data=data, num_batches=None),
        precision="64-true",
    )  # fmt: skip

    def loss(parameters):
        return cross_entropy(functional_call(module.net, parameters, (x.double(),)), y)

    operator = HessianOperator(loss, dict(module.net.named_parameters()))
    exact = torch.linalg.eigvalsh(operator.dense())
    logged = {k.split("/")[1]: v.item() for k, v in trainer.callback_metrics.items()}
    assert logged["lambda_max"] == pytest.approx(exact[-1].item(), rel=1e-5)  # logged as float32
    assert logged["lambda_min"] == pytest.approx(exact[0].item(), rel=1e-5)
    assert logged["trace"] == pytest.approx(exact.sum().item(), rel=1e-5)
    assert logged["loss"] == pytest.approx(operator.loss().item(), rel=1e-5)
    assert logged["gradient_norm"] == pytest.approx(operator.gradient().norm().item(), rel=1e-5)
    share = (exact > 1e-3 * exact.abs().max()).double().mean().item()
    assert logged["minimum_ratio"] == pytest.approx(share, rel=1e-5)
    assert logged["num_samples"] == 14


def test_every_tag_is_logged_and_nothing_else():
    trainer = train(*MODULES["classifier"](), every_step())
    logged = {k for k in trainer.callback_metrics if k.startswith("optkit-")}
    assert logged == {tags.tag(tags.HESSIAN, tag.name) for tag in tags.HESSIAN_SCALARS}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_autocast_does_not_reach_the_measurement(precision):
    """The spectrum at bf16 weights, of a net trained in bf16, is computed in float32."""
    module = Plain(learning_rate=0.0)
    if precision == "bf16-true":
        module = module.to(torch.bfloat16)
    all_data = every_step(data=image_loader(), num_batches=None)
    trainer = train(module, image_loader(), all_data, precision=precision)
    logged = trainer.callback_metrics["optkit-hessian/lambda_max"].item()
    plain = Plain()
    plain.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    x, y = images()
    x = x.to(torch.bfloat16).float() if precision == "bf16-true" else x
    operator = HessianOperator(
        lambda p: cross_entropy(functional_call(plain.net, p, (x,)), y),
        dict(plain.net.named_parameters()),
    )
    assert logged == pytest.approx(hessian_spectrum(operator).lambda_max, rel=1e-4)


def test_same_batches_all_through_the_run(tmp_path):
    logger = CSVLogger(tmp_path)
    train(Plain(learning_rate=0.0), image_loader(), every_step(), logger=logger)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("optkit-hessian/lambda_max")
    assert len({row.split(",")[column] for row in rows[1:]} - {""}) == 1


def test_lockstep_measures_the_same(tmp_path):
    found = []
    for graphs in ("cached", "lockstep"):
        torch.manual_seed(0)
        observer = every_step(graphs=graphs, num_probes=3)
        found.append(train(Plain(), image_loader(shuffle=False), observer).callback_metrics)
    for key in ("lambda_max", "trace", "minimum_ratio_lower"):
        tag = f"optkit-hessian/{key}"
        assert found[0][tag].item() == pytest.approx(found[1][tag].item(), rel=1e-5)


def test_parts_of_a_gan_by_name():
    critic = every_step(parameters=["critic.*"], loss_index=1, name="critic")
    generator = every_step(parameters=["generator.*"], name="generator")
    module, data = MODULES["gan"]()
    trainer = train(module, data, critic, generator)
    metrics = trainer.callback_metrics
    ours = sum(p.numel() for p in module.critic.parameters())
    assert (
        metrics["optkit-hessian-critic/num_matvecs"] == ours + 2
    )  # exact: a product a parameter, and the self-check's two
    assert metrics["optkit-hessian-generator/lambda_max"] > 0


def test_tensorboard_gets_quadrature_and_one_figure(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    train(Plain(), image_loader(), every_step(), logger=logger)
    log = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    arrays = log.Tensors("optkit-hessian/quadrature")
    assert [array.step for array in arrays] == [0, 1, 2]
    quadrature = make_ndarray(arrays[-1].tensor_proto)
    assert quadrature[..., 1].sum(axis=1) == pytest.approx(1.0, rel=1e-5)
    last = log.Scalars("optkit-hessian/lambda_max")[-1].value
    assert quadrature[..., 0].max() == pytest.approx(last, rel=1e-6)
    assert [image.step for image in log.Images("optkit-hessian/spectrum")] == [2]


# -- when it measures --------------------------------------------------------------------------


def test_a_checkpoint_can_monitor_the_sharpness(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="optkit-hessian/lambda_max", save_top_k=1
    )
    options = {"max_epochs": 2, "enable_checkpointing": True}
    trainer = train(
        Plain(), image_loader(), HessianSpectrum(max_overhead=None), checkpoint, **options
    )
    assert checkpoint.best_model_score <= trainer.callback_metrics["optkit-hessian/lambda_max"]


def test_the_end_is_measured_however_small_the_budget(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = HessianSpectrum(None, every_n_steps=1, max_overhead=1e-6, num_batches=1)
    train(Plain(), image_loader(), callback, logger=logger, limit_train_batches=8)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    steps = [line.split(",")[lines[0].split(",").index("step")] for line in lines[1:]]
    assert steps == ["0", "7"]


def test_a_second_fit_and_fast_dev_run():
    callback = every_step()
    module, data = Plain(), image_loader()
    trainer = train(module, data, callback)
    first = trainer.callback_metrics["optkit-hessian/loss"].item()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert trainer.callback_metrics["optkit-hessian/loss"].item() < first
    assert (
        "optkit-hessian/loss" in train(module, data, every_step(), fast_dev_run=1).callback_metrics
    )


def test_validation_alone_measures_nothing():
    module = Plain()
    module.validation_step = lambda batch, batch_idx: None
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[every_step()], enable_progress_bar=False
    )
    trainer.validate(module, DataLoader([images(4)], batch_size=None), verbose=False)
    assert trainer.callback_metrics == {}


def test_two_observers_resume_from_one_checkpoint(tmp_path):
    module, data = Plain(), image_loader()

    def callbacks():
        return [every_step(), every_step(name="head", parameters=["net.3.*"])]

    trainer = train(module, data, *callbacks(), limit_train_batches=1.0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"HessianSpectrum[optkit-hessian]", "HessianSpectrum[optkit-hessian-head]"} <= set(saved)
    again = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=callbacks(), max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    again.fit(module, data, ckpt_path=tmp_path / "last.ckpt")
    assert again.callback_metrics["optkit-hessian-head/num_matvecs"] == 16 + 2


# -- bad input, before the first step ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"curvature": "fisher"},
            ValueError,
            "`curvature` must be 'hessian' or 'gauss_newton', got 'fisher'",
        ),
        ({"num_matvecs": 1}, ValueError, "`num_matvecs` must be at least 2, got 1"),
        ({"num_probes": 0}, ValueError, "`num_probes` must be at least 1, got 0"),
        ({"every_n_epochs": 1, "every_n_steps": 2}, ValueError, "At most one of"),
        ({"tol_rel": -1.0}, ValueError, "`tol_rel` must be at least 0"),
        ({"confidence": 99}, ValueError, "`confidence` must be between 0 and 1"),
        ({"mode": "test"}, ValueError, "`mode` must be 'eval' or 'train', got 'test'"),
        ({"num_batches": 0}, ValueError, "`num_batches` must be an integer of at least 1, got 0"),
        ({"num_batches": None}, ValueError, "unless `data=` is given"),
        ({"graphs": "none"}, ValueError, "`graphs` must be 'cached' or 'lockstep', got 'none'"),
        ({"top_k": 0}, ValueError, "`top_k` must be at least 1"),
        ({"loss_index": -1}, ValueError, "`loss_index` must be at least 0"),
        ({"parameters": "head"}, TypeError, r"Write `parameters=\['head'\]`"),
        ({"name": "My net"}, ValueError, "`name` must be snake_case"),
        ({"max_overhead": 2.0}, ValueError, "`max_overhead` must be a share"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        HessianSpectrum(**options)


def assert_refused_before_the_first_step(module, data, callback, error, message, **options):
    class NoStep(pl.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("training began")

    with pytest.raises(error, match=message):
        train(module, data, NoStep(), callback, **options)


def test_a_pattern_that_matches_nothing_is_refused():
    assert_refused_before_the_first_step(
        Plain(), image_loader(), every_step(parameters=["nett.*"]), ValueError,
        r"must match the name.*'nett\.\*'.*net\.1\.weight",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*")
def test_a_module_without_trainable_parameters_is_refused():
    module = Plain()
    module.requires_grad_(False)
    assert_refused_before_the_first_step(
        module, image_loader(), every_step(), ValueError, "must have a trainable parameter"
    )


class FetchesItself(Plain):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_own_batches_is_refused_without_a_loss_fn():
    with pytest.raises(MisconfigurationException, match=r"`dataloader_iter`\. Pass `loss_fn="):
        train(FetchesItself(), image_loader(), every_step())

    def loss_fn(module, batch):
        return cross_entropy(module.net(batch[0]), batch[1])

    trainer = train(FetchesItself(), image_loader(), every_step(loss_fn=loss_fn))
    assert trainer.callback_metrics["optkit-hessian/lambda_max"] > 0


# -- what fails during training ----------------------------------------------------------------


class Failing(Plain):
    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def training_step(self, batch, batch_idx):
        from lightning_optkit import is_probing

        loss = super().training_step(batch, batch_idx)
        return self.fail(loss) if is_probing() else loss


def out_of_memory(loss):
    raise torch.OutOfMemoryError("no memory for a graph")


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda loss: loss * torch.nan, "CurvatureError: .* NaN or infinite. Is the loss itself"),
        (out_of_memory, "OutOfMemoryError: no memory.*"),
        (
            OnceDifferentiable.apply,
            "wrong second derivatives. Look for a `torch.autograd.Function`",
        ),
        (lambda loss: None, "ProbeError: `training_step` must return the loss"),
    ],
    ids=["nan", "memory", "double_backward", "none"],
)
def test_a_failed_measurement_warns_once_and_training_goes_on(fail, message, recwarn):
    torch.manual_seed(0)
    failing = Failing(fail)
    torch.manual_seed(0)
    untouched = Plain()
    with pytest.warns(UserWarning, match=f"measured nothing at step 0.*{message}"):
        trainer = train(failing, image_loader(shuffle=False), every_step())
    assert trainer.global_step == 3
    assert not [k for k in trainer.callback_metrics if k.startswith("optkit-")]
    ours = [w for w in recwarn if "measured nothing" in str(w.message)]
    assert len(ours) <= 1
    train(untouched, image_loader(shuffle=False))
    for a, b in zip(failing.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)


# -- on a GPU ----------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
    @pytest.mark.parametrize("module_name", ["classifier", "lstm", "transformer"])
    def test_training_is_bit_identical(self, module_name, precision, tmp_path):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert_observer(
                every_step, module_name, tmp_path, accelerator="gpu", devices=1, precision=precision
            )
        finally:
            torch.use_deterministic_algorithms(False)

    def test_spectrum_is_that_of_the_cpu(self):
        torch.backends.cuda.matmul.allow_tf32 = True  # the measurement switches it off
        data = image_loader(shuffle=False)
        found = {}
        for accelerator in ("cpu", "gpu"):
            torch.manual_seed(0)
            plain = Plain(learning_rate=0.0)
            trainer = train(plain, data, every_step(num_batches=8), accelerator=accelerator)
            found[accelerator] = trainer.callback_metrics["optkit-hessian/lambda_max"].item()
        assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-4)
        assert torch.backends.cuda.matmul.allow_tf32


# -- what steps do, and must not show --------------------------------------------------------------


class TouchesOptimizers(Plain):
    """Decays its learning rate by hand and uses the Trainer's lists."""

    def training_step(self, batch, batch_idx):
        self.optimizers().param_groups[0]["lr"] *= 0.9
        self.trainer.optimizers[0].param_groups[0]["momentum"] += 0.01
        self.trainer.optimizers[0].zero_grad()
        self.trainer.lr_scheduler_configs[0].scheduler.step()
        assert isinstance(self.optimizers().optimizer, torch.optim.SGD)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]


class Checkpointed(Plain):
    """Recomputes a part with dropout in it."""

    def training_step(self, batch, batch_idx):
        hidden = torch.utils.checkpoint.checkpoint(
            lambda x: nn.functional.dropout(self.net[:3](x), 0.2, self.training),
            batch[0],
            use_reentrant=False,
        )
        return cross_entropy(self.net[3](hidden), batch[1])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", [TouchesOptimizers, Checkpointed])
def test_training_is_bit_identical_for_steps_that_reach_far(kind):
    ends = []
    for callbacks in ([], [every_step()]):
        pl.seed_everything(5, verbose=False)
        module = kind()
        trainer = train(module, image_loader(), *callbacks, max_epochs=2)
        group = {k: v for k, v in trainer.optimizers[0].param_groups[0].items() if k != "params"}
        gradients = [p.grad for p in module.parameters()]
        assert all(gradient is not None for gradient in gradients)  # none was zeroed
        ends.append((group, [*module.parameters(), *gradients]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert "optkit-hessian/lambda_max" in trainer.callback_metrics


class OwnAutocast(Plain):
    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.net(batch[0])
        return cross_entropy(logits.float(), batch[1])


def test_autocast_inside_a_step_does_not_reach_the_measurement():
    found = []
    for kind in (Plain, OwnAutocast):
        pl.seed_everything(5, verbose=False)
        module = kind(learning_rate=0.0)
        found.append(train(module, image_loader(), every_step()).callback_metrics)
    for key in ("lambda_max", "minimum_ratio", "tol"):
        tag = f"optkit-hessian/{key}"
        assert found[0][tag] == found[1][tag]


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_refused_module_does_not_spoil_the_next():
    observer = every_step()
    with pytest.warns(UserWarning, match="wrong second derivatives"):
        train(Failing(OnceDifferentiable.apply), image_loader(), observer)
    trainer = train(Plain(), image_loader(), observer)
    assert "optkit-hessian/lambda_max" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_running_out_of_memory_names_the_way_out():
    with pytest.warns(UserWarning, match="Hold fewer batches"):
        train(Failing(out_of_memory), image_loader(), every_step())


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, XLAStrategy])
def test_strategies_that_only_look_like_ddp_are_refused(strategy):
    with pytest.raises(MisconfigurationException, match=f"`{strategy.__name__}` may shard"):
        require_whole_parameters(object.__new__(strategy), "HessianSpectrum")
