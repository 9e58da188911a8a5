"""What it costs to recompute a stage, by hand and for any schedule: time in its backward, memory between the two."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.errors import ScheduleError
from pipework.plan import FAMILIES, Action, Costs, Kind, Layout, Schedule, check, gpipe, one_f_one_b, simulate
from pipework.plan.channels import Channels
from pipework.plan.files import write_csv
from tests.plan.test_channels import CHANNELS
from tests.strategies import schedules

whole = st.integers(0, 5).map(float)


@st.composite
def priced(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    """A schedule with stages that are recomputed, and whole-numbered costs, so that times and memory are exact."""
    schedule = draw(schedules())
    stages = range(schedule.layout.stages)
    times = (tuple(draw(whole) for _ in stages) for _ in range(3))
    boundary = tuple(draw(whole) for _ in stages)
    activation = tuple(kept + draw(whole) for kept in boundary)
    early = draw(st.sampled_from((0.0, 0.5, 1.0)))
    costs = Costs(*times, draw(whole), activation, released_by_input_gradient=early, boundary=boundary)
    return schedule.recomputing(draw(st.sets(st.sampled_from(stages)))), costs


@given(priced(), st.sampled_from(CHANNELS))
def test_it_takes_as_long_as_input_gradients_with_a_forward_in_them(
    case: tuple[Schedule, Costs], channels: Channels
) -> None:
    schedule, costs = case
    assert isinstance(costs.forward, tuple)
    assert isinstance(costs.input_gradient, tuple)
    longer = tuple(
        i + (f if stage in schedule.recomputed else 0.0)
        for stage, (f, i) in enumerate(zip(costs.forward, costs.input_gradient, strict=True))
    )
    # The programs of the one: those of the other have their transfers in the order of other unit costs.
    found = simulate(schedule, costs)
    plain = simulate(schedule.recomputing([]), replace(costs, input_gradient=longer))
    assert (found.starts, found.ends, found.bound) == (plain.starts, plain.ends, plain.bound)
    assert simulate(schedule, costs, channels).makespan >= found.makespan


@given(priced())
def test_no_rank_ever_holds_more_for_it(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    for one, other in zip(
        simulate(schedule, costs).peaks, simulate(schedule.recomputing([]), costs).peaks, strict=True
    ):
        assert one <= other


@given(priced())
def test_where_everything_is_given_back_nothing_is_left(case: tuple[Schedule, Costs]) -> None:
    schedule, costs = case
    if schedule.trains:
        timeline = simulate(schedule, costs)
        ranks = range(schedule.layout.ranks)
        assert all(curve[-1][1] == 0 for rank in ranks if (curve := timeline.memory(rank)))


@given(priced())
def test_all_inputs_and_no_activation_recomputes_for_nothing(case: tuple[Schedule, Costs]) -> None:
    """Where a stage keeps all of its activation, memory is as it was."""
    schedule, costs = case
    same = replace(costs, boundary=costs.activation)
    assert simulate(schedule, same).peaks == simulate(schedule.recomputing([]), same).peaks


def test_one_stage_by_hand() -> None:
    order = tuple(map(Action.parse, ("0F0", "0F1", "0B1", "0I0", "0W0")))
    schedule = Schedule("by hand", Layout.loop(1), 2, (order,)).recomputing()
    timeline = simulate(schedule, Costs(2, 3, 5, activation=8, boundary=1, released_by_input_gradient=0.5))
    assert [(str(span.action), span.start, span.end) for span in timeline.spans] == [
        ("0F0", 0, 2),
        ("0F1", 2, 4),
        ("0B1", 4, 14),
        ("0I0", 14, 19),
        ("0W0", 19, 24),
    ]
    assert timeline.memory(0) == [(0, 1), (2, 2), (4, 9), (14, 1), (14, 8), (19, 4), (24, 0)]
    assert (timeline.makespan, timeline.bubble, timeline.peaks) == (24, 0, (9,))


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 5), (4, 8), (4, 3)])
def test_closed_forms(ranks: int, microbatches: int) -> None:
    """GPipe keeps m inputs on every rank, 1F1B as many as there are stages up to the last; both, one activation."""
    layout, costs = Layout.loop(ranks), Costs(2, 3, 4, activation=16, boundary=1)
    found = simulate(gpipe(layout, microbatches).recomputing(), costs)
    assert found.makespan == (microbatches + ranks - 1) * (2 + (2 + 3 + 4))
    assert found.peaks == (microbatches * 1 + 15,) * ranks
    found = simulate(one_f_one_b(layout, microbatches).recomputing(), costs)
    assert found.makespan == (microbatches + ranks - 1) * (2 + (2 + 3 + 4))
    assert found.peaks == tuple(min(ranks - rank, microbatches) * 1 + 15 for rank in range(ranks))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "forward_only"])
def test_every_family(family: str) -> None:
    """Only the stages that are named take longer, each backward by one forward."""
    found = FAMILIES[family]
    schedule = found.build(found.layout(4), 8)
    again = schedule.recomputing([0, 2])
    check(again)
    kinds = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
    backwards = sum(a.kind in kinds and a.stage in again.recomputed for order in again.orders for a in order)
    assert again.orders == schedule.orders
    assert simulate(again).busy == simulate(schedule).busy + backwards
    assert max(simulate(again).peaks) <= max(simulate(schedule).peaks)


def test_the_last_word_counts() -> None:
    schedule = one_f_one_b(Layout.loop(3), 2)
    assert schedule.recomputing([0]).recomputing([1]).recomputed == {1}
    assert schedule.recomputing().recomputing([]) == schedule


@pytest.mark.parametrize("stage", [-1, 3])
def test_stages_that_are_not_there_are_refused(stage: int) -> None:
    schedule = one_f_one_b(Layout.loop(3), 2).recomputing([0, stage])
    with pytest.raises(ScheduleError, match=f"stage {stage} of one_f_one_b should be recomputed"):
        check(schedule)


def test_rows_of_actions_cannot_say_it() -> None:
    with pytest.raises(ScheduleError, match="rows of actions cannot say"):
        write_csv(gpipe(Layout.loop(2), 2).recomputing([1]), io.StringIO())
