"""The cuts that balance a model, by the cost of its parts counted while it runs."""

from __future__ import annotations

import itertools
import math

from torch import nn

from pipework.errors import CutError
from pipework.plan import balance
from pipework.split.arguments import Arguments
from pipework.split.capture import Recording, capture
from pipework.split.marks import Mark, SplitPoint
from pipework.split.tape import ClosedModule


def balanced(module: nn.Module, example: Arguments, stages: int) -> dict[str, list[Mark]]:
    """The cuts into `stages` stages whose heaviest stage is lightest, between the calls of modules that stay whole.

    A module is opened when it alone is heavier than a stage should be. Raises `CutError` when the model has fewer calls
    than stages.
    """
    if stages < 1:
        raise CutError(f"a model cannot be cut into {stages} stages", remedy="ask for at least one")
    opened = frozenset({""})
    while True:
        recording = capture(module, example.values, lambda v: example.with_values(v).call(module), {}, opened)
        total = sum(entry.cost for entry in recording.entries)
        heavy = {
            entry.target.name
            for entry in recording.entries
            if isinstance(entry.target, ClosedModule)
            and (entry.cost > total / stages or len(_starts(recording)) < stages)
            and recording.calls.get(entry.target.name)
        }
        if not heavy:
            return _cuts(recording, stages)
        opened |= heavy


def _starts(recording: Recording) -> list[int]:
    """The entries at which a stage may begin: calls of closed modules."""
    return [i for i, entry in enumerate(recording.entries) if isinstance(entry.target, ClosedModule)]


def _cuts(recording: Recording, stages: int) -> dict[str, list[Mark]]:
    entries, starts = recording.entries, _starts(recording)
    if len(starts) < stages:
        raise CutError(
            f"the model cannot be cut into {stages} stages",
            why=f"its forward calls {len(starts)} modules, and a stage holds at least one",
            remedy=f"ask for at most {max(len(starts), 1)} stages, or place pipe_split() in the forward",
        )
    bounds = [0, *starts[1:], len(entries)]
    costs = [sum(e.cost for e in entries[a:b]) for a, b in itertools.pairwise(bounds)]
    crossing = [math.inf, *(_crossing(recording, start) or math.inf for start in starts[1:])]
    marks: dict[str, list[Mark]] = {}
    for position in balance(costs, stages, crossing):
        target = entries[starts[position]].target
        assert isinstance(target, ClosedModule)
        earlier = [i for i in starts[:position] if entries[i].target == target]
        marks.setdefault(target.name, []).append(Mark(SplitPoint.BEGINNING, len(earlier)))
    return marks


def _crossing(recording: Recording, position: int) -> int:
    """Bytes that cross a cut before an entry: what is made before it and read after it."""
    later = {i for entry in recording.entries[position:] for i in entry.reads()}
    return sum(
        value.tensor.numel() * value.tensor.element_size()
        for value in recording.values
        if value.maker is not None and value.maker < position and value.index in later
    )
