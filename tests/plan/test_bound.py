from __future__ import annotations

from functools import cache, partial

from hypothesis import given

from pipework.plan import Action, Costs, Layout, Schedule, bound, forward_only, gpipe, needs, one_f_one_b, simulate
from tests.plan.test_channels import CHANNELS
from tests.plan.test_simulate import simulations


@given(simulations())
def test_it_is_the_longest_chain_or_a_ranks_work_with_its_ways_in_and_out(
    simulation: tuple[Schedule, Costs],
) -> None:
    schedule, costs = simulation
    everything = [action for order in schedule.orders for action in order]
    duration = partial(costs.duration, recomputed=schedule.recomputed)
    users = {need: [a for a in everything if need in needs(a, schedule)] for need in everything}

    def delay(one: Action, other: Action) -> float:
        return costs.delay(one.stage, other.stage, schedule.layout)

    @cache
    def way_in(action: Action) -> float:
        earlier = needs(action, schedule)
        return max((way_in(need) + duration(need) + delay(need, action) for need in earlier), default=0.0)

    @cache
    def way_out(action: Action) -> float:
        later = users[action]
        return max((delay(action, user) + duration(user) + way_out(user) for user in later), default=0.0)

    chains = [way_in(action) + duration(action) + way_out(action) for action in everything]
    ranks = [
        min(map(way_in, order)) + sum(map(duration, order)) + min(map(way_out, order))
        for order in schedule.orders
        if order
    ]
    assert bound(schedule, costs) == max(chains + ranks)


@given(simulations())
def test_nothing_is_below_it(simulation: tuple[Schedule, Costs]) -> None:
    schedule, costs = simulation
    for channels in CHANNELS:
        timeline = simulate(schedule, costs, channels)
        assert timeline.bound == bound(schedule, costs) <= timeline.makespan
        assert 0 <= timeline.gap <= 1
        assert (timeline.gap == 0) == (timeline.bound == timeline.makespan)


def test_1f1b_reaches_it_where_stages_are_alike() -> None:
    """m(F + B) + (p - 1)(F + B + 2c), for equal stages: from there on only other actions make a step shorter."""
    for ranks, microbatches in ((1, 1), (4, 3), (4, 16), (7, 20)):
        costs = Costs(3.0, 4.0, 2.0)
        assert simulate(one_f_one_b(Layout.loop(ranks), microbatches), costs).gap == 0
        assert bound(gpipe(Layout.loop(ranks), microbatches), costs) == (microbatches + ranks - 1) * 9
    assert simulate(forward_only(Layout.loop(4), 8)).gap == 0
