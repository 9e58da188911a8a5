"""Backwards in two parts: the weight gradients, for which nobody waits, fill the time in which a rank would wait."""

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
    split,
)
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def zero_bubble_h1(layout: Layout, microbatches: int) -> Schedule:
    """1F1B with a third of its bubble and no more memory: ZB-H1 (Qi et al., arXiv:2401.10241).

    A rank puts its weight gradients off by as many microbatches as it has less in flight than the first rank. With p
    ranks no rank keeps more than p activations, and the span has a bubble of (p - 1)(F + I - W) without transfers.
    Choose it wherever 1F1B fits and the backward can be split. Takes one stage per rank and 1 or more microbatches;
    raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(zero_bubble_h1(Layout.loop(4), microbatches=6)).text())
    rank 0  F0F1F2F3......I0W0F4I1W1F5I2W2I3W3I4W4I5W5
    rank 1  ..F0F1F2....I0F3I1W0F4I2W1F5I3W2I4W3I5W4W5
    rank 2  ....F0F1..I0F2I1F3I2W0F4I3W1F5I4W2I5W3W4W5
    rank 3  ......F0I0F1I1F2I2F3I3W0F4I4W1F5I5W2W3W4W5
    makespan 21, span 21, bubble 14.3 %, peak per rank 4
    """
    return _one_stage_each("zero_bubble_h1", layout, microbatches, distance=1)


def zero_bubble_h2(layout: Layout, microbatches: int) -> Schedule:
    """No bubble at all within the span, for about twice the memory of 1F1B: ZB-H2 (Qi et al., arXiv:2401.10241).

    More forwards in the warm-up bridge the way to the last rank and back; weight gradients that are put off bridge it
    at the end, so that all ranks together make a parallelogram. With p ranks each keeps up to 2p - 1 activations, and
    the span has a bubble of (p - 1)(F + I - 2W) without transfers, if that is positive and there are 2p - 1 or more
    microbatches. Choose it where memory allows. Takes one stage per rank and 1 or more microbatches; raises
    ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(zero_bubble_h2(Layout.loop(4), microbatches=7)).text())
    rank 0  F0F1F2F3F4F5F6I0W0I1W1I2W2I3W3I4W4I5W5I6W6......
    rank 1  ..F0F1F2F3F4I0F5I1F6I2W0I3W1I4W2I5W3I6W4W5W6....
    rank 2  ....F0F1F2I0F3I1F4I2F5I3F6I4W0I5W1I6W2W3W4W5W6..
    rank 3  ......F0I0F1I1F2I2F3I3F4I4F5I5F6I6W0W1W2W3W4W5W6
    makespan 24, span 21, bubble 12.5 %, peak per rank 7
    """
    return _one_stage_each("zero_bubble_h2", layout, microbatches, distance=2)


def interleaved_zero_bubble(layout: Layout, microbatches: int) -> Schedule:
    """Interleaved 1F1B with split backwards: the idea of ZB-H1 for several stages per rank (after arXiv:2401.10241).

    The warm-up is half as steep as that of interleaved 1F1B, and weight gradients are put off the longer the later the
    rank is. With p ranks and v stages each, every rank keeps vp activations if p divides the microbatches. Choose it
    where interleaved 1F1B fits and the backward can be split. Takes `Layout.loop` with 2 or more stages per rank, and 1
    or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(interleaved_zero_bubble(Layout.loop(2, per_rank=2), microbatches=4)).text(width=120))
    rank 0  0F0-0F1-2F0-2F1-....2I0-2W0-0F2-2I1-2W1-0F3-0I0-0W0-2F2-0I1-0W1-2F3-2I2-2W2-2I3-2W3-0I2-0W2-0I3-0W3-
    rank 1  ....1F0-1F1-3F0-3I0-3F1-3I1-3W0-1F2-1I0-3W1-1F3-1I1-1W0-3F2-3I2-1W1-3F3-3I3-3W2-1I2-3W3-1I3-1W2-1W3-
    makespan 25, span 25, bubble 4.0 %, peak per rank 4
    """
    require_loop("interleaved_zero_bubble", layout, "zero_bubble_h1")

    def order(rank: int) -> Iterable[Action]:
        return split(interleaved(layout, rank, microbatches, bridges=1), delay=layout.held_by(rank)[0])

    return schedule("interleaved_zero_bubble", layout, microbatches, order)


def _one_stage_each(name: str, layout: Layout, microbatches: int, distance: int) -> Schedule:
    """1F1B with split backwards, its warm-up and its delays both in proportion to the distance between ranks."""
    require_one_stage_per_rank(name, layout, "interleaved_zero_bubble")

    def order(rank: int) -> Iterable[Action]:
        (stage,) = layout.held_by(rank)
        forwards = rounds(Kind.FORWARD, (stage,), microbatches, microbatches)
        backwards = rounds(Kind.BACKWARD, (stage,), microbatches, microbatches)
        turns = in_turn(forwards, backwards, warm_up=distance * layout.behind(stage))
        return split(turns, delay=distance * stage)

    return schedule(name, layout, microbatches, order)
