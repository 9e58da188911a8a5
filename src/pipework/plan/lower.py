"""From a schedule to one program per rank.

All ranks read one global order, the actions by the time they end in a simulation with unit costs. Each action is
followed by its transfers there (two that overlap by those of both), so both ends of a transfer have the same place in
it, and no rank can wait in a circle:

    global order   0F0  0F0>1  0F1  1F0  0F1>1 ...
    rank 0         0F0  send 0F0>1     0F1        send 0F1>1    ...
    rank 1              receive 0F0>1       1F0   receive 0F1>1 ...
"""

from __future__ import annotations

from itertools import groupby

from pipework.errors import ScheduleError
from pipework.plan.advance import Placed, advance
from pipework.plan.costs import UNIT
from pipework.plan.program import Compute, Program, Receive, Send
from pipework.plan.prove import prove
from pipework.plan.rules import is_local, transfers
from pipework.plan.schedule import Schedule
from pipework.plan.walk import walk


def lower(schedule: Schedule, window: int = 1) -> tuple[Program, ...]:
    """One program per rank, proven to finish even if every transfer blocks both its ends (see `prove`).

    A receive stands up to `window` of its rank's own actions ahead of the place where its value can exist: 0 saves
    memory, 1 lets a transfer and an action overlap. The order of the transfers between two ranks is never changed, nor
    the order of a rank's receives.

    Raises ScheduleError if the schedule is not one (see `check`), or if `window` is negative.

    >>> from pipework.plan import Layout, gpipe
    >>> for program in lower(gpipe(Layout.loop(2), microbatches=1)):
    ...     print(program.rank, [str(instruction) for instruction in program.instructions])
    0 ['0F0', 'send 0F0>1', 'receive 1B0>0', '0B0']
    1 ['receive 0F0>1', '1F0', '1B0', 'send 1B0>0']
    """
    if window < 0:
        raise ScheduleError(f"window={window} is negative", remedy="give 0 to leave receives where they are")
    placed = _read_off(schedule)
    programs = tuple(Program(rank, tuple(instruction for _, instruction in each)) for rank, each in enumerate(placed))
    prove(programs)
    if window:
        ahead = advance(placed, schedule, window)
        programs = tuple(Program(rank, tuple(each)) for rank, each in enumerate(ahead))
        prove(programs)
    return programs


def _read_off(schedule: Schedule) -> list[list[Placed]]:
    """Each rank's instructions in the global order."""
    layout = schedule.layout
    placed: list[list[Placed]] = [[] for _ in schedule.orders]
    place = 0
    # Whatever needs something ends later than it, since no unit cost is 0; among equals the rank decides. So what ends
    # together on a rank are two actions that overlap.
    _, ends = walk(schedule, UNIT)
    moments = sorted((end, rank, position) for rank, row in enumerate(ends) for position, end in enumerate(row))
    for (_, rank), at_once in groupby(moments, lambda moment: moment[:2]):
        made = [schedule.orders[rank][position] for _, _, position in at_once]
        for action in made:
            placed[rank].append((place, Compute(action)))
            place += 1
        for transfer in (transfer for action in made for transfer in transfers(action, schedule)):
            if not is_local(transfer, layout):
                placed[rank].append((place, Send(transfer)))
                placed[layout.rank_of[transfer.to]].append((place, Receive(transfer)))
                place += 1
    return placed
