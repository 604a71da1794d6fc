"""A checkpoint inspected after the fact: its own weights, and the numbers of a dense Hessian."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from matplotlib.figure import Figure
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from lightning_optkit.inspection import (
    OPERATORS,
    InspectionError,
    InspectionSettings,
    _Inspector,
    inspect_checkpoint,
)
from lightning_optkit.inspection_report import (
    _condition,
    _kind,
    _quadrature_json,
    inspection_json,
    run_inspection,
    write_figures,
)
from lightning_optkit.measures import HessianOperator
from tests import inspected
from tests.modules import GAN, Classifier, image_loader

ON_CPU = {"device": "cpu"}


def saved(module, folder, *, data=None, **trainer_options):
    """Train for an epoch and return the checkpoint's path."""
    torch.manual_seed(0)
    module.__dict__["in_training"] = True
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(module, inspected.loader() if data is None else data)
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    return path


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def inspection(path, kind, data="tests.inspected.loader", **settings):
    return inspect_checkpoint(
        path,
        module=f"tests.inspected.{kind}",
        data=data,
        settings=InspectionSettings(**(ON_CPU | settings)),
    )


def dense_hessian(path, dtype=torch.float64):
    """Return loss, gradient and Hessian on all samples, with nothing of this package."""
    state = {name: t.to(dtype) for name, t in state_of(path).items()}
    net = inspected.Plain(width=state["net.0.weight"].shape[0]).to(dtype)
    inputs, labels = inspected.samples(torch.float32)
    sizes = [t.numel() for t in state.values()]

    def loss(flat):
        pieces = zip(state, flat.split(sizes), strict=True)
        params = {name.removeprefix("net."): p.view_as(state[name]) for name, p in pieces}
        return cross_entropy(functional_call(net.net, params, (inputs.to(dtype),)), labels)

    theta = torch.cat([t.flatten() for t in state.values()])
    gradient = torch.func.grad(loss)
    return loss(theta), gradient(theta), jacrev(gradient)(theta)


# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_below", [1000, 0])
def test_numbers_are_those_of_the_dense_hessian_in_float64(tmp_path, exact_below):
    path = saved(inspected.Plain(width=4), tmp_path, precision="64-true")
    assert all(t.dtype == torch.float64 for t in state_of(path).values())
    found = inspection_json(inspection(path, "Plain", top_k=3, exact_below=exact_below))
    loss, gradient, H = dense_hessian(path)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-12)
    assert found["num_samples"] == 64
    spectrum = found["spectrum"]
    assert spectrum["lambda_max"] == pytest.approx(float(eigenvalues[-1]), rel=1e-10)
    assert spectrum["lambda_min"] == pytest.approx(float(eigenvalues[0]), rel=1e-10)
    if exact_below:
        assert spectrum["trace"] == pytest.approx(float(H.trace()), rel=1e-10)
        ratio = float((eigenvalues > spectrum["tol"]).double().mean())
        assert spectrum["minimum_ratio"]["value"] == pytest.approx(ratio, abs=1e-12)
    largest = sorted(eigenvalues.tolist(), key=abs, reverse=True)[:3]
    for pair, value in zip(found["top_eigenvalues"], largest, strict=True):
        assert pair["value"] == pytest.approx(value, rel=1e-4)
        assert abs(pair["value"] - value) <= pair["residual"]
        assert pair["converged"] is True
    step = float(gradient @ gradient / (gradient @ H @ gradient))
    assert found["gradient_step"]["step"] == pytest.approx(step, rel=1e-9)
    assert found["critical_point"]["gradient_norm"] == pytest.approx(
        float(gradient.norm()), rel=1e-12
    )
    assert found["critical_point"]["kind"] == "not critical"


def test_float32_agrees_with_float64(tmp_path):
    path = saved(inspected.Plain(width=4), tmp_path)
    found = inspection(path, "Plain")
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(path)[2])
    assert abs(found.spectrum.lambda_max - float(eigenvalues[-1])) <= found.spectrum.noise


def test_traces_of_layers_sum_to_the_trace(tmp_path):
    path = saved(inspected.Plain(width=4), tmp_path)
    found = inspection(path, "Plain", per_layer=True)
    assert list(found.layers) == ["net.0", "net.2"]
    total = sum(layer.trace for layer in found.layers.values())
    assert total == pytest.approx(found.spectrum.trace, rel=1e-5)
    _, _, H = dense_hessian(path)
    first = torch.linalg.eigvalsh(H[:24, :24])  # 5 x 4 weights and 4 biases
    assert found.layers["net.0"].lambda_max == pytest.approx(float(first[-1]), rel=1e-5)
    assert found.num_products >= found.spectrum.num_matvecs + 24 + 15


def test_quadrature_is_in_the_json(tmp_path):
    path = saved(inspected.Plain(width=4), tmp_path, precision="64-true")
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(path)[2])
    exact = inspection_json(inspection(path, "Plain"))["spectrum"]
    assert exact["ritz_values"] == [pytest.approx(eigenvalues.tolist(), abs=1e-12)]
    assert exact["ritz_weights"] == [pytest.approx([1 / 39] * 39)]
    settings = {"exact_below": 0, "num_matvecs": 6, "num_probes": 3, "per_layer": True}
    found = inspection_json(inspection(path, "Plain", **settings))
    for spectrum in (found["spectrum"], *found["layers"].values()):
        assert [len(nodes) for nodes in spectrum["ritz_values"]] == [6, 6, 6]
        for nodes, weights in zip(spectrum["ritz_values"], spectrum["ritz_weights"], strict=True):
            assert len(nodes) == len(weights)
            assert sum(weights) == pytest.approx(1)
        assert max(map(max, spectrum["ritz_values"])) == spectrum["lambda_max"]


def test_probes_that_end_early_have_no_padding_in_the_json():
    found = _quadrature_json(
        SimpleNamespace(
            ritz_values=torch.tensor([[1.0, 2.0], [3.0, math.nan]]),
            ritz_weights=torch.tensor([[0.25, 0.75], [1.0, 0.0]]),
        )
    )
    assert found == {
        "ritz_values": [[1.0, 2.0], [3.0]],
        "ritz_weights": [[0.25, 0.75], [1.0]],
    }


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
def test_gauss_newton_is_that_of_the_dense_jacobian(tmp_path, graphs):
    path = saved(inspected.Plain(width=4), tmp_path, precision="64-true")
    found = inspection(path, "Plain", curvature="gauss_newton", graphs=graphs)
    state = state_of(path)
    inputs = inspected.samples(torch.float32)[0].double()
    net = inspected.Plain(width=4).double().net
    jacobians = jacrev(
        lambda params: functional_call(net, params, (inputs,)),
    )({name.removeprefix("net."): t for name, t in state.items()})
    J = torch.cat([jacobian.flatten(2) for jacobian in jacobians.values()], dim=2)
    logits = functional_call(net, {k.removeprefix("net."): t for k, t in state.items()}, inputs)
    p = logits.softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("bin,bij,bjm->nm", J, curvature, J) / len(inputs)
    expected = torch.linalg.eigvalsh(G)
    torch.testing.assert_close(found.spectrum.ritz_values[0], expected, rtol=1e-9, atol=1e-12)
    assert "Hessian's" in found.stability


def test_lockstep_finds_the_same(tmp_path, monkeypatch):
    made = []

    def noting(*args, **kwargs):
        made.append(HessianOperator(*args, **kwargs))
        return made[-1]

    monkeypatch.setitem(OPERATORS, "hessian", noting)
    path = saved(inspected.Plain(width=4), tmp_path, precision="64-true")
    settings = {"exact_below": 0, "num_matvecs": 10}
    cached, lockstep = (
        inspection(path, "Plain", graphs=graphs, **settings) for graphs in ("cached", "lockstep")
    )
    assert [operator.works_in_blocks for operator in made] == [False, True]
    largest = float(torch.linalg.eigvalsh(dense_hessian(path)[2])[-1])
    for found in (cached, lockstep):
        assert found.spectrum.ritz_values.shape == (4, 10)
        assert abs(found.spectrum.lambda_max - largest) <= found.spectrum.lambda_max_error
        assert float(found.pairs.values[0]) == pytest.approx(largest, rel=1e-4)


def test_condition_number_is_a_bound_unless_exact(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    path = saved(inspected.Plain(width=1), tmp_path, precision="64-true")
    chosen = {"parameters": ("net.0.*",)}
    exact = inspection(path, "Plain", **chosen)
    bound = inspection(path, "Plain", exact_below=0, num_matvecs=3, **chosen)
    _, _, H = dense_hessian(path)
    sizes = torch.linalg.eigvalsh(H[:6, :6]).abs()
    truth = float(sizes.max() / sizes.min())
    shown = [_condition(each.spectrum) for each in (exact, bound)]
    assert shown == [f"{truth:.4g}", f"≥ {bound.spectrum.condition_number:.4g}"]
    assert 1 < bound.spectrum.condition_number <= truth
    flags = [
        inspection_json(each)["spectrum"]["condition_number_is_lower_bound"]
        for each in (exact, bound)
    ]
    assert flags == [False, True]


def test_an_infinite_condition_number_is_no_bound(tmp_path):
    path = saved(inspected.Plain(), tmp_path)  # softmax does not mind a shift of all logits
    found = inspection(path, "Plain", exact_below=0)
    assert math.isinf(found.spectrum.condition_number)
    assert _condition(found.spectrum) == "infinite"
    assert not inspection_json(found)["spectrum"]["condition_number_is_lower_bound"]


# -- the optimizer in the checkpoint ----------------------------------------------------------


def test_stability_of_momentum_is_that_of_the_dense_hessian(tmp_path):
    path = saved(inspected.Trained(optimizer="sgd"), tmp_path, precision="64-true")
    found = inspection_json(inspection(path, "Trained"))
    lambda_max = float(torch.linalg.eigvalsh(dense_hessian(path)[2])[-1])
    limit = (2 + 2 * 0.9) / 0.2  # the schedule has halved the learning rate after the epoch
    assert found["stability"]["learning_rate"] == 0.2
    assert found["stability"]["threshold"] == pytest.approx(limit, rel=1e-12)
    assert found["stability"]["lambda_max"] == pytest.approx(lambda_max, rel=1e-4)
    assert found["stability"]["ratio"] == pytest.approx(lambda_max / limit, rel=1e-4)
    assert found["stability_reason"] is None


def test_stability_of_adamw_is_that_of_the_state_in_the_file(tmp_path):
    path = saved(inspected.Trained(), tmp_path, precision="64-true")
    found = inspection(path, "Trained").stability
    state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    steps = int(state[0]["step"])
    assert steps == 3
    moments = torch.cat([state[i]["exp_avg_sq"].flatten() for i in range(4)])
    D = 1 / ((moments / (1 - 0.999**steps)).sqrt() + 1e-8)
    H = dense_hessian(path)[2]
    scaled = D.sqrt()[:, None] * H * D.sqrt()
    lambda_max = float(torch.linalg.eigvalsh(scaled)[-1])
    rate = 0.01
    # decoupled decay: 2 - rate * decay in place of 2
    limit = (2 - rate * 0.1) * (1 + 0.9) * (1 - 0.9**steps) / (rate * (1 - 0.9))
    assert found.optimizer == "AdamW"
    assert found.threshold == pytest.approx(limit, rel=1e-9)
    assert found.lambda_max == pytest.approx(lambda_max, rel=1e-4)
    assert abs(found.lambda_max - lambda_max) <= found.lambda_max_error


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        ("NoOptimizer", {}, "`configure_optimizers` failed: the learning rate was never found"),
        ("Trained", {"optimizer": "lbfgs"}, "must be one whose stability threshold is known"),
        ("Trained", {"optimizer": "part"}, "no optimizer owns all parameters"),
    ],
)
def test_stability_is_left_out_with_a_reason(tmp_path, kind, changed, reason):
    path = saved(getattr(inspected, kind)(**changed), tmp_path)
    found = inspection(path, kind)
    assert reason in found.stability
    assert inspection_json(found)["stability"] is None
    assert reason in inspection_json(found)["stability_reason"]


def test_stability_needs_a_state_that_fits(tmp_path):
    path = saved(inspected.Trained(), tmp_path)
    content = torch.load(path, weights_only=True)
    for state in content["optimizer_states"]:
        state["param_groups"].append(state["param_groups"][0])
    torch.save(content, tmp_path / "other.ckpt")
    assert "parameter group" in inspection(tmp_path / "other.ckpt", "Trained").stability
    del content["optimizer_states"]
    torch.save(content, tmp_path / "weights.ckpt")
    found = inspection(tmp_path / "weights.ckpt", "Trained").stability
    assert found == "the checkpoint holds no optimizer's state"


def test_stability_in_part_of_the_parameters(tmp_path):
    path = saved(inspected.Trained(optimizer="part"), tmp_path, precision="64-true")
    found = inspection(path, "Trained", parameters=("net.0.*",)).stability
    block = dense_hessian(path)[2][:24, :24]
    assert found.threshold == pytest.approx(2 / 0.1)
    assert found.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-4)


# -- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "trainer_options"),
    [
        ("Plain", {}),
        ("Plain", {"precision": "64-true"}),
        ("Plain", {"precision": "bf16-true"}),
        ("LayersInSetup", {}),
        ("LayersInConfigureModel", {}),
        ("NoOptimizer", {}),
        ("WritesWeights", {}),
    ],
)
def test_weights_are_the_checkpoints_to_the_bit(tmp_path, monkeypatch, kind, trainer_options):
    path = saved(getattr(inspected, kind)(), tmp_path, **trainer_options)
    seen = {}
    measured = _Inspector._measured

    def noting(self, pl_module, terms, limit):
        seen.update({name: p.clone() for name, p in terms["params"].items()})
        return measured(self, pl_module, terms, limit)

    monkeypatch.setattr(_Inspector, "_measured", noting)
    inspection(path, kind)
    state = state_of(path)
    assert seen.keys() == state.keys()
    for name, value in seen.items():
        wider = torch.promote_types(value.dtype, state[name].dtype)
        assert torch.equal(value.to(wider), state[name].to(wider))
        assert (value.dtype == torch.float64) == (state[name].dtype == torch.float64)


def test_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspected.Plain, "on_train_batch_start", lambda *_: None, raising=False)
    path = saved(inspected.Plain(), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert inspection(path, "ForbidsTraining").num_samples == 64
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_manual_optimization_has_a_loss_for_each_part(tmp_path):
    path = saved(GAN(), tmp_path, data=image_loader())
    norms = [
        inspect_checkpoint(
            path,
            module="tests.modules:GAN",
            data="tests.modules:image_loader",
            settings=InspectionSettings(
                **ON_CPU,
                parameters=("critic.*",),
                loss_index=index,
                num_matvecs=5,
                num_probes=1,
            ),
        ).point.gradient_norm
        for index in (0, 1)
    ]
    assert min(norms) > 0
    assert norms[0] != norms[1]  # both losses meet the critic


def test_hooks_of_the_module_see_the_weights(tmp_path, monkeypatch):
    path = saved(inspected.Plain(), tmp_path)
    seen = []
    monkeypatch.setattr(
        inspected.LayersInSetup,
        "on_fit_start",
        lambda self: seen.append(self.net[0].weight.detach().clone()),
        raising=False,
    )
    inspection(path, "LayersInSetup")
    assert torch.equal(seen[0], state_of(path)["net.0.weight"])


def test_mode_reaches_dropout_and_batchnorm(tmp_path):
    path = saved(Classifier(), tmp_path, data=image_loader())
    values = [
        inspect_checkpoint(
            path,
            module="tests.modules:Classifier",
            data="tests.modules:image_loader",
            settings=InspectionSettings(**ON_CPU, mode=mode, num_batches=2),
        ).spectrum.lambda_max
        for mode in ("eval", "train")
    ]
    assert abs(values[0] - values[1]) > 0.01 * abs(values[0])


# -- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    ["tests.inspected.Points", "tests.inspected:loader", "tests.inspected.LOADER",
     "tests.inspected:BATCHES", "tests.inspected:Points"],
)  # fmt: skip
def test_data_may_be_any_of_these(tmp_path, data):
    path = saved(inspected.Plain(), tmp_path)
    found = inspection(path, "Plain", data)
    assert found.num_samples == 64
    assert found.loss == pytest.approx(float(dense_hessian(path)[0]), rel=1e-6)


def test_module_brings_its_own_data(tmp_path):
    path = saved(inspected.OwnData(), tmp_path)
    assert inspection(path, "OwnData", None, num_batches=2).num_samples == 48


def test_datamodule_has_the_hyperparameters_of_the_checkpoint(tmp_path):
    path = saved(inspected.Plain(), tmp_path, data=inspected.Points(batch_size=8))
    assert inspection(path, "Plain", "tests.inspected.Points").num_samples == 4 * 8


def test_arguments_come_before_the_hyperparameters(tmp_path):
    path = saved(inspected.Plain(width=6), tmp_path)
    losses = [
        inspect_checkpoint(
            path,
            module="tests.inspected.Plain",
            data="tests.inspected.loader",
            module_args=arguments,
            data_args={"batch_size": 64},
            settings=InspectionSettings(**ON_CPU),
        ).loss
        for arguments in ({}, {"steepness": 0.0})
    ]
    assert losses[1] == pytest.approx(math.log(3), rel=1e-6)  # of three equal logits
    assert losses[0] < losses[1]


# -- what cannot be loaded --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": "nothing.ckpt"}, "must be a file"),
        ({"checkpoint": "."}, "a folder"),
        ({"checkpoint": "text.ckpt"}, "that torch cannot load"),
        ({"checkpoint": "other.ckpt"}, "without 'state_dict'"),
        ({"module": "Plain"}, "must be like package.module.Class"),
        ({"module": "tests.inspected.Nothing"}, "no attribute 'Nothing'"),
        ({"module": "nowhere_at_all.Plain"}, "No module named"),
        ({"module": "tests.inspected.Points"}, "must name a LightningModule"),
        ({"module": "tests.modules.Classifier"}, "does not fit"),
        ({"module_args": {"width": 7}}, "size mismatch"),
        ({"data": None}, "has no `train_dataloader`"),
        ({"data": "tests.inspected.nothing"}, "no attribute 'nothing'"),
        ({"data_args": {"size": 3}}, "unexpected keyword argument 'size'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    path = saved(inspected.Plain(), tmp_path)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    capsys.readouterr()
    given = {
        "checkpoint": str(path),
        "module": "tests.inspected.Plain",
        "data": "tests.inspected.loader",
        "module_args": {},
        "data_args": {},
        "settings": InspectionSettings(**ON_CPU),
        "trust": False,
        "folder": None,
        "as_json": True,
    } | changed
    assert run_inspection(given.pop("checkpoint"), **given) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_a_measurement_that_fails_is_one_line_and_status_1(tmp_path, capsys):
    path = saved(inspected.Plain(), tmp_path)
    capsys.readouterr()
    status = run_inspection(
        str(path),
        module="tests.inspected.Plain",
        data="tests.inspected.loader",
        module_args={"steepness": math.inf},
        data_args={},
        settings=InspectionSettings(**ON_CPU),
        trust=False,
        folder=None,
        as_json=True,
    )
    shown = capsys.readouterr()
    assert (status, shown.out) == (1, "")
    assert "nothing was measured. CurvatureError: Hessian products are NaN" in shown.err
    assert shown.err.count("\n") == 1


def test_objects_are_unpickled_only_on_trust(tmp_path):
    path = saved(inspected.TakesObject(inspected.Plan(width=2)), tmp_path)
    with pytest.raises(InspectionError, match=r"inspected\.Plan.*--trust"):
        inspection(path, "TakesObject")
    found = inspect_checkpoint(
        path,
        module="tests.inspected.TakesObject",
        data="tests.inspected.loader",
        settings=InspectionSettings(**ON_CPU),
        trust=True,
    )
    assert found.spectrum.num_params == 5 * 2 + 2 + 2 * 3 + 3


# -- what is shown ----------------------------------------------------------------------------


def test_json_has_no_literal_that_json_lacks(tmp_path, capsys):
    path = saved(inspected.Plain(), tmp_path)
    capsys.readouterr()
    status = run_inspection(
        str(path),
        module="tests.inspected.ForbidsTraining",  # prints in its step
        data="tests.inspected.loader",
        module_args={"steepness": 0.0},  # no gradient, no curvature
        data_args={},
        settings=InspectionSettings(**ON_CPU, num_batches=1),
        trust=False,
        folder=str(tmp_path / "figures"),
        as_json=True,
    )
    out = capsys.readouterr().out
    assert status == 0

    def refuse(literal):
        raise AssertionError(literal)

    found = json.loads(out, parse_constant=refuse)
    assert found["version"] == 1
    assert found["spectrum"]["condition_number"] == "Infinity"
    assert found["critical_point"]["gradient_noise"] is None  # one batch
    assert found["gradient_step"]["step"] is None
    assert found["figures"] == [str(tmp_path / "figures" / "spectrum.png")]


def test_figures_are_one_for_all_and_one_a_layer(tmp_path):
    path = saved(inspected.Plain(), tmp_path)
    found = inspection(path, "Plain", per_layer=True)
    paths = write_figures(found, tmp_path / "out")
    assert [p.name for p in paths] == ["spectrum.png", "layer-net.0.png", "layer-net.2.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_figures_name_the_matrix_and_count_one_parameter(tmp_path, monkeypatch):
    path = saved(inspected.OneWeight(), tmp_path)
    found = inspection(path, "OneWeight", curvature="gauss_newton", per_layer=True)
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: titles.append(self._suptitle))
    write_figures(found, tmp_path / "out")
    assert [title.get_text() for title in titles] == [
        "Gauss–Newton spectrum, 1 parameter",
        "Gauss–Newton spectrum of scale, 1 parameter",
    ]


def test_a_critical_point_of_gauss_newton_has_no_kind(tmp_path):
    path = saved(inspected.OneWeight(), tmp_path)
    rows = {}
    for curvature in ("hessian", "gauss_newton"):
        found = inspection(path, "OneWeight", curvature=curvature, num_batches=1)
        point = replace(found.point, kind="minimum")
        rows[curvature] = _kind(replace(found, point=point))
        assert _kind(found) == "not critical"
    assert rows["hessian"] == "minimum"
    assert "only the Hessian tells" in rows["gauss_newton"]


def test_tables_name_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    path = saved(inspected.Plain(), tmp_path)
    capsys.readouterr()
    status = run_inspection(
        str(path),
        module="tests.inspected.Plain",
        data="tests.inspected.loader",
        module_args={},
        data_args={},
        settings=InspectionSettings(**ON_CPU, per_layer=True, exact_below=0),
        trust=False,
        folder=None,
        as_json=False,
    )
    shown = capsys.readouterr().out
    assert status == 0
    for words in (
        "epoch 1, step 3", "on 64 training samples", "not critical", "λ max", "minimum ratio",
        "trace", "condition", "best step", "threshold", "ratio", "stable curvature of SGD",
        "matrix", "Hessian", "Eigenvalues of largest size", "Layer by layer", "net.0",
        "in brackets: 99% bounds",
    ):  # fmt: skip
        assert words in shown
