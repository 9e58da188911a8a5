"""Schedules made of others."""

from __future__ import annotations

from dataclasses import replace

import pipework
from pipework import Action, Kind, Layout, Schedule


def split_1f1b(layout: Layout, microbatches: int, turned: bool = False) -> Schedule:
    """1F1B with every backward in halves: W two actions after I, or all W at the end and the last microbatch first.

    It is interleaved where ranks hold several stages.
    """
    family = "one_f_one_b" if layout.stages == layout.ranks else "interleaved_one_f_one_b"
    schedule = pipework.schedules.FAMILIES[family].build(layout, microbatches)
    orders = []
    for order in schedule.orders:
        done: list[Action] = []
        waiting: list[Action] = []
        for action in order:
            if action.kind is not Kind.BACKWARD:
                done.append(action)
                continue
            done.append(replace(action, kind=Kind.INPUT_GRADIENT))
            waiting.append(replace(action, kind=Kind.WEIGHT_GRADIENT))
            if len(waiting) > 2 and not turned:
                done.append(waiting.pop(0))
        orders.append((*done, *(reversed(waiting) if turned else waiting)))
    return replace(schedule, name="split", orders=tuple(orders))
