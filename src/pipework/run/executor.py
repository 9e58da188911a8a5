"""The one executor: it plays a rank's program on real stages.

Everything that can be decided before a step is decided when the executor is made: which tensors a stage takes and where
they come from, which it hands on, which gradients travel. A step then only looks up, computes, and passes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, final

from pipework.plan import Action, Compute, Instruction, Kind, Layout, Program, Receive, Transfer
from pipework.run.backward import Later
from pipework.run.clock import Recording
from pipework.run.elsewhere import Elsewhere
from pipework.run.labels import Label
from pipework.run.layouts import Layouts
from pipework.run.recompute import explained
from pipework.run.stage_run import NOTHING, Backwards, Feed, Kept, StageEnd, StageRun
from pipework.run.tied import Spread
from pipework.run.transport import Arrival, Tensors, Transport, Wait
from pipework.split.cut import Edge
from pipework.split.draws import drawing_for
from pipework.split.pipe import Variant
from pipework.split.stage import Stage

SENDS_UNDER_WAY = 4
"""Messages of one edge that may be under way before the oldest is waited for; each holds its tensors in memory."""


Key = tuple[int, int, int]
"""What a transfer, or a hand-over on one rank, is looked up by: from stage, to stage, microbatch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a transfer goes."""

    instruction: Instruction
    key: Key
    channel: int
    send: Callable[[Tensors], Wait]
    receive: Callable[[], Arrival]
    layouts: Layouts | None  # of gradients that leave the process, or come from another

    @property
    def settled(self) -> bool:
        """Whether both ends know what a transfer is like."""
        return self.layouts is None or self.layouts.settled


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One action, and where what it takes and gives is to be found."""

    action: Action
    run: StageRun
    takes: tuple[Key, ...]  # in the order of its stage's edges
    gives: tuple[tuple[StageEnd, Key], ...]
    stays: tuple[int, int]  # what is kept from the forward to the backward, and from there to the weight gradient

    @classmethod
    def of(cls, action: Action, run: StageRun) -> Work:
        """The work of an action on its stage."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind is Kind.FORWARD:
            takes, gives = [e.edge.source for e in run.incoming], [(e, e.edge.target) for e in run.outgoing]
        elif action.kind is Kind.WEIGHT_GRADIENT:
            takes, gives = [], []
        else:
            takes = [e.edge.target for e in run.outgoing if e.back]
            gives = [(e, e.edge.source) for e in run.incoming if e.back]
        return cls(
            action,
            run,
            tuple((source, stage, microbatch) for source in takes),
            tuple((end, (stage, target, microbatch)) for end, target in gives),
            (stage, microbatch),
        )


@final
class Executor:
    """Plays one rank's program, again and again."""

    def __init__(
        self,
        program: Program,
        layout: Layout,
        variants: Sequence[Variant],
        stages: Mapping[int, Stage],
        transport: Transport,
        trains: bool,
        recomputed: Collection[int],
        elsewhere: Elsewhere,
    ) -> None:
        self._elsewhere = elsewhere
        self.rank, self.transport, self.layout, self.trains = program.rank, transport, layout, trains
        own = next((p for stage in stages.values() for p in (*stage.parameters(), *stage.buffers())), None)
        self.devices = {index: stage.device_beside(own) for index, stage in stages.items()}
        backwards = {index: Backwards.of(index, program) for index in stages}
        made = {
            (index, variant): StageRun(
                variant, index, stage, self.devices[index], trains, backwards[index], index in recomputed
            )
            for index, stage in stages.items()
            for variant in dict.fromkeys(variants)
        }
        self.runs = list(made.values())
        self._run_of = {(index, m): made[index, v] for index in stages for m, v in enumerate(variants)}
        self._edges = [{(e.source, e.target): e for e in variant.cut.edges} for variant in variants]
        self._channels = {pair: number for number, pair in enumerate(sorted(layout.edges))}
        self._in_order = [self._bound(instruction) for instruction in program.instructions]
        self._program = self._in_order  # until it is known how gradients are laid out
        self.alone = any(variant.casts or any(variant.compiled) for variant in variants)
        ties = variants[0].ties if trains and not transport.in_one_process else ()
        self._spread = Spread(ties, layout, stages, transport, channel=2 * len(self._channels))

    def run(self, feed: Feed) -> None:
        """One step; gradients are added to the parameters' own."""
        for run in self.runs:
            run.begin()
        step = _Step(self, feed)
        try:
            with self._elsewhere.left_alone(self.rank):
                self._play(step)
            step.finish()
        except BaseException:
            step.abandon()
            raise
        finally:
            for run in self.runs:
                run.end()
        if self._program is self._in_order:
            self._program = _ahead(self._in_order, self.transport.receives_ahead)
        self._spread()

    def _play(self, step: _Step) -> None:
        feed = step.feed
        if feed.recording or feed.label:
            self._play_watched(step, feed.recording, feed.label or contextlib.nullcontext)
            return
        for do, what in self._program:
            do(step, what)

    def _play_watched(self, step: _Step, recording: Recording | None, label: Label) -> None:
        """Play the program with a label on each instruction, and the time of each action, its waits not counted."""
        for do, what in self._program:
            if isinstance(what, Route):
                with label(what.instruction):
                    do(step, what)
                continue
            step.wait(what)
            with label(what.action):
                if recording is None:
                    do(step, what)
                else:
                    clock = recording.clock(what.run.device)
                    begin = clock.now()
                    do(step, what)
                    recording.mark(self.rank, what.action, clock, begin, clock.now())

    def is_here(self, stage: int) -> bool:
        """Whether a stage is on this rank."""
        return self.layout.rank_of[stage] == self.rank

    def _bound(self, instruction: Instruction) -> Bound:
        if isinstance(instruction, Compute):
            action = instruction.action
            return _DO[action.kind], Work.of(action, self._run_of[action.stage, action.microbatch])
        do = _Step.receive if isinstance(instruction, Receive) else _Step.send
        return do, self._route(instruction, instruction.transfer)

    def _route(self, instruction: Instruction, transfer: Transfer) -> Route:
        source, target = transfer.after.stage, transfer.to
        forward = source < target
        pair = (source, target) if forward else (target, source)
        edge = self._edges[transfer.after.microbatch].get(pair, Edge(*pair, ()))
        wires = edge.values if forward else edge.gradients
        here, there = (source, target) if self.is_here(source) else (target, source)
        peer, channel = self.layout.rank_of[there], 2 * self._channels[pair] + (not forward)
        send = partial(self.transport.send, to=peer, channel=channel)
        receive = partial(self.transport.receive, source=peer, channel=channel, device=self.devices[here])
        layouts = None if forward or self.transport.in_one_process else Layouts(wires, self.devices[here])
        return Route(
            instruction=instruction,
            key=(source, target, transfer.after.microbatch),
            channel=channel,
            send=partial(layouts.send, send=send) if layouts else partial(send, wires=wires),
            receive=partial(layouts.receive, receive) if layouts else partial(receive, wires),
            layouts=layouts,
        )


Bound = tuple[Callable[["_Step", Any], None], Any]


def _ahead(program: list[Bound], count: int) -> list[Bound]:
    """The program with the first `count` receives of each channel at its start, and each later one `count` earlier.

    Only for a transport on which being ready blocks nobody; the order within each channel stays. Where gradients are
    still described, a receive waits for the description, so that the receives of that channel stay where they are.
    """
    waiting_ones = {route.channel for do, route in program if do is _Step.receive and not route.settled}
    channels: dict[int, deque[Bound]] = {}
    for bound in program:
        if bound[0] is _Step.receive and bound[1].channel not in waiting_ones:
            channels.setdefault(bound[1].channel, deque()).append(bound)
    start = [waiting.popleft() for waiting in channels.values() for _ in range(min(count, len(waiting)))]
    rest: list[Bound] = []
    for bound in program:
        if bound[0] is not _Step.receive or bound[1].channel not in channels:
            rest.append(bound)
        elif channels[bound[1].channel]:
            rest.append(channels[bound[1].channel].popleft())
    return start + rest


class _Step:
    """One step under way on one rank."""

    def __init__(self, executor: Executor, feed: Feed) -> None:
        self.executor, self.feed = executor, feed
        self.alone: contextlib.AbstractContextManager[Any] = _one if feed.alone or executor.alone else NOTHING
        self.kept: dict[tuple[int, int], Kept] = {}
        self.later: dict[tuple[int, int], Later] = {}
        self.arrivals: dict[Key, Arrival] = {}
        self.ready: dict[Key, Tensors] = {}  # made here, for here or to be sent
        self.sending: dict[int, deque[Wait]] = {}  # by channel

    def receive(self, route: Route) -> None:
        self.arrivals[route.key] = route.receive()

    def send(self, route: Route) -> None:
        under_way = self.sending.setdefault(route.channel, deque())
        if len(under_way) == SENDS_UNDER_WAY:
            under_way.popleft()()
        tensors = self.ready.pop(route.key, ())  # nothing, where only other microbatches send over this edge
        under_way.append(route.send(tensors))

    def finish(self) -> None:
        for under_way in self.sending.values():
            for wait in under_way:
                wait()

    def abandon(self) -> None:
        """Let go of all transfers under way, which keep connections open as long as they are there."""
        for left in (self.kept, self.later, self.arrivals, self.ready, self.sending):
            left.clear()

    def forward(self, work: Work) -> None:
        received = self.arrived(work)
        with self.alone, self.drawing(work):
            kept, out = work.run.forward(work.action.microbatch, self.feed, received)
        if self.executor.trains:
            self.kept[work.stays] = kept
        for end, key in work.gives:
            self.ready[key] = [out[i].detach() for i in end.positions]

    def backward(self, work: Work) -> None:
        action, run = work.action, work.run
        kept = self.kept.pop(work.stays)
        gradients = self.arrived(work)
        with self.alone, self.drawing(work), explained(action) if run.recomputed else NOTHING:
            if action.kind is Kind.BACKWARD:
                run.backward(kept, gradients)
            else:
                self.later[work.stays] = run.input_gradient(action.microbatch, kept, gradients)
        for end, key in work.gives:
            self.ready[key] = run.returned(end, kept)

    def weight_gradient(self, work: Work) -> None:
        work.run.halves[work.action.microbatch].weight_gradient(self.later.pop(work.stays))

    def arrived(self, work: Work) -> list[Tensors]:
        """What other stages made for this action."""
        return [self.arrivals.pop(key)() if key in self.arrivals else self.ready.pop(key) for key in work.takes]

    def wait(self, work: Work) -> None:
        """Have ready what other stages make for this action."""
        for key, tensors in zip(work.takes, self.arrived(work), strict=True):
            self.ready[key] = tensors

    def drawing(self, work: Work) -> contextlib.AbstractContextManager[None]:
        calls, draw = work.run.calls_before, self.feed.draw
        if calls is None or draw is None:
            return NOTHING
        return drawing_for(dataclasses.replace(draw, microbatch=work.action.microbatch), calls)


_DO: dict[Kind, Callable[[_Step, Any], None]] = {
    Kind.FORWARD: _Step.forward,
    Kind.BACKWARD: _Step.backward,
    Kind.INPUT_GRADIENT: _Step.backward,
    Kind.WEIGHT_GRADIENT: _Step.weight_gradient,
}

_one = threading.Lock()
"""One stage of this process computes at a time where what it does reaches into other threads.

Who leaves an autocast region empties a cache that all threads share. Who compiles puts back the generators that all
share, over what others draw meanwhile, and replaces methods of `nn.Module` while others call them.
"""
