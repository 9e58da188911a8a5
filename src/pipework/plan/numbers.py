"""Actions as whole numbers, so that arrays can hold what is known of millions of them.

    number = 4 * (stages * microbatch + stage) + kind          F 0, I 1, W 2, B 3

A backward is done once its input gradient exists, whether it is split or not. So all that is found out about when an
action is done stands at its *place*: the number of the I for a B, else its own number.

The one rule, `needs`, is asked about the first sequence only. What an action needs depends on its microbatch by the
place in its sequence alone, so in every other sequence all lies at the same distance.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import NamedTuple, final

from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.rules import needs
from pipework.plan.schedule import Schedule
from pipework.plan.whole import require_shape, require_whole

_KINDS = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD)
_NUMBER_OF = {kind: number for number, kind in enumerate(_KINDS)}


@final
class Work(NamedTuple):
    """What actions have in common whose numbers are equal modulo `Numbers.period`."""

    needs: tuple[tuple[int, float], ...]  # how far from the number the place of each need is, and the delay from there
    duration: float
    place: int  # how far from the number its own place is


@final
@dataclass(frozen=True, slots=True)
class Numbers:
    """The actions of a schedule by rank and in order."""

    orders: tuple[array[int], ...]
    overlapped: tuple[frozenset[int], ...]  # by rank, the positions of actions that overlap with the next
    work: tuple[Work, ...]  # of an action: work[number % period]
    period: int  # as many numbers as a sequence has
    size: int  # above all numbers

    @classmethod
    def of(cls, schedule: Schedule, costs: Costs) -> Numbers:
        """The numbers of a schedule; raises ScheduleError where it has too much or too little (see `require_whole`)."""
        require_shape(schedule)
        size = 4 * schedule.layout.stages * schedule.microbatches
        orders = _numbered(schedule) if _is_at_home(schedule) else ()
        overlapped = tuple(_overlapped(order, schedule) for order in schedule.orders)
        if not orders or not _is_complete(schedule, orders, size) or not _are_pairs(schedule, overlapped):
            require_whole(schedule)
            raise AssertionError("what is wrong with a schedule has a name")
        return cls(orders, overlapped, _work(schedule, costs), size // schedule.microbatches * schedule.slices, size)


def _is_at_home(schedule: Schedule) -> bool:
    """Whether all actions are of stages of their ranks and of microbatches that there are."""
    if schedule.microbatches > sum(map(len, schedule.orders)):
        return False
    for rank, order in enumerate(schedule.orders):
        microbatches = {action.microbatch for action in order} or {0}
        if min(microbatches) < 0 or max(microbatches) >= schedule.microbatches:
            return False
        if not {action.stage for action in order} <= set(schedule.layout.held_by(rank)):
            return False
    return True


def _numbered(schedule: Schedule) -> tuple[array[int], ...]:
    stages, number_of = schedule.layout.stages, _NUMBER_OF
    return tuple(
        array("q", [4 * (stages * action.microbatch + action.stage) + number_of[action.kind] for action in order])
        for order in schedule.orders
    )


def _overlapped(order: tuple[Action, ...], schedule: Schedule) -> frozenset[int]:
    if not schedule.overlapped:
        return frozenset()
    return frozenset(position for position, action in enumerate(order) if action in schedule.overlapped)


def _is_complete(schedule: Schedule, orders: tuple[array[int], ...], size: int) -> bool:
    """Whether every stage does what it should with every microbatch it takes, and nothing twice."""
    present = present_in(orders, size)
    if sum(present) != sum(map(len, orders)):
        return False
    trains, stages = schedule.trains, schedule.layout.stages
    for stage in range(stages):
        taken = bytearray(schedule.microbatches)
        for microbatch in schedule.taken_by(stage):
            taken[microbatch] = 1
        forward, input_gradient, weight_gradient, backward = (
            present[4 * stage + kind :: 4 * stages] for kind in range(len(_KINDS))
        )
        either = bytes(i + b for i, b in zip(input_gradient, backward, strict=True))
        if forward != taken or input_gradient != weight_gradient or either != (taken if trains else bytes(len(taken))):
            return False
    return True


def _are_pairs(schedule: Schedule, overlapped: tuple[frozenset[int], ...]) -> bool:
    """Whether all that should overlap is there, and followed by what does not."""
    return sum(map(len, overlapped)) == len(schedule.overlapped) and all(
        position + 1 < len(order) and position + 1 not in positions
        for order, positions in zip(schedule.orders, overlapped, strict=True)
        for position in positions
    )


def present_in(orders: tuple[array[int], ...], size: int) -> bytearray:
    """1 at the number of every action that there is, else 0."""
    present = bytearray(size)
    for order in orders:
        for number in order:
            present[number] = 1
    return present


def _work(schedule: Schedule, costs: Costs) -> tuple[Work, ...]:
    layout = schedule.layout
    bare = replace(schedule, orders=())  # it splits nothing, so that whoever needs an input gradient needs a B

    def number(action: Action) -> int:
        return 4 * (layout.stages * action.microbatch + action.stage) + _NUMBER_OF[action.kind]

    def place(action: Action) -> int:
        return number(replace(action, kind=Kind.INPUT_GRADIENT) if action.kind is Kind.BACKWARD else action)

    return tuple(
        Work(
            tuple(
                (place(need) - number(action), costs.delay(need.stage, action.stage, layout))
                for need in needs(action, bare)
            ),
            costs.duration(action, schedule.recomputed),
            place(action) - number(action),
        )
        for microbatch in range(schedule.slices)
        for stage in range(layout.stages)
        for action in (Action(stage, kind, microbatch) for kind in _KINDS)
    )
