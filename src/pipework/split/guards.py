"""Values that the forward reads back into Python, as far as the model's inputs alone decide them.

A mask that is dropped when nothing is masked, a length counted from token ids: the forward branches on them, so a
capture holds for inputs that give the same values. These can be worked out before a step, from the inputs, by the
very calls that the forward makes; a capture for other values is then made, or found. Values that depend on a closed
module's output are checked where they are read, while the step runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from pipework.split.capture import Recording
from pipework.split.code import guard_source
from pipework.split.cut import StagePart
from pipework.split.scope import compiled, equal
from pipework.split.tape import ClosedModule, Entry, Origin

NO_STAGE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Guards:
    """What the inputs decide: how to work it out, and what it was when the model was captured."""

    work_out: Callable[..., tuple[Any, ...]]
    source: str
    constants: SimpleNamespace
    positions: tuple[int, ...]  # of the inputs that it needs
    values: tuple[Any, ...]

    def hold(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether these inputs give the captured values; taken to hold where an input has no values itself."""
        given = [inputs[position] for position in self.positions]
        if any(tensor.is_meta for tensor in given):
            return True
        with torch.no_grad():
            found = self.work_out(self.constants, *given)
        return all(equal(one, other) for one, other in zip(found, self.values, strict=True))


def input_guards(recording: Recording) -> Guards | None:
    """The guards of a recording that its inputs decide; None if there are none."""
    known = {v.index for v in recording.values if v.origin in (Origin.INPUT, Origin.CONSTANT)}
    decided: list[Entry] = []
    for entry in recording.entries:
        reads, touched = set(entry.reads()), {*entry.makes(), *entry.writes}
        whole = isinstance(entry.target, ClosedModule) or entry.modules or entry.draw is not None
        if not whole and reads <= known:
            decided.append(entry)
            known |= touched
        else:  # what shares memory with something written here is not known from here on
            written = {recording.values[index].storage for index in entry.writes}
            known -= {v.index for v in recording.values if v.storage in written}
    needed = _needed(decided, recording)
    read = {index for entry in needed for index in entry.reads()}
    values = [recording.values[index] for index in sorted(read)]
    inputs = tuple((v.index, int(v.name)) for v in values if v.origin is Origin.INPUT)
    if not inputs or not any(entry.readback for entry in needed):
        return None
    constants = {v.index: v for v in values if v.origin is Origin.CONSTANT}
    written = {recording.values[index].storage for entry in needed for index in entry.writes}
    part = StagePart(
        index=NO_STAGE,
        entries=tuple(dataclasses.replace(entry, checkpoints=()) for entry in needed),
        inputs=inputs,
        received=(),
        outputs=(),
        copied=frozenset(index for index, _ in inputs if recording.values[index].storage in written),
        owned=dict.fromkeys(constants, (Origin.CONSTANT, "")),
        assigned={},
        modules=(),
    )
    names = {index: f"constant_{index}" for index in constants}
    source, objects = guard_source(part, recording, recording.ambient, names)
    return Guards(
        work_out=compiled(source, objects, NO_STAGE),
        source=source,
        constants=SimpleNamespace(**{names[index]: value.tensor for index, value in constants.items()}),
        positions=tuple(position for _, position in inputs),
        values=tuple(entry.result for entry in needed if entry.readback),
    )


def _needed(decided: Sequence[Entry], recording: Recording) -> list[Entry]:
    """Of the calls that the inputs decide, those that lead to a value read back."""
    wanted: set[int] = set()  # memory
    found: list[Entry] = []
    for entry in reversed(decided):
        touched = {recording.values[index].storage for index in (*entry.makes(), *entry.writes)}
        if entry.readback or touched & wanted:
            found.append(entry)
            wanted |= {recording.values[index].storage for index in entry.reads()}
    return found[::-1]
