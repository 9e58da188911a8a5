"""Transfers that wait for one another: programs played with channels that carry one thing at a time, in order.

A transfer begins once its value exists and everything before it in the queues of both its ends is over. Each rank has

    edge   a queue for each directed edge between stages that begins or ends there
    pair   a queue for each other rank, in both directions
    rank   one queue

All wait only for what the programs fix beforehand, so a time is the length of the longest way there; and every wait in
one line of this list is one, directly or not, in the next. Therefore nothing is ever earlier with fewer channels.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal, get_args

from pipework.errors import ScheduleError
from pipework.plan.action import Action
from pipework.plan.costs import Costs
from pipework.plan.layout import Layout
from pipework.plan.program import Compute, Instruction, Program, Receive, Send
from pipework.plan.rules import Transfer, is_local, needs, transfers
from pipework.plan.schedule import Schedule
from pipework.plan.walk import Times

Channels = Literal["free", "edge", "pair", "rank"]
"""What transfers wait for: nothing but their value, or others on the same edge, between the same ranks, of one rank."""

Node = Action | Transfer


def play_through(
    channels: Channels, schedule: Schedule, costs: Costs, programs: Sequence[Program]
) -> tuple[Times, Times]:
    """The starts and the ends of all actions. Takes time in proportion to the number of instructions.

    Raises ScheduleError for unknown channels, for programs that are not of this schedule, and where actions and
    transfers wait for one another in a circle.
    """
    if channels not in get_args(Channels):
        raise ScheduleError(f"there are no channels {channels!r}", remedy=f"use one of {', '.join(get_args(Channels))}")
    _require_programs(schedule, programs)
    # Two actions that overlap are one node, the first of them.
    first_of = {b: a for order in schedule.orders for a, b in pairwise(order) if a in schedule.overlapped}
    waits = _waits(channels, schedule, programs, first_of)
    durations = defaultdict[Node, float](float)
    for action in (action for order in schedule.orders for action in order):
        durations[first_of.get(action, action)] += costs.duration(action, schedule.recomputed)
    begin, end = dict[Node, float](), dict[Node, float]()
    for node in _in_order(waits, schedule, channels):
        begin[node] = max((end[other] for other in waits[node]), default=0.0)
        if isinstance(node, Transfer):
            end[node] = begin[node] + costs.delay(node.after.stage, node.to, schedule.layout)
        else:
            end[node] = begin[node] + durations[node]
    starts, ends = (
        tuple(array("d", [times[first_of.get(action, action)] for action in order]) for order in schedule.orders)
        for times in (begin, end)
    )
    return starts, ends


def _waits(
    channels: Channels, schedule: Schedule, programs: Sequence[Program], first_of: Mapping[Action, Action]
) -> dict[Node, list[Node]]:
    """For each action and each transfer what must be over before it begins."""
    rank_of = schedule.layout.rank_of
    waits: dict[Node, list[Node]] = {}
    for program in programs:
        before: Action | None = None
        last: dict[Hashable, Transfer] = {}
        for instruction in program.instructions:
            if isinstance(instruction, Compute):
                node = first_of.get(instruction.action, instruction.action)
                waiting = waits.setdefault(node, [])
                if before is not None and before != node:
                    waiting.append(before)
                before = node
                for need in needs(instruction.action, schedule):
                    local = rank_of[need.stage] == program.rank
                    waiting.append(first_of.get(need, need) if local else Transfer(need, instruction.action.stage))
            else:
                transfer = instruction.transfer
                waiting = waits.setdefault(transfer, [])
                queue = _queue(transfer, program.rank, channels, schedule.layout)
                if queue in last:
                    waiting.append(last[queue])
                last[queue] = transfer
                if isinstance(instruction, Send):
                    waiting.append(first_of.get(transfer.after, transfer.after))
    return waits


def _queue(transfer: Transfer, rank: int, channels: Channels, layout: Layout) -> Hashable:
    """Which of the rank's queues the transfer stands in."""
    if channels == "free":
        return transfer
    if channels == "edge":
        return transfer.after.stage, transfer.to
    if channels == "pair":
        sender, receiver = layout.rank_of[transfer.after.stage], layout.rank_of[transfer.to]
        return receiver if rank == sender else sender
    return rank


def _in_order(waits: Mapping[Node, Sequence[Node]], schedule: Schedule, channels: Channels) -> list[Node]:
    """All nodes, each after those that it waits for."""
    try:
        return list(TopologicalSorter(waits).static_order())
    except CycleError as error:
        circle: list[Node] = error.args[1]
        raise ScheduleError(
            f"{schedule.name} cannot proceed through channels {channels!r}: {len(circle) - 1} steps wait in a circle",
            why="\n    waits for ".join(map(str, reversed(circle))),
            remedy="give programs that prove accepts, such as those of lower",
        ) from None


def _require_programs(schedule: Schedule, programs: Sequence[Program]) -> None:
    """Raises ScheduleError unless the programs do all that the schedule asks for once, and nothing else."""
    rank_of = schedule.layout.rank_of
    wanted: list[set[Instruction]] = [set(map(Compute, order)) for order in schedule.orders]
    for action in (action for order in schedule.orders for action in order):
        for transfer in transfers(action, schedule):
            if not is_local(transfer, schedule.layout):
                wanted[rank_of[action.stage]].add(Send(transfer))
                wanted[rank_of[transfer.to]].add(Receive(transfer))
    if [program.rank for program in programs] != list(range(len(wanted))):
        raise ScheduleError(
            f"{schedule.name} has {len(wanted)} ranks", remedy="give the program of each rank, in order"
        )
    for program, instructions in zip(programs, wanted, strict=True):
        given = set(program.instructions)
        if stray := sorted(map(str, given ^ instructions)):
            which = "more" if given - instructions else "less"
            raise ScheduleError(f"the program of rank {program.rank} does {which} than {schedule.name}: {stray[0]}")
        computed = tuple(each.action for each in program.instructions if isinstance(each, Compute))
        if len(given) < len(program.instructions) or computed != schedule.orders[program.rank]:
            raise ScheduleError(f"the program of rank {program.rank} has another order than {schedule.name}")
