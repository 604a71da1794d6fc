"""The figure of curvature by layer draws any number of layers of any spectrum."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch

from lightning_optkit.figures.layers import layers_figure
from lightning_optkit.measures import hessian_spectrum
from tests.quadratics import MatrixOperator, symmetric


def spectrum(*eigenvalues, **options):
    return hessian_spectrum(MatrixOperator(symmetric(list(eigenvalues))), **options)


@pytest.mark.parametrize("count", [1, 3, 60])
def test_any_number_of_layers(count):
    layers = {f"body.{i}": spectrum(-1.0, 0.5, float(i + 1)) for i in range(count)}
    figure = layers_figure(layers)
    figure.savefig(BytesIO(), format="png")
    shown = min(count, 40)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"body.{i}" for i in range(shown)]
    assert ("20 more not shown" in figure.get_suptitle()) == (count == 60)
    lengths = [patch.get_width() for patch in figure.axes[0].patches]
    assert lengths == pytest.approx([i + 1.0 for i in range(shown)] + [-1.0] * shown)


def test_an_unresolved_ratio_has_no_bar():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator).tolist()
    wide = spectrum(*values, num_matvecs=3, num_probes=1, exact_below=0)
    assert not wide.minimum_ratio_resolved
    figure = layers_figure({"a": wide, "b": spectrum(0.0, 0.0)})
    figure.savefig(BytesIO(), format="png")
    assert len(figure.axes[2].patches) == 1
