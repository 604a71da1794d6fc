"""The Lanczos loop never waits for the device: it reads no value back to the host."""

import torch
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optkit.measures import HessianOperator, lanczos


class CountsReads(TorchDispatchMode):
    """Counts the operations that need a value on the host, and so wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (
            torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), if tensor:
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def reads_of(num_matvecs: int, **options) -> int:
    w = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(8, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = HessianOperator(
        lambda p: mse_loss((x @ p["w"]).tanh(), x[:, 0]), {"w": w}, self_check=False, **options
    )
    with CountsReads() as counter:
        lanczos(operator, num_matvecs, num_lanes=2)
    return counter.reads


def test_reads_do_not_grow_with_the_number_of_steps():
    for options in ({}, {"graphs": "lockstep"}):
        assert reads_of(4, **options) == reads_of(32, **options)


def test_the_counter_counts():
    with CountsReads() as counter:
        bool(torch.ones(()) > 0)
    assert counter.reads == 1
