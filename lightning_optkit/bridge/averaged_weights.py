"""A module's weights and their running average, one of the two in the module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit.bridge.exchange import Exchange
from lightning_optkit.bridge.live_tensors import LiveTensors
from lightning_optkit.bridge.sharding import at_rest
from lightning_optkit.methods.averaging import RunningAverage

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """The running average of a module's parameters and buffers, and its place: beside or in it.

    Under FSDP2 each rank averages its own shards; all ranks must call the same methods.

    Args:
        module: whose weights are averaged.
        average: as yet empty.
        apart: names of buffers that are not averaged, because :attr:`statistics` replace them.
    """

    def __init__(
        self, module: nn.Module, average: RunningAverage, *, apart: Collection[str] = ()
    ) -> None:
        self.module = module
        self.average = average
        self.statistics: dict[str, Tensor] = {}
        """What goes with the average in place of averaged buffers, by name."""
        self._apart = frozenset(apart)
        self._look()

    def _look(self) -> None:
        self._live = LiveTensors(self.module)
        self._exchange = Exchange(self._live.buffer_names)
        self._choose(left_out=self._live.masks())

    def _choose(self, *, left_out: Collection[str]) -> None:
        """Say what is averaged: for good, once there is a model in the average."""
        not_averaged = self._apart | set(left_out)
        self._names = [name for name in self._live.names if name not in not_averaged]

    def look_again(self) -> None:
        """Find the tensors anew, where layers may have been replaced.

        Raises:
            ValueError: if there are others than those averaged so far.
        """
        if self.num_averaged == 0:
            self._look()
            return
        live = LiveTensors(self.module)
        if changed := set(live.names) ^ set(self._live.names):
            raise ValueError(
                "The module's tensors must stay the same while they are averaged, got changes in "
                f"{', '.join(sorted(changed)[:4])}. Change layers before the average begins."
            )
        self._live = live

    @property
    def num_averaged(self) -> int:
        """Models in the average."""
        return self.average.num_averaged

    @property
    def is_in_module(self) -> bool:
        """Whether the module holds the average now, and the weights of training are kept here."""
        return self._exchange.is_exchanged

    def take(self, *, thorough: bool) -> bool:
        """Take the weights into the average; return whether they were finite."""
        with self._at_rest():
            return self.average.add(self._live.local(self._names), thorough=thorough)

    def swap(self) -> None:
        """Put the average into the module or, if it is there, the weights of training."""
        with self._at_rest():
            self._exchange.exchange(self._live.local(), self._aside)

    @contextmanager
    def in_module(self, *, average: bool = True) -> Iterator[None]:
        """Have the average, or else the weights of training, in the module for the block."""
        if self.is_in_module == average:
            yield
            return
        try:
            self.swap()  # an interruption waits for its end, and is raised here
            yield
        finally:
            if self.is_in_module == average:
                self.swap()

    def distance(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> float:
        """Return ‖w̄ - w‖ / ‖w‖ over the parameters, while the average is not in the module."""
        with self._at_rest():
            squares = self.average.squares(self._live.local(), self._live.parameter_names)
        if self._live.is_sharded and sum_over_ranks is not None:
            device = next(iter(self._live.local().values())).device
            squares = sum_over_ranks(squares.to(device)).cpu()
        return float((squares[0] / squares[1]).sqrt())

    def follow_devices(self) -> None:
        """Move the average to where the module's tensors are, in their precision or a higher one.

        A checkpoint is restored before Lightning puts the module there, and makes it float64.
        """
        live = self._live.local()
        for values in (self.average.tensors, self.statistics):
            for name, value in values.items():
                device = self.average.device or live[name].device
                dtype = torch.promote_types(value.dtype, live[name].dtype)
                values[name] = value.to(device, dtype)

    def averaged_buffers(self) -> list[Tensor]:
        """Return the averages of buffers, which differ from rank to rank."""
        tensors = self.average.tensors
        return [tensors[name] for name in self._live.buffer_names if name in tensors]

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self, *, average_is_in_state_dict: bool) -> dict[str, Any]:
        """Return what a checkpoint needs beside its ``state_dict``, which holds one of the two.

        Args:
            average_is_in_state_dict: it is the average, and not the weights of training.
        """
        with self._at_rest():
            live, aside = self._live.local(), self._aside
            own = self._exchange.own(live, aside)
            average = self._exchange.others(live, aside)
            if average_is_in_state_dict:
                average = {n: v for n, v in average.items() if v.dtype != own[n].dtype}
                if not self._live.is_sharded:  # what was never trained is in the state_dict
                    own = {n: v for n, v in own.items() if not _is_untrained(v, aside[n], live[n])}
            else:
                own = {}
            raw, average = self._live.whole(own), self._live.whole(average)
        return {
            "num_averaged": self.num_averaged,
            "raw": {name: value.detach() for name, value in raw.items()},
            "average": {name: value.detach() for name, value in average.items()},
            "statistics": list(self.statistics),
            "left_out": sorted(set(self._live.names) - self._apart - set(self._names)),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose ``state_dict`` the module holds.

        The module then holds the weights of training.

        Args:
            state: as returned by :meth:`state`.
        """
        with self._at_rest():
            average = self._live.local() | self._live.shards(state["average"])
            self.statistics = {
                name: average[name].detach().clone()
                for name in state["statistics"]
                if name in self._apart and name in average
            }
            if state["num_averaged"]:
                self._choose(left_out=state["left_out"])
                self.average.load(
                    {name: average[name] for name in self._names},
                    num_averaged=state["num_averaged"],
                )
            self.write(state["raw"])

    @torch.no_grad()
    def write(self, raw: Mapping[str, Tensor]) -> None:
        """Write the weights of training into the module."""
        with self._at_rest():
            live = self._live.local()
            for name, value in self._live.shards(raw).items():
                live[name].data.copy_(value)

    @property
    def _aside(self) -> dict[str, Tensor]:
        return self.average.tensors | self.statistics

    def _at_rest(self) -> AbstractContextManager[None]:
        return at_rest(self.module) if self._live.is_sharded else nullcontext()


def _is_untrained(own: Tensor, aside: Tensor, live: Tensor) -> bool:
    """Return whether a frozen parameter is its own average."""
    frozen = isinstance(live, nn.Parameter) and not live.requires_grad
    return frozen and own.dtype == aside.dtype and torch.equal(live, aside.to(live.device))
