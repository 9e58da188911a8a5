"""Schedules that grow action by action on a clock, with weight gradients in the gaps.

    rank 0  F0 F1 F2 .. I0 F3 W0 I1 ...     the next input gradient comes late: weight gradients first, if they fit
    rank 1     F0 F1 I0 F2 I1 W0 F3 ...     no memory for another forward: a weight gradient first, which frees some

Which forward or input gradient comes next is said by who fills; where the weight gradients go is decided here.
"""

from __future__ import annotations

from collections import deque
from typing import final

from pipework.plan.action import Action, Kind
from pipework.plan.families.whole_costs import Step, WholeCosts


@final
class Filling:
    """What each rank does so far, since when it is free, how much it holds and for how long it was idle."""

    def __init__(self, costs: WholeCosts) -> None:
        ranks = range(costs.layout.ranks)
        self.costs, self.layout = costs, costs.layout
        self.orders: list[list[Action]] = [[] for _ in ranks]
        self.free = [0 for _ in ranks]
        self.idle = [0 for _ in ranks]
        self._held = [0 for _ in ranks]
        self._put_off: list[deque[Action]] = [deque() for _ in ranks]
        self._ends: dict[tuple[Step, int], int] = {}

    def is_possible(self, action: Action) -> bool:
        """Whether all that it needs is done."""
        after = self.costs.after[action.stage, action.kind]
        return all((step, action.microbatch) in self._ends for step, _ in after)

    def arrival(self, action: Action) -> int:
        """When what it needs, all of it done, has arrived."""
        arrival = 0
        for step, delay in self.costs.after[action.stage, action.kind]:
            arrival = max(arrival, self._ends[step, action.microbatch] + delay)
        return arrival

    def slack(self, rank: int) -> int:
        """How long the rank can be idle before it is the one that was idle for longest."""
        return max(self.idle) - self.idle[rank]

    def has_room(self, action: Action, others: int = 0) -> bool:
        """Whether it fits into the memory left, and so many `others` like it."""
        kept = self.costs.keeps[action.stage, action.kind]
        return self._held[self.layout.rank_of[action.stage]] + kept * (1 + others) <= self.costs.memory

    def put(self, action: Action) -> None:
        """Adds it to its rank, where it starts as soon as it can."""
        rank, step = self.layout.rank_of[action.stage], (action.stage, action.kind)
        start = max(self.free[rank], self.arrival(action))
        if self.orders[rank]:
            self.idle[rank] += start - self.free[rank]
        self.free[rank] = self._ends[step, action.microbatch] = start + self.costs.duration[step]
        self._held[rank] += self.costs.keeps[step]
        self.orders[rank].append(action)
        if action.kind is Kind.INPUT_GRADIENT:
            self._put_off[rank].append(Action(action.stage, Kind.WEIGHT_GRADIENT, action.microbatch))

    def fill(self, action: Action, tolerated: float) -> None:
        """Weight gradients before `action`: to make room for it, while they fit into the gap, and into what is left.

        One that does not fit into the gap goes in if the gap is longer than `tolerated`, and then delays `action`.
        """
        rank, duration = self.layout.rank_of[action.stage], self.costs.duration
        put_off, arrival = self._put_off[rank], self.arrival(action)
        while put_off and (
            not self.has_room(action) or self.free[rank] + duration[put_off[0].stage, put_off[0].kind] <= arrival
        ):
            self.put(put_off.popleft())
        if put_off and arrival - self.free[rank] > tolerated:
            self.put(put_off.popleft())

    def time_to_make_room(self, action: Action) -> int:
        """How long the weight gradients take that have to come first if `action` is to fit into memory."""
        rank = self.layout.rank_of[action.stage]
        excess = self._held[rank] + self.costs.keeps[action.stage, action.kind] - self.costs.memory
        time = 0
        for weight in self._put_off[rank]:
            if excess <= 0:
                break
            excess += self.costs.keeps[weight.stage, weight.kind]
            time += self.costs.duration[weight.stage, weight.kind]
        return time

    def flush(self, rank: int) -> None:
        """All weight gradients that a rank has put off."""
        while self._put_off[rank]:
            self.put(self._put_off[rank].popleft())

    @property
    def lengths(self) -> tuple[int, int]:
        """The span and the makespan."""
        durations = self.costs.duration
        work = [sum(durations[action.stage, action.kind] for action in order) for order in self.orders]
        return max(busy + idle for busy, idle in zip(work, self.idle, strict=True)), max(self.free)
