"""A stage at work on a rank: its forwards and backwards, and what it keeps of a microbatch in between."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipework.plan import Compute, Kind, Program
from pipework.run.backward import Later, MicrobatchCalls, SplitBackward
from pipework.run.buffers import WrittenBuffers
from pipework.run.clock import Recording
from pipework.run.labels import Label
from pipework.run.recompute import Recomputed
from pipework.run.tied import TiedStage
from pipework.run.transport import Tensors
from pipework.split.cut import Edge
from pipework.split.draws import DrawKey
from pipework.split.pipe import Variant
from pipework.split.stage import Stage
from pipework.split.torch_private import run_backward

NOTHING = contextlib.nullcontext()


@dataclasses.dataclass(slots=True)
class Feed:
    """What one step works on, on one rank: the inputs by microbatch and position, and what becomes of the output."""

    inputs: Sequence[Sequence[torch.Tensor | None]]
    finish: Callable[
        [int, Sequence[torch.Tensor]], torch.Tensor | None
    ]  # (microbatch, results) -> loss to go back from
    draw: DrawKey | None = None
    recording: Recording | None = None
    label: Label | None = None
    alone: bool = False  # no two ranks of this process may compute at a time


Outputs = tuple[torch.Tensor, ...]


class StageEnd:
    """One stage's end of one edge."""

    def __init__(self, edge: Edge, positions: Sequence[int]) -> None:
        self.edge = edge
        self.positions = tuple(positions)  # of the values among the stage's inputs or outputs
        place = {wire.value: position for wire, position in zip(edge.values, positions, strict=True)}
        self.back = tuple((place.get(wire.value, -1), wire) for wire in edge.gradients)
        self.back_values = tuple(position for position, wire in self.back if not wire.parameter)


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What a stage keeps of a microbatch between its forward and its backward."""

    taken: list[torch.Tensor]
    roots: tuple[GradientEdge | None, ...]  # of its outputs; these themselves are with those who need them
    loss: torch.Tensor | None
    gradients: dict[int, torch.Tensor]  # of what was taken, by position, as the backward left them
    calls: MicrobatchCalls | None  # where the backward is split


@dataclasses.dataclass(frozen=True, slots=True)
class Backwards:
    """How one stage goes back: on which microbatches in two halves, and whether these come in two orders."""

    split: frozenset[int]
    reorders: bool
    waited: set[int] = dataclasses.field(default_factory=set[int])  # parameters, by their ids, whose gradients did

    @classmethod
    def of(cls, stage: int, program: Program) -> Backwards:
        """Read off what the program does with the stage."""
        done = [i.action for i in program.instructions if isinstance(i, Compute) and i.action.stage == stage]
        first = [a.microbatch for a in done if a.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT)]
        last = [a.microbatch for a in done if a.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)]
        return cls(frozenset(a.microbatch for a in done if a.kind is Kind.WEIGHT_GRADIENT), first != last)


class StageRun:
    """A stage at work on this rank."""

    def __init__(
        self,
        variant: Variant,
        index: int,
        stage: Stage,
        device: torch.device,
        trains: bool,
        backwards: Backwards,
        is_recomputed: bool,
    ) -> None:
        self.tied = TiedStage(index, stage, variant.ties if trains else ())
        self.compiled = variant.compiled[index]
        self.split = split = None
        if backwards.split:
            own, leaves = self.tied.own_parameters() if backwards.reorders else (), self.tied.leaves.values()
            self.split = split = SplitBackward(self.tied.stage, leaves, own, backwards.waited, self.compiled)
        self.halves = dict.fromkeys(backwards.split, split) if split else {}  # by the microbatches that go back in two
        self.buffers = WrittenBuffers(stage, variant.written_buffers if trains else ())
        self.index, self.stage, self.code = index, self.tied.stage, variant.codes[index]
        self.device, self.trains = device, trains
        self.part = part = variant.cut.parts[index]
        first = len(part.inputs)
        self.incoming: list[StageEnd] = []
        for edge in (e for e in variant.cut.edges if e.target == index):
            self.incoming.append(StageEnd(edge, range(first, first + len(edge.values))))
            first += len(edge.values)
        self.outgoing = [
            StageEnd(edge, [part.outputs.index(w.value) for w in edge.values])
            for edge in variant.cut.edges
            if edge.source == index
        ]
        self.is_last = part is variant.cut.parts[-1]
        self.results = [part.outputs.index(value) for value in variant.cut.results] if self.is_last else []
        draws = any(e.draw for e in part.entries) or any(
            name == own or name.startswith(own + ".") for name in variant.drawing for own in part.modules
        )
        # Also where this stage draws nothing: a checkpoint in it sets a generator, from which others may be drawing.
        self.calls_before = variant.calls_before[index] if variant.draws else None
        self.recomputed = None
        if is_recomputed:
            self.recomputed = Recomputed(self.stage, variant.written_buffers, stage.replaced, draws)

    def begin(self) -> None:
        """At the start of a step."""
        self.tied.refresh()
        self.buffers.begin()

    def end(self) -> None:
        """At the end of a step, however it ended."""
        self.buffers.settle()
        if self.split:
            self.split.forget()

    def forward(self, microbatch: int, feed: Feed, received: Sequence[Tensors]) -> tuple[Kept, Outputs]:
        """Run the stage on what came over each incoming edge; gives what to keep, and the outputs."""
        inputs = feed.inputs[microbatch]
        taken: list[Any] = [inputs[position] for _, position in self.part.inputs]
        taken = [t if t.device == self.device else t.to(self.device, non_blocking=True) for t in taken]
        for tensors in received:
            taken += tensors
        gradients: dict[int, torch.Tensor] = {}
        if self.trains:
            for end in self.incoming:
                for position in end.back_values:
                    # A view, since autocast casts a leaf that is none but once, and adds its gradients in that dtype.
                    came = taken[position]
                    taken[position] = (came if came.is_sparse else came.view_as(came)).requires_grad_()
                    # Not read from `.grad`, which takes on the layout of the value: kernels choose by layout.
                    taken[position].register_hook(partial(gradients.__setitem__, position))
        self.buffers.renew()
        halves = self.halves.get(microbatch)

        def run(*taken: torch.Tensor) -> tuple[Outputs, torch.Tensor | None]:
            out = self.code(self.stage, *taken)
            return out, feed.finish(microbatch, [out[i] for i in self.results]) if self.is_last else None

        calls = halves.begin(taken) if halves else None
        with halves.at_work(calls) if halves else NOTHING:
            out, loss = self.recomputed.forward(run, taken) if self.recomputed else run(*taken)
        if halves and calls:
            halves.look_at(calls, out if loss is None else (*out, loss))
        roots = tuple([get_gradient_edge(t) if t.requires_grad else None for t in out]) if self.trains else ()
        return Kept(taken, roots, loss, gradients, calls), out

    def backward(self, kept: Kept, gradients: Sequence[Tensors]) -> None:
        """Go back from the loss and from what came back over each outgoing edge that returns gradients."""
        run_backward(*self._roots(kept, gradients))

    def input_gradient(self, microbatch: int, kept: Kept, gradients: Sequence[Tensors]) -> Later:
        """Go back as `backward` does, but leave the gradients of weights for later."""
        assert kept.calls is not None, "the forward was told that its backward is split"
        return self.halves[microbatch].input_gradient(kept.calls, *self._roots(kept, gradients))

    def _roots(self, kept: Kept, gradients: Sequence[Tensors]) -> tuple[list[Any], list[torch.Tensor | None]]:
        """Tensors and edges of the graph to go back from, and what to begin with at each."""
        roots: list[Any] = []
        seeds: list[torch.Tensor | None] = []
        returning = (end for end in self.outgoing if end.back)
        for end, came in zip(returning, gradients, strict=True):
            for (position, wire), gradient in zip(end.back, came, strict=True):
                if gradient is None:
                    continue
                root = self.tied.leaves[wire.parameter] if wire.parameter else kept.roots[position]
                if isinstance(root, GradientEdge) or (root is not None and root.requires_grad):
                    roots.append(root)
                    seeds.append(gradient)
        for own in kept.taken[: len(self.part.inputs)]:
            if own.requires_grad and own.is_leaf and own.grad is not None:
                # Of an input of the model, from later stages: this stage's uses are added to it one by one.
                roots.append(own)
                seeds.append(own.grad)
                own.grad = None
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            seeds.append(None)
        return roots, seeds

    def returned(self, end: StageEnd, kept: Kept) -> Tensors:
        """The gradients that go back over an incoming edge, after the backward; None where nothing gave one."""
        return [
            self.tied.take_gradient(wire.parameter) if wire.parameter else kept.gradients.get(position)
            for position, wire in end.back
        ]
