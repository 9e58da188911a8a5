from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.errors import InputError
from pipework.plan import Action, Costs, Layout, Schedule, Span, Timeline, forward_only, one_f_one_b, simulate
from tests.plan.test_simulate import simulations
from tests.strategies import at_once, schedules


@given(simulations())
def test_the_critical_path_explains_every_moment(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    timeline = simulate(schedule, costs)
    path = timeline.critical_path()
    assert path[0].start == 0
    assert path[-1].end == timeline.makespan
    for earlier, later in pairwise(path):
        if {earlier.action, later.action} in map(set, chain(*at_once(schedule))):
            assert (later.start, later.end) == (earlier.start, earlier.end)
        else:
            assert later.start == earlier.end + costs.delay(earlier.action.stage, later.action.stage, schedule.layout)


@given(schedules(), st.integers(0, 2**32))
def test_recorded_spans_make_a_timeline(schedule: Schedule, seed: int) -> None:
    """Any clock will do, in any order, and no time is needed to fit any costs."""
    random = Random(seed)
    recorded = [
        Span(span.rank, span.action, 1e6 + span.start + 0.25, 1e6 + span.end - 0.25)
        for span in simulate(schedule).spans
    ]
    random.shuffle(recorded)
    timeline = Timeline.recorded(schedule, recorded)
    planned = simulate(schedule)
    assert timeline.makespan == planned.makespan - 0.5
    assert timeline.peaks == planned.peaks
    span_of = {span.action: span for span in recorded}
    assert [timeline.rank(rank) for rank in range(schedule.layout.ranks)] == [
        tuple(span_of[action] for action in order) for order in schedule.orders
    ]
    path = timeline.critical_path()
    assert path[0].start == timeline.start
    assert path[-1].end == timeline.start + timeline.makespan


@given(schedules())
def test_the_bubble_is_what_is_not_busy(schedule: Schedule) -> None:
    timeline = simulate(schedule)
    work = sum(Costs().duration(action, schedule.recomputed) for order in schedule.orders for action in order)
    assert timeline.busy == work
    assert timeline.bubble == 1 - work / (timeline.makespan * schedule.layout.ranks)
    assert timeline.bubble_of_span == 1 - work / (timeline.span * schedule.layout.ranks)
    assert timeline.span <= timeline.makespan


def test_span_is_a_ranks_own_time() -> None:
    timeline = simulate(forward_only(Layout.loop(4), 8))
    assert (timeline.makespan, timeline.span, timeline.bubble_of_span) == (11, 8, 0)


def test_a_recorded_path_follows_the_latest_predecessor() -> None:
    schedule = one_f_one_b(Layout.loop(2), 1)
    times = {"0F0": (5.0, 6.0), "1F0": (6.5, 7.0), "1B0": (7.0, 9.0), "0B0": (9.75, 11.0)}
    spans = tuple(
        Span(rank, action, *times[str(action)]) for rank, order in enumerate(schedule.orders) for action in order
    )
    timeline = Timeline.recorded(schedule, spans)
    assert [str(span.action) for span in timeline.critical_path()] == ["0F0", "1F0", "1B0", "0B0"]
    assert (timeline.start, timeline.makespan, timeline.span) == (5, 6, 6)


def test_an_empty_timeline_is_all_zero() -> None:
    timeline = Timeline.recorded(Schedule("nothing", Layout.loop(2), 1, ((), ())), ())
    assert (timeline.makespan, timeline.span, timeline.bubble, timeline.peaks) == (0, 0, 0, (0, 0))
    assert timeline.critical_path() == ()
    assert timeline.text().startswith("rank 0\nrank 1\nmakespan 0 µs, ")


@given(schedules())
def test_memory_is_what_has_begun_and_is_not_over(schedule: Schedule) -> None:
    costs = Costs(activation=8.0, released_by_input_gradient=0.25, boundary=3.0)
    timeline, held = simulate(schedule, costs), partial(costs.held, recomputed=schedule.recomputed)
    for rank, groups in enumerate(at_once(schedule)):
        levels: list[float] = []
        for index, group in enumerate(groups):
            before = [action for earlier in groups[:index] for action in earlier]
            freed = sum(map(costs.released, before))
            levels.append(sum(map(held, [*before, *group])) - freed)
            levels.append(levels[-1] - sum(map(costs.released, group)))
        changed = [level for earlier, level in pairwise([0.0, *levels]) if level != earlier]
        assert [level for _, level in timeline.memory(rank)] == changed
        assert timeline.peak(rank) == max(levels, default=0.0)
        times = [time for time, _ in timeline.memory(rank)]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda spans: spans[1:], "0F0 of rank 0 was not recorded"),
        (lambda spans: [replace(spans[0], rank=1), *spans[1:]], "0F0 of rank 0 was not recorded, or one_f_one_b has"),
        (
            lambda spans: [*spans, Span(1, Action.parse("1W0"), 0, 1)],
            "1W0 was recorded on rank 1, where one_f_one_b has",
        ),
        (lambda spans: [*spans, spans[0]], "0F0 was recorded twice"),
        (lambda spans: [replace(spans[0], start=99), *spans[1:]], "rank 0 is recorded to have done 0B0 before 0F0"),
    ],
)
def test_what_was_not_recorded_of_this_schedule_makes_no_timeline(
    change: Callable[[list[Span]], list[Span]], says: str
) -> None:
    schedule = one_f_one_b(Layout.loop(2), 1)
    with pytest.raises(InputError, match=says):
        Timeline.recorded(schedule, change(list(simulate(schedule).spans)))


def test_peaks_count_from_the_start_of_a_forward_to_the_end_of_its_backward() -> None:
    order = tuple(map(Action.parse, ("0F0", "0F1", "0B1", "0F2", "0B0", "0B2")))
    assert simulate(Schedule("by hand", Layout.loop(1), 3, (order,)), Costs(activation=2.5)).peaks == (5,)
