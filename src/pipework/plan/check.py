"""Whether a schedule is one: complete, at home, and able to finish."""

from __future__ import annotations

from pipework.plan.costs import UNIT
from pipework.plan.schedule import Schedule
from pipework.plan.walk import walk


def check(schedule: Schedule) -> None:
    """Raises ScheduleError unless every rank, each in its own order, can carry the schedule to its end.

    - Every stage does every microbatch it takes once: F and either B or both I and W; in a forward-only schedule F
      alone.
    - Every action is on the rank that holds its stage.
    - What overlaps are pairs, each of two actions in a row on a rank, of which neither waits for the other.
    - Sequences are whole, also in what a stage takes, and stages between which values flow take the same microbatches.
    - No rank waits for ever; when one would, `why` draws who waits for whom.

    Takes time in proportion to the number of actions.

    >>> from pipework.plan import Action, Layout
    >>> order = tuple(map(Action.parse, ("0F0", "0B0", "0F1")))
    >>> check(Schedule("half", Layout.loop(1), 2, (order,)))
    Traceback (most recent call last):
    pipework.errors.ScheduleError: half is incomplete: 0B1 is never done
      remedy: add it to the order of rank 0
    """
    walk(schedule, UNIT)
