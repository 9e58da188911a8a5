"""Schedules by a simple rule: whenever a rank is free, it does the most urgent of what it can do.

    rank free at time t:   gradients that others wait for  >  forwards, while there is room  >  weight gradients

No forward is started that could not be drained: at all times the microbatches in flight can be finished one after the
other within the memory that is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product
from typing import final

from pipework.plan.action import Kind
from pipework.plan.problem import Problem

_F, _B, _I, _W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT
_URGENT = ((_F, _B, _I, _W), (_B, _I, _F, _W), (_B, _I, _W, _F))


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """What a rank prefers.

    - `in_flight[stage]`: the most microbatches that are on their way from the stage to the end and back.
    - `patience`: a rank waits for something more urgent, up to this share of what it could do meanwhile.
    - `urgent`: the kinds, most urgent first.
    - `deep_forwards`, `deep_backwards`: of several stages, prefer the last; else the first.
    """

    in_flight: tuple[int, ...]
    patience: float
    urgent: tuple[Kind, ...]
    deep_forwards: bool
    deep_backwards: bool


def rules(problem: Problem) -> Iterator[Rule]:
    """The rules worth a try."""
    layout = problem.one_by_one.layout
    either = (True, False) if layout.stages > layout.ranks else (True,)
    for each in product(_in_flight(problem), (0.0, 1.0, 0.5), _URGENT, either, either):
        yield Rule(*each)


def _in_flight(problem: Problem) -> Sequence[tuple[int, ...]]:
    """How many microbatches a stage may have in flight: about as many as fill the time until the first comes back.

    That time is the trip of a microbatch that is alone. What fills it is the work of the busiest rank, with or without
    weight gradients, which can wait; or, where memory is short, any number at the first stage and fewer behind it.
    """
    trips, busiest, busiest_without = _alone(problem)
    most = problem.one_by_one.microbatches
    found = [(most,) * len(trips)]
    for extra, work in product((0, 1, 2, -1, -2), (busiest_without, busiest)):
        found.append(tuple(min(most, max(1, -(-trip // max(work, 1)) + extra)) for trip in trips))
    longest = max(1, *trips)
    found += [tuple(max(1, -(-first * trip // longest)) for trip in trips) for first in range(1, most)]
    return list(dict.fromkeys(found))


def _alone(problem: Problem) -> tuple[list[int], int, int]:
    """Each stage's time from a forward to its gradient, and the work of the busiest rank, with and without W."""
    schedule = problem.one_by_one
    ends: dict[int, int] = {}
    trips = [0] * schedule.layout.stages
    work, without = [0] * problem.ranks, [0] * problem.ranks
    for task, (action, rank) in enumerate(zip(problem.actions, problem.rank_of, strict=True)):
        if action.microbatch != schedule.taken_by(action.stage)[0]:
            continue
        duration = problem.durations[task]
        start = max((ends[need] + delay for need, delay in problem.needs[task]), default=0)
        ends[task] = start + duration
        work[rank] += duration
        if action.kind is not _W:
            without[rank] += duration
            trips[action.stage] += -start if action.kind is _F else ends[task]
    return trips, max(work), max(without)


def greedy(problem: Problem, rule: Rule) -> list[list[int]]:
    """Each rank's tasks in the order that the rule gives."""
    return _Greedy(problem, rule).orders()


@final
class _Greedy:
    """One run: what is done, what can be done next, and when."""

    def __init__(self, problem: Problem, rule: Rule) -> None:
        self.problem, self.rule = problem, rule
        self.reached = [[0] * len(lanes) for lanes in problem.lanes]
        self.followers: list[list[tuple[int, int]]] = [[] for _ in problem.actions]
        for task, needs in enumerate(problem.needs):
            for need, delay in needs:
                self.followers[need].append((task, delay))
        self.missing = [len(needs) for needs in problem.needs]  # how many needs have not even been started
        self.ready = [0] * len(problem.actions)  # once none is missing: when all of them have arrived
        self.urgency = [self._urgency(task) for task in range(len(problem.actions))]
        self.room = list(rule.in_flight)
        self.memory = None if problem.limits is None else _Ledger(problem, problem.limits)

    def _urgency(self, task: int) -> tuple[int, int]:
        action = self.problem.actions[task]
        deep = self.rule.deep_forwards if action.kind is _F else self.rule.deep_backwards
        return self.rule.urgent.index(action.kind), -action.stage if deep else action.stage

    def orders(self) -> list[list[int]]:
        problem = self.problem
        orders: list[list[int]] = [[] for _ in range(problem.ranks)]
        free = [0] * problem.ranks
        wake = [(0, rank) for rank in range(problem.ranks)]
        while wake:
            now, rank = heappop(wake)
            while wake and wake[0] == (now, rank):
                heappop(wake)
            number, later = self._choose(rank, now) if free[rank] <= now else (None, None)
            if later is not None:
                heappush(wake, (later, rank))
            if number is None:
                continue
            task = problem.lanes[rank][number][self.reached[rank][number]]
            self.reached[rank][number] += 1
            orders[rank].append(task)
            end = free[rank] = now + problem.durations[task]
            for other in self._start(task, end):
                heappush(wake, other)
        assert sum(map(len, orders)) == len(problem.actions), "the oldest microbatch can always go on"
        return orders

    def _start(self, task: int, end: int) -> Iterator[tuple[int, int]]:
        """Book the task, and say which ranks to look at again, and when."""
        problem, action = self.problem, self.problem.actions[task]
        for follower, delay in self.followers[task]:
            self.missing[follower] -= 1
            self.ready[follower] = max(self.ready[follower], end + delay)
            yield end + delay, problem.rank_of[follower]
        if action.kind is not _W:
            self.room[action.stage] += -1 if action.kind is _F else 1
        if self.memory is not None:
            self.memory.start(task)
        # What is freed on one rank may let another start what could not have been drained before.
        for other in range(problem.ranks) if action.kind is not _F and self.memory else (problem.rank_of[task],):
            yield end, other

    def _choose(self, rank: int, now: int) -> tuple[int | None, int | None]:
        """The lane to go on with now, if any; and when to look again, if that can be told."""
        best: tuple[tuple[int, int], int, int] | None = None
        coming: list[tuple[int, int]] = []
        for number, (lane, position) in enumerate(zip(self.problem.lanes[rank], self.reached[rank], strict=True)):
            if position == len(lane) or self.missing[lane[position]]:
                continue
            task = lane[position]
            urgency = self.urgency[task]
            if self.ready[task] > now:
                coming.append((self.ready[task], urgency[0]))
            elif (best is None or urgency < best[0]) and self._has_room(task):
                best = urgency, number, task
        if best is None:
            return None, min((ready for ready, _ in coming), default=None)
        until = now + self.rule.patience * self.problem.durations[best[2]]
        worth = [ready for ready, urgency in coming if urgency < best[0][0] and ready < until]
        return (None, min(worth)) if worth else (best[1], None)

    def _has_room(self, task: int) -> bool:
        action = self.problem.actions[task]
        if action.kind is not _F:
            return True
        return self.room[action.stage] > 0 and (self.memory is None or self.memory.allows(task))


@final
class _Ledger:
    """What memory is taken on each rank, and by which microbatches."""

    def __init__(self, problem: Problem, limits: Sequence[int]) -> None:
        self.problem = problem
        self.spare = list(limits)
        self.held: dict[int, list[int]] = {}
        self.to_come = [[0] * problem.ranks for _ in range(problem.one_by_one.microbatches)]
        for task, (action, rank) in enumerate(zip(problem.actions, problem.rank_of, strict=True)):
            self.to_come[action.microbatch][rank] += problem.takes[task]
        self.whole = [max(ranks) for ranks in zip(*self.to_come, strict=True)]
        layout = problem.one_by_one.layout
        self.several = layout.stages > layout.ranks  # with one stage per rank, what fits can always be drained

    def start(self, task: int) -> None:
        """Book what the task takes, and what it frees: nothing else runs on its rank before it ends."""
        rank, microbatch = self.problem.rank_of[task], self.problem.actions[task].microbatch
        change = self.problem.takes[task] - self.problem.frees[task]
        held = self.held.setdefault(microbatch, [0] * len(self.spare))
        held[rank] += change
        self.spare[rank] -= change
        self.to_come[microbatch][rank] -= self.problem.takes[task]
        if not any(held) and not any(self.to_come[microbatch]):
            del self.held[microbatch]

    def allows(self, task: int) -> bool:
        """Whether the task fits, and everything in flight could be drained, oldest first, if it were started."""
        rank, takes = self.problem.rank_of[task], self.problem.takes[task]
        started = self.problem.actions[task].microbatch
        spare = list(self.spare)
        spare[rank] -= takes
        if spare[rank] < 0:
            return False
        if not self.several or all(left >= whole for left, whole in zip(spare, self.whole, strict=True)):
            return True
        for microbatch in sorted({*self.held, started}):
            held = self.held.get(microbatch, [0] * len(spare))
            for other, to_come in enumerate(self.to_come[microbatch]):
                own = takes if microbatch == started and other == rank else 0
                if to_come - own > spare[other]:
                    return False
                spare[other] += held[other] + own
        return True
