"""The picture of a mixed batch says what each image is made of."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_optkit.figures.mixed_batch import mixed_batch_figure


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_images_in_rows_of_four(n, channels):
    images = np.random.default_rng(0).normal(size=(n, channels, 5, 6))
    mixing = np.linspace(0, 1, n)
    labels = (list(range(n)), [0] * n)
    figure = mixed_batch_figure(images, mixing, labels, title="Mixup")
    assert len(figure.axes) == 4 * -(-n // 4)
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == n
    whole = (images - images.min()) / (images.max() - images.min())
    for i, axis in enumerate(drawn):
        pixels = np.asarray(axis.images[0].get_array())
        expected = np.moveaxis(whole[i], 0, -1)
        assert np.allclose(pixels, expected.squeeze(-1) if channels == 1 else expected)
        if channels == 1:
            assert axis.images[0].get_clim() == (0.0, 1.0)  # one scale for all
    titles = [axis.get_title() for axis in drawn]
    assert titles[0] == "1.00 · 0"
    assert titles[-1] == f"1.00 · {n - 1} + 0.00 · 0"
    assert figure.get_suptitle() == "Mixup: share · label"


def test_without_labels_it_says_lambda_and_a_flat_batch_is_no_error():
    figure = mixed_batch_figure(np.ones((2, 1, 4, 4)), np.array([0.25, 1]), title="CutMix")
    assert [axis.get_title() for axis in figure.axes] == ["λ = 0.25", "λ = 1.00", "", ""]
    assert figure.get_suptitle() == "CutMix"
