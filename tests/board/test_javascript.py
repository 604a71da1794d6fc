"""What the page computes, in Node, against closed forms and against Python."""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from lightning_optkit.board.page import one_script
from lightning_optkit.board.payload import encode_run
from lightning_optkit.board.runs import ArraySeries, Run, Series
from lightning_optkit.board.schema import names_array

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")


def computed(entry, code):
    """The value of `found` after the code, which reads modules from `$`."""
    script = f"{one_script(entry)}\n{code}\nconsole.log(JSON.stringify(found));"
    done = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def density(rules, *, bandwidth=1.0, linear=0.1, end=50):
    """Places and density of quadratures, shape (probes, nodes, 2), by the page."""
    code = f"""
    const {{ makeGrid, densityAt }} = $["density.js"];
    const grid = makeGrid(-{end}, {end}, {linear}, 2000);
    const values = Float32Array.from({np.ravel(rules).tolist()});
    const series = {{ values, shape: {list(np.shape(rules))} }};
    const found = [[...grid.places], [...densityAt(series, 0, grid, {bandwidth})]];
    """
    return np.array(computed("density.js", code))


def test_a_lone_eigenvalue_is_a_gaussian_of_its_share_per_decade():
    rules = [[[-1.0, 0.5], [0.0, 0.0], [2.0, 0.5]]]  # weight 0 pads
    u, found = density(rules, bandwidth=0.5)
    width = 0.15  # half of the widest for equal weights: they are all eigenvalues
    expected = sum(
        0.5 * math.log(10) * np.exp(-0.5 * ((u - math.asinh(at / 0.1)) / width) ** 2)
        / (width * math.sqrt(2 * math.pi))
        for at in (-1.0, 2.0)
    )  # fmt: skip
    np.testing.assert_allclose(
        found, expected, atol=math.exp(-8) * expected.max()
    )  # cut at 4 widths


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 3.0])
def test_all_eigenvalues_are_there_once_whatever_the_bandwidth(bandwidth):
    rng = np.random.default_rng(0)
    nodes = np.sort(rng.normal(0, 1, (3, 20)), axis=1)
    weights = rng.dirichlet(np.ones(20), 3)
    u, found = density(np.stack([nodes, weights], axis=-1), bandwidth=bandwidth, end=50_000)
    mass = found.sum() * (u[1] - u[0]) / math.log(10)
    assert mass == pytest.approx(1.0, abs=1e-3)


def test_what_stands_for_many_may_be_wider_than_a_lone_one():
    rules = [[[-1.0, 0.9], [1.0, 0.0998], [30.0, 0.0002]]]
    u, found = density(rules)
    widths = []
    for at, weight in ((-1.0, 0.9), (30.0, 0.0002)):
        peak = found[np.abs(u - math.asinh(at / 0.1)).argmin()]
        widths.append(weight * math.log(10) / (peak * math.sqrt(2 * math.pi)))
    assert widths == pytest.approx([0.6, 0.3], rel=1e-2)


def test_the_page_decodes_what_python_encodes():
    run = Run(
        "<b>ö",
        {"a/x": Series.of([(0, 1.5, 2.5), (2**40, 2.5, float("nan"))])},
        {
            "a/path": ArraySeries.of([(0, 0.0, np.arange(4, dtype=np.float32).reshape(2, 2))]),
            "a/layer_names": ArraySeries.of(
                [(0, 0.0, names_array(["é"])), (5, 1.0, names_array(["b"]))]
            ),
        },
        listed=("a/quadrature",),
    )
    data = base64.b64encode(encode_run(run)).decode()
    code = f"""
    const bytes = Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0));
    const {{ decode, namesAt, arrayAt, nearest }} = $["payload.js"];
    const run = decode(bytes.buffer);
    const of = (name) => run.series.get(`a/${{name}}`);
    const [x, path, names] = [of("x"), of("path"), of("layer_names")];
    const found = [run.name, [...x.steps], [...x.times], x.values[0], Number.isNaN(x.values[1]),
      path.shape, [...arrayAt(path, 0)], [4, 5].map((s) => namesAt(names, s)),
      of("quadrature").steps.length, [-1, 3, 4, 9].map((v) => nearest([0, 2, 5], v))];
    """
    assert computed("payload.js", code) == [
        "<b>ö", [0, 2**40], [1.5, 2.5], 2.5, True, [2, 2], [0, 1, 2, 3], [["é"], ["b"]], 0,
        [0, 1, 2, 2],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("linear", -3, 5), ("log", 1e-4, 20), ("symlog", -7, 300)]
)
def test_scales_go_there_and_back_and_ticks_lie_within(kind, low, high):
    code = f"""
    const scale = $["scale.js"].makeScale("{kind}", {low}, {high}, 0.01);
    const found = [[scale.share({low}), scale.share({high})],
      [0, 0.25, 0.7, 1].map((s) => scale.share(scale.value(s))), scale.ticks(6)];
    """
    ends, shares, ticks = computed("scale.js", code)
    assert ends == pytest.approx([0, 1])
    assert shares == pytest.approx([0, 0.25, 0.7, 1])
    assert 3 <= len(ticks) <= 20
    assert ticks == sorted(set(ticks))
    assert low * (1.001 if low < 0 else 0.999) <= ticks[0] < ticks[-1] <= high * 1.001
