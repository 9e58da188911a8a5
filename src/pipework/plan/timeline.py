"""When each action ran: computed by the simulator, or recorded by a real step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from pipework.plan.action import Action
from pipework.plan.costs import Costs
from pipework.plan.rules import needs
from pipework.plan.schedule import Schedule
from pipework.plan.text import grid


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

    `simulate` makes one from costs. A real step makes one from the spans it measured, with `Costs(unit="s")`; only
    differences of times matter, so any clock will do that all ranks share.

        rank 0  F0 F1 .. .. B0 .. B1      makespan  from the first start on any rank to the last end on any rank
        rank 1  .. F0 B0 F1 B1            span      the longest stretch from a rank's own first start to its last end

    >>> from pipework.plan import Layout, one_f_one_b, simulate
    >>> timeline = simulate(one_f_one_b(Layout.loop(4), microbatches=8))
    >>> timeline.makespan, timeline.span, timeline.peaks
    (33.0, 33.0, (4.0, 3.0, 2.0, 1.0))
    """

    schedule: Schedule
    spans: tuple[Span, ...]
    costs: Costs = field(default_factory=Costs)
    _by_rank: tuple[tuple[Span, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_rank: list[list[Span]] = [[] for _ in range(self.schedule.layout.ranks)]
        place = {action: place for order in self.schedule.orders for place, action in enumerate(order)}
        for span in sorted(self.spans, key=lambda span: (span.start, span.end, place[span.action])):
            by_rank[span.rank].append(span)
        object.__setattr__(self, "_by_rank", tuple(map(tuple, by_rank)))

    def rank(self, rank: int) -> tuple[Span, ...]:
        """The spans of one rank, in order."""
        return self._by_rank[rank]

    def at_once(self, rank: int) -> Iterator[tuple[Span, ...]]:
        """The spans of one rank, in order, two that ran at once together."""
        spans = iter(self._by_rank[rank])
        span = next(spans, None)
        while span is not None:
            following = next(spans, None)
            if span.action in self.schedule.overlapped and following is not None and following.start == span.start:
                yield span, following
                following = next(spans, None)
            else:
                yield (span,)
            span = following

    @property
    def unit(self) -> str:
        """`"s"` if times are in seconds, empty if they are plain counts."""
        return self.costs.unit

    @property
    def start(self) -> float:
        """When the first action on any rank started; 0 in a simulation and in an empty timeline."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """The time from the first start on any rank to the last end on any rank."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    @property
    def span(self) -> float:
        """The time of the longest rank, each from its own first start to its own last end.

        In a row of steps this is what a step costs where ranks need not wait for each other in between, and it is what
        claims of a "zero bubble" are about.
        """
        return max((spans[-1].end - spans[0].start for spans in self._by_rank if spans), default=0.0)

    @property
    def busy(self) -> float:
        """The time of compute, all ranks together; while two actions run at once, it counts once."""
        ranks = range(self.schedule.layout.ranks)
        return sum(spans[0].end - spans[0].start for rank in ranks for spans in self.at_once(rank))

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

    def peak(self, rank: int) -> float:
        """The most activation memory alive at once on a rank, in the unit of `costs.activation`.

        An activation lives from the start of its forward to the end of its (weight gradient or full) backward.
        """
        alive = most = 0.0
        for spans in self.at_once(rank):
            alive += sum(self.costs.held(span.action) for span in spans)
            most = max(most, alive)
            alive -= sum(self.costs.released(span.action) for span in spans)
        return most

    @property
    def peaks(self) -> tuple[float, ...]:
        """`peak` of every rank."""
        return tuple(self.peak(rank) for rank in range(self.schedule.layout.ranks))

    def critical_path(self) -> tuple[Span, ...]:
        """The chain of spans that made the step take as long as it did, first to last.

        Each waited for the one before it: the previous action on its rank, or one that it needs (and its transfer).
        Of two that ran at once, the one that could have started later also stands before the other.
        In a simulation each starts the moment its predecessor lets it; in a recorded timeline the predecessor is the
        one that let it start last.
        """
        if not self.spans:
            return ()
        span_of = {span.action: span for span in self.spans}
        before: dict[Action, Span] = {}
        other: dict[Action, Span] = {}
        for rank in range(self.schedule.layout.ranks):
            last: Span | None = None
            for spans in self.at_once(rank):
                for span in spans:
                    if last is not None:
                        before[span.action] = last
                if len(spans) == 2:
                    other[spans[0].action], other[spans[1].action] = spans[1], spans[0]
                last = spans[-1]
        path = [max(self.spans, key=lambda span: span.end)]
        while True:
            action = path[-1].action
            # The rank's own comes first, so that among equals the path stays on its rank.
            waits = [(before[action].end, action, before[action])] if action in before else []
            for one in (action, other[action].action) if action in other else (action,):
                waits += [
                    (self._arrives(span_of[need], one), one, span_of[need])
                    for need in needs(one, self.schedule)
                    if need in span_of
                ]
            if not waits:
                return tuple(reversed(path))
            _, one, earlier = max(waits, key=lambda wait: wait[0])
            if one != action:
                path.append(other[action])
            path.append(earlier)

    def _arrives(self, earlier: Span, action: Action) -> float:
        """When `earlier` is over and what it made has arrived at `action`'s stage."""
        return earlier.end + self.costs.delay(earlier.action.stage, action.stage, self.schedule.layout)

    def text(self, width: int | None = None) -> str:
        """The grid for a terminal, one row per rank, `width` columns at most, and a line of figures below."""
        return grid(self, width)
