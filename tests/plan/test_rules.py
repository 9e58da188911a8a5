from __future__ import annotations

from hypothesis import given

from pipework.plan import Action, Kind, Layout, Schedule, Transfer, is_local, needs, one_f_one_b, transfers
from tests.strategies import is_ready, schedules


@given(schedules())
def test_needs_are_what_it_takes_and_no_more(schedule: Schedule) -> None:
    everything = {action for order in schedule.orders for action in order}
    for action in everything:
        needed = needs(action, schedule)
        assert len(set(needed)) == len(needed)
        assert set(needed) <= everything
        assert is_ready(action, schedule, set(needed))
        for need in needed:
            assert not is_ready(action, schedule, set(needed) - {need})


@given(schedules())
def test_transfers_are_needs_seen_from_the_other_end(schedule: Schedule) -> None:
    everything = [action for order in schedule.orders for action in order]
    sent = [transfer for action in everything for transfer in transfers(action, schedule)]
    needed = [
        Transfer(need, action.stage)
        for action in everything
        for need in needs(action, schedule)
        if need.stage != action.stage
    ]
    assert sorted(map(str, sent)) == sorted(map(str, needed))
    for transfer in sent:
        ends = {schedule.layout.rank_of[transfer.after.stage], schedule.layout.rank_of[transfer.to]}
        assert is_local(transfer, schedule.layout) == (len(ends) == 1)


def test_no_gradient_comes_back_where_none_is_wanted() -> None:
    layout = Layout((0, 1, 2), frozenset({(0, 1), (0, 2), (1, 2)}), frozenset({(0, 1), (1, 2)}))
    schedule = one_f_one_b(Layout.loop(3), 1).with_layout(layout)
    assert needs(Action(2, Kind.FORWARD, 0), schedule) == (Action(0, Kind.FORWARD, 0), Action(1, Kind.FORWARD, 0))
    assert needs(Action(0, Kind.BACKWARD, 0), schedule) == (Action(0, Kind.FORWARD, 0), Action(1, Kind.BACKWARD, 0))
    assert transfers(Action(2, Kind.BACKWARD, 0), schedule) == (Transfer(Action(2, Kind.BACKWARD, 0), 1),)
