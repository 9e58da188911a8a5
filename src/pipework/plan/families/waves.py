"""A microbatch starts in every other slot of time, and comes back in the slots between: waves that fill each other.

    rank 0  F0 .. F1 f0 B0 f1 B1 b0 F2 b1 F3 ..      F f: forwards on the way down and up, B b: backwards
    rank 1  .. F0 f0 F1 f1 B0 b0 B1 b1 F2 f2 F3

On a rank the slots of one parity hold what goes down the ranks, the others what goes up. Microbatches go in units; the
next one starts in the slots that the one before leaves idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.families.order import (
    halves,
    require_microbatches,
    require_replicas,
    schedule,
    where_the_stages_are,
)
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def chimera(layout: Layout, microbatches: int) -> Schedule:
    """1F1B from both ends at once over two replicas, which halves the bubble: Chimera (Li, Hoefler, arXiv:2107.06925).

    In units of p microbatches, with p ranks, half of them each way. With m microbatches in full units, and F and B
    equally long, it takes (2m + p - 2)F without transfers; longer backwards leave gaps between units. A rank keeps
    p/2 + 1 to p activations, and its parameters are there twice. Choose it for few microbatches per rank, where memory
    for two replicas is there. Takes `Layout.bidirectional` with an even number of ranks, and 2 or more microbatches, of
    which the first replica takes the first half; raises ScheduleError otherwise.

    >>> from pipework.plan import Costs, simulate
    >>> timeline = simulate(chimera(Layout.bidirectional(4), microbatches=8), Costs(weight_gradient=0))
    >>> print(timeline.text())
    rank 0  0F0-0F1-....7F4-7B4-7F5-7B5-0B0-0F2-0B1-0F3-7F6-7B6-7F7-7B7-0B2-....0B3-
    rank 1  ....1F0-6F4-1F1-6F5-6B4-1B0-6B5-1B1-1F2-6F6-1F3-6F7-6B6-1B2-6B7-1B3-....
    rank 2  ....5F4-2F0-5F5-2F1-2B0-5B4-2B1-5B5-5F6-2F2-5F7-2F3-2B2-5B6-2B3-5B7-....
    rank 3  4F4-4F5-....3F0-3B0-3F1-3B1-4B4-4F6-4B5-4F7-3F2-3B2-3F3-3B3-4B6-....4B7-
    makespan 18, span 18, bubble 11.1 %, peak per rank 3 4 4 3
    """
    require_replicas("chimera", layout)
    require_microbatches(microbatches, least=2)
    taken = halves(layout, microbatches)
    ranks = layout.ranks

    def order(rank: int) -> Iterable[Action]:
        ways = [_slots(stage, stage % ranks, ranks, ranks // 2, len(taken[stage])) for stage in layout.held_by(rank)]
        return _in_order(ways)

    return schedule("chimera", layout, microbatches, order, taken)


def hanayo(layout: Layout, microbatches: int) -> Schedule:
    """Chimera without its replicas, the bubble divided by the number of waves: Hanayo (Liu et al., arXiv:2308.15762).

    The model runs down the ranks and up again w times, in units of p microbatches, with p ranks. With m microbatches in
    full units, and F and B of a stage equally long, it takes (4wm + 2p - 2)F without transfers; longer backwards leave
    gaps between units. A rank keeps at most 2wp activations of stages 2w times smaller than those of 1F1B. Choose it
    for few microbatches per rank where backwards cannot be split; more waves cost more transfers. Takes `Layout.vee`
    with 2w stages per rank, and 1 or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import Costs, simulate
    >>> timeline = simulate(hanayo(Layout.vee(4), microbatches=4), Costs(weight_gradient=0))
    >>> print(timeline.text())
    rank 0  0F0-0F1-0F2-0F3-............7F0-7B0-7F1-7B1-7F2-7B2-7F3-7B3-0B0-....0B1-....0B2-....0B3-
    rank 1  ....1F0-1F1-1F2-........6F0-1F3-6F1-6B0-6F2-6B1-6F3-6B2-1B0-6B3-1B1-....1B2-....1B3-....
    rank 2  ........2F0-2F1-....5F0-2F2-5F1-2F3-5F2-5B0-5F3-5B1-2B0-5B2-2B1-5B3-2B2-....2B3-........
    rank 3  ............3F0-4F0-3F1-4F1-3F2-4F2-3F3-4F3-4B0-3B0-4B1-3B1-4B2-3B2-4B3-3B3-............
    makespan 22, span 22, bubble 27.3 %, peak per rank 5 6 7 8
    """
    ranks, per_rank = layout.ranks, layout.stages // layout.ranks
    if per_rank % 2 or layout.rank_of != Layout.vee(ranks, per_rank).rank_of:
        raise ScheduleError(
            "hanayo wants an even number of stages per rank, down the ranks and up again",
            why=where_the_stages_are(layout),
            remedy=f"use Layout.vee({ranks}, per_rank=2), or 4 and more for more waves",
        )

    def order(rank: int) -> Iterable[Action]:
        ways = [_slots(stage, stage, layout.stages, ranks, microbatches) for stage in layout.held_by(rank)]
        return _in_order(ways)

    return schedule("hanayo", layout, microbatches, order)


def _slots(stage: int, depth: int, length: int, width: int, microbatches: int) -> Iterator[tuple[int, Action]]:
    """When a stage at this depth of a way of so many stages has its turns, in units of `width` microbatches."""
    for microbatch in range(microbatches):
        unit, place = divmod(microbatch, width)
        start = 2 * length * unit + 2 * place
        yield start + depth, Action(stage, Kind.FORWARD, microbatch)
        yield start + 2 * length - 1 - depth, Action(stage, Kind.BACKWARD, microbatch)


def _in_order(ways: Iterable[Iterable[tuple[int, Action]]]) -> Iterator[Action]:
    turns = dict(chain(*ways))
    return (turns[slot] for slot in sorted(turns))
