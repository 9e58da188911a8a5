"""Timelines as a real step would give them, and a strategy for all kinds."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from pipework.plan import Action, Costs, Span, Timeline, needs, simulate
from tests.strategies import schedules


def recorded(plan: Timeline, seconds: Callable[[int], float], start: float = 4711.25) -> Timeline:
    """The plan's actions in its order, the one at `index` taking `seconds(index)` for every second planned.

    It begins at `start` on some clock, in seconds, and costs are unknown, as in a recording.
    """
    schedule = plan.schedule
    free = [start] * schedule.layout.ranks
    ends: dict[Action, float] = {}
    spans: list[Span] = []
    for index, span in enumerate(sorted(plan.spans, key=lambda span: (span.start, span.rank))):
        begin = max([free[span.rank], *(ends[need] for need in needs(span.action, schedule))])
        free[span.rank] = ends[span.action] = begin + (span.end - span.start) * seconds(index)
        spans.append(Span(span.rank, span.action, begin, free[span.rank]))
    return Timeline.recorded(schedule, spans)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Any legal schedule in time: simulated in unit costs, simulated in seconds, or recorded."""
    schedule = draw(schedules())
    durations = st.floats(1e-5, 20)
    costs = draw(st.just(Costs()) | st.builds(Costs, durations, durations, durations, durations, unit=st.just("s")))
    plan = simulate(schedule, costs)
    if draw(st.booleans()):
        return plan
    factors = draw(st.lists(st.floats(0.001, 2), min_size=1, max_size=20))
    return recorded(plan, lambda index: factors[index % len(factors)], start=draw(st.floats(0, 1e6)))
