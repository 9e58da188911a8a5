from __future__ import annotations

from itertools import pairwise

import pytest

from pipework.errors import ScheduleError
from pipework.plan import Action, Compute, Instruction, Layout, Program, Receive, Send, Transfer, gpipe, lower, prove


def program(rank: int, text: str) -> Program:
    """`0F0 >0F0>1 <1B0>0`: compute, send, receive."""

    def transfer(word: str) -> Transfer:
        after, to = word[1:].split(">")
        return Transfer(Action.parse(after), int(to))

    def instruction(word: str) -> Instruction:
        match word[0]:
            case ">":
                return Send(transfer(word))
            case "<":
                return Receive(transfer(word))
            case _:
                return Compute(Action.parse(word))

    return Program(rank, tuple(map(instruction, text.split())))


def test_a_crossed_pair_is_found_and_drawn() -> None:
    crossed = [program(0, "0F0 <1B0>0 >0F0>1"), program(1, "1B0 <0F0>1 >1B0>0")]
    with pytest.raises(ScheduleError) as caught:
        prove(crossed)
    assert caught.value.why == (
        "rank 0 waits at receive 1B0>0 for send 1B0>0\n"
        "    <- rank 1 waits at receive 0F0>1 for send 0F0>1\n"
        "    <- rank 0, and the circle is closed"
    )
    prove([crossed[0], program(1, "1B0 >1B0>0 <0F0>1")])


def test_sends_block_too() -> None:
    with pytest.raises(ScheduleError, match="rank 0 waits at send 0F0>1 for receive 0F0>1"):
        prove([program(0, "0F0 >0F0>1 <1F0>0"), program(1, "1F0 >1F0>0 <0F0>1")])


def test_two_transfers_in_another_order_at_the_other_end_are_found() -> None:
    with pytest.raises(ScheduleError, match="2 of 2 ranks wait for ever"):
        prove([program(0, "0F0 0F1 >0F0>1 >0F1>1"), program(1, "<0F1>1 <0F0>1 1F0 1F1")])


def test_a_circle_of_three_is_found_with_who_hangs_on_it() -> None:
    circle = ["0F0 <2F0>0 >0F0>1", "1F0 <0F0>1 >1F0>2", "2F0 <1F0>2 >2F0>0", "<3F9>3"]
    with pytest.raises(ScheduleError, match="4 of 4") as caught:
        prove([program(rank, text) for rank, text in enumerate(circle)])
    assert caught.value.why.count("<-") == 3


def test_a_transfer_with_one_end_is_found() -> None:
    with pytest.raises(ScheduleError, match="rank 1 waits at receive 0F0>1 for send 0F0>1\n    <- no rank does this"):
        prove([program(0, "0F0"), program(1, "<0F0>1")])


def test_what_is_not_computed_is_not_sent() -> None:
    with pytest.raises(ScheduleError, match="send 0F0>1 comes before 0F0 is computed\n  where: rank 0, position 0"):
        prove([program(0, ">0F0>1 0F0"), program(1, "<0F0>1")])


def test_any_two_neighbouring_transfers_crossed_between_two_ranks_are_found() -> None:
    first, second = lower(gpipe(Layout.loop(2), 3), window=0)
    places = [at for at, instruction in enumerate(second.instructions) if not isinstance(instruction, Compute)]
    for here, there in pairwise(places):
        crossed = list(second.instructions)
        crossed[here], crossed[there] = crossed[there], crossed[here]
        with pytest.raises(ScheduleError):
            prove([first, Program(1, tuple(crossed))])
