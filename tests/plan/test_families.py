"""Against figures found elsewhere (torch's own orders, closed forms, the papers' tables), and what holds for all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.errors import ScheduleError
from pipework.plan import FAMILIES, Costs, Family, Kind, Layout, Schedule, bound, check, lower, simulate

FIGURES = json.loads((Path(__file__).parent / "data" / "families.json").read_text())


def costs_of(case: Mapping[str, Any]) -> Costs:
    def each(name: str) -> float | tuple[float, ...]:
        return tuple(case[name]) if isinstance(case[name], list) else case[name]

    return Costs(each("forward"), each("input_gradient"), each("weight_gradient"), case["transfer"])


@pytest.mark.parametrize("case", FIGURES["cases"], ids=lambda case: case["id"])
def test_known_figures(case: Mapping[str, Any]) -> None:
    family, costs = FAMILIES[case["family"]], costs_of(case)
    options = {"costs": costs} if case.get("heeded") else {"slices": case["slices"]} if "slices" in case else {}
    schedule = family.build(family.layout(case["ranks"], case.get("per_rank")), case["microbatches"], **options)
    check(schedule)
    timeline = simulate(schedule, costs)
    found = {
        "makespan": timeline.makespan,
        "span": timeline.span,
        "peaks": list(timeline.peaks),
        "peak": max(timeline.peaks),
    }
    assert {name: found[name] for name in case["expected"]} == case["expected"]


@pytest.mark.parametrize("case", FIGURES["rates"], ids=lambda case: case["id"])
def test_the_bubble_rates_of_the_zero_bubble_paper(case: Mapping[str, Any]) -> None:
    """ZB-2p depends on how much an input gradient releases: all but 32h of the 34h + 5as per token (its section 4)."""
    hidden, scores = case["hidden"], 5 * case["heads"] * case["sequence"]
    released = (2 * hidden + scores) / (34 * hidden + scores)
    costs = replace(costs_of(case), released_by_input_gradient=released)
    for name, rate in case["rates"].items():
        schedule = FAMILIES[name].plan(Layout.loop(case["ranks"]), case["microbatches"], costs)
        assert abs(simulate(schedule, costs).bubble_of_span - rate) < case["tolerance"], name


@pytest.mark.parametrize("case", FIGURES["rates"], ids=lambda case: case["id"])
def test_its_closed_forms(case: Mapping[str, Any]) -> None:
    p, v, m = case["ranks"], case["per_rank_interleaved"], case["microbatches"]
    # In whole microseconds, so that floats add up without rounding; all of a stage times v, so that a v-th is whole.
    f, i, w, c = (round(case[name] * 1000) for name in ("forward", "input_gradient", "weight_gradient", "transfer"))

    def bubble(name: str, per_rank: int, transfer: int) -> float:
        schedule = FAMILIES[name].build(Layout.loop(p, per_rank), m)
        return simulate(schedule, Costs(f, i, w, transfer)).span - per_rank * m * (f + i + w)

    assert bubble("one_f_one_b", 1, c) == (p - 1) * (f + i + w) + c * (2 * (p - 1) * m // p + 2 * (p - 2))
    assert bubble("interleaved_one_f_one_b", v, c * v) == (p - 1) * (f + i + w) + c * v * (2 * p * v - 2)
    assert bubble("zero_bubble_h1", 1, c) == (p - 1) * (f + i - w) + 4 * (p - 1) * c
    assert bubble("zero_bubble_h2", 1, c) == (p - 1) * (f + i - 2 * w) + 2 * (p - 1) * c


def test_dual_pipe_v_is_the_published_order() -> None:
    schedule = FAMILIES["dual_pipe_v"].build(Layout.vee(4), 10)
    rows: list[str] = []
    for order in schedule.orders:
        row = ",".join(map(str, order))
        for action in schedule.overlapped:
            row = re.sub(rf"(?<![^,]){action},([^,]+)", rf"({action};\1)", row)
        rows.append(row)
    assert rows == FIGURES["dual_pipe_v"]


counts = st.integers(1, 6), st.integers(1, 20)
durations = st.tuples(*[st.integers(1, 9)] * 3)


@given(*counts, durations)
def test_closed_forms_of_one_stage_per_rank(p: int, m: int, fiw: tuple[int, int, int]) -> None:
    turn = sum(fiw)
    gpipe, alternating = (
        simulate(FAMILIES[name].build(Layout.loop(p), m), Costs(*fiw)) for name in ("gpipe", "one_f_one_b")
    )
    assert gpipe.makespan == alternating.makespan == (m + p - 1) * turn
    assert gpipe.peaks == (m,) * p
    assert alternating.peaks == tuple(min(p - rank, m) for rank in range(p))


@given(*counts, st.integers(1, 5))
def test_closed_form_of_slices(p: int, m: int, slices: int) -> None:
    timeline = simulate(FAMILIES["sequence_one_f_one_b"].build(Layout.loop(p), m, slices=slices))
    assert timeline.makespan == 3 * (m * slices + p - 1)
    assert timeline.peaks == tuple(min(p - rank + slices - 1, m * slices) for rank in range(p))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_closed_form_of_chimera(half: int, units: int, duration: int) -> None:
    p, m = 2 * half, 2 * half * units
    schedule = FAMILIES["chimera"].build(Layout.bidirectional(p), m)
    timeline = simulate(schedule, Costs(duration, duration, 0))
    assert timeline.makespan == (2 * m + p - 2) * duration
    assert all(half + 1 <= peak <= p for peak in timeline.peaks)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_closed_form_of_hanayo(p: int, waves: int, units: int, duration: int) -> None:
    schedule = FAMILIES["hanayo"].build(Layout.vee(p, 2 * waves), p * units)
    timeline = simulate(schedule, Costs(duration, duration, 0))
    assert timeline.makespan == (4 * waves * p * units + 2 * p - 2) * duration
    assert timeline.peaks == tuple((2 * waves - 1) * p + 1 + rank for rank in range(p))


@given(st.integers(1, 8), st.integers(0, 9))
def test_what_less_memory_costs(p: int, more: int) -> None:
    m = 2 * p + more
    for name, times in (("v_half", 3), ("v_min", 4)):
        assert simulate(FAMILIES[name].build(Layout.vee(p), m)).makespan - 6 * m < times * p


@given(st.integers(1, 5), st.integers(0, 9), st.integers(2, 9), st.integers(1, 5))
def test_closed_forms_of_dual_pipe(p: int, more: int, f: int, w: int) -> None:
    """F and I equally long, W not longer: then each rank idles for as long as the paper says."""
    w, m = min(f, w), 2 * p + more
    costs = Costs(f, f, w)
    bubble = (p - 1) * ((2 * f + w) + (f + w) - 3 * w)
    folded = simulate(FAMILIES["dual_pipe_v"].build(Layout.vee(p), m), costs)
    assert folded.span == 2 * m * (2 * f + w) + bubble
    assert folded.peaks == (2 * p + 1,) * p
    both = simulate(FAMILIES["dual_pipe"].build(Layout.bidirectional(2 * p), 2 * m), costs)
    assert both.span == 2 * m * (2 * f + w) + bubble
    assert both.peaks == (2 * p + 1,) * 2 * p


@given(st.integers(1, 5), st.integers(0, 9))
def test_zero_bubble_means_that_no_rank_idles_between_its_first_and_its_last_action(p: int, more: int) -> None:
    m = 2 * p - 1 + more
    for name, work in (("zero_bubble_h2", 3 * m), ("zero_bubble_2p", 3 * m), ("zero_bubble_v", 6 * m)):
        family = FAMILIES[name]
        assert simulate(family.build(family.layout(p), m)).span == work
        assert simulate(family.plan(family.layout(p), m, Costs())).span == work


@st.composite
def built(draw: st.DrawFn) -> tuple[Family, Schedule, Costs]:
    """A family's schedule for random counts, and random costs, which it heeds if it can."""
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    ranks = draw(st.integers(1, 5))
    several = [2, 3, 4] if family.place == Layout.loop and family.per_rank > 1 else [family.per_rank]
    per_rank = draw(st.sampled_from([2, 4] if family.name == "hanayo" else several))
    layout = family.layout(ranks if family.least == 1 else 2 * ranks, per_rank)
    microbatches = draw(st.integers(family.smallest(layout), 16))
    each = st.tuples(*[st.integers(1, 9)] * layout.stages)
    costs = Costs(draw(each), draw(each), draw(each), draw(st.integers(0, 3)))
    return family, family.plan(layout, microbatches, costs), costs


@given(built())
def test_each_is_a_schedule_that_can_be_carried_out(case: tuple[Family, Schedule, Costs]) -> None:
    family, schedule, costs = case
    check(schedule)
    lower(schedule)
    assert schedule.name == family.name
    assert schedule.trains == family.trains == (family.name != "forward_only")
    assert simulate(schedule, costs).makespan >= bound(schedule, costs)
    ranks = schedule.layout.ranks
    if schedule.microbatches_of is None:
        every_skip = frozenset((u, v) for v in range(schedule.layout.stages) for u in range(v))
        check(schedule.with_layout(Layout(schedule.layout.rank_of, every_skip)))
    for peak, limit in zip(simulate(schedule).peaks, limits(family.name, schedule), strict=True):
        assert peak <= limit, ranks


def limits(name: str, schedule: Schedule) -> list[int]:
    """The most activations that each rank may keep, as the papers have it."""
    p, m, stages = schedule.layout.ranks, schedule.microbatches, schedule.layout.stages
    per_rank = stages // p
    width = -(-m // max(1, m // p))
    everything = per_rank * m
    each: dict[str, list[int]] = {
        "one_f_one_b": [p - rank for rank in range(p)],
        "interleaved_one_f_one_b": [(per_rank - 1) * width + 2 * (p - rank) - 1 for rank in range(p)],
        "zero_bubble_h1": [p] * p,
        "zero_bubble_h2": [2 * p - 1] * p,
        "zero_bubble_1p": [p] * p,
        "zero_bubble_2p": [2 * p] * p,
        "interleaved_zero_bubble": [(per_rank - 1) * width + p] * p,
        "zero_bubble_v": [2 * p] * p,
        "v_half": [2 * (p // 2) + 2] * p,
        "v_min": [2 * ((p + 1) // 3) + 2] * p,
        "hanayo": [stages] * p,
        "dual_pipe_v": [2 * p + 1] * p,
        "dual_pipe": [p + 1] * p,
        "chimera": [p] * p,
        "sequence_one_f_one_b": [p - rank + schedule.slices - 1 for rank in range(p)],
    }
    return [min(limit, everything) for limit in each.get(name, [everything] * p)]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_smallest_number_of_microbatches(family: Family) -> None:
    layout = family.layout(4)
    smallest = family.smallest(layout)
    check(family.build(layout, smallest))
    with pytest.raises(ScheduleError, match=f"use at least {smallest} microbatch"):
        family.build(layout, smallest - 1)


def test_1f1b_does_not_lose_the_last_ranks_first_forward() -> None:
    last = FAMILIES["one_f_one_b"].build(Layout.loop(4), 8).orders[3]
    assert " ".join(map(str, last)) == " ".join(f"3F{m} 3B{m}" for m in range(8))


def test_1f1b_follows_the_stages_not_the_ranks() -> None:
    backwards = Layout((2, 1, 0), Layout.loop(3).edges)
    assert simulate(FAMILIES["one_f_one_b"].build(backwards, 6)).peaks == (1, 2, 3)
    assert simulate(FAMILIES["zero_bubble_1p"].build(backwards, 6)).peaks == (3, 3, 3)


def test_looped_bfs_goes_back_through_the_microbatches_in_reverse() -> None:
    order = FAMILIES["looped_bfs"].build(Layout.loop(1), 3).orders[0]
    assert [action.microbatch for action in order if action.kind is Kind.BACKWARD] == [2, 1, 0]


def test_memory_is_a_limit_that_is_kept() -> None:
    costs = Costs((1, 2, 1, 1), activation=(3, 2, 2, 1), released_by_input_gradient=0.5)
    for memory in (3, 4.5, 20):
        schedule = FAMILIES["zero_bubble_1p"].build(Layout.loop(4), 9, costs=costs, memory=memory)
        check(schedule)
        assert max(simulate(schedule, costs).peaks) <= memory
    with pytest.raises(ScheduleError, match="allow memory=3 or more"):
        FAMILIES["zero_bubble_1p"].build(Layout.loop(4), 9, costs=costs, memory=2.5)


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        ("gpipe", Layout.loop(2, 2), "use looped_bfs"),
        ("one_f_one_b", Layout.vee(2), "use interleaved_one_f_one_b"),
        ("zero_bubble_h1", Layout.loop(2, 2), "use interleaved_zero_bubble"),
        ("zero_bubble_2p", Layout.loop(2, 2), "use interleaved_zero_bubble"),
        ("interleaved_one_f_one_b", Layout.loop(4), "or one_f_one_b for one stage per rank"),
        ("interleaved_one_f_one_b", Layout.vee(2), "are on ranks 0, 1, 1, 0"),
        ("interleaved_zero_bubble", Layout((0, 1, 0), frozenset()), "are on ranks 0, 1, 0"),
        ("zero_bubble_v", Layout.loop(2, 2), r"into 4 stages and use Layout.vee\(2\)"),
        ("hanayo", Layout.loop(2, 2), r"use Layout.vee\(2, per_rank=2\)"),
        ("v_min", Layout.loop(3), r"into 6 stages and use Layout.vee\(3\)"),
        ("dual_pipe_v", Layout.loop(3), r"into 6 stages and use Layout.vee\(3\)"),
        ("dual_pipe", Layout.bidirectional(3), r"use Layout.bidirectional\(4\)"),
        ("chimera", Layout.vee(2), "edge 1>2 leads from one to the other"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_one_that_does(name: str, layout: Layout, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        FAMILIES[name].build(layout, 4)
