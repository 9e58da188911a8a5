"""Why a step took as long as it did."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from pipework.plan.numbers import Numbers

if TYPE_CHECKING:
    from pipework.plan.timeline import Timeline


def critical_path(timeline: Timeline) -> list[tuple[int, int]]:
    """Rank and position of each action of the chain that `Timeline.critical_path` describes, first to last."""
    schedule, starts, ends = timeline.schedule, timeline.starts, timeline.ends
    if not any(ends):
        return []
    numbers = Numbers.of(schedule, timeline.costs)
    rank_of, stages = schedule.layout.rank_of, schedule.layout.stages
    position_at = array("q", [0]) * numbers.size  # at an action's place
    for order in numbers.orders:
        for position, number in enumerate(order):
            position_at[number + numbers.work[number % numbers.period].place] = position

    def is_first_of_two(rank: int, position: int) -> bool:
        both = starts[rank][position : position + 2]
        return position in numbers.overlapped[rank] and both[0] == both[1]

    rank = max((rank for rank, row in enumerate(ends) if row), key=lambda rank: ends[rank][-1])
    position = len(ends[rank]) - 1
    path: list[tuple[int, int]] = [(rank, position)]
    while True:
        begin, others = position, []
        if is_first_of_two(rank, position):
            others = [position + 1]
        elif position and is_first_of_two(rank, position - 1):
            begin, others = position - 1, [position - 1]
        # The rank's own comes first, so that among equals the path stays on its rank.
        waits = [(ends[rank][begin - 1], position, (rank, begin - 1))] if begin else []
        for at in (position, *others):
            number = numbers.orders[rank][at]
            for offset, delay in numbers.work[number % numbers.period].needs:
                place = number + offset
                source = rank_of[place // 4 % stages], position_at[place]
                waits.append((ends[source[0]][source[1]] + delay, at, source))
        if not waits:
            return path[::-1]
        _, at, source = max(waits, key=lambda wait: wait[0])
        if at != position:
            path.append((rank, at))
        path.append(source)
        rank, position = source
