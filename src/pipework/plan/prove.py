"""The proof that programs finish, whatever the transport."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipework.errors import ScheduleError
from pipework.plan.action import Action
from pipework.plan.program import Compute, Instruction, Program, Receive, Send
from pipework.plan.walk import Wait, blocking_chain


def prove(programs: Sequence[Program]) -> None:
    """Raises ScheduleError unless the programs finish even if every transfer blocks both its ends until it is over.

    What finishes under this strictest rule finishes on every transport, buffered or not, and both ends of every pair of
    ranks see the transfers between them in the same order. `programs[rank]` is the program of that rank. Takes time in
    proportion to the number of instructions.

        rank 0  send 0F0>1     0B0 ...           rank 0  receive 1B0>0  <- waits for rank 1
        rank 1  receive 0F0>1  1F0 ...  passes   rank 1  receive 0F0>1  <- waits for rank 0     is refused

    >>> from pipework.plan import Transfer
    >>> sent = Transfer(Action.parse("0F0"), to=1)
    >>> prove([Program(0, (Compute(sent.after), Send(sent))), Program(1, (Receive(sent),))])
    """
    _require_made(programs)
    for reached in play([program.instructions for program in programs]):
        left = [program.instructions[start:] for program, start in zip(programs, reached, strict=True)]
        rank_of = {end: rank for rank, instructions in enumerate(left) for end in instructions}
        others = {rank: _other_end(instructions[0]) for rank, instructions in enumerate(left) if instructions}
        raise ScheduleError(
            f"the programs cannot finish: {len(others)} of {len(programs)} ranks wait for ever if transfers block",
            why=blocking_chain(
                {rank: Wait(str(left[rank][0]), str(other), rank_of.get(other)) for rank, other in others.items()}
            ),
            remedy="put both ends of every transfer at the same place in the order of all transfers; lower does",
        )


def play(programs: Sequence[Sequence[Instruction]]) -> Iterator[list[int]]:
    """Goes through all programs with transfers that block both ends, and ends when the programs do.

    Whenever no rank can go on it yields how many instructions each has done; whoever lets it continue has reordered
    some of those to come.
    """
    reached = [0] * len(programs)
    while True:
        waiting: dict[Instruction, int] = {}
        ready = list(range(len(programs)))
        while ready:
            rank = ready.pop()
            instructions = programs[rank]
            while reached[rank] < len(instructions):
                instruction = instructions[reached[rank]]
                if not isinstance(instruction, Compute):
                    other = waiting.pop(_other_end(instruction), None)
                    if other is None:
                        waiting[instruction] = rank
                        break
                    reached[other] += 1
                    ready.append(other)
                reached[rank] += 1
        if not waiting:
            return
        yield reached


def _other_end(instruction: Instruction) -> Instruction:
    if isinstance(instruction, Send):
        return Receive(instruction.transfer)
    assert isinstance(instruction, Receive), "only transfers have two ends"
    return Send(instruction.transfer)


def _require_made(programs: Sequence[Program]) -> None:
    """Raises ScheduleError if a rank sends what it has not computed yet."""
    for program in programs:
        computed: set[Action] = set()
        for position, instruction in enumerate(program.instructions):
            if isinstance(instruction, Compute):
                computed.add(instruction.action)
            elif isinstance(instruction, Send) and instruction.transfer.after not in computed:
                raise ScheduleError(
                    f"{instruction} comes before {instruction.transfer.after} is computed",
                    where=f"rank {program.rank}, position {position}",
                    remedy="compute an action before sending what it makes",
                )
