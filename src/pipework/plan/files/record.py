"""Schedules as JSON."""

from __future__ import annotations

import json
from typing import NoReturn, cast, final

from pipework.errors import ScheduleError
from pipework.plan.action import Action
from pipework.plan.check import check
from pipework.plan.files.text import MANY, STAGES, File, name_of, read, write
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule

FORMAT = 1
_FIELDS = (
    "format",
    "name",
    "microbatches",
    "slices",
    "rank_of",
    "edges",
    "gradients",
    "microbatches_of",
    "overlapped",
    "recomputed",
    "orders",
)


def write_json(schedule: Schedule, file: File) -> None:
    """Write a schedule, with its layout and all its data, to a path or an open text file.

    >>> import io
    >>> from pipework.plan import Layout, gpipe
    >>> written = io.StringIO()
    >>> write_json(gpipe(Layout.loop(2), microbatches=2), written)
    >>> print(written.getvalue())
    {
      "format": 1,
      "name": "gpipe",
      "microbatches": 2,
      "slices": 1,
      "rank_of": [0, 1],
      "edges": [[0, 1]],
      "gradients": [[0, 1]],
      "microbatches_of": null,
      "overlapped": [],
      "recomputed": [],
      "orders": [
        "0F0 0F1 0B0 0B1",
        "1F0 1F1 1B0 1B1"
      ]
    }
    <BLANKLINE>
    """
    layout = schedule.layout
    values = (
        FORMAT,
        schedule.name,
        schedule.microbatches,
        schedule.slices,
        layout.rank_of,
        sorted(layout.edges),
        sorted(layout.gradients or ()),
        schedule.microbatches_of,
        sorted(map(str, schedule.overlapped)),
        sorted(schedule.recomputed),
    )
    lines = [f"  {json.dumps(field)}: {json.dumps(value)}," for field, value in zip(_FIELDS, values, strict=False)]
    orders = ",\n".join(f'    "{" ".join(map(str, order))}"' for order in schedule.orders)
    write(file, "\n".join(["{", *lines, '  "orders": [', orders, "  ]", "}", ""]))


def read_json(file: File, *, checked: bool = True) -> Schedule:
    """The schedule in a file that `write_json` wrote, from a path or an open file; its fingerprint is the same.

    Raises ScheduleError for anything else, and unless it is `checked=False`, if the schedule is not one (see `check`);
    InputError if the file cannot be read.

    >>> import io
    >>> from pipework.plan import Layout, gpipe
    >>> written = io.StringIO()
    >>> write_json(gpipe(Layout.loop(2), microbatches=2), written)
    >>> read_json(io.StringIO(written.getvalue())) == gpipe(Layout.loop(2), microbatches=2)
    True
    """
    schedule = _Record(name_of(file), read(file)).schedule()
    if checked:
        check(schedule)
    return schedule


@final
class _Record:
    """The fields of a file, each believed only after a look at its type and its size."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        try:
            fields: object = json.loads(
                text, object_pairs_hook=_unique, parse_int=_whole, parse_float=_refuse, parse_constant=_refuse
            )
        except json.JSONDecodeError as error:
            raise self.wrong("the file is not JSON", f"line {error.lineno}, column {error.colno}", error.msg) from error
        except (_UnexpectedError, RecursionError) as error:
            raise self.wrong("the file is not the JSON of a schedule", why=str(error)) from error
        if not isinstance(fields, dict):
            raise self.wrong("the file is not the JSON of a schedule", why="it is no object")
        self.fields = cast(dict[str, object], fields)
        if self.fields.get("format") != FORMAT:
            raise self.wrong("the file is not of a format that is known", why=f'"format" must be {FORMAT}')
        for field in sorted(self.fields.keys() ^ set(_FIELDS)):
            said = "is not known" if field in self.fields else "is missing"
            raise self.wrong(f"the field {field!r} {said}", why=f"the fields are {', '.join(_FIELDS)}")

    def wrong(self, what: str, where: str = "", why: str = "") -> ScheduleError:
        return ScheduleError(
            what,
            where=f"{self.file}, {where}" if where else self.file,
            why=why,
            remedy="write the file with pipework.plan.write_json",
        )

    def schedule(self) -> Schedule:
        orders = tuple(tuple(self.actions(f"orders[{n}]", row)) for n, row in enumerate(self.rows("orders")))
        actions = sum(map(len, orders))
        rank_of = self.numbers("rank_of", self.fields["rank_of"])
        microbatches = self.count("microbatches")
        # Every microbatch has actions: a larger number is not worth a look at all those that are missing.
        if microbatches > actions or actions > MANY:
            raise self.wrong(f"{microbatches} microbatches do not go with {actions} actions", "microbatches")
        if len(rank_of) > STAGES:
            raise self.wrong(f"there are more than {STAGES} stages", "rank_of")
        if max(rank_of, default=0) >= len(orders):
            raise self.wrong(f"a stage is on rank {max(rank_of)}, but there are orders for {len(orders)}", "rank_of")
        edges, gradients = self.edges("edges"), self.edges("gradients")
        if len(edges) * microbatches > MANY:
            raise self.wrong(f"{len(edges)} edges and {microbatches} microbatches are too many", "edges")
        return Schedule(
            self.text("name"),
            Layout(rank_of, edges, gradients),
            microbatches,
            orders,
            frozenset(self.actions("overlapped", self.rows("overlapped"))),
            self.count("slices"),
            self.shares(),
            frozenset(self.numbers("recomputed", self.fields["recomputed"])),
        )

    def shares(self) -> tuple[tuple[int, ...], ...] | None:
        field = "microbatches_of"
        if self.fields[field] is None:
            return None
        return tuple(self.numbers(f"{field}[{n}]", row) for n, row in enumerate(self.rows(field)))

    def rows(self, field: str) -> list[object]:
        found = self.fields[field]
        if not isinstance(found, list):
            raise self.wrong("a list is expected", field)
        return cast(list[object], found)

    def text(self, field: str) -> str:
        found = self.fields[field]
        if not isinstance(found, str) or found != found.encode(errors="replace").decode():
            raise self.wrong("a text is expected", field)
        return found

    def count(self, field: str) -> int:
        found = self.fields[field]
        if type(found) is not int or found < 1:
            raise self.wrong("a number of 1 or more is expected", field)
        return found

    def numbers(self, where: str, found: object) -> tuple[int, ...]:
        if not isinstance(found, list):
            raise self.wrong("a list of numbers is expected", where)
        numbers = cast(list[object], found)
        for number in numbers:
            if type(number) is not int or number < 0:
                raise self.wrong("a list of numbers of 0 or more is expected", where)
        return tuple(cast(list[int], numbers))

    def edges(self, field: str) -> frozenset[tuple[int, int]]:
        edges = [self.numbers(f"{field}[{n}]", row) for n, row in enumerate(self.rows(field))]
        for edge in edges:
            if len(edge) != 2:
                raise self.wrong("pairs of stages are expected", field)
        return frozenset((edge[0], edge[1]) for edge in edges)

    def actions(self, where: str, found: object) -> list[Action]:
        """Actions, from one text with spaces between them or from a list of texts."""
        if isinstance(found, str):
            found = found.split(" ") if found else []
        if not isinstance(found, list):
            raise self.wrong("actions are expected", where)
        return [self.action(f"{where}, action {n}", each) for n, each in enumerate(cast(list[object], found))]

    def action(self, where: str, found: object) -> Action:
        if not isinstance(found, str) or len(found) > 20:
            raise self.wrong("an action such as 2F0 is expected", where)
        try:
            return Action.parse(found)
        except ScheduleError as error:
            raise self.wrong(error.what, where, error.why) from error


class _UnexpectedError(ValueError):
    """Something that JSON has and a schedule does not."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _UnexpectedError("an object names a field twice")
    return fields


def _whole(text: str) -> int:
    if len(text) > 9:
        raise _UnexpectedError(f"the number {text[:9]}... is too large")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise _UnexpectedError(f"{text[:20]} is not a whole number")
