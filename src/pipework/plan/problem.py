"""What a search for a schedule has to decide, in whole numbers.

Microbatches are alike: in any schedule they can be renumbered, at each stage and kind, in the order in which they are
done there, and every need is still met, at the same times and with as many activations alive. So nothing is lost by
taking them in order everywhere, and what is left to decide is how the `lanes` of each rank interleave:

    rank 0    0F0 0F1 0F2 ...   0I0 0I1 0I2 ...   0W0 0W1 0W2 ...    one lane for each of its stages and kinds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm
from typing import Literal, final

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.check import check
from pipework.plan.costs import Costs
from pipework.plan.layout import Layout
from pipework.plan.rules import needs
from pipework.plan.schedule import Schedule

Objective = Literal["makespan", "span"]
Orders = Sequence[Sequence[int]]
Memory = float | Sequence[float] | None
Shares = tuple[tuple[int, ...], ...] | None

_LARGEST = 10**12  # what all durations, or all activations, may add up to: far below where a solver's 64 bits end


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """All actions of the schedule to be found, as tasks 0, 1, 2, ... in an order in which they can be done one by one.

    Times are whole numbers, `per_unit` of them to one unit of the costs. `exact_times` says whether these are the costs
    as they are written; else they were rounded down: what bounds a schedule from below here does so there, too.

    - `needs[task]`: earlier tasks, each with the delay between its end and the earliest start of this one.
    - `takes[task]`, `frees[task]`: memory of the rank, from the task's start on and from its end on.
    - `limits[rank]`: the most memory that may ever be taken; None if that does not matter. `exact_memory` says whether
      these are the costs as they are written; else what fits here fits there, but not always the other way round.
    - `lanes[rank]`: for each of its stages and kinds, the tasks in the order in which they are done.
    """

    objective: Objective
    one_by_one: Schedule
    actions: tuple[Action, ...]
    rank_of: tuple[int, ...]
    durations: tuple[int, ...]
    needs: tuple[tuple[tuple[int, int], ...], ...]
    takes: tuple[int, ...]
    frees: tuple[int, ...]
    limits: tuple[int, ...] | None
    exact_memory: bool
    lanes: tuple[tuple[tuple[int, ...], ...], ...]
    per_unit: Fraction
    exact_times: bool

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.one_by_one.layout.ranks

    def starts(self, orders: Orders) -> list[int]:
        """When each task starts if every rank keeps its order and does each as soon as it may."""
        starts = [-1] * len(self.actions)
        reached, free = [0] * len(orders), [0] * len(orders)
        moved = True
        while moved:
            moved = False
            for rank, order in enumerate(orders):
                while reached[rank] < len(order):
                    task = order[reached[rank]]
                    start = free[rank]
                    for need, delay in self.needs[task]:
                        if starts[need] < 0:
                            break
                        start = max(start, starts[need] + self.durations[need] + delay)
                    else:
                        starts[task] = start
                        free[rank] = start + self.durations[task]
                        reached[rank] += 1
                        moved = True
                        continue
                    break
        assert min(starts) >= 0, "orders come from checked schedules, or from a search that keeps the needs"
        return starts

    def value(self, starts: Sequence[int]) -> int:
        """What is to be small: the makespan, or the longest stretch from a rank's first start to its last end."""
        ends = [start + duration for start, duration in zip(starts, self.durations, strict=True)]
        if self.objective == "makespan":
            return max(ends)
        tasks = [[task for lane in lanes for task in lane] for lanes in self.lanes]
        return max(max(ends[task] for task in own) - min(starts[task] for task in own) for own in tasks if own)

    def fits(self, orders: Orders) -> bool:
        """Whether the orders stay within the memory of every rank."""
        for order, limit in zip(orders, self.limits or (), strict=self.limits is not None):
            taken = 0
            for task in order:
                taken += self.takes[task]
                if taken > limit:
                    return False
                taken -= self.frees[task]
        return True

    def orders(self, schedule: Schedule) -> Orders | None:
        """The tasks of another schedule in its orders, if it does just these; a full backward is I, then W."""
        like, number = self.one_by_one, {action: task for task, action in enumerate(self.actions)}
        if (schedule.layout, schedule.microbatches_of, schedule.slices) != (like.layout, like.microbatches_of, 1):
            return None
        orders: list[list[int]] = [[] for _ in schedule.orders]
        for order, found in zip(schedule.orders, orders, strict=True):
            for action in order:
                parts = [action] if action in number else _parts(action)
                if not all(part in number for part in parts):
                    return None
                found += [number[part] for part in parts]
        return orders if sum(map(len, orders)) == len(number) else None

    def schedule(self, name: str, orders: Orders) -> Schedule:
        """The orders as a schedule."""
        like = self.one_by_one
        actions = tuple(tuple(self.actions[task] for task in order) for order in orders)
        return Schedule(name, like.layout, like.microbatches, actions, microbatches_of=like.microbatches_of)


def problem(
    layout: Layout,
    microbatches: int,
    costs: Costs,
    memory: Memory,
    objective: Objective,
    split_backward: bool,
    shares: Shares,
) -> Problem:
    """The problem of training `microbatches` over `layout`; `shares` are the schedule's `microbatches_of`.

    Raises ScheduleError if the costs or the memory do not fit the layout, or if a rank's memory does not hold one
    microbatch of all its stages.
    """
    costs.require(layout)
    actions = _one_by_one(layout, microbatches, split_backward, shares)
    orders = [[action for action in actions if action.stage in layout.held_by(rank)] for rank in range(layout.ranks)]
    serial = Schedule("one by one", layout, microbatches, tuple(map(tuple, orders)), microbatches_of=shares)
    check(serial)
    lanes: list[dict[tuple[int, Kind], list[int]]] = [{} for _ in range(layout.ranks)]
    number = {action: task for task, action in enumerate(actions)}
    for action, task in number.items():
        lanes[layout.rank_of[action.stage]].setdefault((action.stage, action.kind), []).append(task)
    needed = [
        [(number[need], _written(costs.delay(need.stage, action.stage, layout))) for need in needs(action, serial)]
        for action in actions
    ]
    durations = [_duration(action, costs) for action in actions]
    per_unit, exact_times = _grain(
        [*durations, *(delay for each in needed for _, delay in each)], sum(durations, Fraction())
    )
    takes, frees, limits, exact = _memory(actions, costs, layout, memory)
    return Problem(
        objective,
        serial,
        tuple(actions),
        tuple(layout.rank_of[action.stage] for action in actions),
        tuple(floor(duration * per_unit) for duration in durations),
        tuple(tuple((need, floor(delay * per_unit)) for need, delay in each) for each in needed),
        takes,
        frees,
        limits,
        exact,
        tuple(tuple(map(tuple, each.values())) for each in lanes),
        per_unit,
        exact_times,
    )


def _one_by_one(layout: Layout, microbatches: int, split_backward: bool, shares: Shares) -> list[Action]:
    """One microbatch after the other, each through all its stages and back: slow, and with the least memory."""
    back = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT) if split_backward else (Kind.BACKWARD,)
    stages_of: dict[int, list[int]] = {microbatch: [] for microbatch in range(microbatches)}
    for stage, share in enumerate([range(microbatches)] * layout.stages if shares is None else shares):
        for microbatch in share:
            stages_of.setdefault(microbatch, []).append(stage)
    return [
        Action(stage, kind, microbatch)
        for microbatch, stages in stages_of.items()
        for way, kinds in ((stages, (Kind.FORWARD,)), (stages[::-1], back))
        for stage in way
        for kind in kinds
    ]


def _written(number: float) -> Fraction:
    """The number as it is written, so that 0.1 is a tenth."""
    return Fraction(repr(float(number)))


def _duration(action: Action, costs: Costs) -> Fraction:
    return sum((_written(costs.duration(part)) for part in _parts(action)), Fraction())


def _parts(action: Action) -> list[Action]:
    """The action, or the two parts of a full backward."""
    if action.kind is not Kind.BACKWARD:
        return [action]
    return [Action(action.stage, kind, action.microbatch) for kind in (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)]


def _grain(amounts: Sequence[Fraction], total: Fraction) -> tuple[Fraction, bool]:
    """How many whole numbers make one unit, and whether all amounts then are whole."""
    exact = Fraction(lcm(*(amount.denominator for amount in amounts)))
    if total * exact <= _LARGEST:
        return exact, True
    return _LARGEST / total, False


def _memory(
    actions: Sequence[Action], costs: Costs, layout: Layout, memory: Memory
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, bool]:
    """What each action takes and frees, the ranks' limits, and whether these are exact."""
    held = [_written(costs.held(action)) for action in actions]
    freed = [_written(costs.released(action)) for action in actions]
    if memory is None:
        nothing = (0,) * len(actions)
        return nothing, nothing, None, True
    limits = [_written(limit) for limit in _per_rank(memory, layout)]
    _require_one_microbatch(actions, held, limits, layout)
    grain, exact = _grain([*held, *freed, *limits], sum(held, max(limits)))
    takes = [ceil(amount * grain) for amount in held]
    frees = [floor(amount * grain) for amount in freed]
    left: dict[tuple[int, int], int] = {}
    for task, action in enumerate(actions):  # rounding leaves nothing behind: the last action frees all there is
        key = action.stage, action.microbatch
        left[key] = left.get(key, 0) + takes[task]
        if action.kind is Kind.WEIGHT_GRADIENT or action.kind is Kind.BACKWARD:
            frees[task] = left[key]
        left[key] -= frees[task]
    return tuple(takes), tuple(frees), tuple(floor(limit * grain) for limit in limits), exact


def _per_rank(memory: float | Sequence[float], layout: Layout) -> Sequence[float]:
    limits = memory if isinstance(memory, Sequence) else [memory] * layout.ranks
    if len(limits) != layout.ranks:
        raise ScheduleError(
            f"memory is given for {len(limits)} ranks, but the layout has {layout.ranks}",
            remedy="give one number for all ranks, or one per rank",
        )
    for limit in limits:
        if not 0 <= limit < float("inf"):
            raise ScheduleError(
                f"memory is given as {limit}", remedy="give a number of 0 or more, or None if memory does not matter"
            )
    return limits


def _require_one_microbatch(
    actions: Sequence[Action], held: Sequence[Fraction], limits: Sequence[Fraction], layout: Layout
) -> None:
    whole: dict[tuple[int, int], Fraction] = {}
    for action, amount in zip(actions, held, strict=True):
        rank = layout.rank_of[action.stage]
        key = rank, action.microbatch
        whole[key] = whole.get(key, Fraction()) + amount
        if whole[key] > limits[rank]:
            raise ScheduleError(
                f"the memory of rank {rank}, {float(limits[rank]):g}, does not hold one microbatch",
                why="all its stages keep their activations at once, when the microbatch is at the last stage",
                remedy="give more memory, smaller microbatches or fewer stages per rank",
            )
