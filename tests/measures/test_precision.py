"""Inside, float32 is float32; outside, the user's settings are as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_optkit.measures import HessianOperator, full_precision

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and later


def settings() -> dict[str, Any]:
    """Return every setting that can be read; older ones cannot where they contradict newer ones."""
    readers: dict[str, Callable[[], Any]] = {
        "matmul": torch.get_float32_matmul_precision,
        "cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    }
    if NEWER:
        backends = torch.backends
        readers |= {
            "cuda.matmul": lambda: backends.cuda.matmul.fp32_precision,
            "cudnn": lambda: backends.cudnn.fp32_precision,
            "cudnn.conv": lambda: backends.cudnn.conv.fp32_precision,
            "cudnn.rnn": lambda: backends.cudnn.rnn.fp32_precision,
            "mkldnn.matmul": lambda: backends.mkldnn.matmul.fp32_precision,
            "mkldnn.conv": lambda: backends.mkldnn.conv.fp32_precision,
            "mkldnn.rnn": lambda: backends.mkldnn.rnn.fp32_precision,
        }
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "contradicts"
    return found


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision(before["matmul"])
    torch.backends.cudnn.allow_tf32 = before["cudnn.allow_tf32"]
    if NEWER:
        torch.backends.cuda.matmul.fp32_precision = before["cuda.matmul"]
        for kind in ("conv", "rnn"):
            getattr(torch.backends.cudnn, kind).fp32_precision = before[f"cudnn.{kind}"]
        for kind in ("matmul", "conv", "rnn"):
            getattr(torch.backends.mkldnn, kind).fp32_precision = before[f"mkldnn.{kind}"]
    assert settings() == before


def defaults() -> None:
    pass


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def high() -> None:
    torch.set_float32_matmul_precision("high")


def no_tf32_in_cudnn() -> None:
    torch.backends.cudnn.allow_tf32 = False


def tf32_everywhere() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def newer_interface() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def both_interfaces() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.backends.mkldnn.conv.fp32_precision = "tf32"


needs_newer = pytest.mark.skipif(not NEWER, reason="torch before 2.9")
CHOICES = [
    defaults,
    medium,
    high,
    no_tf32_in_cudnn,
    tf32_everywhere,
    pytest.param(newer_interface, marks=needs_newer),
    pytest.param(both_interfaces, marks=needs_newer),
]


def assert_exact() -> None:
    inside = settings()
    assert inside.pop("matmul") == "highest"
    assert inside.pop("cuda.matmul.allow_tf32") is False
    assert inside.pop("cudnn.allow_tf32") is False
    inside.pop("cudnn", None)  # the parent of `conv` and `rnn`, which decide
    assert set(inside.values()) <= {"ieee"}


@pytest.mark.parametrize("choose", CHOICES)
def test_settings_are_exact_inside_and_the_users_own_afterwards(choose):
    choose()
    before = settings()
    with full_precision():
        assert_exact()
    assert settings() == before


@pytest.mark.parametrize("choose", CHOICES)
def test_settings_come_back_after_an_error(choose):
    choose()
    before = settings()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == before


def test_it_nests():
    medium()
    before = settings()
    with full_precision():
        with full_precision():
            assert_exact()
        assert_exact()
    assert settings() == before


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_autocast_is_off_inside_and_on_again_afterwards(device_type):
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(device_type):
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_enabled(device_type)
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_region_of_autocast_inside_has_no_effect():
    x = torch.ones(2, 2)
    original = torch.autocast.__init__
    with full_precision(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.is_autocast_enabled("cpu")
        assert (x @ x).dtype == torch.float32
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert torch.autocast.__init__ is original
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("graphs", ["cached", "lockstep"])
@pytest.mark.parametrize("quantity", ["product", "gradient", "shifted gradient", "forward mode"])
def test_an_operator_measures_in_full_precision_and_leaves_no_trace(quantity, graphs):
    medium()
    before = settings()
    dtypes = []

    def loss(p):
        assert_exact()
        out = p["w"] @ p["w"]
        dtypes.append(out.dtype)
        return out.sin().sum()

    params = {"w": torch.linspace(-1, 1, 9).view(3, 3)}
    v = torch.ones(9)
    measured = {
        "product": lambda op: op @ v,
        "gradient": lambda op: op.gradient(),
        "shifted gradient": lambda op: op.gradient(v),
        "forward mode": lambda op: op.forward_mode_product(v),
    }[quantity]
    truth = measured(HessianOperator(loss, params, graphs=graphs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured(HessianOperator(loss, params, graphs=graphs))
    assert torch.equal(found, truth)
    assert set(dtypes) == {torch.float32}
    assert settings() == before
