"""Squeezing idle slots out of the beginning and the end of a schedule in slots, within the memory that it takes anyway.

A table says what each rank does in each slot of time, where every action takes one slot. An action is pulled ahead into
the first free slot after all that it needs, unless its rank would then hold more than the rank that holds most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import final

from pipework.plan.action import Action, Kind
from pipework.plan.families.order import all_split, chained
from pipework.plan.layout import Layout
from pipework.plan.rules import needs
from pipework.plan.schedule import Schedule
from pipework.plan.simulate import simulate

Slots = dict[int, Action]
"""What a rank does, and when."""


def squeezed(layout: Layout, table: Sequence[Slots], microbatches: int) -> list[list[Action]]:
    """The orders of all ranks, with weight gradients, from a table of forwards and input gradients.

    First what comes before the first stage's first input gradient is pulled ahead, with weight gradients in the slots
    that were idle; then what comes after its last forward, with weight gradients in whichever slots remain.
    """
    work = all_split(chained(layout), microbatches)  # so that the orders are right for any edges
    ranks = [_Rank(_filled(slots), fills=False) for slots in table]
    rows = _in_order(ranks)
    _pull_ahead(ranks, rows[: rows.index(Action(0, Kind.INPUT_GRADIENT, 0))], work)
    orders = tuple(tuple(action for _, action in sorted(rank.slots.items())) for rank in ranks)
    starts: list[Slots] = [{} for _ in ranks]
    for span in simulate(replace(work, orders=orders)).spans:
        if span.action.kind is not Kind.WEIGHT_GRADIENT:
            starts[span.rank][round(span.start)] = span.action
    ranks = [_Rank(slots, fills=True) for slots in starts]
    rows = _in_order(ranks)
    _pull_ahead(ranks, rows[rows.index(Action(0, Kind.FORWARD, microbatches - 1)) + 1 :], work)
    return [[action for _, action in sorted(_filled(rank.slots).items())] for rank in ranks]


@final
class _Rank:
    """What a rank does in each slot, and after each how much it holds, and how many weight gradients it owes.

    If it `fills` slots, the idle ones take weight gradients that it owes.
    """

    def __init__(self, slots: Slots, fills: bool) -> None:
        self.slots, self.fills = slots, fills
        self._states: list[tuple[int, int]] = []
        for slot in range(max(slots) + 1):
            self._states.append(self._after(self._before(slot), slots.get(slot)))
        self.peak = max(held for held, _ in self._states)

    def pull(self, old: int, new: int, limit: int) -> bool:
        """Moves what is in slot `old` to `new`, an idle one, unless the rank would then hold more than `limit`."""
        action, state = self.slots[old], self._before(new)
        states: list[tuple[int, int]] = []
        for slot in range(new, len(self._states)):
            if slot > old and state == self._states[slot - 1]:
                break
            state = self._after(state, action if slot == new else self.slots.get(slot) if slot != old else None)
            if state[0] > limit:
                return False
            states.append(state)
        self._states[new : new + len(states)] = states
        self.slots[new] = self.slots.pop(old)
        return True

    def _before(self, slot: int) -> tuple[int, int]:
        return self._states[slot - 1] if slot else (0, 0)

    def _after(self, state: tuple[int, int], action: Action | None) -> tuple[int, int]:
        held, owed = state
        if action is None:
            return (held - 1, owed - 1) if self.fills and owed else state
        if action.kind is Kind.FORWARD:
            return held + 1, owed
        return (held, owed + 1) if action.kind is Kind.INPUT_GRADIENT else (held - 1, owed - 1)


def _in_order(ranks: Sequence[_Rank]) -> list[Action]:
    """All actions by slot, and in a slot by rank."""
    rows = [(slot, rank, action) for rank, each in enumerate(ranks) for slot, action in each.slots.items()]
    return [action for _, _, action in sorted(rows, key=lambda row: row[:2])]


def _pull_ahead(ranks: Sequence[_Rank], actions: Sequence[Action], work: Schedule) -> None:
    """Each action in turn, as far as it goes; never past the same stage's work of its kind on another microbatch."""
    slot_of = {action: slot for rank in ranks for slot, action in rank.slots.items()}
    limit = max(rank.peak for rank in ranks)
    for action in actions:
        rank = ranks[work.layout.rank_of[action.stage]]
        before = [*needs(action, work)]
        if action.microbatch > 0:
            before.append(replace(action, microbatch=action.microbatch - 1))
        old, earliest = slot_of[action], 1 + max((slot_of[each] for each in before), default=-1)
        idle = (slot for slot in range(earliest, old) if slot not in rank.slots)
        slot_of[action] = next((slot for slot in idle if rank.pull(old, slot, limit)), old)


def _filled(slots: Slots) -> Slots:
    """With weight gradients in idle slots, first in, first out, and after the last."""
    filled: Slots = {}
    owed: deque[Action] = deque()
    for slot in range(max(slots) + len(slots)):
        if slot in slots:
            filled[slot] = action = slots[slot]
            if action.kind is Kind.INPUT_GRADIENT:
                owed.append(replace(action, kind=Kind.WEIGHT_GRADIENT))
        elif owed:
            filled[slot] = owed.popleft()
    return filled
