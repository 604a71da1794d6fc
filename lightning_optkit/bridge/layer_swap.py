"""Layers of a module replaced before anybody looks at its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

__all__ = ["LayerSwap"]

Swap = Callable[[pl.LightningModule, bool], None]
"""``(pl_module, last)``: replaces what is there; ``last`` says that all layers are made."""

_SHADOWED = ("configure_model", "on_save_checkpoint")


class LayerSwap:
    """Replaces layers as the Trainer sets a module up, wherever the module makes them.

    Layers are made in ``__init__``, in the module's ``setup``, which comes after that of callbacks,
    or in ``configure_model``, which may shard them at once. Then a checkpoint is restored, and
    optimizers are made. So layers are replaced in the callback's ``setup``, and right before and
    after ``configure_model``, which Lightning calls last. Both methods that are shadowed on the
    instance for this are free again after :meth:`detach`.

    Args:
        swap: replaces what there is, and leaves alone what it has replaced already.
        save: called with each checkpoint that is written, also one of weights alone.
    """

    def __init__(self, swap: Swap, save: Callable[[dict[str, Any]], None]) -> None:
        self.swap = swap
        self.save = save
        self._shadow: _Shadow | None = None

    def attach(self, pl_module: pl.LightningModule) -> None:
        """Replace what there is, and what is to come; in ``setup`` of every stage."""
        self.detach()
        self.swap(pl_module, False)
        self._shadow = _Shadow.over(pl_module)
        self._shadow.swaps.append(self)

    def detach(self) -> None:
        """Leave the module's methods, in ``teardown`` and on an exception."""
        if self._shadow is not None:
            self._shadow.swaps.remove(self)
            self._shadow.lift_if_idle()
            self._shadow = None


class _Shadow:
    """Stands in front of two methods of a module, for all that replace layers of it.

    Lightning calls ``configure_model`` only where it is overridden, and looks through
    ``functools.wraps`` to see that: a plain method of another object counts.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.swaps: list[LayerSwap] = []
        self._module = pl_module
        self._own = {name: vars(pl_module).get(name) for name in _SHADOWED}
        for name in _SHADOWED:
            vars(pl_module)[name] = getattr(self, name)

    @classmethod
    def over(cls, pl_module: pl.LightningModule) -> _Shadow:
        """Return that of a module, made if there is none."""
        found = getattr(vars(pl_module).get(_SHADOWED[0]), "__self__", None)
        return found if isinstance(found, cls) else cls(pl_module)

    def lift_if_idle(self) -> None:
        for name in [] if self.swaps else _SHADOWED:
            if getattr(vars(self._module).get(name), "__self__", None) is not self:
                continue  # another has come in front
            del vars(self._module)[name]
            if self._own[name] is not None:
                vars(self._module)[name] = self._own[name]

    def _call(self, name: str, *args: Any) -> None:
        own = self._own[name] or getattr(type(self._module), name).__get__(self._module)
        own(*args)

    def configure_model(self) -> None:
        for each in self.swaps:  # before layers are sharded
            each.swap(self._module, False)
        self._call("configure_model")
        for each in self.swaps:
            each.swap(self._module, True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for each in self.swaps:
            each.save(checkpoint)
        self._call("on_save_checkpoint", checkpoint)
