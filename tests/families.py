"""The families that a runner can train with."""

from __future__ import annotations

from pipework.plan import FAMILIES

PER_RANK = {name: each.per_rank for name, each in FAMILIES.items() if each.runs and each.trains}
"""The name of each, and how many stages its ranks usually hold."""
