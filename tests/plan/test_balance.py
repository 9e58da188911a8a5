from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from math import inf, nan

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipework.errors import CutError
from pipework.plan import balance

costs = st.one_of(st.integers(0, 6), st.floats(0, 1e300), st.sampled_from([0.1, 0.2, 0.3]))
crossings = st.one_of(st.integers(0, 3), st.just(inf), st.floats(0, 10))


def worth(cuts: tuple[int, ...], items: list[float], crossing: list[float]) -> tuple[Fraction, ...]:
    """The heaviest part, the total crossing and the sum of squares, in exact arithmetic."""
    parts = [items[begin:end] for begin, end in pairwise([0, *cuts, len(items)])]
    assert all(parts)
    weights = [sum(map(Fraction, part), Fraction()) for part in parts]
    total = sum((Fraction(crossing[cut]) for cut in cuts), Fraction())
    return max(weights), total, sum((weight**2 for weight in weights), Fraction())


@given(st.lists(st.tuples(costs, crossings), min_size=1, max_size=9), st.integers(1, 5))
def test_it_is_the_best_of_all_cuts(items: list[tuple[float, float]], parts: int) -> None:
    weights, crossing = [cost for cost, _ in items], [each for _, each in items]
    allowed = [at for at in range(1, len(items)) if crossing[at] != inf]
    every = list(combinations(allowed, parts - 1))
    if not every:
        with pytest.raises(CutError, match="cannot be cut"):
            balance(weights, parts, crossing)
        return
    found = balance(weights, parts, crossing)
    assert found in every
    assert worth(found, weights, crossing) == min(worth(cuts, weights, crossing) for cuts in every)


@given(st.lists(costs, min_size=1, max_size=30), st.integers(1, 30))
def test_without_crossings_only_the_heaviest_part_counts(items: list[float], parts: int) -> None:
    assume(parts <= len(items))
    free = [0.0] * len(items)
    assert balance(items, parts) == balance(items, parts, free)


def test_the_exact_sum_decides_where_rounded_sums_would_tie() -> None:
    assert balance([2.0**53, 1, 1, 2.0**53 + 2], parts=2, crossing=[0, 9, 9, 0]) == (3,)
    assert balance([2.0**53, 1, 2.0**53], parts=2, crossing=[0, 5, 4]) == (2,)


@pytest.mark.parametrize(
    ("items", "parts", "crossing", "says"),
    [
        ([], 1, None, "0 items cannot be cut into 1 parts\n  why: .*\n  remedy: give at least one item"),
        ([1, 1], 3, None, "1 places where a cut is allowed\n  remedy: ask for 1 to 2 parts"),
        ([1, 1], 0, None, "ask for 1 to 2 parts"),
        ([1, 1, 1], 3, [0, inf, 0], "1 places where a cut is allowed"),
        ([1, -1], 1, None, "a cost is -1"),
        ([1, inf], 1, None, "a cost is inf"),
        ([1, nan], 1, None, "a cost is nan"),
        ([1, 1], 1, [0, nan], "a crossing is nan"),
        ([1, 1], 1, [0], "1 crossing costs for 2 items"),
    ],
)
def test_what_cannot_be_is_refused(items: list[float], parts: int, crossing: list[float] | None, says: str) -> None:
    with pytest.raises(CutError, match=says):
        balance(items, parts, crossing)
