"""Moving receives ahead, so that a value can arrive while its rank still computes something else.

as lowered   receive 0F0>1  1F0  send 1F0>2  receive 0F1>1  1F1 ...
advanced     receive 0F0>1  receive 0F1>1  1F0  send 1F0>2  1F1 ...
"""

from __future__ import annotations

from collections.abc import Sequence

from pipework.plan.program import Compute, Instruction, Receive
from pipework.plan.prove import play
from pipework.plan.schedule import Schedule

# An instruction with its place in the global order of all ranks' instructions; both ends of a transfer have one place.
Placed = tuple[int, Instruction]


def advance(programs: Sequence[Sequence[Placed]], schedule: Schedule, window: int) -> list[list[Instruction]]:
    """Each rank's instructions, with receives up to `window` of its actions ahead of their places.

    Two actions that overlap count as one, and nothing goes between them.

    No receive overtakes another one, nor any transfer with the same rank. One by one, receives go back towards their
    places where otherwise the programs could not finish with transfers that block both ends.
    """
    ahead = [_moved(program, schedule, window) for program in programs]
    instructions = [[instruction for _, instruction in program] for program in ahead]
    for reached in play(instructions):
        # Of all that is left, the first in the global order is held up, by a receive that went past it. So what the
        # receives at which the ranks stand went past includes it, or something before it on its rank.
        _, rank, begin, end = min(
            held_up for rank, begin in enumerate(reached) if (held_up := _held_up(ahead[rank], rank, begin))
        )
        ahead[rank][begin : end + 1] = [ahead[rank][end], *ahead[rank][begin:end]]
        instructions[rank][begin : end + 1] = [instruction for _, instruction in ahead[rank][begin : end + 1]]
    return instructions


def _moved(program: Sequence[Placed], schedule: Schedule, window: int) -> list[Placed]:
    moved: list[Placed] = []
    for place, instruction in program:
        position = len(moved)
        if isinstance(instruction, Receive):
            position = _earliest(moved, schedule.layout.rank_of[instruction.transfer.after.stage], schedule, window)
        moved.insert(position, (place, instruction))
    return moved


def _earliest(before: Sequence[Placed], peer: int, schedule: Schedule, window: int) -> int:
    """How far ahead a receive from `peer` may go."""
    earliest, passed = len(before), 0
    for position in range(len(before) - 1, -1, -1):
        _, instruction = before[position]
        if isinstance(instruction, Compute):
            if passed == window:
                break
            _, other = before[position - 1]
            if not (position and isinstance(other, Compute) and other.action in schedule.overlapped):
                earliest, passed = position, passed + 1
        elif isinstance(instruction, Receive) or schedule.layout.rank_of[instruction.transfer.to] == peer:
            break
    return earliest


def _held_up(program: Sequence[Placed], rank: int, begin: int) -> tuple[int, int, int, int] | None:
    """What the receives from `begin` on were moved past, if anything: its place, the rank, and where both stand."""
    end = begin
    while end < len(program) and isinstance(program[end][1], Receive):
        end += 1
    if begin < end < len(program) and program[end][0] < program[begin][0]:
        return program[end][0], rank, begin, end
    return None
