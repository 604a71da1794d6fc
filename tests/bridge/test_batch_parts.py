import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optkit.bridge.batch_parts import batch_parts, num_rows


def test_parts_have_all_rows_in_order_and_what_is_no_row_is_in_all():
    batch = {"x": torch.arange(10).reshape(5, 2), "y": [torch.arange(5)], "scale": torch.tensor(3)}
    parts = batch_parts(batch | {"name": "a"}, 2)
    assert [num_rows(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["y"][0] for part in parts]), batch["y"][0])
    assert all(part["scale"] == 3 and part["name"] == "a" for part in parts)


def test_a_batch_smaller_than_a_part_is_one():
    (part,) = batch_parts(torch.arange(3), 8)
    assert part.tolist() == [0, 1, 2]


def test_tensors_that_do_not_share_their_rows_cannot_be_split():
    assert num_rows([torch.zeros(8, 3), torch.zeros(5)]) is None
    with pytest.raises(MisconfigurationException, match="must share their first dimension"):
        batch_parts([torch.zeros(8, 3), torch.zeros(5)], 2)
