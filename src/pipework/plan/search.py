"""Finding a good schedule for a layout, its costs and its memory, and how good it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import inf
from time import monotonic
from typing import final

from pipework.errors import ScheduleError
from pipework.plan import solver
from pipework.plan.check import check
from pipework.plan.costs import Costs
from pipework.plan.families import FAMILIES
from pipework.plan.figures import unit_for
from pipework.plan.greedy import greedy, rules
from pipework.plan.layout import Layout
from pipework.plan.problem import Memory, Objective, Orders, Problem, Shares, problem
from pipework.plan.schedule import Schedule
from pipework.plan.simulate import UNIT, simulate
from pipework.plan.timeline import Timeline
from pipework.plan.windows import windows

_GREEDY_STEPS = 150_000  # tasks that greedy rules put in order, all together, so that it takes a second or two


@final
@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: the schedule, how long it takes, and how long every schedule takes at least.

    `bound` is of the objective, in the unit of the costs. `optimal` says that the schedule was proven to reach it; if
    not, it may be the best possible even so. `how` tells where the schedule comes from.
    """

    schedule: Schedule
    timeline: Timeline
    objective: Objective
    bound: float
    optimal: bool
    how: str

    @property
    def value(self) -> float:
        """The schedule's makespan or span, whichever was the objective."""
        return self.timeline.makespan if self.objective == "makespan" else self.timeline.span

    @property
    def text(self) -> str:
        """One line: the objective's value, how far it is from the best possible at most, and how it was found."""
        unit = unit_for(self.value, self.timeline.unit)
        if self.optimal:
            quality = "optimal"
        elif self.bound:
            quality = f"within {100 * (self.value / self.bound - 1):.2g} % of the best possible"
        else:
            quality = "nothing known of the best possible"
        return f"{self.objective} {unit.text(self.value)}, {quality}; {self.how}"


def search(
    layout: Layout,
    microbatches: int,
    costs: Costs = UNIT,
    *,
    memory: Memory = None,
    objective: Objective = "makespan",
    split_backward: bool = True,
    microbatches_of: Shares = None,
    seconds: float = 10.0,
    workers: int | None = None,
) -> Found:
    """The best schedule that can be found in about `seconds`, and a bound that no schedule beats.

    First come the published families that fit, and several hundred greedy rules; often one of them meets the bound. A
    family's schedule is left as it is published. If nothing meets the bound, and with the extra `pipework[search]`, a
    constraint solver goes on from the best of them until it has a proof or the time is over. With `seconds=0`, or
    without the extra, the result is the same on every machine; a solver's is not, so search on one rank and give the
    others the schedule (`write_json`).

    - `memory`: the most activation memory of a rank, in the unit of `costs.activation`; one number, or one per rank.
    - `objective`: `"makespan"` or `"span"`, as in `Timeline`.
    - `split_backward`: whether backwards may be split into I and W, so that W fills what would be idle time.
    - `microbatches_of`: as in `Schedule`, for layouts with replicas.
    - `workers`: the solver's threads; unless given, as many as the machine has cores, but 8 at least.

    Raises ScheduleError if the costs do not fit the layout, or if a rank's memory does not hold one microbatch.

    >>> found = search(Layout.loop(4), microbatches=6, memory=4)
    >>> found.text
    'makespan 21, optimal; zero_bubble_h1'
    >>> print(found.timeline.text())
    rank 0  F0F1F2F3......I0W0F4I1W1F5I2W2I3W3I4W4I5W5
    rank 1  ..F0F1F2....I0F3I1W0F4I2W1F5I3W2I4W3I5W4W5
    rank 2  ....F0F1..I0F2I1F3I2W0F4I3W1F5I4W2I5W3W4W5
    rank 3  ......F0I0F1I1F2I2F3I3W0F4I4W1F5I5W2W3W4W5
    makespan 21, span 21, bubble 14.3 %, peak per rank 4
    """
    _require(objective, seconds, workers)
    given = problem(layout, microbatches, costs, memory, objective, split_backward, microbatches_of)
    known = windows(given)
    begin = monotonic()
    least = known.least
    best = _constructed(given, costs, least)
    left = seconds - (monotonic() - begin)
    if best.value > least and not solver.is_installed():
        best = replace(best, how=f"{best.how}, without a solver: install pipework[search]")
    elif best.value > least and left > 0:
        solved = solver.solve(given, known, best.orders, left, workers)
        least = solved.least
        if best.value <= least:
            best = replace(best, how=f"{best.how}, proven by the solver")
        elif solved.orders is not None:
            best = min(best, _candidate(given, solved.orders, "solver"), key=lambda candidate: candidate.value)
    optimal = best.value <= least and given.exact_times
    bound = float(least / given.per_unit)
    timeline = simulate(given.schedule("search", best.orders), costs)
    found = Found(timeline.schedule, timeline, objective, bound, optimal, best.how)
    if best.published is None or best.published.overlapped:
        return found
    # As published, with backwards in one piece where they cost no time: two pieces are more work for a device.
    timeline = simulate(best.published, costs)
    published = replace(found, schedule=timeline.schedule, timeline=timeline)
    return published if published.value <= found.value else found


@final
@dataclass(frozen=True, slots=True)
class _Candidate:
    """Orders that fit the memory, their value, and where they come from: from which family, if from any."""

    orders: Orders
    value: int
    how: str
    published: Schedule | None = None


def _candidate(given: Problem, orders: Orders, how: str, published: Schedule | None = None) -> _Candidate:
    return _Candidate(orders, given.value(given.starts(orders)), how, published)


def _constructed(given: Problem, costs: Costs, enough: int) -> _Candidate:
    """The best of what needs no search."""
    found: _Candidate | None = None
    for each in _candidates(given, costs):
        if found is None or each.value < found.value:
            found = each
        if found.value <= enough:
            break
    assert found is not None, "one by one is always a candidate"
    return found


def _candidates(given: Problem, costs: Costs) -> Iterator[_Candidate]:
    for schedule in chain(_families(given, costs), [given.one_by_one]):
        orders = given.orders(schedule)
        if orders is not None and given.fits(orders):
            yield _candidate(given, orders, schedule.name, schedule)
    for rule in islice(rules(given), max(1, _GREEDY_STEPS // len(given.actions))):
        yield _candidate(given, greedy(given, rule), "greedy")


def _families(given: Problem, costs: Costs) -> Iterator[Schedule]:
    """What the families make of this layout; most take only some."""
    for family in FAMILIES.values():
        try:
            schedule = family.plan(given.one_by_one.layout, given.one_by_one.microbatches, costs)
            check(schedule)
            yield schedule
        except ScheduleError:
            continue


def _require(objective: str, seconds: float, workers: int | None) -> None:
    if objective not in {"makespan", "span"}:
        raise ScheduleError(f"the objective is {objective!r}", remedy="use 'makespan' or 'span'")
    if not 0 <= seconds < inf:
        raise ScheduleError(f"the search may take {seconds} seconds", remedy="give a number of seconds, 0 or more")
    if workers is not None and workers < 1:
        raise ScheduleError(f"the search has {workers} workers", remedy="give 1 or more, or None for the usual number")
