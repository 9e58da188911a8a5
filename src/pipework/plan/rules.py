"""What must be done before what: the one place that says so.

    F   needs the F of every stage that feeds its stage
    B   needs its own F, and the B (or I) of every stage that sends its stage a gradient
    I   as B
    W   needs its own I

and where sequences are cut into slices, at its own stage

    F   needs the F of the slice before, whose keys and values it reads
    B   needs the B (or I) of the slice after, which has the gradient of its keys and values
    I   as B

Checking, simulating, lowering, drawing and the error messages all ask `needs` and `transfers`, and nobody else knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pipework.plan.action import Action, Kind
from pipework.plan.layout import Layout
from pipework.plan.schedule import Schedule


@final
@dataclass(frozen=True, slots=True)
class Transfer:
    """What an action hands to another stage: the value after an F, the gradient after a B or I.

    >>> print(Transfer(Action.parse("2F0"), to=3))
    2F0>3
    """

    after: Action
    to: int

    def __str__(self) -> str:
        return f"{self.after}>{self.to}"


def needs(action: Action, schedule: Schedule) -> tuple[Action, ...]:
    """The actions that must have ended before `action` may start, its own stage's first.

    The order of the rank adds its own: an action also waits for the one before it on its rank.

    >>> from pipework.plan import one_f_one_b
    >>> schedule = one_f_one_b(Layout.loop(3, skips=[(0, 2)]), microbatches=2)
    >>> [[str(need) for need in needs(Action.parse(text), schedule)] for text in ("2F1", "0B1")]
    [['0F1', '1F1'], ['0F1', '1B1', '2B1']]
    """
    stage, kind, microbatch = action.stage, action.kind, action.microbatch
    if kind is Kind.WEIGHT_GRADIENT:
        return (Action(stage, Kind.INPUT_GRADIENT, microbatch),)
    needed: list[Action] = []
    if kind is Kind.FORWARD:
        if microbatch % schedule.slices:
            needed.append(Action(stage, kind, microbatch - 1))
        needed += [Action(earlier, kind, microbatch) for earlier in schedule.layout.fed_by(stage)]
    else:
        needed.append(Action(stage, Kind.FORWARD, microbatch))
        if (microbatch + 1) % schedule.slices:
            needed.append(_backward(stage, microbatch + 1, schedule))
        needed += [_backward(later, microbatch, schedule) for later in schedule.layout.gradient_from(stage)]
    return tuple(needed)


def transfers(action: Action, schedule: Schedule) -> tuple[Transfer, ...]:
    """What leaves `action` for other stages, on the same rank or not (see `is_local`), by ascending stage.

    >>> from pipework.plan import one_f_one_b
    >>> schedule = one_f_one_b(Layout.loop(3, skips=[(0, 2)]), microbatches=2)
    >>> [[str(sent) for sent in transfers(Action.parse(text), schedule)] for text in ("0F1", "2B1", "0B1")]
    [['0F1>1', '0F1>2'], ['2B1>0', '2B1>1'], []]
    """
    if action.kind is Kind.WEIGHT_GRADIENT:
        return ()
    forward = action.kind is Kind.FORWARD
    stages = schedule.layout.feeds(action.stage) if forward else schedule.layout.gradient_to(action.stage)
    return tuple([Transfer(action, stage) for stage in stages])


def is_local(transfer: Transfer, layout: Layout) -> bool:
    """Whether both ends of the transfer are on one rank, so that nothing has to travel.

    >>> is_local(Transfer(Action.parse("1F0"), to=2), Layout.vee(2))
    True
    """
    return layout.rank_of[transfer.after.stage] == layout.rank_of[transfer.to]


def crossings(schedule: Schedule) -> int:
    """How many transfers of a step go from rank to rank.

    >>> from pipework.plan import one_f_one_b
    >>> crossings(one_f_one_b(Layout.loop(3), microbatches=2))
    8
    """
    sent = (transfer for order in schedule.orders for action in order for transfer in transfers(action, schedule))
    return sum(not is_local(transfer, schedule.layout) for transfer in sent)


def _backward(stage: int, microbatch: int, schedule: Schedule) -> Action:
    """The action after which this stage's input gradient exists."""
    split = schedule.splits(stage, microbatch)
    return Action(stage, Kind.INPUT_GRADIENT if split else Kind.BACKWARD, microbatch)
