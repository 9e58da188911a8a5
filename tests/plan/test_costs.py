from __future__ import annotations

import pytest

from pipework.errors import ScheduleError
from pipework.plan import Action, Costs, Layout, Schedule, one_f_one_b, simulate


def test_a_full_backward_takes_both_parts() -> None:
    costs = Costs(forward=1, input_gradient=(2, 20), weight_gradient=(3, 30))
    actions = [Action.parse(text) for text in ("1F0", "1I0", "1W0", "1B0", "0B0")]
    assert [costs.duration(action) for action in actions] == [1, 20, 30, 50, 5]


def test_a_transfer_takes_as_long_in_both_directions() -> None:
    layout = Layout.loop(3)
    costs = Costs(transfer={(0, 1): 1.0, (1, 2): 2.0})
    assert [costs.delay(*ends, layout) for ends in ((0, 1), (1, 0), (2, 1))] == [1, 1, 2]


def test_an_input_gradient_may_release_a_part() -> None:
    order = tuple(map(Action.parse, ("0F0", "0I0", "0F1", "0I1", "0W0", "0W1")))
    schedule = Schedule("split", Layout.loop(1), 2, (order,))
    assert simulate(schedule, Costs(activation=8)).peaks == (16,)
    assert simulate(schedule, Costs(activation=8, released_by_input_gradient=0.75)).peaks == (10,)
    assert simulate(schedule, Costs(activation=8, released_by_input_gradient=1)).peaks == (8,)


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        (Costs(forward=(1, 2)), "forward for 2 stages, but the layout has 3"),
        (Costs(activation=(1, 2, 3, 4)), "activation for 4 stages, but the layout has 3"),
        (Costs(weight_gradient=(1, -2, 3)), "-2 as weight_gradient"),
        (Costs(forward=float("nan")), "nan as forward"),
        (Costs(transfer=-1), "-1 as transfer"),
        (Costs(transfer={(0, 1): 1}), "no transfer time for edge 1>2"),
        (Costs(transfer={(0, 1): 1, (1, 2): -1}), "-1 as transfer"),
        (Costs(released_by_input_gradient=1.5), "1.5 as released_by_input_gradient"),
        (Costs(activation=(8, 8, 2), boundary=4), "stage 2 a boundary of 4 in an activation of 2"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs: Costs, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        simulate(one_f_one_b(Layout.loop(3), 1), costs)


def test_only_seconds_and_counts_are_units() -> None:
    assert [simulate(one_f_one_b(Layout.loop(2), 1), Costs(unit=unit)).unit for unit in ("", "s")] == ["", "s"]
    with pytest.raises(ScheduleError, match="unit 'ms'"):
        Costs(unit="ms")
