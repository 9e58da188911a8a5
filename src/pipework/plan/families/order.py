"""What the families are made of: rounds of microbatches, turns after a warm-up, weight gradients that are put off."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule

Shares = tuple[tuple[int, ...], ...]
"""The microbatches that each stage takes."""

Order = Callable[[int], Iterable[Action]]
"""The actions of a rank, first to last, with the microbatches that a stage takes counted from 0."""


def schedule(
    name: str, layout: Layout, microbatches: int, order: Order, microbatches_of: Shares | None = None
) -> Schedule:
    """The schedule in which each rank follows its order, less any microbatches that there are not.

    No microbatch waits for another, so an order for more of them stays right when some are left out.
    """
    require_microbatches(microbatches)
    taken = microbatches_of or [range(microbatches)] * layout.stages
    orders = (tuple(numbered(order(rank), taken)) for rank in range(layout.ranks))
    return Schedule(name, layout, microbatches, tuple(orders), microbatches_of=microbatches_of)


def numbered(actions: Iterable[Action], taken: Sequence[Sequence[int]]) -> Iterator[Action]:
    """The actions for the microbatches that their stages take, instead of how manieth of these, and without the others.

    >>> print(*numbered(map(Action.parse, ("0F0", "1F0", "0F1", "1F1")), taken=[(0, 1), (2,)]))
    0F0 1F2 0F1
    """
    for action in actions:
        if action.microbatch < len(taken[action.stage]):
            yield Action(action.stage, action.kind, taken[action.stage][action.microbatch])


def rounds(kind: Kind, stages: Sequence[int], microbatches: int, width: int) -> list[Action]:
    """Microbatches in rounds of `width`, each round through all `stages` before the next begins."""
    return [
        Action(stage, kind, microbatch)
        for first in range(0, microbatches, width)
        for stage in stages
        for microbatch in range(first, min(first + width, microbatches))
    ]


def each(kind: Kind, stage: int, microbatches: int) -> Iterator[Action]:
    """One stage's work of one kind, microbatch by microbatch."""
    return (Action(stage, kind, microbatch) for microbatch in range(microbatches))


def even_rounds(microbatches: int, ranks: int) -> tuple[int, int]:
    """The width of rounds of about `ranks` microbatches, and how many fill all rounds if that does not divide evenly.

    >>> even_rounds(8, ranks=4), even_rounds(10, ranks=4), even_rounds(11, ranks=4)
    ((4, 8), (5, 10), (6, 12))
    """
    count = max(1, microbatches // ranks)
    width = -(-microbatches // count)
    return width, count * width


def in_turn(forwards: Sequence[Action], backwards: Iterable[Action], warm_up: int) -> Iterator[Action]:
    """`warm_up` forwards (or all there are), then one forward and one backward in turn, then the backwards left."""
    yield from forwards[:warm_up]
    left = iter(backwards)
    for forward in forwards[warm_up:]:
        yield forward
        yield next(left)
    yield from left


def interleaved(layout: Layout, rank: int, microbatches: int, bridges: int) -> Iterator[Action]:
    """One forward and one backward in turn, in rounds of about as many microbatches as ranks through a rank's stages.

    The warm-up has a first round for all its stages but the last, and `bridges` forwards for each stage behind that.
    """
    width, full = even_rounds(microbatches, layout.ranks)
    stages = layout.held_by(rank)
    forwards = rounds(Kind.FORWARD, stages, full, width)
    backwards = rounds(Kind.BACKWARD, stages[::-1], full, width)
    return in_turn(forwards, backwards, (len(stages) - 1) * width + bridges * layout.behind(stages[-1]))


def split(actions: Iterable[Action], delay: int) -> Iterator[Action]:
    """Every backward in two: the input gradient in its place, the weight gradient after `delay` more of them."""
    waiting: deque[Action] = deque()
    for action in actions:
        if action.kind is not Kind.BACKWARD:
            yield action
            continue
        yield Action(action.stage, Kind.INPUT_GRADIENT, action.microbatch)
        waiting.append(Action(action.stage, Kind.WEIGHT_GRADIENT, action.microbatch))
        if len(waiting) > delay:
            yield waiting.popleft()
    yield from waiting


def chained(layout: Layout) -> Layout:
    """The same stages on the same ranks, each fed by the one before it alone."""
    return Layout(layout.rank_of, Layout.loop(layout.stages).edges)


def all_split(layout: Layout, microbatches: int) -> Schedule:
    """All that there is to do if every backward is split, in no order to speak of: to ask what needs what."""
    kinds = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)

    def order(rank: int) -> Iterable[Action]:
        stages = layout.held_by(rank)
        return (action for stage in stages for kind in kinds for action in each(kind, stage, microbatches))

    return schedule("all split", layout, microbatches, order)


def halves(layout: Layout, microbatches: int) -> Shares:
    """Which microbatches each stage takes if the first of two replicas takes the first half of them, rounded up."""
    first, second = tuple(range(-(-microbatches // 2))), tuple(range(-(-microbatches // 2), microbatches))
    return (first,) * layout.ranks + (second,) * layout.ranks


def require_microbatches(microbatches: int, least: int = 1) -> None:
    """Raises ScheduleError for fewer than `least` microbatches."""
    if microbatches < least:
        raise ScheduleError(
            f"microbatches={microbatches} leaves nothing to do" + (" for one of the replicas" if least > 1 else ""),
            remedy=f"use at least {least} microbatch{'es' if least > 1 else ''}",
        )


def require_one_stage_per_rank(name: str, layout: Layout, instead: str) -> None:
    """Raises ScheduleError, with the family to use `instead`, where a rank holds several stages."""
    if layout.stages != layout.ranks:
        raise ScheduleError(
            f"{name} wants one stage per rank",
            why=where_the_stages_are(layout),
            remedy=f"use {instead}, or cut the model into {layout.ranks} stages",
        )


def require_loop(name: str, layout: Layout, instead: str) -> None:
    """Raises ScheduleError unless the stages are dealt to the ranks in turn, two or more to each."""
    ranks, per_rank = layout.ranks, layout.stages // layout.ranks
    if per_rank < 2 or layout.rank_of != Layout.loop(ranks, per_rank).rank_of:
        raise ScheduleError(
            f"{name} wants the stages dealt to the ranks in turn, 2 or more per rank",
            why=where_the_stages_are(layout),
            remedy=f"use Layout.loop(ranks, per_rank=2), or {instead} for one stage per rank",
        )


def require_vee(name: str, layout: Layout) -> None:
    """Raises ScheduleError unless the stages lead down the ranks and up again."""
    if layout.rank_of != Layout.vee(layout.ranks).rank_of:
        raise ScheduleError(
            f"{name} wants two stages per rank, the second half of them placed in reverse",
            why=where_the_stages_are(layout),
            remedy=f"cut the model into {2 * layout.ranks} stages and use Layout.vee({layout.ranks})",
        )


def require_replicas(name: str, layout: Layout) -> None:
    """Raises ScheduleError unless two replicas of a model lie on an even number of ranks, one of them in reverse."""
    if layout.rank_of != Layout.vee(layout.ranks).rank_of or layout.ranks % 2:
        raise ScheduleError(
            f"{name} wants two replicas of the model on an even number of ranks",
            why=where_the_stages_are(layout),
            remedy=f"use Layout.bidirectional({layout.ranks + layout.ranks % 2})",
        )
    if across := sorted((u, v) for u, v in layout.edges if u < layout.ranks <= v):
        u, v = across[0]
        raise ScheduleError(
            f"{name} wants two replicas of the model, but edge {u}>{v} leads from one to the other",
            remedy=f"use Layout.bidirectional({layout.ranks})",
        )


def where_the_stages_are(layout: Layout) -> str:
    """A layout in words, for messages."""
    return f"the layout's {layout.stages} stages are on ranks {', '.join(map(str, layout.rank_of))}"
