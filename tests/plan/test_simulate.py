from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.errors import ScheduleError
from pipework.plan import Action, Costs, Layout, Schedule, Span, needs, one_f_one_b, simulate
from tests.strategies import at_once, schedules


@st.composite
def simulations(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    """A schedule and whole-numbered costs that differ by stage and edge, so that times are exact."""
    schedule = draw(schedules())
    layout = schedule.layout
    seconds = st.integers(0, 5).map(float)
    forward, input_gradient, weight_gradient = (tuple(draw(seconds) for _ in range(layout.stages)) for _ in range(3))
    transfer = {edge: draw(seconds) for edge in sorted(layout.edges)} if draw(st.booleans()) else draw(seconds)
    return schedule, Costs(forward, input_gradient, weight_gradient, transfer)


@given(simulations())
def test_every_action_starts_as_soon_as_it_may(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    timeline, duration = simulate(schedule, costs), partial(costs.duration, recomputed=schedule.recomputed)
    span_of = {span.action: span for span in timeline.spans}
    assert len(span_of) == len(timeline.spans)
    for rank, order in enumerate(at_once(schedule)):
        free = 0.0
        for group in order:
            arrivals = [
                span_of[need].end + costs.delay(need.stage, action.stage, schedule.layout)
                for action in group
                for need in needs(action, schedule)
            ]
            start = max([free, *arrivals])
            free = start + sum(map(duration, group))
            assert [span_of[action] for action in group] == [Span(rank, action, start, free) for action in group]


@given(simulations())
def test_a_rank_keeps_its_order(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    timeline = simulate(schedule, costs)
    orders = tuple(tuple(span.action for span in timeline.rank(rank)) for rank in range(schedule.layout.ranks))
    assert orders == schedule.orders


def test_a_schedule_that_stands_still_is_not_simulated() -> None:
    schedule = one_f_one_b(Layout.loop(2), 1)
    circle = replace(schedule, orders=(schedule.orders[0][::-1], schedule.orders[1]))
    with pytest.raises(ScheduleError, match="rank 0 waits at 0B0 for 0F0"):
        simulate(circle)


def test_what_is_not_whole_is_not_simulated() -> None:
    schedule = one_f_one_b(Layout.loop(2), 1)
    missing = replace(schedule, orders=(schedule.orders[0], ()))
    with pytest.raises(ScheduleError, match="incomplete: 1F0 is never done"):
        simulate(missing)


def test_transfers_cost_nothing_on_one_rank() -> None:
    timeline = simulate(one_f_one_b(Layout.loop(2), 1), Costs(transfer=10))
    assert timeline.makespan == 6 + 2 * 10
    layout = Layout((0, 0), frozenset({(0, 1)}))
    order = tuple(map(Action.parse, ("0F0", "1F0", "1B0", "0B0")))
    assert simulate(Schedule("one rank", layout, 1, (order,)), Costs(transfer=10)).makespan == 6
