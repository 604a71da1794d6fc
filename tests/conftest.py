"""Settings of the whole suite."""

import logging
import os
from pathlib import Path

import pytest

# Two pytest workers with two threads each would wait for one another's spinning threads: a test
# of half a second then takes a minute. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.contracts")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("torch").setLevel(logging.ERROR)


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory):
    """Callbacks without a logger leave `optkit.npz` where they run: not in the repository."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)
