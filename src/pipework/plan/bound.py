"""What no schedule can go below, whatever its orders."""

from __future__ import annotations

from collections import Counter
from graphlib import TopologicalSorter

from pipework.plan.costs import Costs
from pipework.plan.numbers import Numbers, present_in
from pipework.plan.schedule import Schedule


def bound(schedule: Schedule, costs: Costs) -> float:
    """A time that the schedule's actions, in any orders on the same ranks, take at least.

    It is the greatest of

    - for each rank, the shortest way from a beginning to one of its actions, all its work, and the shortest way from
      one of its actions to an end;
    - the longest chain of actions that need one another, with the transfers between them.

        rank 3   way in  F0 B0 F1 B1 F2 B2  way out

    Takes time in proportion to the number of actions. Raises ScheduleError if the schedule is not whole.

    >>> from pipework.plan import Layout, one_f_one_b
    >>> bound(one_f_one_b(Layout.loop(4), microbatches=8), Costs()), bound(one_f_one_b(Layout.loop(4), 1), Costs())
    (33.0, 12.0)
    """
    numbers = Numbers.of(schedule, costs)
    present = present_in(numbers.orders, numbers.size)
    starts = range(0, numbers.size, numbers.period)
    longest, ranks = 0.0, range(schedule.layout.ranks)
    way_in, work, way_out = ([limit] * len(ranks) for limit in (float("inf"), 0.0, float("inf")))
    # Sequences of which the same is done are alike, and there are few kinds of them.
    for there, count in Counter(bytes(present[start : start + numbers.period]) for start in starts).items():
        before, after = _ways(there, numbers)
        for place, (number, begin) in before.items():
            duration = numbers.work[number].duration
            longest = max(longest, begin + duration + after[place])
            rank = schedule.layout.rank_of[place // 4 % schedule.layout.stages]
            way_in[rank] = min(way_in[rank], begin)
            way_out[rank] = min(way_out[rank], after[place])
            work[rank] += count * duration
    return max([longest, *(way_in[rank] + work[rank] + way_out[rank] for rank in ranks if work[rank])])


def _ways(there: bytes, numbers: Numbers) -> tuple[dict[int, tuple[int, float]], dict[int, float]]:
    """At the places of one sequence: the number and the earliest start, and the longest way from the end on."""
    number_at = {number + numbers.work[number].place: number for number, is_there in enumerate(there) if is_there}
    needs = {
        place: [(number + offset, delay) for offset, delay in numbers.work[number].needs]
        for place, number in number_at.items()
    }
    order = list(
        TopologicalSorter({place: [need for need, _ in needed] for place, needed in needs.items()}).static_order()
    )
    begin = dict[int, float]()
    for place in order:
        arrivals = (begin[need] + numbers.work[number_at[need]].duration + delay for need, delay in needs[place])
        begin[place] = max(arrivals, default=0.0)
    after = dict.fromkeys(order, 0.0)
    for place in reversed(order):
        for need, delay in needs[place]:
            after[need] = max(after[need], delay + numbers.work[number_at[place]].duration + after[place])
    return {place: (number_at[place], begin[place]) for place in order}, after
