"""What works on all ranks or on none, with a stand-in for another rank."""

from types import SimpleNamespace

import pytest
import torch

from lightning_optkit.bridge.together import gathered, together


def trainer_beside(*, other_works):
    said = []

    def reduce(decision, all=True):
        said.append(decision)
        return decision and other_works

    strategy = SimpleNamespace(reduce_boolean_decision=reduce)
    return SimpleNamespace(strategy=strategy, world_size=1), said


def test_it_returns_what_worked_everywhere():
    trainer, said = trainer_beside(other_works=True)
    assert together(trainer, lambda: 7) == 7
    assert said == [True]


def test_it_fails_where_another_rank_does():
    trainer, said = trainer_beside(other_works=False)
    with pytest.raises(RuntimeError, match="failed on another rank"):
        together(trainer, lambda: 7)
    assert said == [True]


@pytest.mark.parametrize("other_works", [True, False])
def test_a_failure_here_is_said_to_all_and_raised_as_it_is(other_works):
    trainer, said = trainer_beside(other_works=other_works)
    with pytest.raises(ZeroDivisionError):
        together(trainer, lambda: 1 / 0)
    assert said == [False]


def test_numbers_of_one_rank_are_its_own():
    trainer, _ = trainer_beside(other_works=True)
    assert gathered(trainer, torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
