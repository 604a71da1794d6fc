"""Full-precision arithmetic while measuring.

Under autocast or TF32 the signs of most Hessian eigenvalues are noise: one product then carries a
relative error of about 1e-2 instead of 1e-6. Measurements therefore switch both off and put the
user's settings back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch

__all__ = ["full_precision"]


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """Return (getter, setter, full-precision value) for each setting that may round float32.

    Since torch 2.9 each backend has its own ``fp32_precision`` beside the older settings, and
    reading an older one fails where the two disagree: so both are set, the older ones first.
    """
    switches: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (*_attribute(torch.backends.cuda.matmul, "allow_tf32"), False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (*_attribute(torch.backends.cudnn, "allow_tf32"), False),
    ]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        newer = [torch.backends.cuda.matmul]
        newer += [getattr(torch.backends.cudnn, name) for name in ("conv", "rnn")]
        newer += [getattr(torch.backends.mkldnn, name) for name in ("matmul", "conv", "rnn")]
        switches += [(*_attribute(owner, "fp32_precision"), "ieee") for owner in newer]
    return switches


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)


@contextmanager
def _autocast_stays_off() -> Iterator[None]:
    """Make regions of ``torch.autocast`` that are entered inside have no effect."""
    original = torch.autocast.__init__

    def disabled(self: torch.autocast, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._enabled = False

    torch.autocast.__init__ = disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


@contextmanager
def full_precision(device_type: str = "cpu") -> Iterator[None]:
    """Switch autocast, TF32 and reduced-precision float32 kernels off, and back again on leaving.

    Regions of ``torch.autocast`` inside have no effect.

    Args:
        device_type: ``torch.device.type`` of the tensors that are computed with.

    Example:
        >>> import torch
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    before: list[tuple[Callable[[Any], None], Any]] = []
    for get, put, _ in _switches():
        with suppress(RuntimeError):  # the user mixes the two interfaces: only the newer is whole
            before.append((put, get()))
    with ExitStack() as stack:
        for kind in {device_type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_autocast_stays_off())
        try:
            for _, put, exact in _switches():
                put(exact)
            yield
        finally:
            for put, value in before:
                put(value)
