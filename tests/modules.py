"""LightningModules as people write them, with every side effect a training step can have."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Accuracy, MeanMetric


def images(n: int = 64, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return small images of four classes that a net can learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    pixels = torch.randn(n, 1, 6, 6, generator=generator)
    return pixels + labels[:, None, None, None] / 2, labels


class Classifier(pl.LightningModule):
    """A convolutional net with BatchNorm and Dropout whose step touches all that it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
        )
        self.head = nn.Linear(64, 4)
        self.accuracy = Accuracy(task="multiclass", num_classes=4)
        self.mean_loss = MeanMetric()
        self.diary: dict[str, Any] = {"calls": 0, "losses": [], "seen": torch.zeros(4)}
        self.dice = random.Random(1)
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)
        self.register_buffer("steps_taken", torch.tensor(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        x += 0.01 * torch.randn_like(x)  # in place, from the global stream
        noise = np.random.normal() + random.random()  # noqa: NPY002 - as users do
        noise += self.dice.random() + self.numpy_generator.normal()
        noise += torch.randn((), generator=self.generator).item()
        logits = self(x)
        loss = cross_entropy(logits, y) + 1e-3 * noise * self.head.bias.sum()
        self.diary["calls"] += 1
        self.diary["losses"].append(loss.item())
        self.diary["seen"] += torch.bincount(y, minlength=4)
        self.last_loss = loss.detach()
        self.steps_taken += 1
        self.accuracy(logits, y)
        self.mean_loss.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "mean_loss": self.mean_loss})
        if self.logger is not None:
            self.logger.log_metrics({"by_hand": loss.item()}, step=self.global_step)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class GAN(pl.LightningModule):
    """Manual optimization with two optimizers and schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 36))
        self.critic = nn.Sequential(nn.Linear(36, 8), nn.LeakyReLU(), nn.Linear(8, 1))
        self.diary = {"calls": 0}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0].flatten(1)
        first, second = self.optimizers()
        schedulers = self.lr_schedulers()
        fake = self.generator(torch.randn(len(x), 3, device=x.device))

        self.toggle_optimizer(first)
        score = self.critic(fake)
        generator_loss = binary_cross_entropy_with_logits(score, torch.ones_like(score))
        self.log("generator_loss", generator_loss)
        self.manual_backward(generator_loss)
        self.clip_gradients(first, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)

        scores = self.critic(torch.cat([x, fake.detach()]))
        truth = (torch.arange(len(scores), device=x.device) < len(x)).float()[:, None]
        critic_loss = binary_cross_entropy_with_logits(scores, truth)
        self.log("critic_loss", critic_loss)
        self.manual_backward(critic_loss)
        second.step()
        second.zero_grad()
        for scheduler in schedulers or []:
            scheduler.step()
        self.diary["calls"] += 1

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), lr=1e-2),
            torch.optim.Adam(self.critic.parameters(), lr=1e-2),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


class DictAutoencoder(pl.LightningModule):
    """Dict batches, and a step that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(36, 5), nn.SiLU(), nn.Linear(5, 36))

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = batch["image"].flatten(1)
        return {"loss": mse_loss(self.net(x), x), "extra": x.sum()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SequenceModel(pl.LightningModule):
    """A net over sequences: rows of the image are the time steps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "lstm":
            self.body: nn.Module = nn.LSTM(6, 8, batch_first=True)
        else:
            self.body = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8 if kind == "lstm" else 6, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        hidden = self.body(x[:, 0])
        hidden = hidden[0] if self.kind == "lstm" else hidden
        return cross_entropy(self.head(hidden.mean(1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class CompiledInside(Classifier):
    """A compiled submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


class DictImages(Dataset):
    def __init__(self) -> None:
        self.x, self.y = images()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"image": self.x[i], "label": self.y[i]}


def image_loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*images()), **{"batch_size": 8, "shuffle": True} | options)


MODULES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "classifier": lambda: (Classifier(), image_loader()),
    "gan": lambda: (GAN(), image_loader()),
    "autoencoder": lambda: (DictAutoencoder(), DataLoader(DictImages(), 8, shuffle=True)),
    "lstm": lambda: (SequenceModel("lstm"), image_loader()),
    "transformer": lambda: (SequenceModel("transformer"), image_loader()),
    "compiled": lambda: (
        torch.compile(DictAutoencoder(), backend="aot_eager"),
        DataLoader(DictImages(), 8, shuffle=True),
    ),
    "compiled_inside": lambda: (CompiledInside(), image_loader()),
}
