"""A cut as a value: it can be printed, compared, edited, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from pipework.errors import CutError, InputError
from pipework.split.marks import Mark, Marks, SplitPoint

_WORDS = {SplitPoint.BEGINNING: "before", SplitPoint.END: "after"}
_REMEDY = (
    'write {"cuts": [...]}, each cut one of {"before": NAME}, {"after": NAME}, {"pipe_split": NUMBER}, '
    'with "call": NUMBER beside a name for a later call of that module; numbers count from 0'
)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CutPoint:
    """A cut before or after one call of a module; `call` counts the module's calls in one forward, from 0.

    >>> print(CutPoint("layers.4"), CutPoint("shared", pipework.SplitPoint.END, call=2), sep="; ")
    before layers.4; after shared, call 2
    """

    module: str
    point: SplitPoint = SplitPoint.BEGINNING
    call: int = 0

    def __str__(self) -> str:
        return f"{_WORDS[self.point]} {self.module}" + (f", call {self.call}" if self.call else "")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PipeSplit:
    """A cut where `pipe_split()` is met; `number` counts these in one forward, from 0.

    >>> print(PipeSplit(1))
    pipe_split() 1
    """

    number: int

    def __str__(self) -> str:
        return f"pipe_split() {self.number}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CutPoints:
    """All the cuts of a model. `pipeline(model, ..., split_spec=points)` cuts there and nowhere else.

    There is one stage more than there are points; a `pipe_split()` in the model that is not among them is passed over.
    Raises `CutError` for anything that is no cut, and where one is there twice.

    >>> points = CutPoints((CutPoint("layers.4"), CutPoint("layers.8.mlp")))
    >>> print(points)
    before layers.4
    before layers.8.mlp
    >>> CutPoints.from_json(points.to_json()) == points
    True
    """

    points: tuple[CutPoint | PipeSplit, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        for i, point in enumerate(self.points):
            if not isinstance(point, CutPoint | PipeSplit):
                raise CutError(f"{point!r} is no cut", remedy="use CutPoint or PipeSplit")
            if point in self.points[:i]:
                raise CutError(f"the cut {point} is there twice", remedy="remove one; no stage can be empty")

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[CutPoint | PipeSplit]:
        return iter(self.points)

    def __str__(self) -> str:
        return "\n".join(map(str, self.points)) or "no cut"

    def marks(self) -> Marks:
        """The same for a capture."""
        at: dict[str, list[Mark]] = {}
        for point in self.points:
            if isinstance(point, CutPoint):
                at.setdefault(point.module, []).append(Mark(point.point, point.call))
        return Marks(at, frozenset(point.number for point in self.points if isinstance(point, PipeSplit)))

    def to_json(self) -> str:
        """The cuts as text, one a line."""
        lines = ",\n".join(f"    {json.dumps(_object(point))}" for point in self.points)
        return f'{{\n  "cuts": [\n{lines}\n  ]\n}}\n' if lines else '{\n  "cuts": []\n}\n'

    @classmethod
    def from_json(cls, text: str, where: str = "") -> CutPoints:
        """The cuts that `to_json` wrote; raises `InputError` for other text, and says that it is in `where`."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            line = f"line {error.lineno}, column {error.colno}"
            raise InputError(
                "the cut is not JSON", where=f"{where}, {line}" if where else line, why=error.msg, remedy=_REMEDY
            ) from None
        if not (isinstance(found, dict) and found.keys() == {"cuts"} and isinstance(found["cuts"], list)):
            raise InputError("there is no list of cuts", where=where, remedy=_REMEDY)
        return cls(tuple(_point(item, i, where) for i, item in enumerate(found["cuts"])))

    def save(self, path: str | Path) -> None:
        """Write a file that `load` reads; raises `InputError` where it cannot be written."""
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}", remedy="name a file in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> CutPoints:
        """The cuts in a file; raises `InputError` where it cannot be read, or holds something else."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise InputError(f"cannot read {path}: {why}", remedy="name a file that CutPoints.save wrote") from error
        return cls.from_json(text, str(path))


def _object(point: CutPoint | PipeSplit) -> dict[str, Any]:
    if isinstance(point, PipeSplit):
        return {"pipe_split": point.number}
    return {_WORDS[point.point]: point.module} | ({"call": point.call} if point.call else {})


def _point(item: Any, index: int, where: str) -> CutPoint | PipeSplit:
    match item:
        case {"pipe_split": number, **others} if _counts(number) and not others:
            return PipeSplit(number)
        case {"before": str(name), **others} if name and _is_call(others):
            return CutPoint(name, SplitPoint.BEGINNING, **others)
        case {"after": str(name), **others} if name and _is_call(others):
            return CutPoint(name, SplitPoint.END, **others)
    raise InputError(f"cut {index} is {json.dumps(item)}", where=where, remedy=_REMEDY)


def _is_call(others: dict[str, Any]) -> bool:
    return not others or (others.keys() == {"call"} and _counts(others["call"]))


def _counts(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
