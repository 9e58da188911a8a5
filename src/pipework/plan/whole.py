"""Whether a schedule has all it should, each once and where it belongs; in which order is another question."""

from __future__ import annotations

from bisect import bisect_left

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.schedule import Schedule


def require_whole(schedule: Schedule) -> None:
    """Raises ScheduleError for the first thing that is too much, missing or out of place (see `check`).

    It goes through all actions one by one, to name what is wrong; `Numbers.of` sees faster that nothing is.
    """
    require_shape(schedule)
    seen: set[Action] = set()
    for rank, order in enumerate(schedule.orders):
        for position, action in enumerate(order):
            fault = _fault(action, rank, schedule) or _unpaired(position, order, schedule)
            if action in seen:
                fault = "is done twice"
            if fault:
                raise ScheduleError(f"{action} {fault}", where=f"{schedule.name}, rank {rank}, position {position}")
            seen.add(action)
    _require_complete(schedule, seen)
    if stray := sorted(schedule.overlapped - seen, key=str):
        raise ScheduleError(f"{stray[0]} of {schedule.name} should overlap with what follows it, but is never done")


def require_shape(schedule: Schedule) -> None:
    """Raises ScheduleError unless the numbers of ranks, stages, microbatches and slices fit together."""
    if schedule.microbatches < 1:
        raise ScheduleError(f"{schedule.name} has {schedule.microbatches} microbatches", remedy="use at least 1")
    if len(schedule.orders) != schedule.layout.ranks:
        raise ScheduleError(
            f"{schedule.name} has orders for {len(schedule.orders)} ranks, but its layout has {schedule.layout.ranks}",
            remedy="give one order per rank, empty where a rank has nothing to do",
        )
    if schedule.slices < 1 or schedule.microbatches % schedule.slices:
        raise ScheduleError(
            f"{schedule.name} has {schedule.microbatches} microbatches, in sequences of {schedule.slices} slices",
            remedy="microbatches count slices: use a multiple of slices, 1 or more",
        )
    for stage in sorted(schedule.recomputed - set(range(schedule.layout.stages))):
        raise ScheduleError(
            f"stage {stage} of {schedule.name} should be recomputed, but there are {schedule.layout.stages} stages",
            remedy="give stages that the layout has, counted from 0",
        )
    if schedule.microbatches_of is not None:
        _require_shares(schedule, schedule.microbatches_of)


def _require_shares(schedule: Schedule, shares: tuple[tuple[int, ...], ...]) -> None:
    """Raises ScheduleError unless every stage takes whole sequences, and the same as those that feed it."""
    if len(shares) != schedule.layout.stages:
        raise ScheduleError(
            f"{schedule.name} gives microbatches for {len(shares)} stages, but its layout has {schedule.layout.stages}",
            remedy="give one tuple per stage, or None if every stage takes all microbatches",
        )
    slices = schedule.slices
    for stage, share in enumerate(shares):
        sequences = sorted({microbatch // slices for microbatch in share if 0 <= microbatch < schedule.microbatches})
        if share != tuple(n * slices + slice_ for n in sequences for slice_ in range(slices)):
            raise ScheduleError(
                f"{schedule.name} gives stage {stage} the microbatches {share}",
                remedy=f"give whole sequences ({slices} in a row), ascending, each once, "
                f"out of 0 to {schedule.microbatches - 1}",
            )
        for earlier in schedule.layout.fed_by(stage):
            if share != shares[earlier]:
                raise ScheduleError(
                    f"{schedule.name} gives stage {stage} other microbatches than stage {earlier}, which feeds it",
                    remedy="give both the same: only stages without edges between them can share microbatches out",
                )
    if untaken := set(range(schedule.microbatches)).difference(*shares):
        raise ScheduleError(f"{schedule.name} gives microbatch {min(untaken)} to no stage")


def _unpaired(position: int, order: tuple[Action, ...], schedule: Schedule) -> str:
    """What is wrong with this overlap, or nothing."""
    if order[position] not in schedule.overlapped:
        return ""
    if position == len(order) - 1:
        return "should overlap with what follows it, but is the last on its rank"
    if order[position + 1] in schedule.overlapped:
        return f"and {order[position + 1]} should both overlap with what follows them: only two run at once"
    return ""


def _fault(action: Action, rank: int, schedule: Schedule) -> str:
    """What is wrong with this action where it stands, or nothing."""
    layout = schedule.layout
    if not 0 <= action.stage < layout.stages:
        return f"is of an unknown stage: there are {layout.stages}"
    if not 0 <= action.microbatch < schedule.microbatches:
        return f"is of an unknown microbatch: there are {schedule.microbatches}"
    taken = schedule.taken_by(action.stage)
    position = bisect_left(taken, action.microbatch)  # `in` would go through all of them, for each action
    if position == len(taken) or taken[position] != action.microbatch:
        return f"is of a microbatch that stage {action.stage} does not take"
    if layout.rank_of[action.stage] != rank:
        return f"is not at home: rank {layout.rank_of[action.stage]} holds stage {action.stage}"
    if action.kind is Kind.BACKWARD and schedule.splits(action.stage, action.microbatch):
        return "is a full backward of what is also done in two parts, I and W"
    return ""


def _require_complete(schedule: Schedule, seen: set[Action]) -> None:
    trains = schedule.trains
    for stage in range(schedule.layout.stages):
        for microbatch in schedule.taken_by(stage):
            halves = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
            backward = halves if schedule.splits(stage, microbatch) else (Kind.BACKWARD,)
            for kind in (Kind.FORWARD, *(backward if trains else ())):
                action = Action(stage, kind, microbatch)
                if action not in seen:
                    raise ScheduleError(
                        f"{schedule.name} is incomplete: {action} is never done",
                        remedy=f"add it to the order of rank {schedule.layout.rank_of[stage]}",
                    )
