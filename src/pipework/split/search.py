"""Which modules to open, and where then to cut, so that the stages weigh about the same.

A module is opened when it alone is heavier than a stage should be. Where the best cut between the modules then still
leaves a stage too heavy, those over which an even cut would fall are opened one level deeper, if that helps:

    ideal       │        ┆         │
    modules     ├────────┼────────┬┴───────┼────────┤
    deeper      ├────────┼────┬───┼────┬───┼────────┤      between attention and MLP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TypeVar

from torch import nn

from pipework.errors import CaptureError, CutError, PipeworkError
from pipework.split.arguments import Arguments
from pipework.split.capture import Recording, capture
from pipework.split.cost import Meter
from pipework.split.hints import NO_SPLIT, PLAN, Hints
from pipework.split.marks import Marks
from pipework.split.parts import ModuleCosts, counted
from pipework.split.points import CutPoint, CutPoints
from pipework.split.tape import ClosedModule

UNEVEN = 1.05
"""A heaviest stage of up to this many times an even share is left as it is."""

WORTH = 0.98
"""A deeper cut must bring the heaviest stage down to this share of what it was."""

Made = TypeVar("Made")


def balanced(module: nn.Module, example: Arguments, stages: int, make: Callable[[CutPoints], Made]) -> Made:
    """`make(points)` of the best cut into so many stages that `make` takes.

    Where it refuses with `CutError`, each point is tried alone, and the search goes on without those it refuses.
    """
    if stages == 1:
        return make(CutPoints())
    costs = searched(module, example, stages)
    while True:
        points = costs.cut_points(stages)
        try:
            return make(points)
        except CutError as refusal:
            refused = {point for point in points if isinstance(point, CutPoint) and not _is_taken(point, make)}
            costs = costs.without(refused)
            if not refused or len(costs.parts) < stages:
                raise refusal from None


def _is_taken(point: CutPoint, make: Callable[[CutPoints], object]) -> bool:
    try:
        make(CutPoints((point,)))
    except CutError:
        return False
    return True


def searched(module: nn.Module, example: Arguments, stages: int) -> ModuleCosts:
    """The counted costs of the parts between which the best cut into so many stages lies.

    Raises `CutError` where the model has fewer parts than stages.
    """
    if stages < 1:
        raise CutError(f"a model cannot be cut into {stages} stages", remedy="ask for at least one")
    return _Search(module, example, stages).found()


class _Search:
    def __init__(self, module: nn.Module, example: Arguments, stages: int) -> None:
        self.module, self.example, self.stages = module, example, stages
        self.hints = Hints.of(module)
        self.sealed: dict[str, PipeworkError] = {}  # modules that could not be opened
        self.opened: frozenset[str] = frozenset({""})
        self.recording = self._recorded(self.opened)
        self.costs = counted(self.recording, self.hints)

    def found(self) -> ModuleCosts:
        while heavy := self._heavy():
            self._open(heavy)
        self._refuse_too_few()
        while self._is_uneven():
            before = self.opened, self.recording, self.costs
            heaviest = self.costs.heaviest(self.stages)
            deeper = frozenset(self._straddling())
            if deeper:
                self._open(deeper)
            if self.costs.heaviest(self.stages) > WORTH * heaviest:
                self.opened, self.recording, self.costs = before
                break
        return self.costs

    def _recorded(self, opened: frozenset[str]) -> Recording:
        def call(values: object) -> object:
            return self.example.with_values(values).call(self.module)  # type: ignore[arg-type]

        marks = Marks({}, splits=frozenset())
        try:
            return capture(self.module, self.example.values, call, marks, opened, Meter())
        except CaptureError:
            # Gradients taken inside the forward (torch.func.grad) forbid counting what autograd keeps.
            return capture(self.module, self.example.values, call, marks, opened, Meter(activations=False))

    def _open(self, names: frozenset[str]) -> None:
        """Open these modules, or those of them that can be."""
        try:
            recording = self._recorded(self.opened | names)
        except PipeworkError as error:
            if len(names) == 1:
                self.sealed |= dict.fromkeys(names, error)
                return
            for name in sorted(names):
                self._open(frozenset({name}))
            return
        self.opened, self.recording = recording.opened, recording
        self.costs = counted(recording, self.hints)

    def _calls(self) -> Iterator[tuple[str, float, float]]:
        """Each call of a closed module: its name, the work up to it, and the work up to its end."""
        entries = self.recording.entries
        ends = accumulate(entry.cost.work for entry in entries)
        for entry, end in zip(entries, ends, strict=True):
            if isinstance(entry.target, ClosedModule):
                yield entry.target.name, end - entry.cost.work, end

    def _can_open(self, name: str) -> bool:
        whole = name in self.hints.whole or name in self.sealed or name in self.recording.compiled
        return bool(self.recording.calls.get(name)) and not whole

    def _heavy(self) -> frozenset[str]:
        """What alone is heavier than a stage should be, and all there is where there are too few parts."""
        share = self.costs.work / self.stages if len(self.costs.parts) >= self.stages else -1.0
        return frozenset(name for name, begin, end in self._calls() if end - begin > share and self._can_open(name))

    def _is_uneven(self) -> bool:
        whole = max((end - begin for name, begin, end in self._calls() if not self._can_open(name)), default=0.0)
        return self.costs.heaviest(self.stages) > UNEVEN * max(self.costs.work / self.stages, whole)

    def _straddling(self) -> Iterator[str]:
        """The modules over which an even cut falls, and those at either end of the heaviest stage."""
        share = self.costs.work / self.stages
        calls = list(self._calls())
        for name, begin, end in calls:
            if any(begin < k * share < end for k in range(1, self.stages)) and self._can_open(name):
                yield name
        begin, end = self.costs.heaviest_span(self.stages)
        inside = [name for name, a, b in calls if begin <= a and b <= end]
        yield from (name for name in {*inside[:1], *inside[-1:]} if self._can_open(name))

    def _refuse_too_few(self) -> None:
        """Say why there are too few parts, or why one stays too heavy, where a module could not be opened."""
        share = self.costs.work / self.stages if len(self.costs.parts) >= self.stages else -1.0
        for name, begin, end in self._calls():
            if name in self.sealed and end - begin > share:
                raise self.sealed[name]
        if len(self.costs.parts) >= self.stages:
            return
        kept = sorted({type(self.module.get_submodule(name)).__name__ for name in self._kept()})
        raise CutError(
            f"the model cannot be cut into {self.stages} stages",
            why=f"there are {len(self.costs.parts)} parts to share out, and a stage holds at least one"
            + (f"; the model's {NO_SPLIT} or {PLAN}, or torch.compile, keep whole: {', '.join(kept)}" if kept else ""),
            remedy=f"ask for at most {max(len(self.costs.parts), 1)} stages, or place pipe_split() in the forward"
            + (", or name modules inside of these in split_spec" if kept else ""),
        )

    def _kept(self) -> set[str]:
        by_hint = {name for name in self.hints.whole if self.recording.calls.get(name)}
        return {name for name, _, _ in self._calls() if name in by_hint | self.recording.compiled}
