"""Forwards overlapped with backwards, so that the communication within each hides behind the compute of the other.

Both families are one: a rank holds a `shallow` and a `deep` stage, and starts the later into the steady state of

    F of the shallow with B of the deep, F of the deep with B of the shallow

the farther it is from where the model turns around (or from where its two replicas cross).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from pipework.plan.action import Action, Kind
from pipework.plan.families.order import (
    each,
    halves,
    numbered,
    require_microbatches,
    require_replicas,
    require_vee,
    split,
)
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule

Block = tuple[Action, ...]
"""One action, or two that overlap."""


def dual_pipe(layout: Layout, microbatches: int) -> Schedule:
    """Two replicas from both ends, forwards overlapped with backwards: DualPipe (DeepSeek-V3, arXiv:2412.19437).

    With p ranks and p or more microbatches per replica each rank has a bubble of (p/2 - 1)(FB + B - 3W), where FB is
    what an overlapped pair takes and B a full backward, and keeps p + 1 activations; its parameters are there twice.
    Choose it where communication within a stage, as among experts, is worth hiding, and memory for two replicas is
    there. Takes `Layout.bidirectional` with an even number of ranks, and 2 or more microbatches, of which the first
    replica takes the first half; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(dual_pipe(Layout.bidirectional(4), microbatches=8)).text(width=120))
    rank 0  0F0-0F1-0F2-7F4-7I4-7W4-7F5-0F3---7B5---....7F6---0B0---7B6-----....7F7---0B1---7B7-----0I2-0W2-0I3-0W3-
    rank 1  ....1F0-6F4-1F1-6F5-1F2-6B4-----6F6---1B0---1F3---6B5---6F7---1B1---6B6-----1B2-----....6I7-1I3-6W7-1W3-
    rank 2  ....5F4-2F0-5F5-2F1-5F6-2B0-----2F2---5B4---5F7---2B1---2F3---5B5---2B2-----5B6-----....2I3-5I7-2W3-5W7-
    rank 3  4F4-4F5-4F6-3F0-3I0-3W0-3F1-4F7---3B1---....3F2---4B4---3B2-----....3F3---4B5---3B3-----4I6-4W6-4I7-4W7-
    makespan 26, span 26, bubble 7.7 %, peak per rank 5
    """
    require_replicas("dual_pipe", layout)
    require_microbatches(microbatches, least=2)
    places = layout.ranks // 2
    taken = halves(layout, microbatches)

    def order(rank: int) -> Iterable[Block]:
        held, place = layout.held_by(rank), min(rank, layout.ranks - 1 - rank)
        shallow, deep = held if rank == place else held[::-1]
        return _blocks(shallow, deep, place, places, len(taken[0]))

    orders, overlapped = _joined(layout, order, taken)
    return Schedule("dual_pipe", layout, microbatches, orders, overlapped, microbatches_of=taken)


def dual_pipe_v(layout: Layout, microbatches: int) -> Schedule:
    """DualPipe cut in half, without the second replica: DualPipeV (DeepSeek, after arXiv:2412.19437; "cut-in-half").

    What were two replicas are the two halves of a model that turns around on the last rank. With p ranks and 2p or more
    microbatches each rank has a bubble of (p - 1)(FB + B - 3W), where FB is what an overlapped pair takes and B a full
    backward, and keeps 2p + 1 activations, of stages half as large. Choose it over `zero_bubble_v` where communication
    within a stage is worth hiding. Takes `Layout.vee` and 1 or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(dual_pipe_v(Layout.vee(2), microbatches=5)).text(width=120))
    rank 0  F0-F1-F2-F0-I0-W0-F1-0F3-3B1--...3F2-0B0--0F4-3B2--3F3-0B1--3B3---...3F4-0B2--3B4---I3-W3-I4-W4-
    rank 1  ...F0-F0-F1-F1-F2-2B0---2F2-1B0--1F3-2B1--2F3-1B1--1F4-2B2--2F4-1B2--2B3---1B3---...I4-I4-W4-W4-
    makespan 32, span 32, bubble 6.2 %, peak per rank 5
    """
    require_vee("dual_pipe_v", layout)
    require_microbatches(microbatches)

    def order(rank: int) -> Iterable[Block]:
        shallow, deep = layout.held_by(rank)
        return _blocks(shallow, deep, rank, layout.ranks, microbatches)

    orders, overlapped = _joined(layout, order, [range(microbatches)] * layout.stages)
    return Schedule("dual_pipe_v", layout, microbatches, orders, overlapped)


def _blocks(shallow: int, deep: int, place: int, places: int, microbatches: int) -> Iterator[Block]:
    """What the rank does that is at `place` of so many, from where a model begins to where it turns around.

    For 2 * places microbatches, if there are fewer.
    """
    full = max(microbatches, 2 * places)
    forwards, more_forwards = (each(Kind.FORWARD, stage, full) for stage in (shallow, deep))
    backwards, more_backwards = (each(Kind.BACKWARD, stage, full) for stage in (shallow, deep))
    farther = places - 1 - place
    for _ in range(2 * farther):
        yield (next(forwards),)
    for _ in range(place + 1):
        yield (next(forwards),)
        yield (next(more_forwards),)
    for _ in range(farther):
        yield from ((part,) for part in split([next(more_backwards)], delay=0))
        yield (next(more_forwards),)
    for turn in range(full - 2 * places + place + 1):
        pair = (next(forwards), next(more_backwards))
        # Where the model turns around, nothing hides behind the first pair, and the parts are wanted soon.
        yield from [pair] if turn or farther else [pair[:1], pair[1:]]
        yield next(more_forwards), next(backwards)
    for _ in range(farther):
        yield (next(more_backwards),)
        yield next(more_forwards), next(backwards)
    rest = [next(kind) for _ in range(place + 1) for kind in (more_backwards, backwards)] + [*backwards]
    # The weight gradients of the second half fill the way back to the first stage.
    yield from ((action,) for action in chain(rest[: place + 1], split(rest[place + 1 :], delay=place)))


def _joined(
    layout: Layout, order: Callable[[int], Iterable[Block]], taken: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[Action, ...], ...], frozenset[Action]]:
    """The orders of all ranks, and which of their actions overlap with the next."""
    blocks = [[tuple(numbered(block, taken)) for block in order(rank)] for rank in range(layout.ranks)]
    overlapped = frozenset(block[0] for each in blocks for block in each if len(block) > 1)
    return tuple(tuple(chain(*each)) for each in blocks), overlapped
