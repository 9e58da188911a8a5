from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given

from pipework.errors import ScheduleError
from pipework.plan import Action, Layout, Schedule, check
from tests.strategies import is_legal, schedules, tampered


def by_hand(*orders: str, microbatches: int = 1) -> Schedule:
    layout = Layout.loop(len(orders))
    return Schedule("by hand", layout, microbatches, tuple(tuple(map(Action.parse, order.split())) for order in orders))


def overlapping(overlapped: str, order: str) -> Schedule:
    schedule = by_hand(order, microbatches=1 + order.count("F1") + order.count("F2"))
    return replace(schedule, overlapped=frozenset(map(Action.parse, overlapped.split())))


def sharing(*shares: tuple[int, ...]) -> Schedule:
    return replace(by_hand("0F0 0F1", "1F0 1F1", microbatches=2), microbatches_of=shares)


@given(schedules())
def test_legal_schedules_pass(schedule: Schedule) -> None:
    assert is_legal(schedule)
    check(schedule)


@given(tampered())
@example(by_hand("0F0 0B0 0W0"))
@example(by_hand("0F0 0B0 0I0 0W0"))
@example(by_hand("0F0 0I0"))
@example(by_hand("0F0 0F1 0B0", microbatches=2))
def test_exactly_the_illegal_ones_are_refused(schedule: Schedule) -> None:
    if is_legal(schedule):
        check(schedule)
    else:
        with pytest.raises(ScheduleError):
            check(schedule)


def test_a_circle_is_drawn() -> None:
    with pytest.raises(ScheduleError) as caught:
        check(by_hand("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1", microbatches=2))
    assert caught.value.why == (
        "rank 0 waits at 0B0 for 1B0\n    <- rank 1 waits at 1F1 for 0F1\n    <- rank 0, and the circle is closed"
    )


def test_a_rank_can_wait_for_itself() -> None:
    with pytest.raises(ScheduleError, match="rank 0 waits at 0B0 for 0F0\n    <- rank 0, and the circle is closed"):
        check(by_hand("0B0 0F0"))


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (by_hand("0F0 0B0 0F0"), "0F0 is done twice\n  where: by hand, rank 0, position 2"),
        (by_hand("0F0 1F0 0B0", "1B0"), "1F0 is not at home: rank 1 holds stage 1"),
        (by_hand("0F0 7F0 0B0"), "7F0 is of an unknown stage: there are 1"),
        (by_hand("0F0 0F1 0B0"), "0F1 is of an unknown microbatch: there are 1"),
        (by_hand("0F0 0B0 0I0 0W0"), "0B0 is a full backward of what is also done in two parts"),
        (by_hand("0F0", "1F0 1B0"), "incomplete: 0B0 is never done\n  remedy: add it to the order of rank 0"),
        (replace(by_hand("0F0"), orders=()), "orders for 0 ranks, but its layout has 1"),
        (by_hand("", microbatches=0), "has 0 microbatches"),
        (overlapping("0F1", "0F0 0F1"), "0F1 should overlap with what follows it, but is the last on its rank"),
        (overlapping("0F0 0F1", "0F0 0F1 0F2"), "0F0 and 0F1 should both overlap .*: only two run at once"),
        (overlapping("0B0", "0F0 0F1"), "0B0 of by hand should overlap with what follows it, but is never done"),
        (overlapping("0F0", "0F0 0B0"), "rank 0 waits at 0F0 and 0B0 for 0F0\n    <- rank 0, and the circle is closed"),
        (replace(by_hand("0F0 0F1 0F2", microbatches=3), slices=2), "3 microbatches, in sequences of 2 slices"),
        (replace(by_hand("0F1 0F0", microbatches=2), slices=2), "rank 0 waits at 0F1 for 0F0"),
        (replace(by_hand("0F0 0F1 0B0 0B1", microbatches=2), slices=2), "rank 0 waits at 0B0 for 0B1"),
        (sharing((0,)), "microbatches for 1 stages, but its layout has 2"),
        (sharing((0, 1), (1, 0)), "gives stage 1 the microbatches \\(1, 0\\)"),
        (sharing((0, 1), (0,)), "gives stage 1 other microbatches than stage 0, which feeds it"),
        (sharing((0,), (0,)), "gives microbatch 1 to no stage"),
        (
            replace(sharing((0,), (0,)), slices=2),
            "gives stage 0 the microbatches \\(0,\\)\n  remedy: give whole sequences",
        ),
        (sharing((), ()).with_layout(Layout((0, 1), frozenset())), "gives microbatch 0 to no stage"),
    ],
)
def test_what_is_wrong_is_named(schedule: Schedule, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        check(schedule)


def test_legality_depends_on_the_edges() -> None:
    backwards_at_once = by_hand("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0", microbatches=2)
    check(backwards_at_once.with_layout(Layout((0, 1), frozenset())))
    with pytest.raises(ScheduleError, match="cannot proceed: 2 of 2 ranks"):
        check(backwards_at_once)
