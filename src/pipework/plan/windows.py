"""How long every schedule takes at least, without searching.

Each task has a head, before which it cannot start, and a tail, which must follow its end. Both come from all that must
be done before and after it: on other ranks the longest path counts, and on its own rank, which does one thing at a
time, the sum. Then each rank is looked at alone: it has to get through its tasks, between their heads and their tails.

    rank 0  F0 F1 .. .. .. .. B0 W0 B1 W1        the head of B0 is the way to the last stage and back
    rank 1  .. F0 F1 B0 .. B1 ..                 the tail of B1 here is B1 W1 on rank 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import final

from pipework.plan.action import Kind
from pipework.plan.problem import Problem

Edge = tuple[int, int, int]  # two tasks, and the least time between the end of the first and the start of the second

_MANY = 3000  # tasks, above which only longest paths count, so that it takes seconds


@final
@dataclass(frozen=True, slots=True)
class Windows:
    """What is known of a problem before any search: which tasks come before which, heads, tails, and the least value.

    `least` is a lower bound of the objective's value, in the problem's whole numbers.
    """

    edges: tuple[Edge, ...]
    heads: tuple[int, ...]
    tails: tuple[int, ...]
    least: int


def windows(problem: Problem) -> Windows:
    """The windows of a problem's tasks."""
    edges = tuple(_edges(problem))
    everything = range(len(problem.actions))
    heads = _heads(problem, edges, everything)
    tails = _heads(problem, [(later, earlier, delay) for earlier, later, delay in edges], everything)
    least = 0
    for lanes in problem.lanes:
        tasks = [task for lane in lanes for task in lane]
        if problem.objective == "makespan":
            jobs = [(heads[task], problem.durations[task], tails[task]) for task in tasks]
        else:  # time counts from the rank's first start, until its last end
            own_heads = _heads(problem, edges, tasks)
            jobs = [(own_heads[task], problem.durations[task], 0) for task in tasks]
        least = max(least, _one_at_a_time(jobs))
    return Windows(edges, tuple(heads), tuple(tails), least)


def _edges(problem: Problem) -> Iterator[Edge]:
    """Needs, lanes, and what memory adds: with room for three activations, the first is freed before the fourth."""
    for later, needs in enumerate(problem.needs):
        yield from ((earlier, later, delay) for earlier, delay in needs)
    for lanes in problem.lanes:
        for lane in lanes:
            yield from ((earlier, later, 0) for earlier, later in pairwise(lane))
    if problem.limits is not None and problem.exact_memory:
        inside = _inside(problem)
        for lanes, limit in zip(problem.lanes, problem.limits, strict=True):
            yield from _by_memory(problem, lanes, limit, inside)


def _by_memory(
    problem: Problem, lanes: Sequence[tuple[int, ...]], limit: int, inside: Sequence[Sequence[int]]
) -> Iterator[Edge]:
    forwards = {problem.actions[lane[0]].stage: lane for lane in lanes if problem.actions[lane[0]].kind is Kind.FORWARD}
    for lane in lanes:
        stage, kind = problem.actions[lane[0]].stage, problem.actions[lane[0]].kind
        if kind is Kind.FORWARD:
            continue
        own, outer = problem.takes[forwards[stage][0]], sum(problem.takes[forwards[s][0]] for s in inside[stage])
        # As long as one of this lane has not ended, it and all after it keep this much.
        kept = problem.frees[lane[0]] if kind is Kind.WEIGHT_GRADIENT else own + outer
        if kept:
            ahead = (limit - own - outer) // kept + 1
            yield from ((earlier, later, 0) for earlier, later in zip(lane, forwards[stage][ahead:], strict=False))


def _inside(problem: Problem) -> list[list[int]]:
    """For each stage those on its rank that hold an activation as long as it waits for its input gradient."""
    layout = problem.one_by_one.layout
    feeding: list[set[int]] = []
    for stage in range(layout.stages):
        feeding.append({other for direct in layout.fed_by(stage) for other in (direct, *feeding[direct])})
    behind: list[set[int]] = [set() for _ in feeding]
    for stage in reversed(range(layout.stages)):
        behind[stage] = {other for direct in layout.gradient_from(stage) for other in (direct, *behind[direct])}
    return [
        [other for other in layout.held_by(layout.rank_of[stage]) if other in feeding[stage] and stage in behind[other]]
        for stage in range(layout.stages)
    ]


def _heads(problem: Problem, edges: Sequence[Edge], sources: Sequence[int]) -> list[int]:
    """The earliest start of each task if the sources may start at 0; -1 where that depends on no source."""
    size = len(problem.actions)
    before: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    after: list[list[int]] = [[] for _ in range(size)]
    for earlier, later, delay in edges:
        before[later].append((earlier, delay))
        after[earlier].append(later)
    missing = list(map(len, before))
    heads = [-1] * size
    for source in sources:
        heads[source] = 0
    on_rank = [sum(1 << task for lane in lanes for task in lane) for lanes in problem.lanes]
    all_before = [0] * size  # tasks as bits
    ready = [task for task in range(size) if not missing[task]]
    while ready:
        task = ready.pop()
        for earlier, delay in before[task]:
            if heads[earlier] >= 0:
                heads[task] = max(heads[task], heads[earlier] + problem.durations[earlier] + delay)
            if size <= _MANY:
                all_before[task] |= all_before[earlier] | 1 << earlier
        own = [each for each in _bits(all_before[task] & on_rank[problem.rank_of[task]]) if heads[each] >= 0]
        if own:
            heads[task] = max(heads[task], _one_at_a_time([(heads[each], problem.durations[each], 0) for each in own]))
        for later in after[task]:
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    return heads


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _one_at_a_time(jobs: Sequence[tuple[int, int, int]]) -> int:
    """The least time for jobs of (head, duration, tail) on one rank, if they may be interrupted.

    At each moment the job with the longest tail goes on: Jackson's rule, which is optimal for this.
    """
    coming = sorted(jobs, reverse=True)
    waiting: list[tuple[int, int]] = []
    now = longest = 0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[-1][0])
        while coming and coming[-1][0] <= now:
            _, duration, tail = coming.pop()
            heappush(waiting, (-tail, duration))
        tail, left = heappop(waiting)
        step = min(left, coming[-1][0] - now) if coming else left
        now += step
        if step < left:
            heappush(waiting, (tail, left - step))
        else:
            longest = max(longest, now - tail)
    return longest
