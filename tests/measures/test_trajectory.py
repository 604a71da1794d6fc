import pytest
import torch

from lightning_optkit.measures.trajectory import Trajectory


@pytest.mark.parametrize("first", [0, 7, 13])
@pytest.mark.parametrize("num_steps", [3, 8, 40, 101])
def test_the_first_point_stays_and_the_others_are_evenly_spaced(first, num_steps):
    path = Trajectory(max_points=6)
    for step in range(first, first + num_steps):
        if path.is_due(step):
            path.take(step, torch.tensor([float(step)]))
    assert path.steps[0] == first
    assert [float(point) for point in path.points] == path.steps
    apart = {after - before for before, after in zip(path.steps, path.steps[1:], strict=False)}
    assert len(apart) == 1
    assert apart <= {1, 2, 4, 8, 16, 32}
    assert min(num_steps, 3) <= len(path.steps) <= 6
    assert first + num_steps - path.steps[-1] <= apart.pop()  # up to the end


def test_a_path_goes_on_where_it_was_left():
    whole, cut, resumed = (Trajectory(max_points=4) for _ in range(3))
    for step in range(5, 30):
        if step == 17:
            resumed.load_state_dict(cut.state_dict())
        for path in (whole, cut if step < 17 else resumed):
            if path.is_due(step):
                path.take(step, torch.tensor([float(step)]))
    assert resumed.steps == whole.steps
