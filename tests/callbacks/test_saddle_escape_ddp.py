"""SaddleEscape on two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optkit import SaddleEscape
from tests.contracts import assert_resumes, assert_same, run
from tests.distributed import run_in_two_processes
from tests.modules import DictAutoencoder, images

pytestmark = pytest.mark.distributed

DDP = {"strategy": "ddp", "devices": 2}


def eager(**options: Any) -> SaddleEscape:
    defaults = {"every_n_steps": 4, "num_batches": 2, "gradient_tol": 1e9, "max_matvecs": 8}
    return SaddleEscape(**defaults | options)


def train_and_resume(folder: Path) -> list[dict[str, Any]]:
    """Return what each kind of run leaves on this rank, resumed ones compared with whole ones."""
    found = []
    for name, options, parameters in (
        ("classifier", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, None),
        ("gan", {"strategy": "ddp_find_unused_parameters_true"}, ["critic.*", "generator.*"]),
    ):
        callback = assert_resumes(
            lambda parameters=parameters: eager(parameters=parameters),
            name,
            folder / name,
            use_distributed_sampler=False,
            **DDP | options,
        )
        found.append({"escapes": callback.num_escapes})
        callback, options = eager(parameters=parameters), options | {"limit_train_batches": 3}
        trace = run(name, [callback], folder / f"{name}-again", **DDP | options)
        found.append({"escapes": callback.num_escapes, "weights": trace["weights"]})
    return found


def test_resumes_with_the_same_weights_on_both_processes(tmp_path):
    first, second = run_in_two_processes(train_and_resume, tmp_path, tmp_path)
    for one, two in zip(first, second, strict=True):
        assert one["escapes"] == two["escapes"] > 0
        weights = [
            {k: v for k, v in rank.get("weights", {}).items() if "running" not in k}
            for rank in (one, two)
        ]
        assert_same(*weights)  # statistics of BatchNorm are each rank's own


def fails_on_one_rank() -> tuple[list[float], int]:
    """Train from where one rank alone cannot compute its loss, once it has begun."""

    class Failing(DictAutoencoder):
        def training_step(self, batch):
            from lightning_optkit import is_probing

            if is_probing() and self.global_step > 0 and os.environ["RANK"] == "1":
                raise RuntimeError("only here")
            return super().training_step(batch)

    module, callback = fresh(Failing), eager(every_n_steps=1)
    trainer = fit(module, callback, uneven_data()[int(os.environ["RANK"])] * 3, **DDP)
    return [float(p.sum()) for p in module.parameters()], trainer.global_step


@pytest.mark.filterwarnings("ignore:.*measured nothing")
def test_a_failure_on_one_rank_keeps_none_waiting(tmp_path):
    first, second = run_in_two_processes(fails_on_one_rank, tmp_path)
    assert first == second
    assert first[1] == 3


def uneven_data() -> list[list[dict[str, torch.Tensor]]]:
    """Return 7 samples for one rank and 4 for the other."""
    x = images(11)[0].double()
    return [[{"image": x[:7]}], [{"image": x[7:]}]]


def fresh(kind: type[DictAutoencoder]) -> DictAutoencoder:
    pl.seed_everything(3, verbose=False)
    module = kind().double()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    return module


def fit(
    module: DictAutoencoder, callback: SaddleEscape, data: list[Any], **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        max_epochs=1,
        precision="64-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def escaped(data: list[Any], **options: Any) -> dict[str, Any]:
    """Return what an escape did that alone moved the weights."""
    module = fresh(DictAutoencoder)
    trainer = fit(module, eager(data=data, num_batches=None, max_escapes=1), data, **options)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return found | {name: p.detach().clone() for name, p in module.named_parameters()}


def escaped_on_this_rank() -> dict[str, Any]:
    return escaped(uneven_data()[int(os.environ["RANK"])], **DDP)


def test_the_step_is_that_of_all_samples_together(tmp_path):
    alone = escaped([*uneven_data()[0], *uneven_data()[1]], devices=1)
    first, second = run_in_two_processes(escaped_on_this_rank, tmp_path)
    assert alone["optkit-escape/escaped"] == 1
    first.pop("optkit-escape/seconds"), second.pop("optkit-escape/seconds")
    assert_same(first, second)
    for key, value in first.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-6, atol=1e-9)
