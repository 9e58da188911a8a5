"""Cutting a row of costs into contiguous parts of about equal weight."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite

from pipework.errors import CutError
from pipework.plan.exact import whole


def balance(costs: Sequence[float], parts: int, crossing: Sequence[float] | None = None) -> tuple[int, ...]:
    """Where to cut a row of items into contiguous, non-empty parts so that the heaviest part is as light as can be.

    The result has `parts - 1` ascending positions; position i cuts before item i. Among all best cuts it is one of
    least total `crossing`, where `crossing[i]` is what a cut before item i costs, and `math.inf` forbids it
    (`crossing[0]` is never used); among those, of least sum of squares, which evens out the parts below the heaviest.
    Exact, for floats too: nothing is rounded on the way.

    Raises CutError for negative or infinite costs, and where so many parts cannot be had.

    >>> balance([1, 1, 1, 3, 1, 1], parts=3)
    (3, 4)
    >>> balance([1, 1, 1, 1, 4], parts=3, crossing=[0, 9, 9, 1, 9])
    (3, 4)
    """
    crossing = [0.0] * len(costs) if crossing is None else crossing
    if len(crossing) != len(costs):
        raise CutError(f"{len(crossing)} crossing costs for {len(costs)} items", remedy="give one per item")
    for name, numbers in (("cost", costs), ("crossing", [each for each in crossing if each != inf])):
        if bad := [number for number in numbers if not (isfinite(number) and number >= 0)]:
            raise CutError(f"a {name} is {bad[0]}", remedy="give finite numbers, 0 or more")
    # Items that no cut may part make one block; `begins` are the positions before which a block begins, and the end.
    begins = [i for i in range(len(costs)) if i == 0 or crossing[i] != inf] + [len(costs)]
    blocks = len(begins) - 1
    if not 1 <= parts <= blocks:
        raise CutError(
            f"{len(costs)} items cannot be cut into {parts} parts",
            why=f"there are {max(blocks - 1, 0)} places where a cut is allowed" if parts > blocks else "",
            remedy=f"ask for 1 to {blocks} parts" if blocks > 0 else "give at least one item",
        )
    weights = whole(costs)
    total = [0, *accumulate(weights)]
    upto = [total[begin] for begin in begins]
    heaviest = _least_bound(upto, parts)
    cuts = _cheapest_cuts(upto, whole([0 if each == inf else each for each in crossing]), begins, parts, heaviest)
    return tuple(begins[cut] for cut in cuts)


def _least_bound(upto: Sequence[int], parts: int) -> int:
    """The weight of the heaviest part in the best cut; `upto[i]` is the weight of all blocks before block i."""
    low, high = max(after - before for before, after in pairwise(upto)), upto[-1]
    while low < high:
        middle = (low + high) // 2
        if _parts_within(upto, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


def _parts_within(upto: Sequence[int], bound: int) -> int:
    """How few parts do if none may weigh more than `bound`: fill each as far as it goes."""
    parts, begin = 0, 0
    while begin < len(upto) - 1:
        begin = bisect_right(upto, upto[begin] + bound) - 1
        parts += 1
    return parts


def _cheapest_cuts(
    upto: Sequence[int], crossing: Sequence[int], begins: Sequence[int], parts: int, bound: int
) -> list[int]:
    """The blocks before which to cut, with no part heavier than `bound`: of least crossing, then of least squares."""
    blocks = len(upto) - 1
    # least[i]: the least (crossing, sum of squares) when the first i blocks make so many parts; last[i]: where the
    # last one begins.
    least: list[tuple[int, int] | None] = [(0, 0), *[None] * blocks]
    chosen: list[list[int]] = []
    for _ in range(parts):
        after: list[tuple[int, int] | None] = [None] * (blocks + 1)
        last = [0] * (blocks + 1)
        for end in range(1, blocks + 1):
            for begin in range(bisect_left(upto, upto[end] - bound), end):
                before = least[begin]
                if before is None:
                    continue
                crossed = before[0] + (crossing[begins[begin]] if begin else 0)
                sums = crossed, before[1] + (upto[end] - upto[begin]) ** 2
                best = after[end]
                if best is None or sums < best:
                    after[end], last[end] = sums, begin
        least = after
        chosen.append(last)
    cuts: list[int] = []
    end = blocks
    for last in reversed(chosen[1:]):
        end = last[end]
        cuts.append(end)
    return cuts[::-1]
