"""How the calls of a stage nest in its source: blocks under torch's switches, and functions to be computed again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from pipework.split.tape import Checkpoint, Entry, Surroundings

Autocast = tuple[tuple[str, bool, object], ...]
Block = tuple[str, int]
"""A context manager as source, and the number of its stretch: neighbours of another stretch need one of their own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One call of a stage, by its number; or all those of a checkpoint."""

    numbers: range
    surroundings: Surroundings
    stretch: int
    checkpoint: Checkpoint | None = None
    inner: tuple[Step, ...] = ()


def steps(entries: Sequence[Entry], depth: int = 0, start: int = 0) -> tuple[Step, ...]:
    """The calls in order, each checkpoint's calls as one step; `start` is the number of the first."""
    found: list[Step] = []
    number = start
    for mark, group in itertools.groupby(entries, lambda e: e.checkpoints[depth] if e.checkpoints[depth:] else None):
        calls = list(group)
        numbers = range(number, number + len(calls))
        if mark is None:
            found += [Step(range(n, n + 1), e.surroundings, e.stretch) for n, e in zip(numbers, calls, strict=True)]
        else:
            inner = steps(calls, depth + 1, number)
            found.append(Step(numbers, mark.surroundings, calls[0].stretch, mark, inner))
        number = numbers.stop
    return tuple(found)


def blocks(steps: Sequence[Step], ambient: Surroundings) -> list[tuple[Block, ...]]:
    """The `with` blocks that each step stands in, outermost first, where `ambient` is what holds around them all.

    An autocast block reaches to the end of its stretch, with others inside it: weights that were cast are forgotten
    when the outermost one is left.
    """
    outer: list[Autocast] = [ambient.autocast] * len(steps)
    spans: dict[int, list[int]] = {}
    for place, step in enumerate(steps):
        if step.surroundings.autocast != ambient.autocast:
            spans.setdefault(step.stretch, []).append(place)
    for places in spans.values():
        reach = range(places[0], places[-1] + 1)
        outer[reach.start : reach.stop] = [steps[places[0]].surroundings.autocast] * len(reach)
    found: list[tuple[Block, ...]] = []
    for step, around in zip(steps, outer, strict=True):
        here = step.surroundings
        casts = [*_autocast(around, ambient.autocast), *_autocast(here.autocast, around)]
        grad = [("torch.enable_grad()" if here.grad else "torch.no_grad()", 0)] if here.grad != ambient.grad else []
        found.append((*((cast, step.stretch) for cast in casts), *grad))
    return found


def _autocast(now: Autocast, before: Autocast) -> list[str]:
    return [
        f"torch.autocast({kind!r}, {dtype}, {enabled})"
        for (kind, enabled, dtype), other in zip(now, before, strict=True)
        if (kind, enabled, dtype) != other
    ]
