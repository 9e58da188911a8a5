"""Everything forward, then everything backward: simple, and every rank keeps the activations of all microbatches."""

from __future__ import annotations

from collections.abc import Iterable

from pipework.plan.action import Action, Kind
from pipework.plan.families.order import require_one_stage_per_rank, rounds, schedule
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def gpipe(layout: Layout, microbatches: int) -> Schedule:
    """All forwards, then all backwards in the same order: GPipe (Huang et al., arXiv:1811.06965).

    With p ranks and m microbatches it takes (m + p - 1)(F + B) without transfers, and every rank keeps m activations.
    Choose it for few microbatches, or to have the simplest order there is. Takes one stage per rank and 1 or more
    microbatches; raises ScheduleError otherwise. `looped_bfs` is its like for several stages per rank.

    >>> from pipework.plan import simulate
    >>> print(simulate(gpipe(Layout.loop(4), microbatches=4)).text())
    rank 0  F0F1F2F3..................B0--B1--B2--B3--
    rank 1  ..F0F1F2F3............B0--B1--B2--B3--....
    rank 2  ....F0F1F2F3......B0--B1--B2--B3--........
    rank 3  ......F0F1F2F3B0--B1--B2--B3--............
    makespan 21, span 21, bubble 42.9 %, peak per rank 4
    """
    require_one_stage_per_rank("gpipe", layout, "looped_bfs")

    def order(rank: int) -> Iterable[Action]:
        stages = layout.held_by(rank)
        forwards = rounds(Kind.FORWARD, stages, microbatches, microbatches)
        return forwards + rounds(Kind.BACKWARD, stages, microbatches, microbatches)

    return schedule("gpipe", layout, microbatches, order)


def looped_bfs(layout: Layout, microbatches: int) -> Schedule:
    """All microbatches through a stage before the next: breadth-first (Lamy-Poirier, arXiv:2211.05953).

    Backwards go through the stages and the microbatches in reverse. With p ranks, v stages each and m >= p
    microbatches it takes (vm + p - 1)(F + B) without transfers, and every rank keeps vm activations. Choose it where
    parameters are sharded, as each stage is needed in one stretch. Takes any layout and 1 or more microbatches; raises
    ScheduleError for none.

    >>> from pipework.plan import simulate
    >>> print(simulate(looped_bfs(Layout.loop(2, per_rank=2), microbatches=3)).text())
    rank 0  0F0-0F1-0F2-2F0-2F1-2F2-............2B2-----2B1-----2B0-----0B2-----0B1-----0B0-----
    rank 1  ....1F0-1F1-1F2-3F0-3F1-3F2-3B2-----3B1-----3B0-----1B2-----1B1-----1B0-----........
    makespan 21, span 21, bubble 14.3 %, peak per rank 6
    """

    def order(rank: int) -> Iterable[Action]:
        forwards = rounds(Kind.FORWARD, layout.held_by(rank), microbatches, microbatches)
        return forwards + [Action(forward.stage, Kind.BACKWARD, forward.microbatch) for forward in reversed(forwards)]

    return schedule("looped_bfs", layout, microbatches, order)


def forward_only(layout: Layout, microbatches: int) -> Schedule:
    """Forwards alone, for evaluation: rounds of as many microbatches as there are ranks, each through all stages.

    Takes any layout and 1 or more microbatches; raises ScheduleError for none.

    >>> from pipework.plan import simulate
    >>> print(simulate(forward_only(Layout.loop(2, per_rank=2), microbatches=4)).text())
    rank 0  0F0-0F1-2F0-2F1-0F2-0F3-2F2-2F3-....
    rank 1  ....1F0-1F1-3F0-3F1-1F2-1F3-3F2-3F3-
    makespan 9, span 8, bubble 11.1 %, peak per rank 8
    """

    def order(rank: int) -> Iterable[Action]:
        return rounds(Kind.FORWARD, layout.held_by(rank), microbatches, layout.ranks)

    return schedule("forward_only", layout, microbatches, order)
