"""What is known of a schedule family besides how to build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from pipework.plan.costs import Costs
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


@final
@dataclass(frozen=True, slots=True)
class Family:
    """A published kind of schedule: what builds it, where it was published, and where it fits.

    - `build` makes a schedule from a layout and a number of microbatches; `least` is the smallest that it takes.
    - `place` makes the layouts that it takes, from the number of ranks and of stages per rank: `per_rank` is the usual.
    - `heeds_costs` tells whether `build` also takes `costs=`, and `runs` whether its schedules can be executed, and not
      only planned. `trains` is False where they only go forward.

    >>> from pipework.plan import FAMILIES
    >>> family = FAMILIES["zero_bubble_v"]
    >>> family.layout(2).rank_of, family.paper
    ((0, 1, 1, 0), 'arXiv:2405.15362')
    >>> family.build(family.layout(2), 4).describe()
    'zero_bubble_v: 2 ranks, 4 stages, 4 microbatches, 48 actions'
    """

    build: Callable[..., Schedule]
    paper: str
    place: Callable[[int, int], Layout] = Layout.loop
    per_rank: int = 1
    least: int = 1
    heeds_costs: bool = False
    runs: bool = True
    trains: bool = True

    @property
    def name(self) -> str:
        """The name of the function that builds it, and of the schedules that it builds."""
        return self.build.__name__

    def layout(self, ranks: int, per_rank: int | None = None) -> Layout:
        """Its usual layout, or one with so many stages per rank; whether it takes that, `build` tells."""
        return self.place(ranks, self.per_rank if per_rank is None else per_rank)

    def plan(self, layout: Layout, microbatches: int, costs: Costs) -> Schedule:
        """A schedule, for these costs if it heeds any."""
        return self.build(layout, microbatches, **({"costs": costs} if self.heeds_costs else {}))

    def smallest(self, layout: Layout) -> int:
        """The least number of microbatches that it takes on this layout."""
        return self.least
