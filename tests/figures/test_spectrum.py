"""The figure of a spectrum draws whatever spectrum there is, without a warning."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_optkit.figures.spectrum import spectrum_figure
from lightning_optkit.measures import Spectrum, hessian_spectrum
from tests.distributed import run_in_new_process
from tests.quadratics import MatrixOperator, symmetric

LANCZOS = {"exact_below": 0, "num_matvecs": 20}


def net_like(n: int = 120) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bulk = 1e-2 * torch.randn(n - 4, generator=generator, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor([-0.5, 1.0, 4.0, 9.0], dtype=torch.float64)])


EIGENVALUES = {
    "as of a net": net_like(),
    "all zero": torch.zeros(7),
    "all negative": -torch.linspace(1, 5, 20),
    "all positive": torch.linspace(1, 5, 20),
    "all equal": torch.full((9,), 3.0),
    "one positive": torch.tensor([2.0]),
    "one negative": torch.tensor([-2.0]),
    "one zero": torch.tensor([0.0]),
    "two": torch.tensor([-2.0, 2.0]),
    "far apart": torch.logspace(-12, 8, 30),
    "tiny": torch.linspace(-1, 2, 10) * 1e-12,
    "huge": torch.linspace(-1, 2, 10) * 1e12,
    "one in a thousand": torch.tensor([0.0] * 999 + [1.0]),
}


def spectrum_of(name: str, **options) -> Spectrum:
    operator = MatrixOperator(symmetric(EIGENVALUES[name].double()))
    return hessian_spectrum(operator, **options)


def pixels(figure: Figure) -> np.ndarray:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=50)
    assert image.getvalue().startswith(b"\x89PNG")
    image.seek(0)
    return imread(image)[:, :, :3]


def texts(figure: Figure) -> str:
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
    return "\n".join(found)


@pytest.mark.parametrize("options", [{}, LANCZOS], ids=["exact", "lanczos"])
@pytest.mark.parametrize("name", EIGENVALUES)
def test_every_spectrum_is_drawn(name, options):
    figure = spectrum_figure(spectrum_of(name, **options))
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2
    image = pixels(figure)
    assert image.shape == (240, 400, 3)
    half = image.shape[0] // 2
    for part in (image[:half], image[half:]):
        assert float((part < 0.9).any(2).mean()) > 0.005  # not blank
    assert "nan" not in texts(figure)


def test_it_says_what_was_measured():
    found = spectrum_of("as of a net", **LANCZOS)
    shown = texts(spectrum_figure(found))
    assert "120 parameters" in shown
    assert f"λ from {found.lambda_min:.4g} to {found.lambda_max:.4g}" in shown
    assert f"trace {found.trace:.4g} ± {found.trace_standard_error:.2g}" in shown
    assert "Lanczos, 80 products" in shown
    assert "share of eigenvalues (99% bounds)" in shown
    for share in (found.positive, found.negative, found.zero):
        assert str(share) in shown
    exact = texts(spectrum_figure(spectrum_of("as of a net")))
    assert "all eigenvalues" in exact
    assert "share of eigenvalues (exact)" in exact


def test_signs_have_their_colours_and_the_density_is_on_a_log_axis():
    found = spectrum_of("as of a net", **LANCZOS)
    density, shares = spectrum_figure(found).axes
    assert density.get_xscale() == "symlog"
    assert density.get_yscale() == "log"
    assert len(density.collections) == 3  # negative, positive and zero, filled
    line = density.lines[0]
    x, y = line.get_data()
    np.testing.assert_allclose(y, np.maximum(found.density(x).numpy(), 1e-300), rtol=1e-12)
    low, high = density.get_xlim()
    assert low <= found.lambda_min < found.lambda_max <= high
    assert shares.get_xlim() == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_the_largest_eigenvalues_are_marked(count):
    found = spectrum_of("as of a net")
    axes = spectrum_figure(found, num_eigenvalues=count).axes[0]
    marked = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "v"]
    assert marked == found.top_eigenvalues(count)
    assert len(marked) == count


def test_the_value_of_an_unresolved_share_is_not_drawn():
    found = spectrum_of("as of a net", exact_below=0, num_matvecs=3, num_probes=1)
    assert not found.minimum_ratio_resolved
    shares = spectrum_figure(found).axes[1]
    resolved = [s for s in (found.positive, found.zero, found.negative) if s.resolved]
    assert len(shares.patches) == len(resolved)
    # its interval is, as a line from bound to bound
    np.testing.assert_allclose(shares.lines[0].get_xdata(), found.positive.bounds)
    known = dataclasses.replace(found, positive=dataclasses.replace(found.positive, upper=0.05))
    known = dataclasses.replace(
        known, positive=dataclasses.replace(known.positive, lower=0.0, value=0.02)
    )
    bars = spectrum_figure(known).axes[1].patches
    assert len(bars) == len(resolved) + 1
    assert bars[0].get_width() == 0.02


def test_pyplot_is_not_loaded():
    """A figure that pyplot knows is never freed, and pyplot wants a display."""
    run_in_new_process(draws_without_pyplot)


def draws_without_pyplot():
    for name in list(sys.modules):  # Lightning's own metrics have loaded it
        if name.startswith(("lightning_optkit.figures", "matplotlib.pyplot")):
            del sys.modules[name]
    figures = importlib.import_module("lightning_optkit.figures.spectrum")
    pixels(figures.spectrum_figure(spectrum_of("two")))
    assert "matplotlib.pyplot" not in sys.modules
