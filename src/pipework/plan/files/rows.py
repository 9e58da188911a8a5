"""Schedules as rows of actions, in the text form of torch.distributed.pipelining.

One row per rank. A schedule's rows hold what is computed, a program's also what is sent and received:

    0F0,0F1,0I0,0W0,(0F2;0B1)OVERLAP_F_B            stage, kind, microbatch; two that run at once
    0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0I0,0W0      SEND names the stage that made it, RECV the one that needs it

B is a full backward, I and W are its two parts. Older files know no I: there B is the first part where W is the second,
and BW is a full backward. Which it is shows: I is in the one form only, W without I in the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.check import check
from pipework.plan.files.cells import Dialect, Rows
from pipework.plan.files.text import File, name_of, read, write
from pipework.plan.layout import Layout
from pipework.plan.program import Compute, Instruction, Program, Receive, Send
from pipework.plan.prove import prove
from pipework.plan.rules import Transfer, is_local, needs, transfers
from pipework.plan.schedule import Schedule


def write_csv(schedule: Schedule, file: File) -> None:
    """Write the orders of a schedule, one row per rank, to a path or an open text file.

    What rows cannot say is left out: the name and the edges. Raises ScheduleError for sequences in slices, which rows
    cannot tell from whole ones, and for stages that are recomputed. `write_json` writes everything.

    >>> import sys
    >>> from pipework.plan import Layout, one_f_one_b
    >>> write_csv(one_f_one_b(Layout.loop(2), microbatches=2), sys.stdout)
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1
    """
    if schedule.slices != 1:
        raise ScheduleError(
            f"{schedule.name} cuts sequences into {schedule.slices} slices, which rows of actions cannot say",
            remedy="write it as JSON",
        )
    if schedule.recomputed:
        raise ScheduleError(
            f"{schedule.name} has stages that are recomputed, which rows of actions cannot say",
            remedy="write it as JSON, or without them (schedule.recomputing([])), to be named again where it is read",
        )
    rows: list[list[str]] = []
    for order in schedule.orders:
        rows.append([])
        actions = iter(order)
        for action in actions:
            other = next(actions, None) if action in schedule.overlapped else None
            rows[-1].append(str(action) if other is None else f"({action};{other})OVERLAP_F_B")
    write(file, "".join(",".join(row) + "\n" for row in rows))


def read_csv(
    file: File, layout: Layout | None = None, *, dialect: Dialect | None = None, checked: bool = True
) -> Schedule:
    r"""The schedule whose orders are in a file, one row per rank, from a path or an open file.

    Unless a layout is given, each stage is on the rank whose row has it, and feeds the next. Empty cells stand for idle
    time and are passed over. The schedule gets the name of the file. `dialect` is what B means, `"current"` or
    `"older"`, should it not show.

    Raises ScheduleError with line and column for what is not an action, for a file that holds sends and receives (see
    `read_programs`), and unless `checked=False`, if the schedule is not one (see `check`); InputError if the file
    cannot be read.

    >>> import io
    >>> print(read_csv(io.StringIO("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")).describe())
    the text: 2 ranks, 2 stages, 2 microbatches, 8 actions
    """
    rows = Rows(name_of(file), read(file), dialect)
    for cell in (cell for row in rows.rows for cell in row if cell.is_transfer):
        raise rows.wrong(cell, f"{cell} is a transfer, not an action", "read what ranks send with read_programs")
    schedule = rows.schedule(layout)
    if checked:
        check(schedule)
    return schedule


def write_programs(programs: Sequence[Program], file: File) -> None:
    """Write what each rank computes, sends and receives, one row per rank, to a path or an open text file.

    Raises ScheduleError where a stage has several others at the other end of its transfers, as after a skip connection:
    a cell names one end alone.

    >>> import sys
    >>> from pipework.plan import Layout, gpipe, lower
    >>> write_programs(lower(gpipe(Layout.loop(2), microbatches=1)), sys.stdout)
    0F0,0SEND_F0,0RECV_B0,0B0
    1RECV_F0,1F0,1B0,1SEND_B0
    """
    rows: list[str] = []
    for program in programs:
        cells: dict[str, Instruction] = {}
        for instruction in program.instructions:
            cell = _cell(instruction)
            if cell in cells:
                raise ScheduleError(
                    f"{cell} would stand for both {cells[cell]} and {instruction}",
                    where=f"rank {program.rank}",
                    remedy="write the schedule as JSON, and lower it where it is read",
                )
            cells[cell] = instruction
        rows.append(",".join(cells))
    write(file, "".join(row + "\n" for row in rows))


def read_programs(
    file: File, layout: Layout | None = None, *, dialect: Dialect | None = None, checked: bool = True
) -> tuple[Program, ...]:
    r"""The programs in a file, one row per rank, from a path or an open file.

    As `read_csv`, but with sends and receives, which must all be there, in an order in which they finish even if each
    blocks both its ends (see `prove`), unless `checked=False`. UNSHARD, RESHARD and REDUCE_GRAD are passed over: when
    to gather and scatter sharded parameters is no part of a program.

    >>> import io
    >>> first, second = read_programs(io.StringIO("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n"))
    >>> print(*second.instructions, sep=", ")
    receive 0F0>1, 1F0, 1B0, send 1B0>0
    """
    rows = Rows(name_of(file), read(file), dialect)
    schedule = rows.schedule(layout)
    programs = tuple(Program(rank, tuple(rows.instructions(rank, schedule))) for rank in range(len(rows.rows)))
    if checked:
        check(schedule)
        for program in programs:
            _require_transfers(program, schedule)
        prove(programs)
    return programs


def _cell(instruction: Instruction) -> str:
    if isinstance(instruction, Compute):
        return str(instruction.action)
    after = instruction.transfer.after
    way = "F" if after.kind is Kind.FORWARD else "B"
    if isinstance(instruction, Send):
        return f"{after.stage}SEND_{way}{after.microbatch}"
    return f"{instruction.transfer.to}RECV_{way}{after.microbatch}"


def _require_transfers(program: Program, schedule: Schedule) -> None:
    """Raises ScheduleError unless a rank sends and receives what it must, once, and before it is needed."""
    layout = schedule.layout
    done: set[Instruction] = set()
    wanted: set[Instruction] = set()
    for position, instruction in enumerate(program.instructions):
        where = f"rank {program.rank}, position {position}"
        if instruction in done:
            raise ScheduleError(f"{instruction} comes twice", where=where)
        done.add(instruction)
        if isinstance(instruction, Compute):
            arriving = {Receive(each) for each in _arriving(instruction.action, schedule)}
            for late in sorted(arriving - done, key=str):
                raise ScheduleError(f"{instruction} comes before {late}", where=where, remedy=f"put {late} before it")
            leaving = transfers(instruction.action, schedule)
            wanted |= arriving | {Send(each) for each in leaving if not is_local(each, layout)}
    ends = {instruction for instruction in done if not isinstance(instruction, Compute)}
    for odd in sorted(wanted ^ ends, key=str):
        said = "is missing" if odd in wanted else "is one too many"
        raise ScheduleError(f"{odd} {said}", where=f"rank {program.rank}", remedy="lower the schedule anew")


def _arriving(action: Action, schedule: Schedule) -> list[Transfer]:
    """What must have come from other ranks before `action`."""
    arriving = (Transfer(need, action.stage) for need in needs(action, schedule))
    return [transfer for transfer in arriving if not is_local(transfer, schedule.layout)]
