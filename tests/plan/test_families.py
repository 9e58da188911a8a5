"""Against figures found elsewhere: torch's own orders, closed forms, and the table of the zero-bubble paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipework.errors import ScheduleError
from pipework.plan import FAMILIES, Costs, Kind, Layout, check, lower, simulate

FIGURES = json.loads((Path(__file__).parent / "data" / "families.json").read_text())
LAYOUTS = {
    "gpipe": [Layout.loop(1), Layout.loop(4)],
    "one_f_one_b": [Layout.loop(1), Layout.loop(4)],
    "interleaved_one_f_one_b": [Layout.loop(1, 2), Layout.loop(2, 3), Layout.loop(4, 2)],
    "looped_bfs": [Layout.loop(1), Layout.loop(4, 2), Layout.vee(3)],
    "forward_only": [Layout.loop(1), Layout.loop(4, 2), Layout.vee(3)],
}


def costs_of(case: dict[str, Any]) -> Costs:
    def each(name: str) -> float | tuple[float, ...]:
        return tuple(case[name]) if isinstance(case[name], list) else case[name]

    return Costs(each("forward"), each("input_gradient"), each("weight_gradient"), case["transfer"])


@pytest.mark.parametrize("case", FIGURES["cases"], ids=lambda case: case["id"])
def test_known_figures(case: dict[str, Any]) -> None:
    layout = Layout.loop(case["ranks"], case["per_rank"])
    schedule = FAMILIES[case["family"]](layout, case["microbatches"])
    check(schedule)
    timeline = simulate(schedule, costs_of(case))
    found = {"makespan": timeline.makespan, "span": timeline.span, "peaks": list(timeline.peaks)}
    assert {name: found[name] for name in case["expected"]} == case["expected"]


@pytest.mark.parametrize("case", FIGURES["rates"], ids=lambda case: case["id"])
def test_the_papers_bubble_rate_and_its_closed_form(case: dict[str, Any]) -> None:
    p, m = case["ranks"], case["microbatches"]
    # In whole microseconds, so that floats add up without rounding.
    f, b, w, c = (round(case[name] * 1000) for name in ("forward", "input_gradient", "weight_gradient", "transfer"))
    timeline = simulate(FAMILIES["one_f_one_b"](Layout.loop(p), m), Costs(f, b, w, c))
    assert timeline.span - m * (f + b + w) == (p - 1) * (f + b + w) + c * (2 * (p - 1) * m // p + 2 * (p - 2))
    assert abs(timeline.bubble_of_span - case["one_f_one_b"]) < case["tolerance"]


@pytest.mark.parametrize("case", FIGURES["rates"], ids=lambda case: case["id"])
def test_interleaving_divides_the_bubble(case: dict[str, Any]) -> None:
    p, v, m = case["ranks"], case["per_rank_interleaved"], case["microbatches"]
    f, b, w, c = (round(case[name] * 1000) for name in ("forward", "input_gradient", "weight_gradient", "transfer"))
    schedule = FAMILIES["interleaved_one_f_one_b"](Layout.loop(p, v), m)
    # A stage is a v-th of the model on one rank; everything times v keeps the numbers whole.
    timeline = simulate(schedule, Costs(f, b, w, c * v))
    assert timeline.span - m * v * (f + b + w) == (p - 1) * (f + b + w) + c * v * (2 * p * v - 2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 8])
def test_each_runs_wherever_it_is_defined(name: str, microbatches: int) -> None:
    for layout in LAYOUTS[name]:
        schedule = FAMILIES[name](layout, microbatches)
        check(schedule)
        lower(schedule)
        assert schedule.name == name
        assert schedule.trains == (name != "forward_only")
        every_skip = Layout(layout.rank_of, frozenset((u, v) for v in range(layout.stages) for u in range(v)))
        check(schedule.with_layout(every_skip))
        lower(schedule.with_layout(every_skip))


def test_1f1b_does_not_lose_the_last_ranks_first_forward() -> None:
    last = FAMILIES["one_f_one_b"](Layout.loop(4), 8).orders[3]
    assert " ".join(map(str, last[:4])) == "3F0 3B0 3F1 3B1"


def test_1f1b_follows_the_stages_not_the_ranks() -> None:
    backwards = Layout((2, 1, 0), Layout.loop(3).edges)
    assert simulate(FAMILIES["one_f_one_b"](backwards, 6)).peaks == (1, 2, 3)


def test_looped_bfs_goes_back_through_the_microbatches_in_reverse() -> None:
    order = FAMILIES["looped_bfs"](Layout.loop(1), 3).orders[0]
    assert [action.microbatch for action in order if action.kind is Kind.BACKWARD] == [2, 1, 0]


@pytest.mark.parametrize(("microbatches", "ranks"), [(5, 2), (10, 3), (11, 4)])
def test_uneven_rounds_are_refused_with_a_number_that_works(microbatches: int, ranks: int) -> None:
    with pytest.raises(ScheduleError) as caught:
        FAMILIES["interleaved_one_f_one_b"](Layout.loop(ranks, 2), microbatches)
    works = int(caught.value.remedy.split()[1])
    check(FAMILIES["interleaved_one_f_one_b"](Layout.loop(ranks, 2), works))


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        ("gpipe", Layout.loop(2, 2), "use looped_bfs"),
        ("one_f_one_b", Layout.vee(2), "use interleaved_one_f_one_b"),
        ("interleaved_one_f_one_b", Layout.loop(4), "or one_f_one_b for one stage per rank"),
        ("interleaved_one_f_one_b", Layout.vee(2), "are on ranks 0, 1, 1, 0"),
        ("interleaved_one_f_one_b", Layout((0, 1, 0), frozenset()), "are on ranks 0, 1, 0"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_one_that_does(name: str, layout: Layout, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        FAMILIES[name](layout, 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_microbatches_are_refused(name: str) -> None:
    with pytest.raises(ScheduleError, match="use at least 1 microbatch"):
        FAMILIES[name](LAYOUTS[name][-1], 0)
