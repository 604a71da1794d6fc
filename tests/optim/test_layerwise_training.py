"""LARS and LAMB in a Trainer: clipped, scheduled, resumed, and made by a `LightningCLI`."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import LAMB, LARS, lars_param_groups

OPTIMIZERS = {
    "lars": lambda groups: LARS(groups, lr=2.0, trust_coefficient=0.05, fold_lr=True),
    "lamb": lambda groups: LAMB(groups, lr=0.05),
}


class Net(pl.LightningModule):
    def __init__(self, kind: str = "lars") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.kind = kind

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        x = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.kind](lars_param_groups(self, weight_decay=0.1))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def fit(module, *, max_epochs=4, ckpt_path=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        gradient_clip_val=0.5,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_ends_where_the_whole_one_does(kind, tmp_path):
    whole, again = Net(kind), Net(kind)
    trainer = fit(whole)
    fit(Net(kind), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(again, ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    ratios = [t.optimizers[0].last_trust_ratios() for t in (trainer, resumed)]
    assert torch.equal(*ratios)
    assert (ratios[0][2:] == 1).all()
    assert not (ratios[0][:2] == 1).any()
    assert not torch.equal(whole.net[0].weight, Net(kind).net[0].weight)


class Bare(Net):
    configure_optimizers = pl.LightningModule.configure_optimizers  # the command line's


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lightning_optkit.LARS", {"lr": 2.0, "weight_decay": 5e-4, "fold_lr": True}),
        ("lightning_optkit.optim.LAMB", {"betas": [0.8, 0.99], "max_weight_norm": 10.0}),
    ],
)
def test_it_is_made_from_a_config(name, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
    arguments = ["--trainer.logger=false", "--trainer.accelerator=cpu", f"--optimizer={name}"]
    arguments += [f"--optimizer.{key}={value}" for key, value in settings.items()]
    cli = LightningCLI(Bare, args=arguments, run=False, seed_everything_default=False)
    optimizer = cli.model.configure_optimizers()
    group = optimizer.param_groups[0]
    assert type(optimizer) is (LARS if "LARS" in name else LAMB)
    assert {key: group[key] for key in settings} == settings | (
        {"betas": (0.8, 0.99)} if "betas" in settings else {}
    )
    (tmp_path / "again.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    again = LightningCLI(
        Bare,
        args=[f"--config={tmp_path / 'again.yaml'}"],
        run=False,
        seed_everything_default=False,
    )
    assert again.config.optimizer == cli.config.optimizer
