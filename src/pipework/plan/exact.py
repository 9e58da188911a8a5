"""Numbers without rounding."""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm


def whole(numbers: Iterable[float]) -> list[int]:
    """The numbers, all multiplied by one factor that makes them whole; every float is a fraction of integers.

    >>> whole([0.5, 0.75, 2])
    [2, 3, 8]
    """
    fractions = [number.as_integer_ratio() for number in numbers]
    factor = lcm(*(denominator for _, denominator in fractions))
    return [numerator * (factor // denominator) for numerator, denominator in fractions]
