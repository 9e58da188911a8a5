from __future__ import annotations

from hypothesis import given

from pipework.plan import Costs, Kind, Schedule, needs
from pipework.plan.numbers import Numbers
from tests.plan.test_simulate import simulations


@given(simulations())
def test_work_says_of_every_action_what_the_rules_and_the_costs_say(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    numbers = Numbers.of(schedule, costs)
    rows = [list(zip(order, row, strict=True)) for order, row in zip(schedule.orders, numbers.orders, strict=True)]
    everything = [pair for row in rows for pair in row]
    work = {number: numbers.work[number % numbers.period] for _, number in everything}
    place_of = {action: number + work[number].place for action, number in everything}
    assert len(set(place_of.values())) == len(everything)
    for action, number in everything:
        assert 0 <= place_of[action] <= number < numbers.size
        assert (place_of[action] == number) == (action.kind is not Kind.BACKWARD)
        assert work[number].duration == costs.duration(action, schedule.recomputed)
        assert [(number + offset, delay) for offset, delay in work[number].needs] == [
            (place_of[need], costs.delay(need.stage, action.stage, schedule.layout)) for need in needs(action, schedule)
        ]
    for row, overlapped in zip(rows, numbers.overlapped, strict=True):
        assert overlapped == {position for position, (action, _) in enumerate(row) if action in schedule.overlapped}
