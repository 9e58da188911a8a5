"""One forward and one backward in turn: a microbatch goes back as soon as it can, which frees its activations."""

from __future__ import annotations

from collections.abc import Iterable

from pipework.plan.action import Action, Kind
from pipework.plan.families.order import (
    in_turn,
    interleaved,
    require_loop,
    require_one_stage_per_rank,
    rounds,
    schedule,
)
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def one_f_one_b(layout: Layout, microbatches: int) -> Schedule:
    """One forward and one backward in turn, after a warm-up: PipeDream-Flush (Narayanan et al., arXiv:2006.09503).

    With p ranks and m microbatches it takes (m + p - 1)(F + B) without transfers, no less than GPipe, but a rank keeps
    at most as many activations as there are stages from its own to the last. Choose it as a good start anywhere. Takes
    one stage per rank and 1 or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(one_f_one_b(Layout.loop(4), microbatches=6)).text())
    rank 0  F0F1F2F3............B0--F4B1--F5B2--..B3--..B4--..B5--
    rank 1  ..F0F1F2........B0--F3B1--F4B2--F5B3--..B4--..B5--....
    rank 2  ....F0F1....B0--F2B1--F3B2--F4B3--F5B4--..B5--........
    rank 3  ......F0B0--F1B1--F2B2--F3B3--F4B4--F5B5--............
    makespan 27, span 27, bubble 33.3 %, peak per rank 4 3 2 1
    """
    require_one_stage_per_rank("one_f_one_b", layout, "interleaved_one_f_one_b")

    def order(rank: int) -> Iterable[Action]:
        stages = layout.held_by(rank)
        forwards = rounds(Kind.FORWARD, stages, microbatches, microbatches)
        backwards = rounds(Kind.BACKWARD, stages, microbatches, microbatches)
        return in_turn(forwards, backwards, warm_up=layout.behind(stages[0]))

    return schedule("one_f_one_b", layout, microbatches, order)


def interleaved_one_f_one_b(layout: Layout, microbatches: int) -> Schedule:
    """1F1B over several stages per rank, which divides the bubble by their number (Narayanan et al., arXiv:2104.04473).

    Microbatches go in rounds of about as many as there are ranks, each round through all stages of a rank. With p
    ranks, v stages each and m microbatches in full rounds it takes (vm + p - 1)(F + B) without transfers; the price is
    v times the transfers, and up to (v + 1)p - 1 activations for rounds of p. Choose it where transfers are cheap.
    Takes `Layout.loop` with 2 or more stages per rank, and 1 or more microbatches; raises ScheduleError otherwise. A
    last round that is not full, where the microbatches do not divide, costs some idle time.

    >>> from pipework.plan import simulate
    >>> print(simulate(interleaved_one_f_one_b(Layout.loop(2, per_rank=2), microbatches=4)).text(width=120))
    rank 0  0F0-0F1-2F0-2F1-0F2-....2B0-----0F3-2B1-----2F2-0B0-----2F3-0B1-----....2B2-----....2B3-----0B2-----0B3-----
    rank 1  ....1F0-1F1-3F0-3B0-----3F1-3B1-----1F2-1B0-----1F3-1B1-----3F2-3B2-----3F3-3B3-----1B2-----1B3-----........
    makespan 27, span 27, bubble 11.1 %, peak per rank 5 3
    """
    require_loop("interleaved_one_f_one_b", layout, "one_f_one_b")
    # The way to the last stage and back is bridged.
    return schedule(
        "interleaved_one_f_one_b", layout, microbatches, lambda rank: interleaved(layout, rank, microbatches, bridges=2)
    )
