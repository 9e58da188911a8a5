"""When each action ran: computed by the simulator, or recorded by a real step."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

from pipework.errors import InputError
from pipework.plan.action import Action, Kind
from pipework.plan.bound import bound
from pipework.plan.costs import RECORDED, Costs
from pipework.plan.critical import critical_path
from pipework.plan.schedule import Schedule
from pipework.plan.text import grid
from pipework.plan.walk import Times


@final
@dataclass(frozen=True, slots=True)
class Span:
    """One action on one rank from `start` to `end`, in the unit of its timeline."""

    rank: int
    action: Action
    start: float
    end: float


@final
@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule's actions in time, in seconds or in plain counts: `unit` says which.

    `simulate` makes one from costs, `Timeline.recorded` from what a real step measured. Only differences of times
    matter, so any clock will do that all ranks share. `starts[rank]` and `ends[rank]` are in the order of the rank's
    actions; spans are made of them when asked for.

        rank 0  F0 F1 .. .. B0 .. B1      makespan  from the first start on any rank to the last end on any rank
        rank 1  .. F0 B0 F1 B1            span      the longest stretch from a rank's own first start to its last end

    >>> from pipework.plan import Layout, one_f_one_b, simulate
    >>> timeline = simulate(one_f_one_b(Layout.loop(4), microbatches=8))
    >>> timeline.makespan, timeline.span, timeline.peaks, timeline.bound
    (33.0, 33.0, (4.0, 3.0, 2.0, 1.0), 33.0)
    """

    schedule: Schedule
    starts: Times
    ends: Times
    costs: Costs = field(default_factory=Costs)

    @classmethod
    def recorded(cls, schedule: Schedule, spans: Iterable[Span], costs: Costs = RECORDED) -> Timeline:
        """The timeline of one span for every action, in any order; what they cost is not known unless given.

        Raises InputError if an action has none or several, and if a rank did its actions in another order.
        """
        span_of: dict[tuple[int, Action], Span] = {}
        for span in spans:
            if (span.rank, span.action) in span_of:
                raise InputError(f"{span.action} was recorded twice on rank {span.rank}")
            span_of[span.rank, span.action] = span
        try:
            rows = [[span_of.pop((rank, action)) for action in order] for rank, order in enumerate(schedule.orders)]
        except KeyError as error:
            rank, action = error.args[0]
            raise InputError(f"{action} of rank {rank} was not recorded, or {schedule.name} has it twice") from None
        if span_of:
            rank, action = next(iter(span_of))
            raise InputError(f"{action} was recorded on rank {rank}, where {schedule.name} has none")
        for rank, row in enumerate(rows):
            for one, other in pairwise(row):
                if other.start < one.start:
                    raise InputError(f"rank {rank} is recorded to have done {other.action} before {one.action}")
        return cls(
            schedule,
            tuple(array("d", [span.start for span in row]) for row in rows),
            tuple(array("d", [span.end for span in row]) for row in rows),
            costs,
        )

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans, rank by rank."""
        return tuple(span for rank in range(len(self.starts)) for span in self.rank(rank))

    def rank(self, rank: int) -> tuple[Span, ...]:
        """The spans of one rank, in order."""
        return tuple(span for spans in self.at_once(rank) for span in spans)

    def at_once(self, rank: int) -> Iterator[tuple[Span, ...]]:
        """The spans of one rank, in order, two that ran at once together."""
        order, starts, ends = self.schedule.orders[rank], self.starts[rank], self.ends[rank]
        for begin, end in self.groups(rank):
            yield tuple(Span(rank, order[i], starts[i], ends[i]) for i in range(begin, end))

    def groups(self, rank: int) -> Iterator[tuple[int, int]]:
        """The positions of a rank from which and before which actions ran alone, or two at once."""
        order, starts, overlapped = self.schedule.orders[rank], self.starts[rank], self.schedule.overlapped
        begin, length = 0, len(order)
        while begin < length:
            end = begin + 1
            # A recording may tell that they did not.
            if overlapped and order[begin] in overlapped and end < length and starts[end] == starts[begin]:
                end += 1
            yield begin, end
            begin = end

    @property
    def unit(self) -> str:
        """`"s"` if times are in seconds, empty if they are plain counts."""
        return self.costs.unit

    @property
    def start(self) -> float:
        """When the first action on any rank started; 0 in a simulation and in an empty timeline."""
        return min((starts[0] for starts in self.starts if starts), default=0.0)

    @property
    def makespan(self) -> float:
        """The time from the first start on any rank to the last end on any rank."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0) - self.start

    @property
    def span(self) -> float:
        """The time of the longest rank, each from its own first start to its own last end.

        In a row of steps this is what a step costs where ranks need not wait for each other in between, and it is what
        claims of a "zero bubble" are about.
        """
        times = zip(self.starts, self.ends, strict=True)
        return max((ends[-1] - starts[0] for starts, ends in times if starts), default=0.0)

    @property
    def busy(self) -> float:
        """The time of compute, all ranks together; while two actions run at once, it counts once."""
        return sum(
            ends[begin] - starts[begin]
            for rank, (starts, ends) in enumerate(zip(self.starts, self.ends, strict=True))
            for begin, _ in self.groups(rank)
        )

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time within the makespan, from 0 to 1."""
        return self._idle(self.makespan)

    @property
    def bubble_of_span(self) -> float:
        """The idle share within the span: the bubble rate of the zero-bubble paper (Qi et al., arXiv:2401.10241)."""
        return self._idle(self.span)

    def _idle(self, length: float) -> float:
        return 1 - self.busy / (self.schedule.layout.ranks * length) if length else 0.0

    @property
    def bound(self) -> float:
        """What no order of the same actions on the same ranks can go below (see `pipework.plan.bound`).

        It goes by the costs alone: 0 for a recording of which they are not known.
        """
        return bound(self.schedule, self.costs)

    @property
    def gap(self) -> float:
        """The share of the makespan above the bound: 0 if no order could be shorter, 1 if nothing is known."""
        return max(0.0, 1 - self.bound / self.makespan) if self.makespan else 0.0

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """The activation memory alive on a rank, as (time, from then on) at each change, in `costs.activation`'s unit.

        An activation lives from the start of its forward to the end of its (weight gradient or full) backward; that of
        a recomputed stage from the start of its backward, and until then what the stage was given.
        """
        order, starts, ends = self.schedule.orders[rank], self.starts[rank], self.ends[rank]
        recomputed = self.schedule.recomputed
        work = [Action(stage, kind, 0) for stage in self.schedule.layout.held_by(rank) for kind in Kind]
        held = {(action.stage, action.kind): self.costs.held(action, recomputed) for action in work}
        released = {(action.stage, action.kind): self.costs.released(action) for action in work}
        alive, curve = 0.0, list[tuple[float, float]]()
        for begin, end in self.groups(rank):
            whats = [(action.stage, action.kind) for action in order[begin:end]]
            if more := sum([held[what] for what in whats]):
                alive += more
                curve.append((starts[begin], alive))
            if less := sum([released[what] for what in whats]):
                alive -= less
                curve.append((ends[begin], alive))
        return curve

    def peak(self, rank: int) -> float:
        """The most activation memory alive at once on a rank, in the unit of `costs.activation`."""
        return max((alive for _, alive in self.memory(rank)), default=0.0)

    @property
    def peaks(self) -> tuple[float, ...]:
        """`peak` of every rank."""
        return tuple(self.peak(rank) for rank in range(self.schedule.layout.ranks))

    def critical_path(self) -> tuple[Span, ...]:
        """The chain of spans that made the step take as long as it did, first to last.

        Each waited for the one before it: the previous action on its rank, or one that it needs (and its transfer).
        In a simulation with free channels each starts the moment its predecessor lets it; in any other timeline the
        predecessor is the one that let it start last. Of two that ran at once, the one that could have started later
        also stands before the other.
        """
        return tuple(
            Span(rank, self.schedule.orders[rank][i], self.starts[rank][i], self.ends[rank][i])
            for rank, i in critical_path(self)
        )

    def text(self, width: int | None = None) -> str:
        """The grid for a terminal, one row per rank, `width` columns at most, and a line of figures below."""
        return grid(self, width)
