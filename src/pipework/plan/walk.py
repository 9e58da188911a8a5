"""Going through a schedule in an order in which everything can happen, or telling why there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from pipework.errors import ScheduleError
from pipework.plan.action import Action
from pipework.plan.rules import needs
from pipework.plan.schedule import Schedule


@final
@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that stands still: `at` what, `until` what has happened, and `on` which rank that would happen, if any."""

    at: str
    until: str
    on: int | None


def walk(schedule: Schedule) -> Iterator[tuple[int, tuple[Action, ...], list[tuple[Action, ...]]]]:
    """Every action once, with its rank and what it needs, after all it needs and after the one before it on its rank.

    Two actions that overlap come together, after all that either needs; any other comes alone.

    Takes time in proportion to the actions and their needs. Raises ScheduleError, with the blocking chain, at the point
    from which no rank can go on.
    """
    reached = [0] * len(schedule.orders)
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    ready = deque(range(len(schedule.orders)))
    while ready:
        rank = ready.popleft()
        order = schedule.orders[rank]
        while reached[rank] < len(order):
            at_once = _at_once(schedule, rank, reached[rank])
            needed = [needs(action, schedule) for action in at_once]
            missing = next((need for each in needed for need in each if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            done.update(at_once)
            reached[rank] += len(at_once)
            yield rank, at_once, needed
            for action in at_once:
                ready.extend(waiting.pop(action, ()))
    if waiting:
        raise _blocked(schedule, {rank: need for need, ranks in waiting.items() for rank in ranks}, reached)


def _at_once(schedule: Schedule, rank: int, position: int) -> tuple[Action, ...]:
    """The action at this position, and with it the one that it overlaps with."""
    order = schedule.orders[rank]
    return order[position : position + (2 if order[position] in schedule.overlapped else 1)]


def _blocked(schedule: Schedule, missing: Mapping[int, Action], reached: list[int]) -> ScheduleError:
    coming = {action: rank for rank, order in enumerate(schedule.orders) for action in order[reached[rank] :]}
    waits = {
        rank: Wait(" and ".join(map(str, _at_once(schedule, rank, reached[rank]))), str(need), coming.get(need))
        for rank, need in missing.items()
    }
    return ScheduleError(
        f"{schedule.name} cannot proceed: {len(waits)} of {len(schedule.orders)} ranks wait for ever",
        why=blocking_chain(waits),
        remedy="reorder the actions of one of these ranks so that what is waited for comes first",
    )


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
