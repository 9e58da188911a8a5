"""Zero bubble on a V: a microbatch ends on the rank where it began, and can start its backward there at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from pipework.plan.action import Action, Kind
from pipework.plan.costs import Costs
from pipework.plan.families.greedy_vee import greedy_vee
from pipework.plan.families.order import each, require_microbatches, require_vee, schedule, split
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule
from pipework.plan.simulate import simulate


def zero_bubble_v(layout: Layout, microbatches: int, *, costs: Costs | None = None) -> Schedule:
    """No bubble in the span, in the memory of 1F1B: ZB-V (Qi et al., arXiv:2405.15362).

    The order of the paper's figure is right where F, I and W take equally long: with p ranks and 2p - 1 or more
    microbatches the span has no bubble then. With `costs` it is the best of that and of a few greedy attempts, by span
    and then by makespan. Either way a rank keeps no more than 2p activations, of stages half as large as those of 1F1B.
    Choose it wherever the model can be cut into twice as many stages as ranks. Takes `Layout.vee` and 1 or more
    microbatches; raises ScheduleError otherwise.

    >>> from pipework.plan import simulate
    >>> print(simulate(zero_bubble_v(Layout.vee(2), microbatches=4)).text(width=120))
    rank 0  0F0-0F1-0F2-3F0-3I0-3W0-3F1-3I1-3W1-0F3-0I0-0W0-3F2-3I2-3W2-0I1-0W1-3F3-3I3-3W3-0I2-0W2-0I3-0W3-....
    rank 1  ....1F0-2F0-1F1-2F1-2I0-2W0-1F2-1I0-1W0-2F2-2I1-2W1-1F3-1I1-1W1-2F3-2I2-2W2-1I2-2I3-1I3-1W2-2W3-1W3-
    makespan 25, span 24, bubble 4.0 %, peak per rank 4
    """
    require_microbatches(microbatches)
    require_vee("zero_bubble_v", layout)
    name = "zero_bubble_v"
    figure = schedule(name, layout, microbatches, lambda rank: _figure(layout, rank, microbatches))
    if costs is None:
        return figure
    costs.require(layout)
    attempts = [
        schedule(name, layout, microbatches, attempt.orders.__getitem__)
        for attempt in greedy_vee(layout, microbatches, costs)
    ]
    timelines = (simulate(attempt, costs) for attempt in (figure, *attempts))
    return min(timelines, key=lambda timeline: (timeline.span, timeline.makespan)).schedule


def _figure(layout: Layout, rank: int, microbatches: int) -> Iterator[Action]:
    """The order of one rank, for at least 2p - 1 microbatches."""
    shallow, deep = layout.held_by(rank)
    full, farther = max(microbatches, layout.stages - 1), layout.ranks - 1 - rank
    forwards, more_forwards = (each(Kind.FORWARD, stage, full) for stage in (shallow, deep))
    backwards, more_backwards = (each(Kind.BACKWARD, stage, full) for stage in (shallow, deep))
    yield from islice(forwards, 2 * farther + 1)
    for forward in islice(more_forwards, rank):
        yield forward
        yield next(forwards)
    for forward in islice(more_forwards, farther + 1):
        yield forward
        yield from split(islice(more_backwards, 1), delay=0)
    for forward in more_forwards:
        yield from islice(forwards, 1)
        yield from split(islice(backwards, 1), delay=0)
        yield forward
        yield from split(islice(more_backwards, 1), delay=0)
    # Input gradients first, as other ranks wait for them: those left are `rank` of the deep stage, p of the shallow.
    late, more = ([*split(left, delay=full)] for left in (backwards, more_backwards))
    inputs, weights = late[: layout.ranks], late[layout.ranks :]
    yield from chain(*zip(inputs, more[:rank], strict=False))
    yield from chain(*zip(inputs[rank:], weights, strict=False))
    yield from more[rank:]
    yield from weights[farther + 1 :]
