"""Two replicas of a model from both ends at once, each in the other's bubble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipework.plan.action import Action, Kind
from pipework.plan.families.order import halves, require_microbatches, require_replicas, schedule
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def chimera(layout: Layout, microbatches: int) -> Schedule:
    """1F1B from both ends at once over two replicas, which halves the bubble: Chimera (Li, Hoefler, arXiv:2107.06925).

    In units of p microbatches, with p ranks, half of them each way; the next unit starts in the bubble of the one
    before. With m microbatches in full units, and F and B of equal length, it takes m(F + B) + (p - 2)F without
    transfers; a rank keeps p/2 + 1 to p activations, and its parameters are there twice. Choose it for few microbatches
    per rank, where memory for two replicas is there. Takes `Layout.bidirectional` with an even number of ranks, and 2
    or more microbatches, of which the first replica takes the first half; raises ScheduleError otherwise.

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
    half = layout.ranks // 2

    def slots(stage: int) -> Iterator[tuple[int, Action]]:
        """When each action has its turn: no two on one rank at once, as one replica has the even slots, one the odd."""
        depth = stage % layout.ranks
        for microbatch in range(len(taken[stage])):
            unit, place = divmod(microbatch, half)
            start = 2 * layout.ranks * unit + 2 * place
            yield start + depth, Action(stage, Kind.FORWARD, microbatch)
            yield start + 2 * layout.ranks - 1 - depth, Action(stage, Kind.BACKWARD, microbatch)

    def order(rank: int) -> Iterable[Action]:
        turns = sorted(turn for stage in layout.held_by(rank) for turn in slots(stage))
        return (action for _, action in turns)

    return schedule("chimera", layout, microbatches, order, taken)
