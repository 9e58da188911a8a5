"""Going through a schedule in an order in which everything can happen, or telling why there is none."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from pipework.errors import ScheduleError
from pipework.plan.costs import Costs
from pipework.plan.numbers import Numbers, Work
from pipework.plan.rules import needs
from pipework.plan.schedule import Schedule

Times: TypeAlias = "tuple[array[float], ...]"
"""A time for each action, `times[rank][position]`."""


def walk(schedule: Schedule, costs: Costs) -> tuple[Times, Times]:
    """The starts and the ends of all actions, each as soon as its rank is free and all that it needs has arrived.

    Each rank goes on until it needs what is not done yet, and is called again by whoever does it. Takes time in
    proportion to the actions and their needs. Raises ScheduleError if the schedule is not whole (see `require_whole`),
    and with the blocking chain if there is a point from which no rank can go on.
    """
    numbers = Numbers.of(schedule, costs)
    work, period = numbers.work, numbers.period
    done = array("d", [-1.0]) * numbers.size  # at an action's place: when it ended
    starts = tuple(array("d") for _ in numbers.orders)
    ends = tuple(array("d") for _ in numbers.orders)
    waiting: dict[int, list[int]] = {}
    ready = deque(range(len(starts)))
    while ready:
        rank = ready.popleft()
        order, overlapped, started, ended = numbers.orders[rank], numbers.overlapped[rank], starts[rank], ends[rank]
        position, length, free = len(started), len(order), ended[-1] if ended else 0.0
        while position < length:
            number = order[position]
            needed, duration, place = work[number % period]
            places = (number + place,)
            if position in overlapped:
                other = order[position + 1]
                needed, duration, place = _both(work[number % period], work[other % period], other - number)
                places += (number + place,)
            start = free
            for offset, delay in needed:
                arrival = done[number + offset]
                if arrival < 0.0:
                    waiting.setdefault(number + offset, []).append(rank)
                    break
                arrival += delay
                start = max(start, arrival)
            else:
                free = start + duration
                for place in places:
                    done[place] = free
                    started.append(start)
                    ended.append(free)
                    position += 1
                    if place in waiting:
                        ready.extend(waiting.pop(place))
                continue
            break
    if waiting:
        raise _blocked(schedule, [len(started) for started in starts])
    return starts, ends


def _both(one: Work, other: Work, distance: int) -> Work:
    """Two that run at once, seen from the number of the one; the other's is `distance` further on."""
    needed = tuple((distance + offset, delay) for offset, delay in other.needs)
    return Work(one.needs + needed, one.duration + other.duration, distance + other.place)


def _blocked(schedule: Schedule, reached: Sequence[int]) -> ScheduleError:
    done = {action for order, end in zip(schedule.orders, reached, strict=True) for action in order[:end]}
    rank_of = schedule.layout.rank_of
    waits: dict[int, Wait] = {}
    for rank, (order, begin) in enumerate(zip(schedule.orders, reached, strict=True)):
        if begin < len(order):
            at_once = order[begin : begin + (2 if order[begin] in schedule.overlapped else 1)]
            until = next(need for action in at_once for need in needs(action, schedule) if need not in done)
            waits[rank] = Wait(" and ".join(map(str, at_once)), str(until), rank_of[until.stage])
    return ScheduleError(
        f"{schedule.name} cannot proceed: {len(waits)} of {len(schedule.orders)} ranks wait for ever",
        why=blocking_chain(waits),
        remedy="reorder the actions of one of these ranks so that what is waited for comes first",
    )


@final
@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that stands still: `at` what, `until` what has happened, and `on` which rank that would happen, if any."""

    at: str
    until: str
    on: int | None


def blocking_chain(waits: Mapping[int, Wait]) -> str:
    """Who waits for whom, from the lowest rank on to where the chain closes or ends.

    >>> print(blocking_chain({0: Wait("0B0", "1B0", 1), 1: Wait("1F1", "0F1", 0)}))
    rank 0 waits at 0B0 for 1B0
        <- rank 1 waits at 1F1 for 0F1
        <- rank 0, and the circle is closed
    """
    rank: int | None = min(waits)
    links: list[str] = []
    passed: set[int] = set()
    while rank is not None and rank in waits and rank not in passed:
        passed.add(rank)
        wait = waits[rank]
        links.append(f"rank {rank} waits at {wait.at} for {wait.until}")
        rank = wait.on
    if rank in passed:
        links.append(f"rank {rank}, and the circle is closed")
    else:
        links.append("no rank does this")
    return "\n    <- ".join(links)
