"""The published schedules, each from a layout and a number of microbatches.

Two ideas make them all: rounds of microbatches through a rank's stages, and forwards and backwards taking turns after a
warm-up of forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


def gpipe(layout: Layout, microbatches: int) -> Schedule:
    """All forwards, then all backwards in the same order: GPipe (Huang et al., arXiv:1811.06965).

    Every rank keeps the activations of all microbatches. Takes one stage per rank and 1 or more microbatches; raises
    ScheduleError otherwise. `looped_bfs` is its like for several stages per rank.

    >>> from pipework.plan import simulate
    >>> print(simulate(gpipe(Layout.loop(4), microbatches=4)).text())
    rank 0  F0F1F2F3..................B0--B1--B2--B3--
    rank 1  ..F0F1F2F3............B0--B1--B2--B3--....
    rank 2  ....F0F1F2F3......B0--B1--B2--B3--........
    rank 3  ......F0F1F2F3B0--B1--B2--B3--............
    makespan 21, span 21, bubble 42.9 %, peak per rank 4
    """
    _require_microbatches(microbatches)
    _require_one_stage_per_rank("gpipe", layout, "looped_bfs")

    def order(rank: int) -> Iterable[Action]:
        stages = layout.held_by(rank)
        forwards = _rounds(Kind.FORWARD, stages, microbatches, microbatches)
        return forwards + _rounds(Kind.BACKWARD, stages, microbatches, microbatches)

    return _schedule("gpipe", layout, microbatches, order)


def one_f_one_b(layout: Layout, microbatches: int) -> Schedule:
    """One forward and one backward in turn, after a warm-up: PipeDream-Flush (Narayanan et al., arXiv:2006.09503).

    No shorter than GPipe, but a rank keeps at most as many activations as there are stages from its own to the last.
    Takes one stage per rank and 1 or more microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(one_f_one_b(Layout.loop(4), microbatches=6)).text())
    rank 0  F0F1F2F3............B0--F4B1--F5B2--..B3--..B4--..B5--
    rank 1  ..F0F1F2........B0--F3B1--F4B2--F5B3--..B4--..B5--....
    rank 2  ....F0F1....B0--F2B1--F3B2--F4B3--F5B4--..B5--........
    rank 3  ......F0B0--F1B1--F2B2--F3B3--F4B4--F5B5--............
    makespan 27, span 27, bubble 33.3 %, peak per rank 4 3 2 1
    """
    _require_microbatches(microbatches)
    _require_one_stage_per_rank("one_f_one_b", layout, "interleaved_one_f_one_b")

    def order(rank: int) -> Iterable[Action]:
        stages = layout.held_by(rank)
        forwards = _rounds(Kind.FORWARD, stages, microbatches, microbatches)
        backwards = _rounds(Kind.BACKWARD, stages, microbatches, microbatches)
        return _in_turn(forwards, backwards, warm_up=layout.behind(stages[0]))

    return _schedule("one_f_one_b", layout, microbatches, order)


def interleaved_one_f_one_b(layout: Layout, microbatches: int) -> Schedule:
    """1F1B over several stages per rank, which divides the bubble by their number (Narayanan et al., arXiv:2104.04473).

    Microbatches go in rounds of about as many as there are ranks, each round through all stages of a rank; the price is
    more transfers and more activations. Takes `Layout.loop` with 2 or more stages per rank. Any number of microbatches
    up to twice the ranks less one will do; above, it must divide into microbatches // ranks equal rounds, as every
    multiple of the ranks does. Raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(interleaved_one_f_one_b(Layout.loop(2, per_rank=2), microbatches=4)).text(width=120))
    rank 0  0F0-0F1-2F0-2F1-0F2-....2B0-----0F3-2B1-----2F2-0B0-----2F3-0B1-----....2B2-----....2B3-----0B2-----0B3-----
    rank 1  ....1F0-1F1-3F0-3B0-----3F1-3B1-----1F2-1B0-----1F3-1B1-----3F2-3B2-----3F3-3B3-----1B2-----1B3-----........
    makespan 27, span 27, bubble 11.1 %, peak per rank 5 3
    """
    _require_microbatches(microbatches)
    ranks, per_rank = layout.ranks, layout.stages // layout.ranks
    if per_rank < 2 or layout.rank_of != Layout.loop(ranks, per_rank).rank_of:
        raise ScheduleError(
            "interleaved_one_f_one_b wants the stages dealt to the ranks in turn, 2 or more per rank",
            why=_where_the_stages_are(layout),
            remedy="use Layout.loop(ranks, per_rank=2), or one_f_one_b for one stage per rank",
        )
    rounds = max(1, microbatches // ranks)
    width, left_over = divmod(microbatches, rounds)
    if left_over:
        raise ScheduleError(
            f"interleaved_one_f_one_b cannot divide {microbatches} microbatches into {rounds} equal rounds",
            why=f"with {ranks} ranks there are microbatches // ranks = {rounds} rounds",
            remedy=f"use {microbatches - left_over} microbatches, or any multiple of {ranks}",
        )

    def order(rank: int) -> Iterable[Action]:
        stages = layout.held_by(rank)
        forwards = _rounds(Kind.FORWARD, stages, microbatches, width)
        backwards = _rounds(Kind.BACKWARD, stages[::-1], microbatches, width)
        # All stages of a rank but the last get their first round, and the way there and back is bridged.
        warm_up = (per_rank - 1) * width + 2 * layout.behind(stages[-1])
        return _in_turn(forwards, backwards, warm_up)

    return _schedule("interleaved_one_f_one_b", layout, microbatches, order)


def looped_bfs(layout: Layout, microbatches: int) -> Schedule:
    """All microbatches through a stage before the next: breadth-first (Lamy-Poirier, arXiv:2211.05953).

    Backwards go through the stages and the microbatches in reverse. Each stage is needed in one stretch, which suits
    sharded parameters; every rank keeps all activations. Takes any layout and 1 or more microbatches; raises
    ScheduleError for none.

    >>> from pipework.plan import simulate
    >>> print(simulate(looped_bfs(Layout.loop(2, per_rank=2), microbatches=3)).text())
    rank 0  0F0-0F1-0F2-2F0-2F1-2F2-............2B2-----2B1-----2B0-----0B2-----0B1-----0B0-----
    rank 1  ....1F0-1F1-1F2-3F0-3F1-3F2-3B2-----3B1-----3B0-----1B2-----1B1-----1B0-----........
    makespan 21, span 21, bubble 14.3 %, peak per rank 6
    """
    _require_microbatches(microbatches)

    def order(rank: int) -> Iterable[Action]:
        forwards = _rounds(Kind.FORWARD, layout.held_by(rank), microbatches, microbatches)
        return forwards + [Action(forward.stage, Kind.BACKWARD, forward.microbatch) for forward in reversed(forwards)]

    return _schedule("looped_bfs", layout, microbatches, order)


def forward_only(layout: Layout, microbatches: int) -> Schedule:
    """Forwards alone, for evaluation: rounds of as many microbatches as there are ranks, each through all stages.

    Takes any layout and 1 or more microbatches; raises ScheduleError for none.

    >>> from pipework.plan import simulate
    >>> print(simulate(forward_only(Layout.loop(2, per_rank=2), microbatches=4)).text())
    rank 0  0F0-0F1-2F0-2F1-0F2-0F3-2F2-2F3-....
    rank 1  ....1F0-1F1-3F0-3F1-1F2-1F3-3F2-3F3-
    makespan 9, span 8, bubble 11.1 %, peak per rank 8
    """
    _require_microbatches(microbatches)

    def order(rank: int) -> Iterable[Action]:
        return _rounds(Kind.FORWARD, layout.held_by(rank), microbatches, layout.ranks)

    return _schedule("forward_only", layout, microbatches, order)


FAMILIES: Mapping[str, Callable[[Layout, int], Schedule]] = {
    family.__name__: family for family in (gpipe, one_f_one_b, interleaved_one_f_one_b, looped_bfs, forward_only)
}
"""Every family by its name."""


def _schedule(name: str, layout: Layout, microbatches: int, order: Callable[[int], Iterable[Action]]) -> Schedule:
    return Schedule(name, layout, microbatches, tuple(tuple(order(rank)) for rank in range(layout.ranks)))


def _rounds(kind: Kind, stages: Sequence[int], microbatches: int, width: int) -> list[Action]:
    """Microbatches in rounds of `width`, each round through all `stages` before the next begins."""
    return [
        Action(stage, kind, microbatch)
        for first in range(0, microbatches, width)
        for stage in stages
        for microbatch in range(first, min(first + width, microbatches))
    ]


def _in_turn(forwards: Sequence[Action], backwards: Iterable[Action], warm_up: int) -> Iterator[Action]:
    """`warm_up` forwards (or all there are), then one forward and one backward in turn, then the backwards left."""
    yield from forwards[:warm_up]
    left = iter(backwards)
    for forward in forwards[warm_up:]:
        yield forward
        yield next(left)
    yield from left


def _require_microbatches(microbatches: int) -> None:
    if microbatches < 1:
        raise ScheduleError(f"microbatches={microbatches} leaves nothing to do", remedy="use at least 1 microbatch")


def _require_one_stage_per_rank(name: str, layout: Layout, instead: str) -> None:
    if layout.stages != layout.ranks:
        raise ScheduleError(
            f"{name} wants one stage per rank",
            why=_where_the_stages_are(layout),
            remedy=f"use {instead}, or cut the model into {layout.ranks} stages",
        )


def _where_the_stages_are(layout: Layout) -> str:
    return f"the layout's {layout.stages} stages are on ranks {', '.join(map(str, layout.rank_of))}"
