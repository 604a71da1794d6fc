"""HessianSpectrum of other matrices than the Hessian: Gauss-Newton, and the layers' blocks."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_optkit import HessianSpectrum
from lightning_optkit.measures import HessianOperator
from tests.contracts import assert_observer
from tests.modules import image_loader, images


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh(), nn.Linear(3, 4))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnLoss(Plain):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


def fit(module, *callbacks, data=None, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
        limit_train_batches=3,
        **{"logger": False} | options,
    )
    trainer.fit(module, image_loader() if data is None else data)
    return trainer


def observer(**options):
    return HessianSpectrum(
        **{"max_overhead": None, "num_batches": 2, "num_matvecs": 4, "num_probes": 2} | options
    )


@pytest.mark.parametrize("module_name", ["classifier", "gan", "autoencoder", "transformer"])
def test_training_is_bit_identical_with_gauss_newton(module_name, tmp_path):
    assert_observer(lambda: observer(curvature="gauss_newton"), module_name, tmp_path)


def test_training_is_bit_identical_by_layer(tmp_path):
    assert_observer(lambda: observer(per_layer=True, exact_below=0), "classifier", tmp_path)


def test_gauss_newton_is_that_of_the_final_weights():
    x, y = images(14)
    module = Plain().double()
    data = [(x.double(), y)]
    callback = observer(curvature="gauss_newton", data=data, num_batches=None)
    trainer = fit(module, callback, data=DataLoader(data, batch_size=None), precision="64-true")
    params = {k: p.detach() for k, p in module.net.named_parameters()}
    rows = jacrev(lambda p: functional_call(module.net, p, (x.double(),)))(params)
    jacobian = torch.cat([rows[k].reshape(56, -1) for k in params], dim=1)
    outputs = module.net(x.double()).detach()
    curved = hessian(lambda z: cross_entropy(z, y))(outputs).reshape(56, 56)
    exact = torch.linalg.eigvalsh(jacobian.T @ curved @ jacobian)
    logged = {k.split("/")[1]: v.item() for k, v in trainer.callback_metrics.items()}
    assert all(k.startswith("optkit-hessian-gauss_newton/") for k in trainer.callback_metrics)
    assert logged["lambda_max"] == pytest.approx(exact[-1].item(), rel=1e-5)
    assert logged["trace"] == pytest.approx(exact.sum().item(), rel=1e-5)
    assert logged["negative_ratio"] == 0.0


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_loss_without_known_outputs_says_what_gauss_newton_needs():
    with pytest.warns(UserWarning, match="needs the net's outputs"):
        fit(OwnLoss(), observer(curvature="gauss_newton"))


def test_a_loss_function_may_return_the_outputs_itself():
    def loss_fn(pl_module, batch):
        outputs = pl_module.net(batch[0])
        return outputs.square().mean(), outputs

    trainer = fit(OwnLoss(), observer(curvature="gauss_newton", loss_fn=loss_fn))
    logged = trainer.callback_metrics
    assert logged["optkit-hessian-gauss_newton/lambda_max"] > 0


def test_blocks_are_those_of_the_final_weights(tmp_path):
    x, y = images(14)
    data = [(x, y)]
    module = Plain()
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv", version=0)]
    fit(
        module,
        observer(per_layer=True, data=data, num_batches=None),
        data=DataLoader(data, batch_size=None),
        logger=loggers,
    )
    events = EventAccumulator(loggers[0].log_dir).Reload()

    def array(tag):
        return make_ndarray(events.Tensors(f"optkit-hessian/{tag}")[-1].tensor_proto)

    operator = HessianOperator(
        lambda p: cross_entropy(functional_call(module.net, p, (x,)), y),
        dict(module.net.named_parameters()),
    )
    matrix = operator.dense()
    blocks = {b"net.1": matrix[:111, :111], b"net.3": matrix[111:, 111:]}
    assert array("layer_names").tolist() == list(blocks)
    for row, block in zip(array("layers"), blocks.values(), strict=True):
        exact = torch.linalg.eigvalsh(block)
        assert row[0] == pytest.approx(exact[-1].item(), rel=1e-4)
        assert row[1] == pytest.approx(exact[0].item(), rel=1e-3, abs=1e-6)
        assert row[2] == pytest.approx(exact.sum().item(), rel=1e-4)
        share = (exact > 1e-3 * exact.abs().max()).double().mean().item()
        assert row[4] <= share + 1e-6
        assert row[5] >= share - 1e-6
    assert (tmp_path / "csv/lightning_logs/version_0/optkit-hessian-by_layer.png").exists()


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_layer_without_a_part_in_the_loss_has_no_curvature(curvature, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Unused(), observer(per_layer=True, curvature=curvature), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    topic = "optkit-hessian" + ("" if curvature == "hessian" else "-gauss_newton")
    names = make_ndarray(events.Tensors(f"{topic}/layer_names")[-1].tensor_proto).tolist()
    layers = make_ndarray(events.Tensors(f"{topic}/layers")[-1].tensor_proto)
    spare = layers[names.index(b"spare")].tolist()
    assert spare == [0.0] * 6
    assert layers[names.index(b"net.3"), 0] > 0


def test_the_engine_may_be_pyhessian(tmp_path):
    pytest.importorskip("pyhessian")
    data = image_loader()
    module = Plain()
    both = [
        observer(data=data, num_batches=None, num_matvecs=60),
        observer(data=data, num_batches=None, num_matvecs=60, engine="pyhessian", name="theirs"),
    ]
    trainer = fit(module, *both)
    found = {k: v.item() for k, v in trainer.callback_metrics.items()}
    ours, theirs = found["optkit-hessian/lambda_max"], found["optkit-hessian-theirs/lambda_max"]
    assert theirs == pytest.approx(ours, rel=0.02)  # its power iteration stops at 1e-3 a step
    assert found["optkit-hessian-theirs/minimum_ratio_lower"] == 0.0
    assert found["optkit-hessian-theirs/minimum_ratio_upper"] == 1.0
    assert found["optkit-hessian/minimum_ratio_lower"] > 0.0


def test_training_is_bit_identical_with_pyhessian(tmp_path):
    pytest.importorskip("pyhessian")
    assert_observer(lambda: observer(engine="pyhessian"), "classifier", tmp_path)


def test_the_tolerance_may_be_left_to_the_measurement():
    trainer = fit(Plain(), observer(tol_rel="auto", num_matvecs=40, exact_below=0))
    logged = {k.split("/")[1]: v.item() for k, v in trainer.callback_metrics.items()}
    width = logged["minimum_ratio_upper"] - logged["minimum_ratio_lower"]
    coarse = fit(Plain(), observer(num_matvecs=40, exact_below=0)).callback_metrics
    assert width < 0.35  # 123 parameters and two probes: the sampling error alone is as wide
    assert logged["tol"] != coarse["optkit-hessian/tol"].item()


def test_descent_is_logged_where_the_loss_curves_down():
    logged = fit(Plain(), observer()).callback_metrics
    predicted = logged["optkit-hessian/predicted_change"].item()
    assert logged["optkit-hessian/lambda_min"] < 0
    assert logged["optkit-hessian/actual_change"].item() == pytest.approx(predicted, rel=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "fisher"}, "`curvature` must be 'hessian' or 'gauss_newton', got 'fisher'"),
        ({"engine": "curvlinops"}, "`engine` must be 'optkit' or 'pyhessian', got 'curvlinops'"),
        ({"exact_below": -1}, "`exact_below` must be at least 0, got -1"),
        ({"sharded": "yes"}, "`sharded` must be 'auto', 'gather' or 'fd', got 'yes'"),
        ({"sharded": "fd", "per_layer": True}, "measure the whole Hessian and nothing else"),
        ({"engine": "pyhessian", "curvature": "gauss_newton"}, "measure the whole Hessian"),
        ({"engine": "pyhessian", "per_layer": True}, "measure the whole Hessian"),
        ({"tol_rel": "small"}, "`tol_rel` must be at least 0 or 'auto', got 'small'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HessianSpectrum(**options)
