from __future__ import annotations

import pytest

from pipework.errors import InputError
from pipework.plan import Action, Costs, Layout, Schedule, Timeline, forward_only, measured, one_f_one_b, simulate


@pytest.mark.parametrize("unit", ["", "s"])
def test_measured_costs_are_those_that_were_simulated(unit: str) -> None:
    # Powers of two, so that no sum is rounded.
    costs = Costs(
        forward=(0.25, 0.5), input_gradient=(0.5, 0.25), weight_gradient=(0.5, 0.25), transfer=0.125, unit=unit
    )
    timelines = [simulate(one_f_one_b(Layout.loop(2), microbatches), costs) for microbatches in (2, 3, 8)]
    assert measured(timelines) == costs


def test_the_two_gradients_may_run_apart() -> None:
    costs = Costs(forward=(1.0,), input_gradient=(2.0,), weight_gradient=(4.0,))
    order = tuple(map(Action.parse, ("0F0", "0F1", "0I0", "0I1", "0W0", "0W1")))
    assert measured([simulate(Schedule("split", Layout.loop(1), 2, (order,)), costs)]) == costs


def test_a_duration_is_the_median() -> None:
    schedule = forward_only(Layout.loop(1), 1)
    timelines = [simulate(schedule, Costs(forward=forward, unit="s")) for forward in (9.0, 1.0, 2.0)]
    assert measured(timelines) == Costs((2.0,), (0.0,), (0.0,), unit="s")


PLAN = simulate(one_f_one_b(Layout.loop(2), 4))


@pytest.mark.parametrize(
    ("timelines", "says"),
    [
        ([], "no timelines"),
        ([PLAN, simulate(PLAN.schedule, Costs(unit="s"))], "differ in layout or unit"),
        ([PLAN, simulate(one_f_one_b(Layout.loop(3), 4))], "differ in layout or unit"),
    ],
)
def test_what_cannot_be_measured_together_is_refused(timelines: list[Timeline], says: str) -> None:
    with pytest.raises(InputError, match=says):
        measured(timelines)
