"""How the figures of a timeline are written: times, and the memory of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

_MANY = 8  # peaks are listed for so many ranks, and only bounded for more


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's symbol, empty for plain counts, and how many of it make one second (one count).

    >>> Unit("ms", 1e3).text(0.0123456)
    '12.35 ms'
    """

    symbol: str
    per_second: float

    def text(self, time: float) -> str:
        """The time with four significant digits, or to the unit, and with the symbol."""
        amount = time * self.per_second
        return (f"{amount:.4g}" if amount < 1e4 else f"{amount:.0f}") + self.suffix

    @property
    def suffix(self) -> str:
        """The symbol with a space before it, if there is one."""
        return f" {self.symbol}" if self.symbol else ""


def unit_for(longest: float, unit: str) -> Unit:
    """The unit in which times up to `longest`, given in `Costs.unit`, have few digits before the point.

    >>> unit_for(0.25, "s").text(0.25), unit_for(0.25, "").text(0.25)
    ('250 ms', '0.25')
    """
    if not unit:
        return Unit("", 1.0)
    if longest >= 10:
        return Unit("s", 1.0)
    return Unit("ms", 1e3) if longest >= 0.01 else Unit("µs", 1e6)


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


def peaks_text(peaks: Sequence[float], separator: str) -> str:
    """Each rank's peak; one for all where they are equal, and the least and the most where there are many.

    >>> [peaks_text(peaks, ", ") for peaks in ((3, 2, 1), (4, 4, 4), range(1, 33))]
    ['3, 2, 1', '4', '1–32']
    """
    least, most = memory_text(min(peaks)), memory_text(max(peaks))
    if least == most:
        return least
    return f"{least}–{most}" if len(peaks) > _MANY else separator.join(map(memory_text, peaks))
