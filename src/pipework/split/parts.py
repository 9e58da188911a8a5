"""A model as a row of parts, between which it can be cut, and what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from itertools import accumulate, pairwise
from typing import final

from pipework.errors import CutError
from pipework.plan import Costs, balance
from pipework.split.capture import Recording
from pipework.split.cost import Cost
from pipework.split.hints import Hints
from pipework.split.points import CutPoint, CutPoints
from pipework.split.table import size_text
from pipework.split.tape import ClosedModule
from pipework.split.trees import Ref, leaves


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What a model does from one place where it can be cut to the next: a module's call, and what follows it.

    `boundary` is what crosses a cut before it, in bytes for one microbatch.
    """

    begins: CutPoint
    cost: Cost
    boundary: int = 0


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ModuleCosts:
    """What each part of a model costs for one microbatch, and so where to cut it; `print` shows a table.

    The unit is "s" for seconds, or empty where operations were counted.

    >>> parts = (Part(CutPoint(name), Cost(forward=cost)) for name, cost in (("a", 1.0), ("b", 1.0), ("c", 2.0)))
    >>> costs = ModuleCosts(tuple(parts))
    >>> print(costs.cut_points(stages=2))
    before c
    >>> costs.per_stage(stages=2).forward
    (2.0, 2.0)
    """

    parts: tuple[Part, ...]
    unit: str = ""

    @property
    def work(self) -> float:
        """Of all parts together."""
        return sum(part.cost.work for part in self.parts)

    def cut_points(self, stages: int) -> CutPoints:
        """The cuts between these parts whose heaviest stage is lightest; among those, the fewest bytes cross them.

        Raises `CutError` where there are fewer parts than stages.
        """
        return CutPoints(tuple(self.parts[i].begins for i in self._cuts(stages)))

    def per_stage(self, stages: int) -> Costs:
        """What the stages cost when the model is cut so, for `pipework.simulate`; transfers take no time."""
        sums, begins = self._sums(stages), [0, *self._cuts(stages)]
        boundaries = [self.parts[begin].boundary for begin in begins]
        return Costs(
            tuple(cost.forward for cost in sums),
            tuple(cost.input_gradient for cost in sums),
            tuple(cost.weight_gradient for cost in sums),
            # What a stage was given is kept, whether autograd has a use for it or not.
            activation=tuple(float(max(c.activation, b)) for c, b in zip(sums, boundaries, strict=True)),
            boundary=tuple(map(float, boundaries)),
            unit=self.unit,
        )

    def heaviest(self, stages: int) -> float:
        """The work of the heaviest stage when the model is cut so."""
        return max(cost.work for cost in self._sums(stages))

    def heaviest_span(self, stages: int) -> tuple[float, float]:
        """The work before the heaviest stage, and up to its end."""
        work = [cost.work for cost in self._sums(stages)]
        end = [*accumulate(work)][work.index(max(work))]
        return end - max(work), end

    def without(self, points: Collection[CutPoint]) -> ModuleCosts:
        """The same costs where no stage may begin at these points."""
        parts: list[Part] = []
        for part in self.parts:
            if parts and part.begins in points:
                parts[-1] = dataclasses.replace(parts[-1], cost=parts[-1].cost + part.cost)
            else:
                parts.append(part)
        return dataclasses.replace(self, parts=tuple(parts))

    def _sums(self, stages: int) -> list[Cost]:
        bounds = (0, *self._cuts(stages), len(self.parts))
        return [sum((part.cost for part in self.parts[a:b]), Cost()) for a, b in pairwise(bounds)]

    def _cuts(self, stages: int) -> tuple[int, ...]:
        if not 1 <= stages <= len(self.parts):
            raise CutError(
                f"the model cannot be cut into {stages} stages",
                why=f"there are {len(self.parts)} parts to share out, and a stage holds at least one",
                remedy=f"ask for at most {len(self.parts)} stages, or place pipe_split() in the forward",
            )
        return balance([part.cost.work for part in self.parts], stages, [part.boundary for part in self.parts])

    def __str__(self) -> str:
        columns = ("part", "forward", "input gradient", "weight gradient", "activation", "boundary")
        lines: list[tuple[str, ...]] = [columns]
        for part in self.parts:
            name = part.begins.module + (f", call {part.begins.call}" if part.begins.call else "")
            cost = part.cost
            times = (f"{x:.3g}" for x in (cost.forward, cost.input_gradient, cost.weight_gradient))
            lines.append((name, *times, size_text(cost.activation), size_text(part.boundary)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(columns)))])
            for line in lines
        )


def counted(recording: Recording, hints: Hints) -> ModuleCosts:
    """The costs that were counted while the model was recorded, part by part."""
    entries = recording.entries
    crossing = _crossing(recording)
    parts: list[Part] = []
    begun = Cost()
    for entry, boundary in zip(entries, crossing, strict=True):
        target = entry.target
        if isinstance(target, ClosedModule) and (not parts or (boundary and hints.may_begin(target.name))):
            parts.append(Part(CutPoint(target.name, call=target.call), begun + entry.cost, boundary if parts else 0))
            begun = Cost()
        elif parts:
            parts[-1] = dataclasses.replace(parts[-1], cost=parts[-1].cost + entry.cost)
        else:
            begun += entry.cost  # what runs before the first module is the first part's
    return ModuleCosts(tuple(parts))


def _crossing(recording: Recording) -> list[int]:
    """For each entry the bytes that cross a cut before it: what is made earlier, and read by it or later."""
    entries = recording.entries
    last = {ref.index: len(entries) - 1 for ref in leaves(recording.output) if isinstance(ref, Ref)}
    for position, entry in enumerate(entries):
        for index in entry.reads():
            last[index] = max(position, last.get(index, 0))
    steps = [0] * (len(entries) + 1)
    for value in recording.values:
        if value.maker is not None and value.index in last:
            size = value.tensor.numel() * value.tensor.element_size()
            steps[value.maker + 1] += size
            steps[max(last[value.index], value.maker) + 1] -= size
    return list(accumulate(steps))[:-1]
