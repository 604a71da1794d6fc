import threading

import pytest
import torch

from lightning_optkit.bridge.batch_copy import copied


class Graph:
    """As other libraries have batches."""

    def __init__(self):
        self.nodes = torch.ones(2)


@pytest.mark.parametrize("make", [list, tuple, lambda x: dict(enumerate(x))])
def test_a_copy_is_of_the_same_form_and_shares_nothing(make):
    batch = make([torch.arange(3.0), torch.tensor([[1, 2]])])
    copy = copied(batch)
    torch.testing.assert_close(copy, batch, rtol=0, atol=0)
    copy[0].zero_()
    copy[1].zero_()
    assert batch[0].tolist() == [0, 1, 2]
    assert batch[1].tolist() == [[1, 2]]


def test_tensors_that_share_memory_share_it_in_the_copy():
    tokens = torch.arange(5)
    inputs, targets = copied([tokens[:-1], tokens[1:]])
    inputs[1] = 9
    assert targets.tolist() == [9, 2, 3, 4]
    assert tokens.tolist() == [0, 1, 2, 3, 4]


def test_other_objects_are_copied_too():
    graph = Graph()
    other, number = copied((graph, 3))
    other.nodes.zero_()
    assert graph.nodes.tolist() == [1, 1]
    assert number == 3


def test_of_what_cannot_be_copied_all_tensors_are():
    lock = threading.Lock()
    batch = {"x": torch.ones(2), "lock": lock, "y": torch.ones(1, requires_grad=True) * 2}
    copy = copied(batch)
    copy["x"].zero_()
    assert copy["lock"] is lock
    assert batch["x"].tolist() == [1, 1]
