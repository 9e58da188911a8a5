from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.errors import ScheduleError
from pipework.plan import (
    FAMILIES,
    Action,
    Compute,
    Layout,
    Program,
    Receive,
    Schedule,
    Transfer,
    check,
    gpipe,
    interleaved_one_f_one_b,
    looped_bfs,
    lower,
    needs,
    one_f_one_b,
    prove,
    simulate,
)
from tests.strategies import schedules

windows = st.integers(0, 3)


def transfers_of(program: Program) -> list[Transfer]:
    return [each.transfer for each in program.instructions if not isinstance(each, Compute)]


def receives_of(program: Program, overlapped: frozenset[Action] = frozenset()) -> dict[Transfer, int]:
    """Before which of the rank's computes each receive stands; two at once are one."""
    computes, found = 0, dict[Transfer, int]()
    for instruction in program.instructions:
        computes += isinstance(instruction, Compute) and instruction.action not in overlapped
        if isinstance(instruction, Receive):
            found[instruction.transfer] = computes
    return found


def between(program: Program, one: int, other: int, layout: Layout) -> list[Transfer]:
    """The transfers between two ranks, in both directions, in the program's order."""
    return [
        each
        for each in transfers_of(program)
        if {layout.rank_of[each.after.stage], layout.rank_of[each.to]} == {one, other}
    ]


@given(schedules(), windows)
def test_programs_do_the_schedule_with_all_that_each_action_needs(schedule: Schedule, window: int) -> None:
    rank_of = schedule.layout.rank_of
    for program in lower(schedule, window):
        here = [each.action for each in program.instructions if isinstance(each, Compute)]
        assert tuple(here) == schedule.orders[program.rank]
        had: set[object] = set()
        for instruction in program.instructions:
            if isinstance(instruction, Compute):
                for need in needs(instruction.action, schedule):
                    local = rank_of[need.stage] == program.rank
                    assert (need if local else Receive(Transfer(need, instruction.action.stage))) in had
                had.add(instruction.action)
            assert instruction not in had
            had.add(instruction)


@given(schedules(), windows)
def test_nothing_comes_between_two_that_overlap(schedule: Schedule, window: int) -> None:
    for program in lower(schedule, window):
        for instruction, following in pairwise(program.instructions):
            if isinstance(instruction, Compute) and instruction.action in schedule.overlapped:
                assert isinstance(following, Compute)


@given(schedules(), windows)
def test_both_ends_of_every_pair_agree_on_the_order(schedule: Schedule, window: int) -> None:
    programs = lower(schedule, window)
    prove(programs)
    for one, other in combinations(range(schedule.layout.ranks), 2):
        ends = [between(programs[rank], one, other, schedule.layout) for rank in (one, other)]
        assert ends[0] == ends[1]


@given(schedules(), windows)
def test_receives_move_ahead_within_the_window_and_overtake_no_transfer_of_their_pair(
    schedule: Schedule, window: int
) -> None:
    layout = schedule.layout
    for before, after in zip(lower(schedule, 0), lower(schedule, window), strict=True):
        assert set(before.instructions) == set(after.instructions)
        was, now = receives_of(before, schedule.overlapped), receives_of(after, schedule.overlapped)
        assert list(was) == list(now)
        assert all(0 <= was[transfer] - now[transfer] <= window for transfer in was)
        for peer in range(layout.ranks):
            assert between(before, before.rank, peer, layout) == between(after, before.rank, peer, layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_receives_ahead(name: str) -> None:
    schedule = FAMILIES[name].build(FAMILIES[name].layout(4), 8)
    was = [receives_of(program) for program in lower(schedule, 0)]
    now = [receives_of(program) for program in lower(schedule, 1)]
    assert any(now[rank][transfer] < was[rank][transfer] for rank in range(4) for transfer in was[rank])


def test_a_window_lets_the_next_value_arrive_during_this_action() -> None:
    _, program = lower(gpipe(Layout.loop(2), 3), window=0)
    assert " ".join(map(str, program.instructions)).startswith("receive 0F0>1 receive 0F1>1 1F0 receive 0F2>1 1F1 1F2")
    _, program = lower(gpipe(Layout.loop(2), 3), window=1)
    assert " ".join(map(str, program.instructions)).startswith("receive 0F0>1 receive 0F1>1 receive 0F2>1 1F0 1F1 1F2")


def test_the_programs_are_the_same_every_time() -> None:
    schedule = interleaved_one_f_one_b(Layout.loop(3, 2, skips=[(0, 3), (1, 5)]), 6)
    assert lower(schedule) == lower(replace(schedule))


def test_one_rank_needs_no_transfers() -> None:
    (program,) = lower(interleaved_one_f_one_b(Layout.loop(1, 3), 4))
    assert transfers_of(program) == []


def test_what_is_no_schedule_is_not_lowered() -> None:
    schedule = one_f_one_b(Layout.loop(2), 2)
    with pytest.raises(ScheduleError, match="incomplete"):
        lower(replace(schedule, orders=(schedule.orders[0][:-1], schedule.orders[1])))
    with pytest.raises(ScheduleError, match="window=-1"):
        lower(schedule, window=-1)


def test_a_large_schedule_is_lowered() -> None:
    """32,768 actions: what takes more than linear time anywhere shows as a test that takes minutes."""
    schedule = interleaved_one_f_one_b(Layout.loop(16, per_rank=4), 256)
    programs = lower(schedule)
    assert sum(isinstance(each, Compute) for program in programs for each in program.instructions) == 32_768
    assert sum(map(len, map(transfers_of, programs))) == 2 * 2 * 63 * 256


def test_64_ranks_and_512_microbatches_go_through_every_phase() -> None:
    schedule = one_f_one_b(Layout.loop(64), 512)
    check(schedule)
    timeline = simulate(schedule)
    assert timeline.makespan == timeline.bound == (512 + 63) * 3
    assert timeline.peaks == tuple(range(64, 0, -1))
    assert timeline.busy == 64 * 512 * 3
    assert len(timeline.critical_path()) == 2 * 63 + 2 * 512
    programs = lower(schedule)  # proven as lowered, and again with receives ahead
    assert sum(map(len, map(transfers_of, programs))) == 2 * 2 * 63 * 512


def test_in_a_ring_some_receives_stay_so_that_the_programs_finish() -> None:
    """If every rank of a ring waits for its next forward before it sends its last one, all wait for each other."""
    schedule = looped_bfs(Layout.loop(4, 2), 8)
    programs = lower(schedule, 1)
    prove(programs)
    was = [receives_of(program) for program in lower(schedule, 0)]
    now = [receives_of(program) for program in programs]
    ahead = [was[rank][transfer] - now[rank][transfer] for rank in range(4) for transfer in was[rank]]
    assert set(ahead) == {0, 1}


def test_transfers_stand_where_their_values_come_to_exist() -> None:
    """A receive waits for the end of what it receives, not for its start: 1F2 goes before the receive of 2B1."""
    _, program, _ = lower(one_f_one_b(Layout.loop(3), 3), window=0)
    assert " ".join(map(str, program.instructions)) == (
        "receive 0F0>1 receive 0F1>1 1F0 send 1F0>2 receive 0F2>1 1F1 send 1F1>2 receive 2B0>1 1B0 send 1B0>0 "
        "1F2 send 1F2>2 receive 2B1>1 1B1 send 1B1>0 receive 2B2>1 1B2 send 1B2>0"
    )
