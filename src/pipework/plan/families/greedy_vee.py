"""ZB-V for given costs: on every rank one backward and one forward in turn, with weight gradients in the gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from math import inf
from statistics import fmean
from typing import final

from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.families.filling import Filling
from pipework.plan.families.whole_costs import WholeCosts
from pipework.plan.layout import Layout


def greedy_vee(layout: Layout, microbatches: int, costs: Costs) -> list[Filling]:
    """Four attempts, all for the mean of the stages' costs (Qi et al., arXiv:2405.15362)."""
    even = WholeCosts.of(layout, _even(costs, layout), memory=layout.stages)
    return [_refined(microbatches, even, *choice) for choice in product((True, False), repeat=2)]


def _even(costs: Costs, layout: Layout) -> Costs:
    kinds = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
    means = (fmean(costs.duration(Action(stage, kind, 0)) for stage in range(layout.stages)) for kind in kinds)
    crossing = [(u, v) for u, v in layout.edges if layout.rank_of[u] != layout.rank_of[v]]
    return Costs(*means, transfer=fmean(costs.delay(u, v, layout) for u, v in crossing) if crossing else 0.0)


def _refined(microbatches: int, costs: WholeCosts, *choice: bool) -> Filling:
    """The last of attempts that know how long each rank was idle in the one before, as long as they get better."""
    best, known = None, [0] * costs.layout.ranks
    while True:
        filling = Filling(costs)
        _Attempt(filling, microbatches, known, *choice).complete()
        if best is not None and max(filling.idle) >= max(best.idle):
            return best
        best, known = filling, filling.idle


@final
class _Attempt:
    """One way through, from an empty `filling` to all that there is to do.

    A weight gradient that does not fit into a gap goes in where the rank would otherwise be the one that idles for
    longest, before forwards if `before_forwards`, before backwards of the deep stages if `before_deep`.
    """

    def __init__(
        self, filling: Filling, microbatches: int, known: Sequence[int], before_deep: bool, before_forwards: bool
    ) -> None:
        self.filling, self.microbatches, self.known = filling, microbatches, known
        self.before_deep, self.before_forwards = before_deep, before_forwards
        self.layout = filling.layout
        self.ranks = range(self.layout.ranks)
        self.shallow, self.deep = zip(*map(self.layout.held_by, self.ranks), strict=True)
        self.done: Counter[tuple[int, Kind]] = Counter()

    def complete(self) -> None:
        """Warm up, then give each rank a backward and a forward in turn."""
        self._first_way_down_and_up()
        self._level()
        for _ in range(2 * self.microbatches):
            self._backwards()
            self._forwards()
        for rank in self.ranks:
            self.filling.flush(rank)

    def _next(self, stage: int, kind: Kind) -> Action:
        return Action(stage, kind, self.done[stage, kind])

    def _put(self, stage: int, kind: Kind) -> None:
        self.filling.put(self._next(stage, kind))
        self.done[stage, kind] += 1

    def _forwards_of(self, rank: int) -> int:
        return sum(self.done[stage, Kind.FORWARD] for stage in self.layout.held_by(rank))

    def _first_way_down_and_up(self) -> None:
        """The first microbatch through all stages; while it is away, as many others down the shallow ones as fit."""
        filling, duration = self.filling, self.filling.costs.duration
        for stage in self.shallow:
            self._put(stage, Kind.FORWARD)
        for rank in reversed(self.ranks):
            back, more = self._next(self.deep[rank], Kind.FORWARD), self._next(self.shallow[rank], Kind.FORWARD)
            while (
                rank < self.ranks[-1]
                and self.done[more.stage, Kind.FORWARD] < self.microbatches
                and filling.has_room(more, others=2 * rank + 1)  # what returns before the first backward
                and filling.free[rank] + duration[more.stage, more.kind] <= filling.arrival(back)
            ):
                for stage in self.shallow[: rank + 1]:
                    self._put(stage, Kind.FORWARD)
            self._put(back.stage, Kind.FORWARD)

    def _level(self) -> None:
        """Forwards of shallow and of deep stages in turn, from the last rank on, until no rank has done less."""
        stages = self.shallow
        for before, rank in pairwise(self.ranks):
            while self._forwards_of(rank) < self._forwards_of(before) or (
                self.done[self.deep[rank], Kind.FORWARD]
                <= self.done[self.deep[before], Kind.FORWARD]
                < self.microbatches
            ):
                for stage in reversed(stages[rank:]):
                    if self.done[stage, Kind.FORWARD] < self.microbatches:
                        self._put(stage, Kind.FORWARD)
                stages = self.deep if stages is self.shallow else self.shallow

    def _backwards(self) -> None:
        """An input gradient on each rank, of its shallow stage if that can be."""
        shallow = [self._shallow_is_next(rank) for rank in self.ranks]
        for rank in reversed(self.ranks):
            if shallow[rank]:
                self._fill_and_put(self.shallow[rank], Kind.INPUT_GRADIENT, True)
        for rank in self.ranks:
            if not shallow[rank]:
                self._fill_and_put(self.deep[rank], Kind.INPUT_GRADIENT, self.before_deep)

    def _shallow_is_next(self, rank: int) -> bool:
        backward = self._next(self.shallow[rank], Kind.INPUT_GRADIENT)
        deep = self.done[self.deep[rank], Kind.INPUT_GRADIENT]
        return backward.microbatch < deep and (deep == self.microbatches or self.filling.is_possible(backward))

    def _forwards(self) -> None:
        """A forward on each rank that has one, of its deep stage if that can be."""
        for rank in self.ranks:
            for stage in (self.deep[rank], self.shallow[rank]):
                forward = self._next(stage, Kind.FORWARD)
                if forward.microbatch < self.microbatches and self.filling.is_possible(forward):
                    self._fill_and_put(stage, Kind.FORWARD, self.before_forwards)
                    break

    def _fill_and_put(self, stage: int, kind: Kind, beyond: bool) -> None:
        rank = self.layout.rank_of[stage]
        # A rank that was idle for less than others in the attempt before can afford the difference here.
        slack = max(self.filling.slack(rank), max(self.known) - self.known[rank] - self.filling.idle[rank])
        self.filling.fill(self._next(stage, kind), tolerated=slack if beyond else inf)
        self._put(stage, kind)
