"""Schedules that grow action by action on a clock, with weight gradients in the gaps.

rank 0  F0 F1 F2 .. I0 F3 W0 I1 ...      the next input gradient comes late: weight gradients first, if they fit
rank 1     F0 F1 I0 F2 I1 W0 F3 ...      no memory for another forward: a weight gradient first, which frees some
"""

from __future__ import annotations

from collections import deque
from typing import final

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.exact import whole
from pipework.plan.families.order import all_split, chained
from pipework.plan.layout import Layout
from pipework.plan.rules import needs

_KINDS = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)


@final
class Filling:
    """What each rank does so far, since when it is free, how much it holds and for how long it was idle.

    Every stage waits for the one before it, so that the orders are right for any edges.

    Times and memory are whole numbers of some unit, so that what is equal by construction also compares equal.
    """

    def __init__(self, layout: Layout, microbatches: int, costs: Costs, memory: float) -> None:
        costs.require(layout)
        stages, ranks = range(layout.stages), range(layout.ranks)
        self.layout = chained(layout)
        self.orders: list[list[Action]] = [[] for _ in ranks]
        self.free = [0 for _ in ranks]
        self.idle = [0 for _ in ranks]
        self._held = [0 for _ in ranks]
        self._put_off: list[deque[Action]] = [deque() for _ in ranks]
        self._ends: dict[Action, int] = {}
        self._arrivals: dict[Action, int] = {}
        self._work = all_split(self.layout, microbatches)
        steps = [(stage, kind) for stage in stages for kind in _KINDS]
        edges = sorted(self.layout.edges)
        durations = [costs.duration(Action(stage, kind, 0)) for stage, kind in steps]
        delays = [costs.delay(*edge, layout) if edge in layout.edges else 0 for edge in edges]
        times = whole([*durations, *delays])
        self._duration = dict(zip(steps, times, strict=False))
        self._delay = dict(zip(edges, times[len(steps) :], strict=True))
        self._delay |= {(later, earlier): delay for (earlier, later), delay in self._delay.items()}
        activations = [costs.held(Action(stage, Kind.FORWARD, 0)) for stage in stages]
        early = [costs.released(Action(stage, Kind.INPUT_GRADIENT, 0)) for stage in stages]
        self._memory, *amounts = whole([memory, *activations, *early])
        self._keeps: dict[tuple[int, Kind], int] = {}
        for stage, activation, released in zip(stages, amounts, amounts[len(stages) :], strict=False):
            changes = (activation, -released, released - activation)
            self._keeps |= {(stage, kind): change for kind, change in zip(_KINDS, changes, strict=True)}
        if max(activations) > memory:
            raise ScheduleError(
                f"a memory limit of {memory} leaves no room for one microbatch",
                why=f"it keeps {max(activations)} on a stage",
                remedy=f"allow memory={max(activations)} or more",
            )

    def is_possible(self, action: Action) -> bool:
        """Whether all that it needs is done."""
        return action in self._arrivals or all(need in self._ends for need in needs(action, self._work))

    def duration(self, action: Action) -> int:
        """How long it takes."""
        return self._duration[action.stage, action.kind]

    def delay(self, start: int, end: int) -> int:
        """How long a transfer between neighbouring stages takes, in either direction."""
        return self._delay[start, end]

    def end(self, action: Action) -> int:
        """When it is over."""
        return self._ends[action]

    def arrival(self, action: Action) -> int:
        """When what it needs from other stages, all of it done, has arrived; 0 if that is nothing."""
        if action not in self._arrivals:
            others = [need for need in needs(action, self._work) if need.stage != action.stage]
            arrivals = [self._ends[need] + self._delay[need.stage, action.stage] for need in others]
            self._arrivals[action] = max(arrivals, default=0)
        return self._arrivals[action]

    def slack(self, rank: int) -> int:
        """How long the rank can be idle before it is the one that was idle for longest."""
        return max(self.idle) - self.idle[rank]

    def has_room(self, action: Action, others: int = 0) -> bool:
        """Whether it fits into the memory left, and so many `others` like it."""
        kept = self._keeps[action.stage, action.kind]
        return self._held[self.layout.rank_of[action.stage]] + kept * (1 + others) <= self._memory

    def put(self, action: Action) -> None:
        """Adds it to its rank, where it starts as soon as it can."""
        rank, step = self.layout.rank_of[action.stage], (action.stage, action.kind)
        start = max(self.free[rank], self.arrival(action))
        if self.orders[rank]:
            self.idle[rank] += start - self.free[rank]
        self.free[rank] = self._ends[action] = start + self._duration[step]
        self._held[rank] += self._keeps[step]
        self.orders[rank].append(action)
        if action.kind is Kind.INPUT_GRADIENT:
            self._put_off[rank].append(Action(action.stage, Kind.WEIGHT_GRADIENT, action.microbatch))

    def fill(self, action: Action, tolerated: float) -> None:
        """Weight gradients before `action`: to make room for it, while they fit into the gap, and into what is left.

        One that does not fit into the gap goes in if the gap is longer than `tolerated`, and then delays `action`.
        """
        rank = self.layout.rank_of[action.stage]
        put_off, arrival = self._put_off[rank], self.arrival(action)
        while put_off and (not self.has_room(action) or self.free[rank] + self.duration(put_off[0]) <= arrival):
            self.put(put_off.popleft())
        if put_off and arrival - self.free[rank] > max(0, tolerated):
            self.put(put_off.popleft())

    def time_to_make_room(self, action: Action) -> int:
        """How long the weight gradients take that have to come first if `action` is to fit into memory."""
        rank = self.layout.rank_of[action.stage]
        excess = self._held[rank] + self._keeps[action.stage, action.kind] - self._memory
        time = 0
        for weight in self._put_off[rank]:
            if excess <= 0:
                break
            excess += self._keeps[weight.stage, weight.kind]
            time += self.duration(weight)
        return time

    def flush(self, rank: int) -> None:
        """All weight gradients that a rank has put off."""
        while self._put_off[rank]:
            self.put(self._put_off[rank].popleft())

    @property
    def lengths(self) -> tuple[int, int]:
        """The span and the makespan."""
        work = [sum(map(self.duration, order)) for order in self.orders]
        return max(busy + idle for busy, idle in zip(work, self.idle, strict=True)), max(self.free)
