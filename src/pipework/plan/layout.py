"""Which rank holds which stage, and which stage feeds which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import final

from pipework.errors import ScheduleError

Edge = tuple[int, int]


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Stages on ranks, and the edges between stages over which values flow.

    `rank_of[stage]` is the rank that holds the stage. An edge `(u, v)`, always with `u < v`, says that a value made in
    stage u is used in stage v; skip connections are edges like any other. `gradients` are the edges over which a
    gradient comes back: all of them, unless said otherwise (integers and masks have none).

    Raises ScheduleError for a rank without stages and for edges that are not between two known stages, forwards.

    >>> layout = Layout.loop(2, per_rank=2, skips=[(0, 3)])
    >>> layout.rank_of, layout.feeds(0), layout.held_by(1)
    ((0, 1, 0, 1), (1, 3), (1, 3))
    """

    rank_of: tuple[int, ...]
    edges: frozenset[Edge]
    gradients: frozenset[Edge] | None = None
    _held_by: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    _feeds: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    _fed_by: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    _gradient_from: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    _gradient_to: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        gradients = self.edges if self.gradients is None else self.gradients
        _validate(self.rank_of, self.edges, gradients)
        keep = object.__setattr__
        keep(self, "gradients", gradients)
        held: list[list[int]] = [[] for _ in range(self.ranks)]
        for stage, rank in enumerate(self.rank_of):
            held[rank].append(stage)
        keep(self, "_held_by", tuple(map(tuple, held)))
        keep(self, "_feeds", _grouped(self.stages, self.edges))
        keep(self, "_fed_by", _grouped(self.stages, ((v, u) for u, v in self.edges)))
        keep(self, "_gradient_from", _grouped(self.stages, gradients))
        keep(self, "_gradient_to", _grouped(self.stages, ((v, u) for u, v in gradients)))

    @classmethod
    def loop(cls, ranks: int, per_rank: int = 1, skips: Iterable[Edge] = ()) -> Layout:
        """Stages dealt to the ranks in turn, each feeding the next, and `skips` on top.

            per_rank=2      rank 0: 0 4    rank 1: 1 5    rank 2: 2 6    rank 3: 3 7

        >>> Layout.loop(4).rank_of
        (0, 1, 2, 3)
        """
        _positive(ranks=ranks, per_rank=per_rank)
        stages = ranks * per_rank
        return cls(tuple(stage % ranks for stage in range(stages)), _chain(stages) | frozenset(skips))

    @classmethod
    def vee(cls, ranks: int, per_rank: int = 2, skips: Iterable[Edge] = ()) -> Layout:
        """Stages down the ranks and up again: with two per rank the first and the last stage share rank 0.

            per_rank=2      rank 0: 0 7    rank 1: 1 6    rank 2: 2 5    rank 3: 3 4

        >>> Layout.vee(2).rank_of, Layout.vee(2, per_rank=4).rank_of
        ((0, 1, 1, 0), (0, 1, 1, 0, 0, 1, 1, 0))
        """
        _positive(ranks=ranks, per_rank=per_rank)
        down = tuple(range(ranks))
        rank_of = tuple(rank for lap in range(per_rank) for rank in (down[::-1] if lap % 2 else down))
        return cls(rank_of, _chain(len(rank_of)) | frozenset(skips))

    @classmethod
    def bidirectional(cls, ranks: int) -> Layout:
        """Two replicas of a model, a stage of each per rank: the first goes down the ranks, the second up.

            rank 0: 0 7    rank 1: 1 6    rank 2: 2 5    rank 3: 3 4

        Stages 0 to ranks - 1 are the first replica, the others the second; no value goes from one to the other. Which
        microbatches each takes is said by `Schedule.microbatches_of`.

        >>> layout = Layout.bidirectional(2)
        >>> layout.rank_of, sorted(layout.edges)
        ((0, 1, 1, 0), [(0, 1), (2, 3)])
        """
        _positive(ranks=ranks)
        down = range(ranks)
        return cls((*down, *reversed(down)), _chain(ranks) | _chain(ranks, first=ranks))

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return max(self.rank_of) + 1

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.rank_of)

    def held_by(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, ascending."""
        return self._held_by[rank]

    def feeds(self, stage: int) -> tuple[int, ...]:
        """The stages that use a value made in `stage`, ascending."""
        return self._feeds[stage]

    def fed_by(self, stage: int) -> tuple[int, ...]:
        """The stages of whose values `stage` uses one, ascending."""
        return self._fed_by[stage]

    def gradient_from(self, stage: int) -> tuple[int, ...]:
        """The later stages from which `stage` gets a gradient back, ascending."""
        return self._gradient_from[stage]

    def gradient_to(self, stage: int) -> tuple[int, ...]:
        """The earlier stages to which `stage` sends an input gradient, ascending."""
        return self._gradient_to[stage]

    def behind(self, stage: int) -> int:
        """How many stages come after `stage`.

        >>> Layout.loop(4).behind(1)
        2
        """
        return self.stages - 1 - stage


def _chain(stages: int, first: int = 0) -> frozenset[Edge]:
    return frozenset((stage, stage + 1) for stage in range(first, first + stages - 1))


def _grouped(stages: int, edges: Iterable[Edge]) -> tuple[tuple[int, ...], ...]:
    """For each stage the other ends of its edges, ascending."""
    others: list[list[int]] = [[] for _ in range(stages)]
    for stage, other in edges:
        others[stage].append(other)
    return tuple(tuple(sorted(each)) for each in others)


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ScheduleError(f"a layout cannot have {name}={count}", remedy=f"give {name} as 1 or more")


def _validate(rank_of: tuple[int, ...], edges: frozenset[Edge], gradients: frozenset[Edge]) -> None:
    if not rank_of:
        raise ScheduleError("a layout without stages", remedy="give at least one stage: rank_of=(0,)")
    if min(rank_of) < 0:
        raise ScheduleError(f"a stage is on rank {min(rank_of)}", remedy="count ranks from 0")
    if empty := sorted(set(range(max(rank_of))) - set(rank_of)):
        raise ScheduleError(
            f"rank {empty[0]} holds no stage",
            why=f"the stages 0 to {len(rank_of) - 1} are on ranks {', '.join(map(str, rank_of))}",
            remedy="number the ranks without gaps, or use fewer ranks",
        )
    for u, v in sorted(edges):
        if not (0 <= u < len(rank_of) and 0 <= v < len(rank_of)):
            unknown = v if 0 <= u < len(rank_of) else u
            raise ScheduleError(f"edge {u}>{v} touches stage {unknown}, but the stages are 0 to {len(rank_of) - 1}")
        if u >= v:
            raise ScheduleError(
                f"edge {u}>{v} does not lead to a later stage", remedy="number the stages in the order values flow"
            )
    if stray := sorted(gradients - edges):
        u, v = stray[0]
        raise ScheduleError(
            f"a gradient comes back over edge {u}>{v}, over which nothing goes forward", remedy="add it to the edges"
        )
