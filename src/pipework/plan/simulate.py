"""Playing a schedule on paper."""

from __future__ import annotations

from pipework.plan.action import Action
from pipework.plan.costs import Costs
from pipework.plan.schedule import Schedule
from pipework.plan.timeline import Span, Timeline
from pipework.plan.walk import walk

UNIT = Costs()
"""Every forward, input gradient and weight gradient takes 1, every transfer 0, in plain counts."""


def simulate(schedule: Schedule, costs: Costs = UNIT) -> Timeline:
    """When each action runs if it starts as soon as its rank is free and all it needs has arrived.

    Two actions that overlap start together once both may, and end together after the sum of their durations.

    Transfers take `costs.transfer`, never wait for each other and never hold up a rank. Times count from the first
    start, in `costs.unit`. Takes time in proportion to the number of actions.

    Raises ScheduleError if the schedule cannot proceed, or if the costs do not fit its layout.

    >>> from pipework.plan import Layout, one_f_one_b
    >>> print(simulate(one_f_one_b(Layout.loop(3), microbatches=3)).text())
    rank 0  F0F1F2........B0--..B1--..B2--
    rank 1  ..F0F1....B0--F2B1--..B2--....
    rank 2  ....F0B0--F1B1--F2B2--........
    makespan 15, span 15, bubble 40.0 %, peak per rank 3 2 1
    """
    costs.require(schedule.layout)
    layout = schedule.layout
    free = [0.0] * len(schedule.orders)
    ends: dict[Action, float] = {}
    spans: list[Span] = []
    for rank, at_once, needed in walk(schedule):
        start = free[rank]
        for action, each in zip(at_once, needed, strict=True):
            for need in each:
                start = max(start, ends[need] + costs.delay(need.stage, action.stage, layout))
        free[rank] = start + sum(map(costs.duration, at_once))
        for action in at_once:
            ends[action] = free[rank]
            spans.append(Span(rank, action, start, free[rank]))
    return Timeline(schedule, tuple(spans), costs)
