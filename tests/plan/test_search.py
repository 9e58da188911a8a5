from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipework.errors import ScheduleError
from pipework.plan import FAMILIES, Costs, Kind, Layout, check, gpipe, search, simulate, solver
from pipework.plan.problem import Problem, problem
from tests.plan.searches import CASES, arguments
from tests.strategies import layouts

# The others take a solver up to a minute each: they are left to `python -m benchmarks.search`.
QUICK = [case for case in CASES if case["per_rank"] == 1 or case["place"] == "bidirectional"]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case["id"])
def test_known_optima_are_found_and_proven(case: dict[str, Any]) -> None:
    found = search(**arguments(case), seconds=100)
    check(found.schedule)
    assert (found.value, found.bound, found.optimal) == (case["best"], case["best"], True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_without_a_solver_it_is_near_and_says_how_near(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "is_installed", lambda: False)
    found = search(**arguments(case))
    check(found.schedule)
    assert found.bound <= case["best"] <= found.value <= 1.12 * case["best"]
    assert found.optimal == (found.value == found.bound)
    assert found.optimal or found.how.endswith("without a solver: install pipework[search]")
    assert found == search(**arguments(case), seconds=0)


@st.composite
def small(draw: st.DrawFn) -> dict[str, Any]:
    """A problem of which every solution can be gone through."""
    layout = draw(layouts().filter(lambda layout: layout.stages <= 4))
    split = draw(st.booleans()) and layout.stages <= 2
    microbatches = draw(st.integers(1, 8 // (layout.stages * (3 if split else 2))))
    durations = st.tuples(*[st.integers(0, 4) for _ in range(layout.stages)])
    activation = draw(st.tuples(*[st.integers(0, 3) for _ in range(layout.stages)]))
    costs = Costs(
        *(draw(durations) for _ in range(3)),
        transfer=draw(st.integers(0, 3)),
        activation=activation,
        released_by_input_gradient=draw(st.sampled_from((0.0, 0.5, 1.0))),
    )
    least = [sum(activation[stage] for stage in layout.held_by(rank)) for rank in range(layout.ranks)]
    memory = [amount + draw(st.integers(0, 3)) for amount in least] if draw(st.booleans()) else None
    objective = draw(st.sampled_from(("makespan", "span")))
    return {
        "layout": layout,
        "microbatches": microbatches,
        "costs": costs,
        "memory": memory,
        "objective": objective,
        "split_backward": split,
    }


def best_of_all(problem: Problem) -> int:
    """The least value over all orders that fit, microbatches in any order."""
    best = [10**9]
    seen: set[tuple[tuple[int, ...], ...]] = set()

    def extend(orders: tuple[tuple[int, ...], ...], done: frozenset[int]) -> None:
        if orders in seen:
            return
        seen.add(orders)
        if len(done) == len(problem.actions):
            best[0] = min(best[0], problem.value(problem.starts(orders)))
        for task, needs in enumerate(problem.needs):
            if task not in done and all(need in done for need, _ in needs):
                rank = problem.rank_of[task]
                longer = (*orders[:rank], (*orders[rank], task), *orders[rank + 1 :])
                if problem.fits(longer):
                    extend(longer, done | {task})

    extend(((),) * problem.ranks, frozenset())
    return best[0]


@settings(max_examples=150)
@given(small())
def test_nothing_is_better_than_what_is_proven_the_best(arguments: dict[str, Any]) -> None:
    whole = problem(**arguments, shares=None)
    least = best_of_all(whole)
    greedily, found = search(**arguments, seconds=0), search(**arguments, seconds=60, workers=1)
    assert greedily.bound <= least <= greedily.value
    assert found.bound <= least <= found.value
    if arguments["objective"] == "makespan":
        assert (found.bound, found.value, found.optimal) == (least, least, True)


@given(
    layouts(),
    st.integers(1, 6),
    st.integers(0, 5),
    st.sampled_from(("makespan", "span")),
    st.booleans(),
    st.floats(0, 10, width=16),
)
def test_what_is_found_is_legal_and_within_the_memory(
    layout: Layout, microbatches: int, more: int, objective: Any, split: bool, transfer: float
) -> None:
    activation = tuple(stage % 3 / 10 for stage in range(layout.stages))
    costs = Costs(0.1, 0.2, 0.3, transfer, activation)
    memory = [sum(activation[s] for s in layout.held_by(rank)) + more / 10 for rank in range(layout.ranks)]
    memory = [round(amount, 3) for amount in memory]
    found = search(layout, microbatches, costs, memory=memory, objective=objective, split_backward=split, seconds=0)
    check(found.schedule)
    assert all(peak <= limit + 1e-9 for peak, limit in zip(found.timeline.peaks, memory, strict=True))
    assert found.timeline == simulate(found.schedule, costs)
    assert found.bound <= found.value + 1e-9
    kinds = {action.kind for order in found.schedule.orders for action in order}
    assert split or kinds == {Kind.FORWARD, Kind.BACKWARD}


@pytest.mark.parametrize("layout", [Layout.loop(4), Layout.loop(2, 2), Layout.vee(3)], ids=str)
@pytest.mark.parametrize("memory", [4, 7, None])
@pytest.mark.parametrize("split", [True, False])
def test_no_family_that_fits_is_better(layout: Layout, memory: float | None, split: bool) -> None:
    costs = Costs(3.0, 2.0, 1.0, 0.5)
    found = search(layout, 6, costs, memory=memory, split_backward=split, seconds=0)
    for family in FAMILIES.values():
        try:
            timeline = simulate(family.plan(layout, 6, costs), costs)
        except ScheduleError:
            continue
        splits = any(timeline.schedule.splits(stage, 0) for stage in range(layout.stages))
        fits = memory is None or max(timeline.peaks) <= memory
        if timeline.schedule.trains and fits and (split or not splits):
            assert found.value <= timeline.makespan


def test_backwards_are_not_split_for_nothing() -> None:
    found = search(Layout.loop(1), 3)
    assert found.schedule == gpipe(Layout.loop(1), 3)
    assert (found.value, found.optimal, found.how) == (9, True, "gpipe")


def test_costs_count_as_they_are_written() -> None:
    found = search(Layout.loop(2), 3, Costs(0.1, 0.2, 0.3, 0.7, activation=0.1), memory=0.2, seconds=0)
    assert found.timeline.peaks == (0.2, 0.1)
    assert search(Layout.loop(1), 3, Costs(0.1, 0.2, 0.3)).optimal


def test_a_bound_stays_one_where_costs_must_be_rounded() -> None:
    costs = Costs((1 / 3, 2 / 7), 1e-9 / 3, 1e5 / 7)
    found = search(Layout.loop(2), 4, costs, seconds=0)
    assert not found.optimal
    assert found.value * (1 - 1e-9) < found.bound <= found.value
    assert found.text == "makespan 57144, within 1e-09 % of the best possible; one_f_one_b"


def test_a_solver_goes_on_where_rules_end() -> None:
    layout, costs = Layout.vee(2), Costs(2, 2, 1, 0.5)
    quick, found = (search(layout, 4, costs, memory=3, seconds=seconds) for seconds in (0, 60))
    assert quick.bound < found.bound == found.value < quick.value
    assert (quick.optimal, found.optimal, found.how) == (False, True, "solver")
    with pytest.raises(KeyboardInterrupt):  # the solver would leave a process that an interrupt kills
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"memory": 1}, "the memory of rank 0, 1, does not hold one microbatch"),
        ({"memory": float("nan")}, "memory is given as nan"),
        ({"memory": (4, 4, 4)}, "memory is given for 3 ranks, but the layout has 2"),
        ({"microbatches": 0}, "has 0 microbatches"),
        ({"objective": "bubble"}, "the objective is 'bubble'"),
        ({"seconds": -1}, "may take -1 seconds"),
        ({"workers": 0}, "has 0 workers"),
        ({"costs": Costs(forward=(1.0, 2.0))}, "costs give forward for 2 stages, but the layout has 4"),
        ({"microbatches_of": ((0,), (0,), (0,))}, "gives microbatches for 3 stages, but its layout has 4"),
        ({"microbatches_of": ((0,), (0,), (0,), (0, 7))}, "gives stage 3 the microbatches (0, 7)"),
    ],
)
def test_wrong_input_is_said(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError) as refusal:
        search(**{"layout": Layout.loop(2, 2), "microbatches": 2, **arguments})
    assert said in str(refusal.value)
