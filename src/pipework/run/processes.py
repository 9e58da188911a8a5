"""Ranks as processes, through `torch.distributed` point-to-point calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

import torch
import torch.distributed as dist
from typing_extensions import override

from pipework.errors import TransportError
from pipework.run.connections import Connections, close, connections
from pipework.run.transport import Arrival, Tensors, Transport, Wait, announced
from pipework.split.cut import Wire


@final
class ProcessTransport(Transport):
    """One process's end of a process group; the group's ranks are the pipeline's."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self.device = group, device
        self._is_gloo = dist.get_backend(group) == "gloo"
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise TransportError(
                "this process is not in the group of the pipeline",
                remedy="make the runner only in the processes of the group",
            )
        self._connected = _Connected(self.rank)
        self._known: Connections | None = connections(group, device)
        self.receives_ahead = self._known.receives_ahead
        self._told = torch.zeros(1, dtype=torch.int64), [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]

    @override
    def send(self, tensors: Tensors, wires: Sequence[Wire], to: int, channel: int) -> Wait:
        laid = [_laid(tensor, wire) for tensor, wire in zip(tensors, wires, strict=True) if tensor is not None]
        assert len(laid) == len(wires)
        spans = [span for span in map(_span, laid) if span.numel()]
        with self._connected:
            lane, end = self._connections.lane(self.rank, to, channel)
            works = [lane.send([span], end, channel) for span in spans]

        def wait() -> None:
            with self._connected:
                for work in works:
                    work.wait()
            spans.clear()  # until here the memory must stay

        return wait

    @override
    def receive(self, wires: Sequence[Wire], source: int, channel: int, device: torch.device) -> Arrival:
        tensors = [_empty(wire, device) for wire in wires]
        spans = [span for span in map(_span, tensors) if span.numel()]
        with self._connected:
            lane, end = self._connections.lane(source, self.rank, channel)
            works = [lane.recv([span], end, channel) for span in spans]

        def wait() -> list[torch.Tensor]:
            with self._connected:
                for work in works:
                    work.wait()
            return tensors

        return wait

    @override
    def exchange(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        with self._connected:
            dist.all_gather_object(found, value, self._group)
        return found

    @override
    def numbers(self, number: int) -> list[int] | None:
        if not self._is_gloo or self.ranks == 1:
            return None  # it would make the host wait for the GPU, or for nobody
        mine, everyones = self._told
        mine.fill_(number)
        with self._connected:
            self._connections.everyone.allgather([everyones], [mine]).wait()
        return [int(one) for one in everyones]

    @override
    def fail(self, error: BaseException) -> None:
        """Close this rank's own connections, so that whoever waits on one of them hears of it at once."""
        known, self._known = self._known, None
        if known is not None:
            close(self._group, known)

    @property
    def _connections(self) -> Connections:
        if self._known is None:
            raise TransportError(
                "this runner's connections were closed when a step failed",
                remedy="make a new runner on every rank once the cause is mended",
            )
        return self._known

    @override
    def share(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        if self.ranks == 1:
            return tensor
        options = dist.BroadcastOptions()
        options.rootRank = source
        with self._connected:
            self._connections.everyone.broadcast([tensor], options).wait()
        return tensor


@final
class _Connected:
    """Whatever torch raises of a transfer in the block becomes a `TransportError`; its words differ by moment."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):
            raise TransportError(
                "the connection to another rank was lost",
                where=f"rank {self._rank}",
                why=f"that rank has failed, ended or hangs, and its own error says more ({error})",
                remedy="make a new runner on every rank once the cause is mended",
            ) from error


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """The memory between the first and the last element, as one row: what travels."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length if tensor.numel() else 0,), (1,))


def _empty(wire: Wire, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(wire.shape, wire.stride, dtype=wire.dtype, device=device)


def _laid(tensor: torch.Tensor, wire: Wire) -> torch.Tensor:
    """The tensor in the layout that the receiver awaits."""
    announced(tensor, wire)
    tensor = tensor.resolve_conj().resolve_neg()  # what travels is memory, which does not show these
    if tensor.stride() == wire.stride:
        return tensor
    return _empty(wire, tensor.device).copy_(tensor)
