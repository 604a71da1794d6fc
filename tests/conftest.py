"""Settings of the whole suite."""

import logging
import os

import pytest

# Two pytest workers with two threads each would wait for one another's spinning threads: a test
# of half a second then takes a minute. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.contracts")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("torch").setLevel(logging.ERROR)
