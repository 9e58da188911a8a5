"""Zero-bubble schedules for given costs within a given memory, found by the rules of thumb of their paper."""

from __future__ import annotations

from itertools import pairwise, product

from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.families.filling import Filling
from pipework.plan.families.order import require_microbatches, require_one_stage_per_rank, schedule
from pipework.plan.families.whole_costs import WholeCosts
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule
from pipework.plan.simulate import UNIT


def zero_bubble_1p(layout: Layout, microbatches: int, *, costs: Costs = UNIT, memory: float | None = None) -> Schedule:
    """A split-backward schedule for these costs, in the memory of 1F1B: ZB-1p (Qi et al., arXiv:2401.10241).

    The best of eight greedy attempts for `costs`, by span and then by makespan. A rank keeps no more than `memory`, in
    the unit of `costs.activation`: unless given, as much as p microbatches keep on a stage, with p ranks. Choose it
    over ZB-H1 where the costs are known and far from equal. Takes one stage per rank and 1 or more microbatches; raises
    ScheduleError otherwise, and if the memory does not hold one microbatch.

    >>> from pipework.plan import simulate
    >>> costs = Costs(forward=(1, 1, 1, 2), input_gradient=(1, 1, 1, 2), weight_gradient=(1, 1, 1, 2))
    >>> print(simulate(zero_bubble_1p(Layout.loop(4), microbatches=6, costs=costs), costs).text())
    rank 0  F0F1F2F3..........I0W0F4..I1W1F5..I2W2....I3W3........I4W4........I5W5........
    rank 1  ..F0F1F2........I0F3W0..I1F4W1..I2F5W2..I3W3........I4W4........I5W5..........
    rank 2  ....F0F1......I0F2W0..I1F3W1..I2F4W2..I3F5W3......I4W4........I5W5............
    rank 3  ......F0--I0--F1--I1--F2--I2--F3--I3--W0--F4--I4--W1--F5--I5--W2--W3--W4--W5--
    makespan 39, span 36, bubble 42.3 %, peak per rank 4 4 3 4
    """
    return _automatic("zero_bubble_1p", layout, microbatches, costs, memory, 1)


def zero_bubble_2p(layout: Layout, microbatches: int, *, costs: Costs = UNIT, memory: float | None = None) -> Schedule:
    """A split-backward schedule for these costs, in twice the memory of 1F1B: ZB-2p (Qi et al., arXiv:2401.10241).

    As `zero_bubble_1p`, but unless given `memory` is twice as much. That leaves next to no bubble in the span if F, I
    and W take about equally long, or if input gradients release about half of an activation, as in the paper's models
    (see `costs.released_by_input_gradient`). Choose it over ZB-H2 where the costs are known and differ. Takes one stage
    per rank and 1 or more microbatches; raises ScheduleError otherwise, and if the memory does not hold one microbatch.

    >>> from pipework.plan import simulate
    >>> print(simulate(zero_bubble_2p(Layout.loop(4), microbatches=7)).text())
    rank 0  F0F1F2F3F4F5F6I0W0I1W1I2W2I3W3I4W4I5W5I6W6......
    rank 1  ..F0F1F2F3F4I0F5I1F6I2W0I3W1I4W2I5W3I6W4W5W6....
    rank 2  ....F0F1F2I0F3I1F4I2F5I3F6I4W0I5W1I6W2W3W4W5W6..
    rank 3  ......F0I0F1I1F2I2F3I3F4I4F5I5F6I6W0W1W2W3W4W5W6
    makespan 24, span 21, bubble 12.5 %, peak per rank 7
    """
    return _automatic("zero_bubble_2p", layout, microbatches, costs, memory, 2)


def _automatic(
    name: str, layout: Layout, microbatches: int, costs: Costs, memory: float | None, times: int
) -> Schedule:
    require_microbatches(microbatches)
    require_one_stage_per_rank(name, layout, "interleaved_zero_bubble")
    if memory is None:
        most = max(costs.held(Action(stage, Kind.FORWARD, 0)) for stage in range(layout.stages))
        memory = times * layout.ranks * most
    given = WholeCosts.of(layout, costs, memory)
    attempts = (_attempt(Filling(given), microbatches, *choices) for choices in product((True, False), repeat=3))
    best = min(attempts, key=lambda attempt: attempt.lengths)
    return schedule(name, layout, microbatches, lambda rank: best.orders[rank])


def _attempt(filling: Filling, microbatches: int, punctual: bool, patient: bool, dense: bool) -> Filling:
    """One forward and one backward in turn, as the paper has it, after as many forwards as fit before the first one.

    Three things can go either way: `punctual` stops the warm-up before a forward that would delay the first backward;
    `patient` leaves a forward out if the next backward is about to come; `dense` puts weight gradients also into gaps
    that would not make a rank the one that idled for longest.
    """
    stages = range(filling.layout.stages)
    forwards = _warm_up(filling, microbatches, punctual)
    for microbatch in range(1, microbatches):
        for stage in reversed(_going(filling, forwards, microbatches, patient)):
            forward = Action(stage, Kind.FORWARD, forwards[stage])
            filling.fill(forward, tolerated=0 if dense else filling.slack(filling.layout.rank_of[stage]))
            filling.put(forward)
            forwards[stage] += 1
        for stage in reversed(stages):
            rank = filling.layout.rank_of[stage]
            backward = Action(stage, Kind.INPUT_GRADIENT, microbatch)
            filling.fill(backward, tolerated=0 if dense else filling.slack(rank))
            if stage == 0 and forwards[stage] == microbatches:
                filling.flush(rank)
            filling.put(backward)
    for rank in range(filling.layout.ranks):
        filling.flush(rank)
    return filling


def _warm_up(filling: Filling, microbatches: int, punctual: bool) -> list[int]:
    """Forwards until the first backward, and that; returns how many forwards each stage has done."""
    stages, costs = range(filling.layout.stages), filling.costs
    for stage in stages:
        filling.put(Action(stage, Kind.FORWARD, 0))
    forwards = [1 for _ in stages]
    last = stages[-1]
    over = filling.free[filling.layout.rank_of[last]] + costs.duration[last, Kind.INPUT_GRADIENT]
    for stage, later in reversed(list(pairwise(stages))):
        arrival = over + costs.delay[stage, later]
        forward, duration = Action(stage, Kind.FORWARD, 0), costs.duration[stage, Kind.FORWARD]
        free = filling.free[filling.layout.rank_of[stage]]
        while forwards[stage] < microbatches and filling.has_room(forward, others=forwards[stage] - 1):
            if free + duration > arrival if punctual else free >= arrival:
                break
            free += duration
            forwards[stage] += 1
        over = max(free, arrival) + costs.duration[stage, Kind.INPUT_GRADIENT]
    for stage, later in pairwise(stages):
        if forwards[stage] < microbatches:
            forwards[later] = max(1, min(forwards[later], forwards[stage] - 1))
    for stage in stages:
        for microbatch in range(1, forwards[stage]):
            filling.put(Action(stage, Kind.FORWARD, microbatch))
    for stage in reversed(stages):
        filling.put(Action(stage, Kind.INPUT_GRADIENT, 0))
    return forwards


def _going(filling: Filling, forwards: list[int], microbatches: int, patient: bool) -> list[int]:
    """The stages that do another forward now, from the last on, so that none gets ahead of one before it."""
    stages = range(filling.layout.stages)
    going = [stages[-1]]
    for stage, later in reversed(list(pairwise(stages))):
        if patient and forwards[stage] >= forwards[later] + 2 and _should_wait(filling, stage, later):
            break
        going.append(stage)
    return [stage for stage in going if forwards[stage] < microbatches]


def _should_wait(filling: Filling, stage: int, later: int) -> bool:
    """Whether another forward would make the next backward late, while waiting for that does no harm."""
    costs, rank, next_rank = filling.costs, filling.layout.rank_of[stage], filling.layout.rank_of[later]
    turn = costs.duration[later, Kind.FORWARD] + costs.duration[later, Kind.INPUT_GRADIENT]
    wait = filling.free[next_rank] + turn + costs.delay[stage, later] - filling.free[rank]
    needed = filling.time_to_make_room(Action(stage, Kind.FORWARD, 0)) + costs.duration[stage, Kind.FORWARD]
    return needed > wait and wait <= filling.slack(rank)
