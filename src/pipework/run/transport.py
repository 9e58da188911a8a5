"""How tensors get from rank to rank: the contract, and ranks as threads of one process.

A message is a list of tensors on a channel, a small number that both ends know. Messages between two ranks on one
channel arrive in the order in which they were sent. Both ends know every layout beforehand, so only contents travel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from typing_extensions import override

from pipework.errors import MismatchError, PipeworkError, TransportError
from pipework.split.cut import Wire

Wait = Callable[[], None]
Tensors = Sequence[torch.Tensor | None]
"""What a message holds; None is a gradient that was never made."""

Arrival = Callable[[], Sequence[Any]]
Way = tuple[int, int, int]  # from rank, to rank, channel


class Transport(ABC):
    """One rank's end of everything that ranks exchange."""

    rank: int
    ranks: int
    device: torch.device  # where tensors for all ranks (see `share`) live
    in_one_process: bool = False  # whether all ranks have the same parameters in hand
    receives_ahead: int = 0  # how many messages of a channel it pays to be ready for from the step's start

    @abstractmethod
    def send(self, tensors: Tensors, wires: Sequence[Wire], to: int, channel: int) -> Wait:
        """Begin to send; the tensors must not change until what is returned has been called, which blocks until then.

        Only threads hand over a None; for processes `Layouts` sees to it.
        Raises `MismatchError` for a tensor that is not what its wire announced.
        """

    @abstractmethod
    def receive(self, wires: Sequence[Wire], source: int, channel: int, device: torch.device) -> Arrival:
        """Be ready for tensors of these layouts; what is returned blocks until they are there, and gives them."""

    @abstractmethod
    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; all ranks call it."""

    @abstractmethod
    def numbers(self, number: int) -> list[int] | None:
        """Every rank's number, by rank, at next to no cost; None where it would cost a wait. All ranks call it."""

    @abstractmethod
    def share(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of rank `source`, on every rank; all ranks call it with one of the same layout."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on, where the transport can."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Refusal:
    """What a rank tells the others in place of a value when it cannot go on."""

    error: PipeworkError


def together(end: Transport, value: Any) -> list[Any]:
    """Every rank's value, by rank; all ranks call it, and if one of them refused instead, all raise its error."""
    told = end.exchange(value)
    for rank, each in enumerate(told):
        if isinstance(each, _Refusal):
            error, place = each.error, f"rank {rank}"
            where = f"{place}, {error.where}" if error.where else place
            raise type(error)(error.what, where=where, why=error.why, remedy=error.remedy) from error
    return told


@contextlib.contextmanager
def refusing(end: Transport, listening: bool) -> Iterator[None]:
    """Tell the others of an error in the block, if they come to `together` next: else they would wait for this rank."""
    try:
        yield
    except PipeworkError as error:
        if listening:
            end.exchange(_Refusal(error))
        raise


@final
class Threads:
    """Ranks as threads of one process: tensors are handed over, not copied, unless they change device."""

    def __init__(self, ranks: int) -> None:
        self._turn = threading.Condition()
        self._shelves: dict[tuple[Way, int], Any] = {}
        self._sent, self._claimed = Counter[Way](), Counter[Way]()
        self._failure: tuple[int | None, BaseException] | None = None
        self.ends = tuple(ThreadTransport(self, rank, ranks) for rank in range(ranks))

    def begin(self) -> None:
        """Forget what an interrupted step left behind."""
        with self._turn:
            for left in (self._shelves, self._sent, self._claimed):
                left.clear()
            self._failure = None

    def put(self, way: Way, value: Any) -> None:
        """Leave the next message on a way."""
        with self._turn:
            self._shelves[way, self._sent[way]] = value
            self._sent[way] += 1
            self._turn.notify_all()

    def claim(self, way: Way) -> Callable[[], Any]:
        """The next message on a way, to be waited for later, in any order.

        Waiting raises `TransportError` when another rank has failed.
        """
        with self._turn:
            place = way, self._claimed[way]
            self._claimed[way] += 1
        return lambda: self._take(place)

    def _take(self, place: tuple[Way, int]) -> Any:
        with self._turn:
            self._turn.wait_for(lambda: place in self._shelves or self._failure)
            if self._failure is not None:
                rank, error = self._failure
                who = "the caller was interrupted" if rank is None else f"rank {rank} failed"
                raise TransportError(who, why=f"{type(error).__name__}: {error}") from error
            return self._shelves.pop(place)

    def fail(self, rank: int | None, error: BaseException) -> None:
        """Wake every rank that waits: this one will send nothing more, or (None) the caller wants the step no more."""
        with self._turn:
            self._failure = self._failure or (rank, error)
            self._turn.notify_all()


_EXCHANGE = -1  # the channel of values that are no tensors


@final
class ThreadTransport(Transport):
    """One thread's end."""

    in_one_process = True

    def __init__(self, shelves: Threads, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.device = rank, ranks, torch.device("cpu")
        self._shelves = shelves

    @override
    def send(self, tensors: Tensors, wires: Sequence[Wire], to: int, channel: int) -> Wait:
        for tensor, wire in zip(tensors, wires, strict=True):
            if tensor is not None:
                announced(tensor, wire)
        ready = [None if tensor is None else _marked(tensor) for tensor in tensors]
        self._shelves.put((self.rank, to, channel), ready)
        return _done

    @override
    def receive(self, wires: Sequence[Wire], source: int, channel: int, device: torch.device) -> Arrival:
        arrival = self._shelves.claim((source, self.rank, channel))

        def wait() -> Tensors:
            return [None if ready is None else _moved(ready[0], ready[1], device) for ready in arrival()]

        return wait

    @override
    def exchange(self, value: Any) -> list[Any]:
        for rank in range(self.ranks):
            self._shelves.put((self.rank, rank, _EXCHANGE), value)
        return [self._shelves.claim((rank, self.rank, _EXCHANGE))() for rank in range(self.ranks)]

    @override
    def numbers(self, number: int) -> list[int] | None:
        return None  # threads are called once for all ranks

    @override
    def share(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        return self.exchange(tensor)[source].to(tensor.device)

    @override
    def fail(self, error: BaseException) -> None:
        self._shelves.fail(self.rank, error)


def announced(tensor: torch.Tensor, wire: Wire) -> None:
    """Raise `MismatchError` where a tensor is not what the receiver awaits."""
    if tensor.shape != wire.shape or tensor.dtype != wire.dtype:
        raise MismatchError(
            f"a tensor of {tuple(tensor.shape)}, {tensor.dtype} was about to be sent as {wire.shape}, {wire.dtype}",
            why="on these inputs a stage made something else than on those that it was captured on",
            remedy="make shapes and dtypes depend on those of the inputs only, or keep the code in one stage",
        )


def _done() -> None:
    """A hand-over between threads is over when it has begun."""


def _marked(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """On a GPU the tensor may still be in the making: an event says when it is there."""
    if not tensor.is_cuda:
        return tensor, None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return tensor, event


def _moved(tensor: torch.Tensor, made: torch.cuda.Event | None, device: torch.device) -> torch.Tensor:
    if made is None:
        return tensor.to(device)
    stream = torch.cuda.current_stream(tensor.device)
    stream.wait_event(made)
    tensor.record_stream(stream)
    if tensor.device == device:
        return tensor
    copy = tensor.to(device, non_blocking=True)
    if device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record(stream)
        torch.cuda.current_stream(device).wait_event(copied)
    return copy
