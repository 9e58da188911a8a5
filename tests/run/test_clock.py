"""The clock of a GPU against a GPU of which everything is known, and the clocks of machines that started apart."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import pipework
from pipework import Runner
from pipework.plan import Action
from pipework.run import clock
from pipework.run.clock import Recording
from tests.end_to_end.case import squared
from tests.gloo import GlooPool
from tests.run.pipes import piped, sequence
from tests.run.test_runner import X, Y, assert_really_ran

GPU = torch.device("cuda", 0)


@dataclass
class Machine:
    """A host and a GPU with one stream, in true seconds: every call and every command takes one of the delays."""

    delays: Iterator[float]
    host: float = 1000.0
    gpu: float = 0.0  # when it is done with all that it was given
    waits: int = 0

    def perf_counter(self) -> float:
        self.host += next(self.delays)
        return self.host

    def work(self, seconds: float) -> None:
        self.perf_counter()
        self.gpu = max(self.gpu, self.host) + seconds

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


@dataclass
class Event:
    machine: Machine
    came: float = field(init=False)

    def record(self, stream: Machine) -> None:
        stream.work(next(stream.delays))
        self.came = stream.gpu

    def synchronize(self) -> None:
        self.machine.waits += 1
        self.machine.host = max(self.machine.host, self.came) + next(self.machine.delays)

    def elapsed_time(self, other: Event) -> float:
        assert self.machine.host >= max(self.came, other.came)
        return (other.came - self.came) * 1e3


@given(
    durations=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    delays=st.lists(st.floats(1e-6, 1e-3), min_size=1, max_size=20),
    left=st.floats(0, 10),
)
def test_moments_of_a_gpu_on_the_hosts_clock(durations: list[float], delays: list[float], left: float) -> None:
    machine = Machine(itertools.cycle(delays))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", SimpleNamespace(perf_counter=machine.perf_counter))
        patch.setattr(torch.cuda, "Event", machine.event)
        patch.setattr(torch.cuda, "current_stream", lambda device: machine)
        recording = Recording([GPU])
        marks: list[tuple[Event, Event]] = []
        for number, seconds in enumerate(durations):
            begin = recording.clock(GPU).now()
            machine.work(seconds)
            marks.append((begin, recording.clock(GPU).now()))
            recording.mark(0, Action.parse(f"0F{number}"), recording.clock(GPU), *marks[-1])
        assert machine.waits == 0
        machine.work(left)  # what the GPU still does when it is asked for the times
        spans = recording.spans()
        waits = machine.waits
        assert recording.spans() is spans
        assert machine.waits == waits
    # Between the two readings of the host's clock lie: a call, an event's own two, the wait's, and a reading.
    most = 5 * max(delays) / 2
    for span, (begin, end) in zip(spans, marks, strict=True):
        assert span.start == pytest.approx(begin.came, abs=most, rel=0)
        assert span.end - span.start == pytest.approx(end.came - begin.came, abs=1e-9, rel=0)


def apart(group: dist.ProcessGroup, rank: int) -> Any:
    """As if every rank were on a machine of its own: they were started hours apart, and agree on the time of day."""
    later = 3600 * rank
    shifted = SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + later,
        perf_counter_ns=lambda: time.perf_counter_ns() + later * 10**9,
        time_ns=time.time_ns,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", shifted)
        pipe = piped(sequence(3), *"12")
        schedule = pipework.schedules.one_f_one_b(pipe.layout(3), 6)
        runner = Runner(pipe, schedule, loss=squared, group=group, record=True)
        runner.step(torch.cat([X, X, X])[:12], target=torch.cat([Y, Y, Y])[:12])
        return runner.recorded


def test_machines_that_were_started_apart(gloo_pool: GlooPool) -> None:
    first, *others = gloo_pool.run(apart, ranks=3)
    assert first.makespan < 3600
    assert_really_ran(first, first.schedule)
    assert all(other.spans == first.spans for other in others)
