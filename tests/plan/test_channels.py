"""Transfers in queues: what queues cannot do, when they cost nothing, and what they do to the peer's orders."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from pipework.errors import ScheduleError
from pipework.plan import (
    Action,
    Channels,
    Compute,
    Costs,
    Instruction,
    Layout,
    Program,
    Receive,
    Schedule,
    Send,
    Timeline,
    Transfer,
    lower,
    one_f_one_b,
    simulate,
)
from tests.plan.test_simulate import simulations
from tests.strategies import schedules

CHANNELS: tuple[Channels, ...] = get_args(Channels)


def ends(timeline: Timeline) -> list[float]:
    return [end for row in timeline.ends for end in row]


@given(simulations(), st.integers(0, 2))
def test_fewer_channels_are_never_faster(simulation: tuple[Schedule, Costs], window: int) -> None:
    schedule, costs = simulation
    programs = lower(schedule, window)
    rows = [ends(simulate(schedule, costs, channels, programs)) for channels in CHANNELS]
    assert rows[0] == ends(simulate(schedule, costs))
    for more, fewer in pairwise(rows):
        assert all(one <= other for one, other in zip(more, fewer, strict=True))


@given(simulations())
def test_a_channel_per_edge_is_free_where_no_transfer_outlasts_an_action(simulation: tuple[Schedule, Costs]) -> None:
    """The next value of an edge exists no sooner than one action later. Two at once make two values at once."""
    schedule, costs = simulation
    assume(not schedule.overlapped)
    edges = schedule.layout.edges
    delays = [costs.delay(*edge, schedule.layout) for edge in edges]
    shortest = min(costs.duration(action, schedule.recomputed) for order in schedule.orders for action in order)
    assume(max(delays, default=0.0) <= shortest)
    assert ends(simulate(schedule, costs, "edge")) == ends(simulate(schedule, costs))


@given(simulations())
def test_a_channel_per_edge_is_free_where_transfers_take_no_time(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    instant = Costs(costs.forward, costs.input_gradient, costs.weight_gradient)
    assert ends(simulate(schedule, instant, "edge")) == ends(simulate(schedule, instant))


@given(schedules())
def test_all_are_free_where_transfers_take_no_time_and_stand_in_the_order_of_their_values(schedule: Schedule) -> None:
    programs = lower(schedule, window=0)  # whose order is that of the ends in unit costs
    for channels in CHANNELS:
        assert ends(simulate(schedule, Costs(), channels, programs)) == ends(simulate(schedule))


def test_a_transfer_that_takes_no_time_still_holds_up_those_behind_it() -> None:
    schedule = one_f_one_b(Layout.loop(3), 4)
    costs = Costs(forward=(1.0, 1.0, 4.0))
    assert [simulate(schedule, costs, channels).makespan for channels in CHANNELS] == [30, 30, 30, 31]


def test_two_at_once_take_turns_in_a_channel() -> None:
    first, second = Action.parse("0F0"), Action.parse("0F1")
    orders = ((first, second), (Action.parse("1F0"), Action.parse("1F1")))
    schedule = Schedule("at once", Layout.loop(2), 2, orders, overlapped=frozenset({first}))
    makespans = [
        simulate(schedule, Costs(forward=(1.0, 0.0), transfer=5.0), channels).makespan for channels in CHANNELS
    ]
    assert makespans == [2 + 5, 2 + 10, 2 + 10, 2 + 10]


def peers(name: str, ranks: int, microbatches: int) -> tuple[Schedule, list[Program]]:
    """The order of the peer's computes, sends and receives, two stages per rank."""
    words = [[str(each) for each in row] for row in get_schedule_ops(name, ranks, microbatches, 2, with_comms=True)]
    orders = [[Action.parse(word) for word in row if re.fullmatch(r"\d+[FBIW]\d+", word)] for row in words]
    rank_of = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    kind_of = {(a.stage, a.microbatch): a.kind.value for order in orders for a in order if a.kind.value in "BI"}
    layout = Layout(tuple(rank_of[stage] for stage in range(2 * ranks)), Layout.loop(2 * ranks).edges)

    def instruction(word: str) -> Instruction | None:
        if found := re.fullmatch(r"(\d+)(SEND|RECV)_([FB])(\d+)", word):
            stage, forward, microbatch = int(found[1]), found[3] == "F", int(found[4])
            other = stage + 1 if forward == (found[2] == "SEND") else stage - 1
            start, to = (stage, other) if found[2] == "SEND" else (other, stage)
            kind = "F" if forward else kind_of[start, microbatch]
            transfer = Transfer(Action.parse(f"{start}{kind}{microbatch}"), to)
            return Send(transfer) if found[2] == "SEND" else Receive(transfer)
        return Compute(Action.parse(word)) if re.fullmatch(r"\d+[FBIW]\d+", word) else None

    programs = [Program(rank, tuple(filter(None, map(instruction, row)))) for rank, row in enumerate(words)]
    return Schedule(name, layout, microbatches, tuple(map(tuple, orders))), programs


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "free", "peers_rank", "our_ranks"),
    [
        ("InterleavedZeroBubble", 4, 8, 1036, 1208, [1044, 1148]),
        ("ZBVZeroBubble", 8, 16, 2093, 2349, [2102, 2681]),
        ("LoopedBFS", 4, 8, 1146, 1624, [1176, 1204]),
    ],
)
def test_what_one_queue_per_rank_costs_the_peers_order_of_transfers_and_ours(
    name: str, ranks: int, microbatches: int, free: int, peers_rank: int, our_ranks: list[float]
) -> None:
    schedule, programs = peers(name, ranks, microbatches)
    costs = Costs(20, 20, 20, 1)
    makespans = {channels: simulate(schedule, costs, channels, programs).makespan for channels in CHANNELS}
    assert makespans == {"free": free, "edge": free, "pair": free, "rank": peers_rank}
    ours = [lower(schedule, window) for window in (0, 1)]  # a receive ahead of its place holds up a whole rank's queue
    assert [simulate(schedule, costs, "rank", each).makespan for each in ours] == our_ranks
    assert [simulate(schedule, costs, "pair", each).makespan for each in ours] == [free, free]


def test_unknown_channels_and_other_programs_are_refused() -> None:
    schedule = one_f_one_b(Layout.loop(2), 2)
    first, second = lower(schedule)
    other = Send(Transfer(Action.parse("0F9"), 1))
    for programs, says in (
        ([first], "has 2 ranks"),
        ([second, first], "has 2 ranks"),
        (
            [first, Program(1, second.instructions[1:])],
            "rank 1 does less than one_f_one_b: receive 0F0>1",
        ),
        (
            [Program(0, (*first.instructions, other)), second],
            "rank 0 does more .*: send 0F9>1",
        ),
        ([first, Program(1, second.instructions[::-1])], "rank 1 has another order"),
        ([Program(0, first.instructions * 2), second], "rank 0 has another order"),
    ):
        with pytest.raises(ScheduleError, match=says):
            simulate(schedule, Costs(), "rank", programs)
    with pytest.raises(ScheduleError, match="no channels 'wire'"):
        simulate(schedule, Costs(), "wire")  # pyright: ignore[reportArgumentType]


def test_a_crossed_pair_is_drawn() -> None:
    schedule = one_f_one_b(Layout.loop(2), 1)
    first, second = lower(schedule, window=0)
    crossed = Program(0, (first.instructions[2], *first.instructions[:2], *first.instructions[3:]))
    assert simulate(schedule, Costs(), "edge", [crossed, second]).makespan == 6
    with pytest.raises(ScheduleError, match="wait in a circle") as caught:
        simulate(schedule, Costs(), "pair", [crossed, second])
    assert caught.value.why == "1B0>0\n    waits for 0F0>1\n    waits for 1B0>0"
