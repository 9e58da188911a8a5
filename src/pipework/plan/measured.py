"""From steps that really ran to costs to plan the next ones with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from pipework.errors import InputError
from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.rules import needs
from pipework.plan.timeline import Span, Timeline


def measured(timelines: Sequence[Timeline]) -> Costs:
    """The costs of the actions in these timelines, in their unit: each stage's median durations, the median transfer.

    The two halves of a backward count for half of it each, without the forward that a recomputed stage does again; what
    never ran, or only at once with another, costs nothing.
    A transfer is measured where a rank had nothing else to wait for: from the end of an action on one rank to the start
    of the one on another rank that needs it. Activations are counted in microbatches.

    Raises InputError where there are no timelines, and where they differ in layout or unit.

    >>> from pipework.plan import Layout, one_f_one_b, simulate
    >>> costs = Costs(forward=(0.25, 0.5), input_gradient=(0.5, 0.5), weight_gradient=(0.5, 0.5), transfer=0.125)
    >>> schedule = one_f_one_b(Layout.loop(2), microbatches=4)
    >>> measured([simulate(schedule, costs), simulate(schedule.recomputing(), costs)]) == costs
    True
    """
    if len({(timeline.schedule.layout, timeline.unit) for timeline in timelines}) != 1:
        raise InputError(
            "the timelines differ in layout or unit" if timelines else "no timelines to measure",
            remedy="give the timelines of steps of one pipe on one layout, such as `runner.recorded` after each",
        )
    durations: defaultdict[tuple[int, Kind], list[float]] = defaultdict(list)
    backwards: list[tuple[Span, bool]] = []  # each with whether it began with another forward
    for timeline in timelines:
        for span in _alone(timeline):
            if span.action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
                backwards.append((span, span.action.stage in timeline.schedule.recomputed))
            else:
                durations[span.action.stage, span.action.kind].append(span.end - span.start)

    def each(kind: Kind) -> tuple[float, ...]:
        return tuple(median(durations[stage, kind] or [0.0]) for stage in range(timelines[0].schedule.layout.stages))

    forward = each(Kind.FORWARD)
    for span, is_recomputed in backwards:
        stage, kind, duration = span.action.stage, span.action.kind, span.end - span.start
        if is_recomputed:
            duration = max(0.0, duration - forward[stage])
        if kind is Kind.BACKWARD:
            durations[stage, Kind.INPUT_GRADIENT].append(duration / 2)
            durations[stage, Kind.WEIGHT_GRADIENT].append(duration / 2)
        else:
            durations[stage, kind].append(duration)
    waits = [wait for timeline in timelines for wait in _waits(timeline)]
    return Costs(
        forward,
        each(Kind.INPUT_GRADIENT),
        each(Kind.WEIGHT_GRADIENT),
        transfer=median(waits or [0.0]),
        unit=timelines[0].unit,
    )


def _alone(timeline: Timeline) -> Iterator[Span]:
    """The spans of the actions that did not run at once with another."""
    for rank in range(timeline.schedule.layout.ranks):
        yield from (spans[0] for spans in timeline.at_once(rank) if len(spans) == 1)


def _waits(timeline: Timeline) -> Iterator[float]:
    """For each action that waited for another rank's: the time between the two."""
    span_of: dict[Action, Span] = {span.action: span for span in timeline.spans}
    for rank in range(timeline.schedule.layout.ranks):
        for (*_, before), (span, *others) in pairwise(timeline.at_once(rank)):
            awaited = max(
                (span_of[need] for need in needs(span.action, timeline.schedule)), key=lambda s: s.end, default=span
            )
            if awaited.rank != rank and awaited.end > before.end and not others:
                yield max(0.0, span.start - awaited.end)
