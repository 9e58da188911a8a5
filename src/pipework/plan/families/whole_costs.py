"""Costs in whole numbers, so that what is equal by construction compares equal, however often it is added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from pipework.errors import ScheduleError
from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.exact import whole
from pipework.plan.families.order import all_split, chained
from pipework.plan.layout import Edge, Layout
from pipework.plan.rules import needs

Step = tuple[int, Kind]
"""A stage's work of one kind, on whichever microbatch."""

_KINDS = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)


@final
@dataclass(frozen=True, slots=True)
class WholeCosts:
    """How long steps and transfers take, and by how much a step changes what its rank holds, which has a limit.

    `delay[u, v]` is between a stage and the next, in both directions. `after[step]` has the steps that must be done
    before, each with its delay. Every stage waits for the one before it, so that what is made with these costs is right
    for any edges.
    """

    layout: Layout
    duration: Mapping[Step, int]
    delay: Mapping[Edge, int]
    keeps: Mapping[Step, int]
    memory: int
    after: Mapping[Step, tuple[tuple[Step, int], ...]]

    @classmethod
    def of(cls, layout: Layout, costs: Costs, memory: float) -> WholeCosts:
        """These costs, and a limit of memory per rank in the unit of `costs.activation`.

        Raises ScheduleError if the costs do not fit the layout, and if a rank cannot hold one microbatch.
        """
        costs.require(layout)
        chain = chained(layout)
        steps = [(stage, kind) for stage in range(layout.stages) for kind in _KINDS]
        edges = sorted(chain.edges)
        durations = [costs.duration(Action(stage, kind, 0)) for stage, kind in steps]
        times = whole([*durations, *(costs.delay(*edge, layout) if edge in layout.edges else 0.0 for edge in edges)])
        delay = dict(zip(edges, times[len(steps) :], strict=True))
        work = all_split(chain, microbatches=1)

        def after(step: Step) -> tuple[tuple[Step, int], ...]:
            needed = [(need.stage, need.kind) for need in needs(Action(*step, 0), work)]
            stage, _ = step
            return tuple((each, delay.get((min(stage, each[0]), max(stage, each[0])), 0)) for each in needed)

        limit, keeps = _keeps(layout, costs, memory)
        duration = dict(zip(steps, times, strict=False))
        return cls(chain, duration, delay, keeps, limit, {step: after(step) for step in steps})


def _keeps(layout: Layout, costs: Costs, memory: float) -> tuple[int, dict[Step, int]]:
    stages = range(layout.stages)
    activations = [costs.held(Action(stage, Kind.FORWARD, 0)) for stage in stages]
    if max(activations) > memory:
        raise ScheduleError(
            f"a memory limit of {memory} leaves no room for one microbatch",
            why=f"it keeps {max(activations)} on a stage",
            remedy=f"allow memory={max(activations)} or more",
        )
    early = [costs.released(Action(stage, Kind.INPUT_GRADIENT, 0)) for stage in stages]
    limit, *amounts = whole([memory, *activations, *early])
    keeps: dict[Step, int] = {}
    for stage, activation, released in zip(stages, amounts, amounts[len(stages) :], strict=False):
        changes = (activation, -released, released - activation)
        keeps |= {(stage, kind): change for kind, change in zip(_KINDS, changes, strict=True)}
    return limit, keeps
