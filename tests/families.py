"""The families that a runner can train with today."""

from __future__ import annotations

from pipework.plan import FAMILIES, Family


def _can_train(family: Family) -> bool:
    schedule = family.build(family.layout(2), 2)
    whole = not any(schedule.splits(stage, 0) for stage in range(schedule.layout.stages))
    return family.runs and schedule.trains and whole


PER_RANK = {name: family.per_rank for name, family in FAMILIES.items() if _can_train(family)}
"""The name of each, and how many stages its ranks usually hold."""
