"""Playing a schedule on paper."""

from __future__ import annotations

from collections.abc import Sequence

from pipework.plan.channels import Channels, play_through
from pipework.plan.costs import UNIT, Costs
from pipework.plan.lower import lower
from pipework.plan.program import Program
from pipework.plan.schedule import Schedule
from pipework.plan.timeline import Timeline
from pipework.plan.walk import walk


def simulate(
    schedule: Schedule, costs: Costs = UNIT, channels: Channels = "free", programs: Sequence[Program] | None = None
) -> Timeline:
    """When each action runs if it starts as soon as its rank is free and all it needs has arrived.

    Two actions that overlap start together once both may, and end together after the sum of their durations. Transfers
    take `costs.transfer` and never hold up a rank. By `channels` they wait for the value that they carry, and

    - `"free"`: for nothing else;
    - `"edge"`: for those before them on their edge between stages, each direction by itself;
    - `"pair"`: for those before them between the same two ranks, in either direction;
    - `"rank"`: for all those before them on their two ranks: a transfer occupies both while it takes.

    Before and after are read off `programs`, those of `lower` unless given. No action ever starts earlier in a later
    line of this list. Even a transfer that takes no time is waited for until its value exists.

    Times count from the first start, in `costs.unit`. Takes time in proportion to the number of actions. Raises
    ScheduleError if the schedule is not one (see `check`), if the costs do not fit its layout, and for programs that
    are not its own or, with their transfers in these channels, cannot finish.

    >>> from pipework.plan import Layout, one_f_one_b
    >>> print(simulate(one_f_one_b(Layout.loop(3), microbatches=3)).text())
    rank 0  F0F1F2........B0--..B1--..B2--
    rank 1  ..F0F1....B0--F2B1--..B2--....
    rank 2  ....F0B0--F1B1--F2B2--........
    makespan 15, span 15, bubble 40.0 %, peak per rank 3 2 1
    """
    costs.require(schedule.layout)
    if channels == "free" and programs is None:
        return Timeline(schedule, *walk(schedule, costs), costs)
    programs = lower(schedule) if programs is None else programs
    return Timeline(schedule, *play_through(channels, schedule, costs, programs), costs)
