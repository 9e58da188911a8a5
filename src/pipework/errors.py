"""What pipework raises: every error says what happened, where, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PipeworkError(Exception):
    """An error in four parts, of which only the first is always there.

    >>> print(PipeworkError("stage 2 is empty", why="no operation lies between its cuts", remedy="remove one cut"))
    stage 2 is empty
      why: no operation lies between its cuts
      remedy: remove one cut
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        parts = (("where", where), ("why", why), ("remedy", remedy))
        super().__init__("\n".join([what, *(f"  {name}: {text}" for name, text in parts if text)]))

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the joined message, and lose the parts on the way between processes.
        return _rebuild, (type(self), self.what, self.where, self.why, self.remedy)


def _rebuild(kind: type[PipeworkError], what: str, where: str, why: str, remedy: str) -> PipeworkError:
    return kind(what, where=where, why=why, remedy=remedy)


class CaptureError(PipeworkError):
    """The model's forward could not be written down on the example input."""


class CutError(PipeworkError):
    """The model cannot be cut where it was asked."""


class ScheduleError(PipeworkError):
    """A schedule is incomplete, contradicts itself, or can never finish."""


class InputError(PipeworkError):
    """What was passed to a step, a pipe or a command does not fit."""


class MismatchError(PipeworkError):
    """Two things that must be equal differ: two ranks' plans, or a tensor and what was announced."""


class TransportError(PipeworkError):
    """A transfer between ranks failed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The names most like `name`, as the end of a sentence; empty when nothing is near.

    >>> nearest("layers.one", ["layers.1", "layers.onx", "head"])
    '; nearest existing: layers.onx, layers.1'
    """
    near = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; nearest existing: {', '.join(near)}" if near else ""
