"""From a recording to stages: which calls and values each stage holds, and which tensors travel between stages.

A value that several later stages read travels from reader to reader, and its gradient comes back the same way:

    stage 0 ──x──▶ stage 1 ──x──▶ stage 3          made in 0, read in 1 and 3
    stage 0 ◀─∂x── stage 1 ◀─∂x── stage 3

Each reader seeds its backward with what came back, so that the contributions are added one by one in descending order
of the calls, which is autograd's own order in the unsplit model. Adding up the readers' subtotals instead would
differ in the last bits as soon as a reader uses the value twice (a residual block does).

Written in place, a value travels on from the stage that wrote it. Values that share memory with one that a later stage
writes are rebuilt there as views of one carrier, so that the write is seen through all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

from pipework.errors import CutError
from pipework.split.capture import Recording
from pipework.split.fakes import Valueless
from pipework.split.tape import ClosedModule, Entry, Origin, State, Value
from pipework.split.trees import Ref, leaves


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """One tensor that travels along an edge: its layout, and whether its gradient comes back.

    For a tied parameter (see `pipework.split.ties`), named by `parameter`, nothing travels but the gradient.
    """

    value: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool
    parameter: str = ""
    layout: torch.layout = torch.strided

    @property
    def size(self) -> int:
        """Bytes for one microbatch."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Edge:
    """What stage `source` hands to stage `target` in each forward."""

    source: int
    target: int
    wires: tuple[Wire, ...]

    @property
    def values(self) -> tuple[Wire, ...]:
        """The wires of what goes forward."""
        return tuple(wire for wire in self.wires if not wire.parameter)

    @property
    def gradients(self) -> tuple[Wire, ...]:
        """The wires of what comes back."""
        return tuple(wire for wire in self.wires if wire.gradient)


@dataclasses.dataclass(frozen=True, slots=True)
class StagePart:
    """One stage's share of the tape; values are numbers."""

    index: int
    entries: tuple[Entry, ...]
    inputs: tuple[tuple[int, int], ...]  # (value, position among the model's input tensors)
    received: tuple[int, ...]
    outputs: tuple[int, ...]
    copied: frozenset[int]  # taken in and written here: the stage works on a copy
    owned: Mapping[int, tuple[Origin, str]]  # parameters, buffers and constants read by the trunk
    assigned: Mapping[str, int]  # buffers that the trunk replaces
    modules: tuple[str, ...]  # closed modules, in the order of their first call


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A model's forward in stages."""

    parts: tuple[StagePart, ...]
    edges: tuple[Edge, ...]
    output: Any  # the model's output with each tensor as Ref
    results: tuple[int, ...]  # the values in it, in the order in which the last stage returns them


def cut(recording: Recording) -> Cut:
    """Assign the tape to stages and route every value; raises `CutError` where that cannot be right."""
    return _Router(recording).cut()


class _Router:
    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.values, self.entries = recording.values, recording.entries
        self.stages = len(recording.labels) + 1
        self.results = list(dict.fromkeys(r.index for r in leaves(recording.output) if isinstance(r, Ref)))
        self.readers = self._readers()
        self.writers: dict[int, list[int]] = {}  # storage -> stages that write it
        for entry in self.entries:
            for write in entry.writes:
                self.writers.setdefault(self.values[write].storage, []).append(entry.stage)
        self.paths: dict[int, list[int]] = {}  # value -> the stages it travels through, its first holder first
        self.rebuilt: list[dict[int, Entry]] = [{} for _ in range(self.stages)]  # value -> view made again

    def _readers(self) -> dict[int, list[int]]:
        found: dict[int, set[int]] = {}
        for entry in self.entries:
            for index in (*entry.reads(), *entry.makes()):
                found.setdefault(index, set()).add(entry.stage)
        for index in self.results:
            found.setdefault(index, set()).add(self.stages - 1)
        return {index: sorted(stages) for index, stages in found.items()}

    def birth(self, index: int) -> int:
        """The stage that makes a value; -1 for one that is there before."""
        maker = self.values[index].maker
        return -1 if maker is None else self.entries[maker].stage

    def cut(self) -> Cut:
        self._refuse_empty_stages()
        self._refuse_gradients_through_cuts()
        groups: dict[int, list[Value]] = {}
        for value in self.values:
            if value.index in self.readers:
                groups.setdefault(value.storage, []).append(value)
        for storage, members in groups.items():
            self._route(members, sorted(set(self.writers.get(storage, ()))))
        self._refuse_shared_state()
        edges = self._edges()
        self._refuse_silent_cuts(edges)
        parts = tuple(self._part(stage, edges) for stage in range(self.stages))
        return Cut(parts, edges, self.recording.output, tuple(self.results))

    # ------------------------------------------------------------------ routing

    def _route(self, members: list[Value], written: list[int]) -> None:
        """Paths for the values that share one piece of memory, written in the stages `written`."""
        standing = [v for v in members if v.origin in (Origin.PARAMETER, Origin.BUFFER, Origin.CONSTANT)]
        travellers = [v for v in members if v not in standing]
        if standing and written:
            self._refuse_split_write(standing, travellers, written)
        first = min((max(self.birth(v.index), 0) for v in members), default=0)
        from_input = any(v.origin is Origin.INPUT for v in travellers)
        if written and not standing and (written[-1] > first or from_input):
            self._route_written(travellers, written)
            return
        for value in travellers:
            if value.origin is not Origin.INPUT:
                self.paths[value.index] = self._from(value.index, self.readers[value.index])

    def _from(self, index: int, stages: Iterable[int]) -> list[int]:
        birth = max(self.birth(index), 0)
        return [birth, *(s for s in stages if s > birth)]

    def _route_written(self, members: list[Value], written: list[int]) -> None:
        """One member carries the memory from stage to stage; the others are made again from it as views."""
        crossing = [v for v in members if any(s > max(self.birth(v.index), 0) for s in self.readers[v.index])]
        carrier = next((c for c in members if all(self._chain(v.index, c.index) is not None for v in crossing)), None)
        if carrier is None and self._cross_one_by_one(crossing):
            for value in crossing:
                self.paths[value.index] = self._from(value.index, self.readers[value.index])
            return
        if carrier is None:
            self._refuse_alias(crossing, written)
        assert carrier is not None
        made_again = {v.index: self._made_again(v, carrier) for v in crossing}
        stops = {s for stages in made_again.values() for s in stages}
        if carrier.origin is Origin.INPUT:
            # Until it is first written every stage takes it from the caller; from then on the writer hands it over.
            stops = {s for s in stops if s >= written[0]} | {written[0]}
            self.paths[carrier.index] = sorted(stops)
        else:
            self.paths[carrier.index] = self._from(carrier.index, sorted(stops))
        for index, stages in made_again.items():
            if index != carrier.index:
                last = max(stages, default=self.birth(index))
                self.paths[index] = [last, *(s for s in self.readers[index] if s > last)]
            for stage in stages:
                for entry in self._chain(index, carrier.index) or ():
                    for made in entry.makes():
                        self.rebuilt[stage][made] = entry

    def _made_again(self, value: Value, carrier: Value) -> list[int]:
        """The stages that make a value again: all that read it, but for those after its first use since the last write.

        That use gives it a node of its own, where autograd adds up its gradient; so from there it travels by itself.
        """
        stages = [s for s in self.readers[value.index] if s > self.birth(value.index)]
        storages = [{self.values[i].storage for i in entry.writes} for entry in self.entries]
        last = max(number for number, written in enumerate(storages) if value.storage in written)
        uses = [e.stage for e in self.entries[last:] if value.index in (*e.reads(), *e.makes())]
        if value is carrier or not uses or not self._state(value.index, uses[0]).requires_grad:
            return stages
        return [s for s in stages if s <= uses[0]]

    def _cross_one_by_one(self, crossing: list[Value]) -> bool:
        """Whether no two of the values are on their way at once, so that each write is seen where it must be."""
        spans = sorted((max(self.birth(v.index), 0), self.readers[v.index][-1]) for v in crossing)
        apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        return apart and not any(v.origin is Origin.INPUT for v in crossing)

    def _chain(self, index: int, carrier: int) -> list[Entry] | None:
        """The view operations that lead from the carrier to a value, first one first; None if others are needed."""
        chain: list[Entry] = []
        differentiable = self.values[index].tensor.requires_grad
        while index != carrier:
            maker = self.values[index].maker
            if maker is None:
                return None
            entry = self.entries[maker]
            reads = set(entry.reads())
            if isinstance(entry.target, ClosedModule) or entry.writes or len(reads) != 1:
                return None
            if differentiable and (entry.title in ("detach", "data") or not entry.surroundings.grad):
                return None  # a gradient reaches the value through what was written into it, but not through this
            chain.append(entry)
            (index,) = reads
        return chain[::-1]

    def _state(self, index: int, stage: int) -> State:
        """What the value is like when it leaves a stage."""
        return [s for s in self.values[index].states if s.stage <= max(stage, self.birth(index), 0)][-1]

    def _edges(self) -> tuple[Edge, ...]:
        needed = reachable([self.values[i].tensor.grad_fn for i in self.results])
        wires: dict[tuple[int, int], list[Wire]] = {}
        for index, path in sorted(self.paths.items()):
            for source, target in itertools.pairwise(path):
                tensor, gradient = self.values[index].tensor, self._returns_gradient(index, source, needed)
                shape, layout = tuple(tensor.shape), tensor.layout
                wire = Wire(index, shape, tensor.stride(), tensor.dtype, gradient, layout=layout)
                wires.setdefault((source, target), []).append(wire)
        return tuple(Edge(source, target, tuple(found)) for (source, target), found in sorted(wires.items()))

    def _returns_gradient(self, index: int, source: int, reachable: set[Any]) -> bool:
        """Whether a value that leaves a stage gets a gradient from later ones.

        Once a view is written in place, its gradient passes it by and goes to the tensor of which it is one.
        """
        state = self._state(index, source)
        if not state.requires_grad or state.node is None or state.node in reachable:
            return state.requires_grad
        is_written = any(stage > source for stage in self.writers.get(self.values[index].storage, ()))
        return is_written and state.base in reachable

    # ------------------------------------------------------------------ one stage

    def _part(self, stage: int, edges: tuple[Edge, ...]) -> StagePart:
        rebuilt = self.rebuilt[stage]
        remade = {id(entry): dataclasses.replace(entry, checkpoints=()) for entry in rebuilt.values()}
        entries = (*remade.values(), *(e for e in self.entries if e.stage == stage))
        received = tuple(w.value for e in edges if e.target == stage for w in e.wires)
        read = {i for entry in entries for i in entry.reads()}
        if stage == self.stages - 1:
            read.update(self.results)
        values = [self.values[i] for i in sorted(read)]
        inputs = tuple((v.index, int(v.name)) for v in values if v.origin is Origin.INPUT and v.index not in received)
        leaving = {w.value for e in edges if e.source == stage for w in e.wires}
        outputs = sorted(leaving) + ([i for i in self.results if i not in leaving] if stage == self.stages - 1 else [])
        written = {self.values[i].storage for e in entries for i in e.writes}
        taken = (*received, *(index for index, _ in inputs))
        return StagePart(
            index=stage,
            entries=entries,
            inputs=inputs,
            received=received,
            outputs=tuple(outputs),
            copied=frozenset(i for i in taken if self.values[i].storage in written),
            owned={
                v.index: (v.origin, v.name) for v in values if v.origin is not None and v.origin is not Origin.INPUT
            },
            assigned={
                name: ref.index
                for name, ref in self.recording.assigned_buffers.items()
                if max(self.birth(ref.index), 0) == stage
            },
            modules=tuple(dict.fromkeys(name for entry in entries for name in entry.holds())),
        )

    # ------------------------------------------------------------------ what cannot be right

    def _label(self, stage: int) -> str:
        """The cut with which a stage begins."""
        return ("the beginning of the model", *self.recording.labels)[stage]

    def _refuse_empty_stages(self) -> None:
        busy = {entry.stage for entry in self.entries}
        labels = self.recording.labels
        ends = itertools.zip_longest(("", *labels), labels, fillvalue="")
        for stage, (begin, end) in enumerate(ends):
            if stage not in busy:
                place = "between these two cuts" if begin and end else f"{'after' if begin else 'before'} this cut"
                raise CutError(
                    f"stage {stage} would be empty",
                    where=" and ".join(filter(None, (begin, end))),
                    why=f"nothing is computed {place}",
                    remedy="remove the cut, or move it",
                )

    def _refuse_gradients_through_cuts(self) -> None:
        """A gradient that the forward takes itself must not pass a value that another stage made."""
        for entry in self.entries:
            if entry.target is torch.autograd.grad:
                outputs, inputs = (
                    [self.values[leaf.index] for leaf in leaves(argument) if isinstance(leaf, Ref)]
                    for argument in (*entry.args, *entry.kwargs.values())[:2]
                )
                goals = {node_of(value.tensor) for value in inputs}
                for value in self.values:
                    crosses = self.birth(value.index) < entry.stage and entry.stage in self.readers.get(value.index, ())
                    node = value.states[0].node
                    if not crosses or value in inputs or node is None or not goals & reachable([node]):
                        continue
                    if node in reachable([node_of(output.tensor) for output in outputs], goals):
                        raise CutError(
                            f"torch.autograd.grad in stage {entry.stage} goes back through what an earlier stage made",
                            where=f"{entry.source}; through {self._label(entry.stage)}",
                            why="the stage has the value, but not the computation behind it",
                            remedy="move the cut before the first or after the last call whose gradient it takes",
                        )

    def _refuse_silent_cuts(self, edges: tuple[Edge, ...]) -> None:
        for stage in range(1, self.stages):
            if not any(e.source < stage <= e.target for e in edges):
                raise CutError(
                    f"no tensor crosses the cut before stage {stage}",
                    where=self._label(stage),
                    why="what follows does not use anything computed before, so it is not a pipeline",
                    remedy="move the cut to a place where the data flow passes, or split the model into two models",
                )

    def _refuse_shared_state(self) -> None:
        """A buffer that is written has one owner."""
        assigned = self.recording.assigned_buffers
        holders: dict[str, set[int]] = {name: set() for name in self.recording.written_buffers}
        holders |= {name: {max(self.birth(ref.index), 0)} for name, ref in assigned.items()}
        for entry in self.entries:
            for module in entry.holds():
                for name in holders:
                    if name.startswith(module + "."):
                        holders[name].add(entry.stage)
        for value in self.values:
            if value.origin is Origin.BUFFER and value.name in holders:
                holders[value.name].update(self.readers.get(value.index, ()))
        for name, stages in holders.items():
            if len(stages) > 1:
                raise CutError(
                    f"the buffer {name!r} is written in the forward and used by stages {sorted(stages)}",
                    where=self._uses(name),
                    why="each stage would update a copy of its own, and they would drift apart",
                    remedy="cut so that all uses of the module that owns it lie in one stage",
                )

    def _uses(self, name: str) -> str:
        """The first line in each stage that uses a buffer or parameter."""
        own = {value.index for value in self.values if name and value.name == name}
        first: dict[int, str] = {}
        for entry in self.entries:
            holds = any(name.startswith(module + ".") for module in entry.holds())
            if holds or own & {*entry.reads(), *entry.makes()}:
                first.setdefault(entry.stage, entry.source)
        return "; ".join(f"stage {stage} at {source}" for stage, source in first.items())

    def _refuse_split_write(self, standing: list[Value], travellers: list[Value], written: list[int]) -> None:
        stages = sorted({s for v in standing for s in self.readers[v.index]} | set(written))
        if len(stages) > 1:
            name = standing[0].name or "a constant"
            raise CutError(
                f"{name!r} is written in place by the trunk in stage {written[0]} and used by stages {stages}",
                where=self._uses(standing[0].name),
                why="it stands still with the stage that holds it, so the write would not be seen in the others",
                remedy="cut so that these uses lie in one stage, or write into a copy (.clone())",
            )

    def _refuse_alias(self, crossing: list[Value], written: list[int]) -> None:
        makers = [self.entries[v.maker] for v in crossing if v.maker is not None]
        raise CutError(
            f"stage {written[-1]} writes in place into memory that values from earlier stages share",
            where="; ".join(f"{e.title} at {e.source}" for e in makers),
            why="the values are views of one another, made by operations that cannot be repeated in another stage",
            remedy="write into a copy (.clone()) instead, or move the cut before the first of these operations",
        )


def reachable(nodes: Iterable[Any], ends: Set[Any] = frozenset()) -> set[Any]:
    """The autograd nodes that a gradient of these can reach without passing one of the ends."""
    todo = list(nodes)
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node not in ends:
                todo.extend(following for following, _ in node.next_functions)
    return seen


def node_of(tensor: torch.Tensor) -> Any:
    """The autograd node that a tensor's gradient goes to; None where it has none."""
    return torch.autograd.graph.get_gradient_edge(tensor).node if tensor.requires_grad else None


def refuse_fake_constants(values: Iterable[Value]) -> None:
    """A constant is kept with the stage, so it must have been there before the run on fake tensors."""
    for value in values:
        if value.origin is Origin.CONSTANT and (isinstance(value.tensor, Valueless) or value.tensor.is_meta):
            raise CutError(
                f"a tensor of shape {tuple(value.tensor.shape)} has no values",
                why="it is no parameter and no buffer, and was made on the meta device or outside torch's functions",
                remedy="register it as a buffer, or build the model on a real device",
            )
