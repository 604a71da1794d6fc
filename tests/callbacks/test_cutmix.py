"""CutMix in a real Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import CutMix
from tests.contracts import assert_resumes
from tests.modules import images


@pytest.mark.parametrize(
    ("make", "module_name", "options", "at"),
    [
        (CutMix, "classifier", {}, ("mid-epoch",)),
        (lambda: CutMix(per_sample=True, probability=0.7), "transformer", {}, ("epoch end",)),
        (
            lambda: CutMix(targets="none", dims=[3]),
            "gan",
            {},
            ("mid-epoch",),
        ),
    ],
)
def test_resumes(make, module_name, options, at, tmp_path):
    callback = assert_resumes(make, module_name, tmp_path, at=at, **options)
    assert callback._counted[:2] == (2, 5)
    assert callback._counted[2] > 0


class Segments(pl.LightningModule):
    """Finds the bright pixels, whose map goes with the image."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 2, 3, padding=1)
        self.fed = []

    def training_step(self, batch):
        self.fed.append((batch["image"].clone(), batch["mask"].clone()))
        return F.cross_entropy(self.net(batch["image"]), batch["mask"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_images_with_their_label_maps():
    x, _ = images(16)

    class Maps(TensorDataset):
        def __getitem__(self, i):
            image = super().__getitem__(i)[0]
            return {"image": image, "mask": (image[0] > 0.5).long()}

    module, callback = Segments(), CutMix(target_key="mask")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Maps(x), 4))
    whole, changed = x.split(4), []
    assert len(module.fed) == 4
    for (image, mask), plain in zip(module.fed, whole, strict=True):
        assert torch.equal(mask, (image[:, 0] > 0.5).long())
        changed.append(not torch.equal(image, plain))
    assert sum(changed) >= 2  # some boxes are too small for a pixel
