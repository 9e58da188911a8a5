"""Connections of the pipeline's own, beside those of the user's process group, and made once for each group.

Gloo has one for each direction of the pipeline: on one connection a message that leaves makes those that arrive wait.
NCCL has one for each directed pair of ranks, since what waits on one holds up all that comes after it there:

    Gloo   values    0 ──▶ 1 ──▶ 2          NCCL   0 ══▶ 1     one of its own
           gradients 0 ◀── 1 ◀── 2                 0 ◀══ 1     and another
"""

from __future__ import annotations

import contextlib
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from typing_extensions import override

from pipework.split.torch_private import timeout_of

Lane = Any  # a process group; torch's stubs leave out the calls of its backends

GLOO_RECEIVES_AHEAD = 4
"""A Gloo send that finds its receive posted is one write; else both sides negotiate, through Gloo's own thread."""

CPU = torch.device("cpu")

NCCL_BLOCKS = 4
"""Thread blocks of a transfer at most: one that waits spins on its multiprocessors, which then compute nothing."""


class Connections(ABC):
    """One process's ends of all connections of a group."""

    receives_ahead: int  # how many messages of a channel it pays to be ready for from the step's start
    everyone: Lane  # for what all ranks do together

    @abstractmethod
    def abort(self) -> None:
        """Break off what is under way, as far as it does not end when nobody holds the connections any more."""

    @abstractmethod
    def lane(self, source: int, target: int, channel: int) -> tuple[Lane, int]:
        """What carries messages from one rank to another on a channel, and the number of the other end there."""


@final
class GlooConnections(Connections):
    """One process group for values, one for gradients."""

    receives_ahead = GLOO_RECEIVES_AHEAD

    def __init__(self, group: dist.ProcessGroup, prefix: str) -> None:
        store, self._rank = group.get_group_store(), dist.get_rank(group)
        self._lanes: tuple[Lane, ...] = tuple(
            dist.ProcessGroupGloo(
                dist.PrefixStore(f"{prefix}/{way}", store),
                self._rank,
                dist.get_world_size(group),
                timeout_of(group, CPU),
            )
            for way in ("forward", "back")
        )
        self.everyone = self._lanes[0]

    @override
    def lane(self, source: int, target: int, channel: int) -> tuple[Lane, int]:
        return self._lanes[channel % 2], source + target - self._rank

    @override
    def abort(self) -> None:
        pass


@final
class NcclConnections(Connections):
    """A process group of two for each directed pair of ranks, connected when the first message goes that way.

    Both ends then wait for each other, as the programs are proven to allow.
    """

    receives_ahead = 0  # one that is posted early spins for nothing

    def __init__(self, group: dist.ProcessGroup, device: torch.device, prefix: str) -> None:
        self._group, self._device, self._prefix, self._rank = group, device, prefix, dist.get_rank(group)
        self._lanes: dict[tuple[int, int], Lane] = {}
        self.everyone = group
        weakref.finalize(self, _shut_down, self._lanes)

    @override
    def lane(self, source: int, target: int, channel: int) -> tuple[Lane, int]:
        here, lane = int(self._rank == target), self._lanes.get((source, target))
        if lane is None:
            store = dist.PrefixStore(f"{self._prefix}/{source}>{target}", self._group.get_group_store())
            lane = self._lanes[source, target] = self._connected(store, here)
        return lane, 1 - here

    def _connected(self, store: dist.Store, here: int) -> Lane:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.min_ctas, options.config.max_ctas = 1, NCCL_BLOCKS
        with _without_warning():
            lane: Lane = dist.ProcessGroupNCCL(store, here, 2, options)
        lane.set_timeout(timeout_of(self._group, self._device))
        lane.bound_device_id = self._device
        lane.eager_connect_single_device(self._device)  # else a communicator is made beside the group's own
        return lane

    @override
    def abort(self) -> None:
        for lane in self._lanes.values():
            lane.abort()
        self._lanes.clear()


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """A process group that is made in the block does not warn that its messages go one after the other."""
    name = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _shut_down(lanes: Mapping[tuple[int, int], Lane]) -> None:
    for lane in lanes.values():
        lane.shutdown()


_known: WeakKeyDictionary[dist.ProcessGroup, Connections] = WeakKeyDictionary()
_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # how often, as a failure closes them


def connections(group: dist.ProcessGroup, device: torch.device) -> Connections:
    """Those of a group, shared by all its runners."""
    found = _known.get(group)
    if found is None:
        number = _made[group] = _made.get(group, 0) + 1
        prefix, is_gloo = f"pipework/{number}", dist.get_backend(group) == "gloo"
        found = _known[group] = GlooConnections(group, prefix) if is_gloo else NcclConnections(group, device, prefix)
    return found


def close(group: dist.ProcessGroup, old: Connections) -> None:
    """Close connections, so that whoever waits on one of them hears of it; the group's next runner makes new ones."""
    if _known.get(group) is old:
        del _known[group]
    old.abort()
