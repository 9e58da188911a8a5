"""The cells of a file of rows: what is written where, and which actions and transfers that means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.files.text import MANY, STAGES
from pipework.plan.layout import Layout
from pipework.plan.program import Compute, Instruction, Receive, Send
from pipework.plan.rules import Transfer
from pipework.plan.schedule import Schedule

Dialect = Literal["current", "older"]

_KINDS: dict[Dialect, dict[str, Kind]] = {
    "current": {kind.value: kind for kind in Kind},
    "older": {"F": Kind.FORWARD, "BW": Kind.BACKWARD, "B": Kind.INPUT_GRADIENT, "W": Kind.WEIGHT_GRADIENT},
}
_ENDS = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
_SHARDING = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
_NUMBER = "(0|[1-9][0-9]{0,8})"
_ONE = re.compile(f"{_NUMBER}(?:(F|BW|B|I|W|{'|'.join(_ENDS)}){_NUMBER}|{'|'.join(_SHARDING)})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One action or one end of a transfer as it is written; `joined` if it runs at once with the next."""

    line: int
    column: int
    stage: int
    word: str
    microbatch: int
    joined: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.word}{self.microbatch}"

    @property
    def is_transfer(self) -> bool:
        """Whether it sends or receives; else it computes."""
        return self.word in _ENDS


@final
class Rows:
    """A file of rows, one per rank; raises ScheduleError with line and column where it cannot be one."""

    def __init__(self, file: str, text: str, dialect: Dialect | None) -> None:
        self.file = file
        if text.count(",") + text.count("\n") > MANY:
            raise ScheduleError(f"the file has more than {MANY} cells", where=file)
        self.rows = [
            list(self._cells(number, line)) for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1)
        ]
        if not any(self.rows):
            raise ScheduleError("the file holds no action", where=file, remedy="give one row of actions per rank")
        self.kinds = _KINDS[dialect or self._dialect()]

    def wrong(self, cell: Cell, what: str, remedy: str, why: str = "") -> ScheduleError:
        """The error about a cell."""
        return ScheduleError(what, where=f"{self.file}, line {cell.line}, column {cell.column}", why=why, remedy=remedy)

    def _cells(self, line: int, text: str) -> Iterator[Cell]:
        column = 1
        for written in text.removesuffix("\r").split(","):
            pair = _PAIR.fullmatch(written.strip(" "))
            for number, one in enumerate(pair.groups() if pair else (written,)):
                found = _ONE.fullmatch(one.strip(" "))
                if found and found[2]:
                    yield Cell(line, column, int(found[1]), found[2], int(found[3]), bool(pair) and number == 0)
                elif pair or not (found or written.strip(" ") == ""):
                    raise self.wrong(
                        Cell(line, column, 0, "", 0),
                        f"{written[:40]!r} is not an action",
                        "write a stage, a kind and a microbatch, such as 2F0, and a comma before the next",
                    )
            column += len(written) + 1

    def _dialect(self) -> Dialect:
        first: dict[str, Cell] = {}
        for cell in (cell for row in self.rows for cell in row):
            first.setdefault(cell.word, cell)
        if "I" in first and "BW" in first:
            raise self.wrong(
                first["BW"],
                "it is not clear what B means",
                "write B for a full backward, I and W for its parts",
                why=f"{first['I']} is of the current form, {first['BW']} of the older one",
            )
        return "older" if "I" not in first and ("W" in first or "BW" in first) else "current"

    def schedule(self, layout: Layout | None) -> Schedule:
        """What is computed, as a schedule; sends and receives are passed over."""
        rows = [[cell for cell in row if not cell.is_transfer] for row in self.rows]
        orders = tuple(tuple(map(self._action, row)) for row in rows)
        taken: dict[int, set[int]] = {}
        for action in (action for order in orders for action in order):
            taken.setdefault(action.stage, set()).add(action.microbatch)
        microbatches = set[int]().union(*taken.values())
        self._require_no_gap("microbatch", microbatches, [(cell.microbatch, cell) for row in rows for cell in row])
        if layout is None:
            if len(taken) > STAGES:
                raise ScheduleError(f"the file has more than {STAGES} stages", where=self.file)
            self._require_no_gap("stage", set(taken), [(cell.stage, cell) for row in rows for cell in row])
            layout = self._layout(rows, len(taken))
        if len(rows) != layout.ranks:
            raise ScheduleError(
                f"the file has {len(rows)} rows, but there are {layout.ranks} ranks",
                where=self.file,
                remedy="give one row per rank, and the layout that it was written for",
            )
        overlapped = frozenset(self._action(cell) for row in rows for cell in row if cell.joined)
        shares = _shares(layout, taken, microbatches)
        return Schedule(Path(self.file).stem, layout, len(microbatches), orders, overlapped, microbatches_of=shares)

    def _action(self, cell: Cell) -> Action:
        if cell.word not in self.kinds:
            raise self.wrong(
                cell,
                f"{cell} is of no known kind",
                "read it in the other dialect",
                why=f"the kinds of this one are {' '.join(self.kinds)}",
            )
        return Action(cell.stage, self.kinds[cell.word], cell.microbatch)

    def _require_no_gap(self, what: str, found: set[int], cells: Sequence[tuple[int, Cell]]) -> None:
        """Raises ScheduleError unless the numbers found are 0, 1, 2, ..."""
        for number, cell in cells:
            if number >= len(found):
                gap = next(each for each in range(len(found)) if each not in found)
                raise self.wrong(
                    cell,
                    f"{cell} is of {what} {number}, but nothing is of {what} {gap}",
                    f"count each {what} from 0 on",
                )

    def _layout(self, rows: Sequence[Sequence[Cell]], stages: int) -> Layout:
        """Each stage on the rank whose row has it, feeding the next."""
        rank_of: dict[int, int] = {}
        for rank, row in enumerate(rows):
            for cell in row:
                if rank_of.setdefault(cell.stage, rank) != rank:
                    raise self.wrong(
                        cell,
                        f"{cell} is on rank {rank}, but stage {cell.stage} on rank {rank_of[cell.stage]}",
                        "keep all that a stage does in one row",
                    )
        chain = Layout.loop(stages).edges if stages else frozenset[tuple[int, int]]()
        return Layout(tuple(rank_of[stage] for stage in range(stages)), chain)

    def instructions(self, rank: int, schedule: Schedule) -> Iterator[Instruction]:
        """The row of a rank as a program."""
        for cell in self.rows[rank]:
            if not cell.is_transfer:
                yield Compute(self._action(cell))
            elif cell.stage >= schedule.layout.stages:
                raise self.wrong(cell, f"{cell} is of an unknown stage", f"there are {schedule.layout.stages} stages")
            else:
                yield self._end(cell, schedule)

    def _end(self, cell: Cell, schedule: Schedule) -> Send | Receive:
        layout, stage = schedule.layout, cell.stage
        sends, forward = cell.word.startswith("SEND"), cell.word.endswith("F")
        if forward:
            others = layout.feeds(stage) if sends else layout.fed_by(stage)
        else:
            others = layout.gradient_to(stage) if sends else layout.gradient_from(stage)
        if len(others) != 1:
            raise self.wrong(
                cell,
                f"{cell} does not say with which stage",
                "read the schedule alone, and lower it for its layout",
                why=f"there are {len(others)} at the other end of stage {stage}",
            )
        source, target = (stage, others[0]) if sends else (others[0], stage)
        kind = Kind.FORWARD
        if not forward:
            kind = Kind.INPUT_GRADIENT if schedule.splits(source, cell.microbatch) else Kind.BACKWARD
        transfer = Transfer(Action(source, kind, cell.microbatch), target)
        return Send(transfer) if sends else Receive(transfer)


def _shares(layout: Layout, taken: Mapping[int, set[int]], every: set[int]) -> tuple[tuple[int, ...], ...] | None:
    """Which microbatches each stage takes, if replicas share them out; None if all take all, or should."""
    shares = [taken.get(stage, set[int]()) for stage in range(layout.stages)]
    if all(share == every for share in shares) or any(shares[u] != shares[v] for u, v in layout.edges):
        return None
    return tuple(tuple(sorted(share)) for share in shares)
