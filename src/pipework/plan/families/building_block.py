"""Schedules from a building block: one microbatch's way through the ranks in slots of time, repeated every six slots.

    rank 0  F . . . f . . . B . . . . b      F f: forwards of the shallow and the deep stage of the rank
    rank 1  . . F f . . . . . . B . b        B b: input gradients of the deep and the shallow one

How long its activations live is the memory that the schedule takes, so the block chooses between memory and bubble.
Repeated, it leaves each rank two slots in six for weight gradients; idle ones at both ends are squeezed out.
"""

from __future__ import annotations

from collections.abc import Callable

from pipework.plan.action import Action, Kind
from pipework.plan.families.order import require_microbatches, require_vee, schedule
from pipework.plan.families.squeeze import Slots, squeezed
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule

_PERIOD = 6  # slots: a forward, an input gradient and a weight gradient of two stages

Block = Callable[[int], tuple[int, int, int, int]]
"""From a rank to the slots of its F, f, B and b."""


def v_half(layout: Layout, microbatches: int) -> Schedule:
    """Half the memory and half the bubble of 1F1B: V-Half (Qi et al., arXiv:2405.15362).

    With p ranks a rank keeps at most 2(p // 2) + 2 activations of stages half as large as those of 1F1B. With F, I and
    W equally long and 2p or more microbatches the makespan is less than 3p longer than the work. Choose it where the
    activations of `zero_bubble_v` do not fit. Takes `Layout.vee` and 1 or more microbatches; raises ScheduleError
    otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(v_half(Layout.vee(3), microbatches=3)).text(width=120))
    rank 0  0F0-0F1-0F2-........5F0-5I0-5W0-5F1-5I1-5W1-0I0-0W0-........5F2-5I2-0I1-5W2-0W1-....0I2-0W2-
    rank 1  ....1F0-1F1-....4F0-....4F1-4I0-4W0-1F2-1I0-4I1-1W0-4W1-4F2-....1I1-4I2-1W1-4W2-1I2-1W2-....
    rank 2  ........2F0-3F0-2F1-3F1-........3I0-2I0-3W0-2F2-2W0-3F2-3I1-2I1-3W1-2W1-3I2-2I2-3W2-2W2-....
    makespan 23, span 23, bubble 21.7 %, peak per rank 4
    """
    ranks = layout.ranks
    gap = 0 if ranks % 2 else 3  # so that no two of its actions fall into one slot

    def block(rank: int) -> tuple[int, int, int, int]:
        return 2 * rank, 3 * ranks - 2 - rank, 3 * ranks - 1 + gap + 2 * rank, 6 * ranks - 2 + gap - rank

    return _repeated("v_half", layout, microbatches, block)


def v_min(layout: Layout, microbatches: int) -> Schedule:
    """A third of the memory and two thirds of the bubble of 1F1B: V-Min (Qi et al., arXiv:2405.15362).

    With p ranks a rank keeps at most 2((p + 1) // 3) + 2 activations of stages half as large as those of 1F1B. With F,
    I and W equally long and 2p or more microbatches the makespan is less than 4p longer than the work; where they are
    not, it loses more than others, as microbatches follow each other closely. Choose it where the activations of
    `v_half` do not fit either. Takes `Layout.vee` and 1 or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(v_min(Layout.vee(3), microbatches=3)).text(width=120))
    rank 0  0F0-0F1-0F2-........5F0-5I0-5W0-5F1-5I1-5W1-0I0-0W0-........5F2-5I2-0I1-5W2-0W1-....0I2-0W2-
    rank 1  ....1F0-1F1-....4F0-....4F1-4I0-4W0-1F2-1I0-4I1-1W0-4W1-4F2-....1I1-4I2-1W1-4W2-1I2-1W2-....
    rank 2  ........2F0-3F0-2F1-3F1-........3I0-2I0-3W0-2F2-2W0-3F2-3I1-2I1-3W1-2W1-3I2-2I2-3W2-2W2-....
    makespan 23, span 23, bubble 21.7 %, peak per rank 4
    """
    ranks = layout.ranks
    gap = 0 if ranks % 3 else 2  # so that no two of its actions fall into one slot

    def block(rank: int) -> tuple[int, int, int, int]:
        return rank, 2 * ranks - 1 - rank, 2 * ranks + gap + rank, 4 * ranks - 1 + gap - rank

    return _repeated("v_min", layout, microbatches, block)


def _repeated(name: str, layout: Layout, microbatches: int, block: Block) -> Schedule:
    require_microbatches(microbatches)
    require_vee(name, layout)
    forward, backward = Kind.FORWARD, Kind.INPUT_GRADIENT

    def slots(rank: int) -> Slots:
        shallow, deep = layout.held_by(rank)
        steps = ((shallow, forward), (deep, forward), (deep, backward), (shallow, backward))
        return {
            begin + _PERIOD * microbatch: Action(stage, kind, microbatch)
            for (stage, kind), begin in zip(steps, block(rank), strict=True)
            for microbatch in range(microbatches)
        }

    orders = squeezed(layout, [slots(rank) for rank in range(layout.ranks)], microbatches)
    return schedule(name, layout, microbatches, lambda rank: orders[rank])
