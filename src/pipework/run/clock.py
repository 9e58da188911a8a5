"""When the actions of a step really ran: by the host's clock or, on a GPU, by the GPU's own."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, final

import torch
from typing_extensions import override

from pipework.plan import Action, Span

TRIES = 5
"""How often two clocks are read together: the pair that was read in the shortest time says best how they differ."""


class Clock(ABC):
    """What the actions of one step on one device are timed by."""

    @abstractmethod
    def now(self) -> Any:
        """This moment; on a GPU the one at which it has done all that this thread has given it so far."""

    @abstractmethod
    def seconds(self, moment: Any) -> float:
        """The moment in seconds of this process's `time.perf_counter`; waits until it has come."""


@final
class HostClock(Clock):
    """For devices on which work is done when its call returns."""

    @override
    def now(self) -> float:
        return time.perf_counter()

    @override
    def seconds(self, moment: float) -> float:
        return moment


@final
class CudaClock(Clock):
    """Events on the stream that does the work. Nothing waits for the GPU until the first moment is read.

    An event tells how long after another one of its device it came, to half a microsecond. So moments are told from an
    event at the step's start, and when that was on the host's clock is found once, while they are read:

        host  ──┬───────────┬──►   before and after it waits for an event, on a stream that is done with all else;
        GPU   ──────●──────────►   the event came in between, so that half the distance is the error at most
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self.now()

    @override
    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @override
    def seconds(self, moment: torch.cuda.Event) -> float:
        moment.synchronize()
        return self._start_on_host + self._start.elapsed_time(moment) / 1e3

    @cached_property
    def _start_on_host(self) -> float:
        _, middle, event = min((self._read() for _ in range(TRIES)), key=lambda read: read[0])
        return middle - self._start.elapsed_time(event) / 1e3

    def _read(self) -> tuple[float, float, torch.cuda.Event]:
        before, event = time.perf_counter(), self.now()
        event.synchronize()
        after = time.perf_counter()
        return after - before, (before + after) / 2, event


@final
class Recording:
    """The spans of one step: marked by its ranks while it runs, read when they are asked for."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._clocks = {d: CudaClock(d) if d.type == "cuda" else HostClock() for d in devices}
        self._marked: list[tuple[int, Action, Clock, Any, Any]] = []
        self._spans: list[Span] | None = None

    def clock(self, device: torch.device) -> Clock:
        """The clock of one of the devices; the threads of a device share it."""
        return self._clocks[device]

    def mark(self, rank: int, action: Action, clock: Clock, begin: Any, end: Any) -> None:
        """An action ran between these moments of a clock."""
        self._marked.append((rank, action, clock, begin, end))

    def spans(self) -> list[Span]:
        """All that was marked, in seconds of one clock; waits for the GPU if there is one."""
        if self._spans is None:
            self._spans = [
                Span(rank, action, clock.seconds(begin), clock.seconds(end))
                for rank, action, clock, begin, end in self._marked
            ]
            self._marked.clear()
        return self._spans

    def share(self, exchange: Callable[[Any], list[Any]]) -> None:
        """Take in what other processes marked, by the clock of the first: `exchange` gives every process's value.

        Each machine's `time.perf_counter` starts when it likes, so they are brought together by the time of day.
        """
        told: list[tuple[int, list[Span]]] = exchange((_time_of_day(), self.spans()))
        self._spans = [
            dataclasses.replace(span, start=span.start + later, end=span.end + later)
            for start, spans in told
            for later in ((start - told[0][0]) / 1e9,)
            for span in spans
        ]


def _time_of_day() -> int:
    """The time of day at which this process's `time.perf_counter` was 0, in nanoseconds."""

    def read() -> tuple[int, int]:
        before, day, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        return after - before, day - (before + after) // 2

    return min(read() for _ in range(TRIES))[1]
