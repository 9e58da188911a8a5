"""What one rank can be asked to do: one stage, one kind of work, one microbatch, written `2F0` as in the literature."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import final

from pipework.errors import ScheduleError


@final
class Kind(Enum):
    """The kind of work in an action.

    A backward is done in one go (`BACKWARD`), or split into the part that other stages wait for (`INPUT_GRADIENT`)
    and the part that nobody waits for (`WEIGHT_GRADIENT`).

    >>> Kind("F")
    <Kind.FORWARD: 'F'>
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"

    # Members are singletons, so identity is equality; Enum's own hash is a Python call, at every look-up of an action.
    __hash__ = object.__hash__


@final
@dataclass(frozen=True, slots=True)
class Action:
    """One stage's work of one kind on one microbatch; stages and microbatches are counted from 0.

    >>> print(Action(2, Kind.FORWARD, 0))
    2F0
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action written `text`; raises ScheduleError for anything that `str` of an action does not give.

        >>> Action.parse("12W7")
        Action(stage=12, kind=<Kind.WEIGHT_GRADIENT: 'W'>, microbatch=7)
        """
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ScheduleError(
                f"{text!r} is not an action",
                why="an action is a stage, one of F B I W, and a microbatch, such as 2F0",
                remedy="write the stage's number, the kind's letter and the microbatch's number, without spaces",
            )
        return cls(int(found[1]), Kind(found[2]), int(found[3]))


_WRITTEN = re.compile(r"(0|[1-9][0-9]*)([FBIW])(0|[1-9][0-9]*)")
