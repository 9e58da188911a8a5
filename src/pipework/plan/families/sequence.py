"""Sequences in slices, so that one sequence can fill several stages."""

from __future__ import annotations

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.families.order import in_turn, require_microbatches, require_one_stage_per_rank, rounds
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def sequence_one_f_one_b(layout: Layout, microbatches: int, *, slices: int = 2) -> Schedule:
    """1F1B over slices of sequences, each a part of a microbatch: Seq1F1B (Sun et al., arXiv:2406.03488).

    A slice attends to those before it, so backwards go through the slices in reverse, and the warm-up is longer than
    that of 1F1B by `slices` less one. With p ranks, m microbatches and k slices of equal cost it takes
    (km + p - 1)(F + B) without transfers, with the F and B of a slice, and a rank keeps at most p + k - 1 slices.
    Choose it for long sequences. In the schedule microbatches count slices: m times k. Takes one stage per rank and 1
    or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(sequence_one_f_one_b(Layout.loop(4), microbatches=3, slices=2)).text())
    rank 0  F0F1F2F3F4............B1--F5B0--..B3--..B2--..B5--B4--
    rank 1  ..F0F1F2F3........B1--F4B0--F5B3--..B2--..B5--B4--....
    rank 2  ....F0F1F2....B1--F3B0--F4B3--F5B2--..B5--B4--........
    rank 3  ......F0F1B1--F2B0--F3B3--F4B2--F5B5--B4--............
    makespan 27, span 27, bubble 33.3 %, peak per rank 5 4 3 2
    """
    require_one_stage_per_rank("sequence_one_f_one_b", layout, "interleaved_one_f_one_b")
    require_microbatches(microbatches)
    if slices < 1:
        raise ScheduleError(f"slices={slices} leaves nothing of a sequence", remedy="use at least 1 slice")
    parts = slices * microbatches

    def order(rank: int) -> tuple[Action, ...]:
        (stage,) = layout.held_by(rank)
        forwards = rounds(Kind.FORWARD, (stage,), parts, parts)
        backwards = [
            Action(stage, Kind.BACKWARD, slices * microbatch + part)
            for microbatch in range(microbatches)
            for part in reversed(range(slices))
        ]
        return tuple(in_turn(forwards, backwards, warm_up=layout.behind(stage) + slices - 1))

    orders = tuple(order(rank) for rank in range(layout.ranks))
    return Schedule("sequence_one_f_one_b", layout, parts, orders, slices=slices)
