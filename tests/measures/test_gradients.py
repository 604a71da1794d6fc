"""Norms of a step and their table, against closed forms."""

import math
import random
import weakref

import pytest
import torch

from lightning_optkit.measures.gradients import (
    LayerStep,
    StepTable,
    step_table,
    tensor_norm,
    tensor_norms,
    update_norms,
)

NAN = math.nan


def test_norms_are_those_of_float64_arithmetic():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 7, 1000)]
    found = tensor_norms([*tensors, None])
    assert found.dtype == torch.float64
    expected = [math.sqrt(math.fsum(x * x for x in t.tolist())) for t in tensors]
    assert found.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_norms_of_mixed_dtypes_and_kinds():
    indices = torch.tensor([[0, 2, 0]])  # the first row twice: 1 + 3 = 4
    values = torch.tensor([1.0, 3.0, 3.0])
    sparse = torch.sparse_coo_tensor(indices, values, (4,), check_invariants=True)
    tensors = [
        torch.tensor([3.0, 4.0], dtype=torch.float64),
        torch.tensor([3 + 4j]),
        sparse,
        torch.zeros(0),
        torch.tensor(-2.0),
        torch.tensor([3.0, 4.0], dtype=torch.bfloat16),
    ]
    assert tensor_norms(tensors).tolist() == [5.0, 5.0, 5.0, 0.0, 2.0, 5.0]
    assert not sparse.is_coalesced()  # it is training's
    assert tensor_norms([]).tolist() == tensor_norms(iter([])).tolist() == []


def test_half_precision_is_summed_in_single():
    ones = torch.full((70_001,), 0.0100097656, dtype=torch.float16)
    assert tensor_norm(ones).dtype == torch.float32
    expected = float(ones[0]) * math.sqrt(70_001)
    assert float(tensor_norms([ones])[0]) == pytest.approx(expected, rel=1e-6)
    large = torch.full((4,), 6e4, dtype=torch.float16)  # whose squares it cannot hold
    assert float(tensor_norms([large])[0]) == pytest.approx(1.2e5, rel=1e-3)


def test_norms_take_one_tensor_at_a_time():
    made = []

    def tensors():
        for i in range(5):
            assert sum(each() is not None for each in made) <= 1  # the last may still be read
            tensor = torch.full((2,), float(i))
            made.append(weakref.ref(tensor))
            yield tensor
            del tensor

    assert tensor_norms(tensors()).tolist() == pytest.approx([i * math.sqrt(2) for i in range(5)])


def test_a_norm_that_is_not_finite_is_kept():
    found = tensor_norms([torch.tensor([1.0, math.inf]), torch.tensor([NAN, 1.0])])
    assert found[0] == math.inf
    assert math.isnan(found[1])


def test_the_change_of_half_precision_is_that_of_the_numbers():
    before = torch.tensor([2.0**-9], dtype=torch.bfloat16)
    now = torch.tensor([1.0], dtype=torch.bfloat16)
    assert float(now - before) == 1.0  # rounded
    assert update_norms([now], [before]).tolist() == [1 - 2.0**-9]
    with pytest.raises(ValueError, match="shorter"):
        update_norms([now, now], [before])


def table_of(rows, **options):
    """Return the table of ``{name: (size, gradient, weight, update, rate)}``."""
    sizes, *columns = zip(*rows.values(), strict=True)
    names = ("gradients", "weights", "updates", "learning_rates")
    return step_table(
        dict(zip(rows, sizes, strict=True)), **dict(zip(names, columns, strict=True)), **options
    )


ROWS = {
    "body.0.weight": (12, 3.0, 6.0, 0.3, 0.1),
    "body.0.bias": (4, 4.0, 8.0, 0.4, 0.2),
    "scale": (1, 12.0, 0.0, 0.5, NAN),
    "body.1.weight": (5, 0.0, 2.0, 0.0, NAN),
}


def test_layers_and_the_whole_net():
    table = table_of(ROWS)
    assert [row.layer for row in table.rows] == ["body.0", "scale", "body.1"]
    first = table["body.0"]
    assert first.num_params == 16
    assert first.numbers[:5] == pytest.approx((5.0, 10.0, 0.5, 2.0, 0.05), rel=1e-14)
    sigma = math.sqrt((12 / 0.1**2 + 4 / 0.2**2) / 16)
    assert first.learning_rate == pytest.approx(1 / sigma, rel=1e-14)
    total = table.total
    assert (total.layer, total.num_params) == ("all", 22)
    assert total.gradient_norm == pytest.approx(13.0, rel=1e-14)
    assert total.weight_norm == pytest.approx(math.sqrt(104), rel=1e-14)
    assert total.update_norm == pytest.approx(math.sqrt(0.5), rel=1e-14)
    assert total.learning_rate == pytest.approx(1 / sigma, rel=1e-14)  # of those that have one
    with pytest.raises(KeyError, match="body"):
        table["body"]


def test_the_total_does_not_depend_on_the_layers():
    draw = random.Random(0)
    rows = {
        f"{layer}.{kind}": (draw.randint(1, 9), *(draw.random() + 0.1 for _ in range(4)))
        for layer in "abc"
        for kind in ("weight", "bias")
    }
    whole = table_of(rows, per_layer=False)
    assert [row.layer for row in whole.rows] == ["all"]
    assert whole.total.numbers == pytest.approx(table_of(rows).total.numbers, rel=1e-14)
    assert whole.total.num_params == table_of(rows).total.num_params


def test_ratios_that_are_not_defined():
    table = table_of(ROWS)
    assert table["scale"].trust_ratio == 0.0
    assert math.isnan(table["scale"].update_ratio)  # of weights that are zero
    assert math.isnan(table["body.1"].trust_ratio)  # of a gradient that is zero
    assert table["body.1"].update_ratio == 0.0
    for gradient in (math.inf, NAN):
        broken = table_of(ROWS | {"body.1.bias": (1, gradient, 1.0, 1.0, 0.1)})
        assert math.isnan(broken.total.trust_ratio)
        assert math.isfinite(broken.total.gradient_norm) is False
        assert broken["body.0"].trust_ratio == 2.0  # one layer does not hide another
    mixed = table_of({"a.weight": (1, math.inf, 1, 1, 1), "a.bias": (1, NAN, 1, 1, 1)})
    assert math.isnan(mixed["a"].gradient_norm)


def test_it_is_printed_as_a_table():
    lines = str(table_of(ROWS)).splitlines()
    assert lines[0].split() == [
        "layer", "params", "‖g‖", "‖w‖", "‖Δw‖", "‖w‖/‖g‖", "‖Δw‖/‖w‖", "η/σ",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == ["body.0", "scale", "body.1", "all"]
    assert lines[2].split() == ["scale", "1", "12", "0", "0.5", "0"]  # NaN is left blank
    assert len({len(line.rstrip()) for line in lines if line.endswith("η/σ")}) == 1
    assert len(str(table_of(ROWS, per_layer=False)).splitlines()) == 2
    assert str(StepTable((LayerStep("x", 1_000_000, 1.0, 1.0, 1.0),))).count("1,000,000") == 1
