"""In what a timeline's times are written: seconds, milliseconds or microseconds, or counted in forwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from pipework.plan import Action, Kind, Timeline


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's symbol, empty for plain counts, and how many of it make one second (or one forward).

    >>> Unit("ms", 1e3).text(0.0123456)
    '12.35 ms'
    """

    symbol: str
    per_second: float

    def text(self, seconds: float) -> str:
        """The time with four significant digits, or to the unit, and with the symbol."""
        amount = seconds * self.per_second
        return (f"{amount:.4g}" if amount < 1e4 else f"{amount:.0f}") + self.suffix

    @property
    def suffix(self) -> str:
        """The symbol with a space before it, if there is one."""
        return f" {self.symbol}" if self.symbol else ""


def is_counted(timeline: Timeline) -> bool:
    """Whether the times are counts of forwards: those of a simulation whose first forward costs exactly 1.

    Nothing else can tell unit costs from seconds, and a cost of exactly one second is not found in practice.
    """
    costs = timeline.costs
    if costs.duration(Action(0, Kind.FORWARD, 0)) != 1:
        return False
    close = 1e-9 * timeline.makespan  # adding up the times has rounded the durations
    return all(
        math.isclose(span.end - span.start, costs.duration(span.action), abs_tol=close) for span in timeline.spans
    )


def unit_for(seconds: float) -> Unit:
    """The unit in which times up to `seconds` have few digits before the point.

    >>> unit_for(0.25).symbol
    'ms'
    """
    if seconds >= 10:
        return Unit("s", 1.0)
    return Unit("ms", 1e3) if seconds >= 0.01 else Unit("µs", 1e6)


def memory_text(amount: float) -> str:
    """Activation memory: a plain count of microbatches while it is small, else bytes.

    >>> memory_text(2.5), memory_text(3 * 2**30)
    ('2.5', '3 GiB')
    """
    for symbol in ("", " KiB", " MiB", " GiB"):
        if amount < 1024:
            return f"{amount:.3g}{symbol}"
        amount /= 1024
    return f"{amount:.3g} TiB"
