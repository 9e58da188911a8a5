"""A backward in two halves: the input gradient, for which other stages wait, and the gradients of weights, later.

The input gradient (I) computes of each `Linear`, `Conv` and `Embedding` module the gradient of its input alone, and
puts the two operands of the weight's aside; the weight gradient (W) is the rest, one product per call:

    F      y  = x wᵀ + b          as ever, and the module is watched
    I      dx = dy w              and (dy, x) is put aside
    W      dw = dyᵀ x, db = Σ dy  added to w.grad and b.grad

A module is watched by a hook in the graph that gets dy, and autograd is asked for all gradients but those of its
parameters. Where that does not do (x is not kept, as in a checkpoint; some gradients are nobody's to ask for, since the
graph goes on beyond the stage) the operation is called through one autograd function instead, which leaves out the
weight's gradient itself: right everywhere, but slower.

Every other parameter gets its gradient with I, and so does a weight in compiled code, and one that anything else uses
too (a loss, a function): its gradients must be added up in autograd's own order. The first microbatch's forward runs as
ever, and its graph tells who uses what. Where I's would be added to `.grad` in another order of microbatches than W's,
they wait for W too.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pipework.errors import PipeworkError
from pipework.run.autograd_graph import Graph
from pipework.run.module_calls import ModuleCall, Operands, can_wait, owned_by, trained_by
from pipework.run.operations import OPERATIONS
from pipework.split.torch_private import run_backward, sequence_number, version_of


@final
class MicrobatchCalls:
    """How one microbatch's forward called the modules whose weight gradient can wait."""

    def __init__(self, in_halves: bool, can_watch: bool, given: Sequence[Tensor]) -> None:
        self.in_halves = in_halves  # the forward of the first microbatch is not
        self.can_watch = can_watch
        self.given = [x for x in given if x.requires_grad]
        self.began = sequence_number()
        self.waiting: list[ModuleCall] = []  # each as often as it was called so that it waits
        self.watched: list[tuple[Any, Operands]] = []  # with the node of the graph at which each is
        self.as_ever: Collection[ModuleCall] = ()  # even so, with their parameters' gradients to come from autograd


@final
class Later:
    """What the weight gradient of one microbatch has left to do; the watched calls have their `deferred` ones here."""

    def __init__(self, deferred: Collection[ModuleCall]) -> None:
        self.deferred = deferred
        self.calls: list[Operands] = []
        self.held_back: list[tuple[nn.Parameter, Tensor]] = []


@final
class SplitBackward:
    """One stage's backwards in two halves.

    `tied` are the parameters that other stages use too, which must have their gradient with I. Those in `held_back`
    get theirs with W even so, because some microbatches' I and W come in different orders. So does a parameter whose
    gradient waited in one microbatch and cannot in another: it might overtake the first. `waited` has the ids of those
    that waited, for all variants of the stage. `compiled` are the modules that run in compiled code, which has one
    backward for all: `in_compiled` has those of them whose weight gradient would have waited.
    """

    def __init__(
        self,
        stage: nn.Module,
        tied: Collection[Tensor] = (),
        held_back: Sequence[nn.Parameter] = (),
        waited: set[int] | None = None,
        compiled: Collection[str] = (),
    ) -> None:
        self._stage, self._held_back = stage, held_back
        self.waited = set[int]() if waited is None else waited
        self._came_with_input: dict[int, nn.Parameter] = {}  # the gradient did, in some microbatch
        self._cast: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}
        could = [
            (name, module, operation)
            for name, module in stage.named_modules()
            for operation in OPERATIONS
            if can_wait(module, operation, tied)
        ]
        self.in_compiled = [name for name, *_ in could if name in compiled]
        self._calls = [ModuleCall(self, module, operation) for name, module, operation in could if name not in compiled]
        self._shares = False  # several of the modules have a parameter in common
        self.alone: set[nn.Module] | None = None  # modules whose parameters nobody else uses; None until seen
        self._is_closed = False  # all gradients but those of deferred calls can be asked for, by their leaves
        self._as_ever: dict[Any, Collection[ModuleCall]] = {}  # by what tells one path through the stage from another
        self._asked: tuple[Collection[ModuleCall], list[nn.Parameter]] | None = (
            None  # for, but for those of these calls
        )
        self.calls: MicrobatchCalls | None = None  # while a forward is under way
        self.later: Later | None = None  # while an input gradient is being made
        self.mark = torch.zeros(0, requires_grad=True, device="cpu")  # whoever goes back to this makes all gradients
        self.marked = get_gradient_edge(self.mark).node

    def begin(self, given: Sequence[Tensor]) -> MicrobatchCalls:
        """What is to be noted of the forward of a microbatch on these tensors."""
        can_watch = self._is_closed and all(x.is_leaf for x in given)  # the graph of others goes on beyond the stage
        return MicrobatchCalls(self.alone is not None, can_watch, given)

    @contextlib.contextmanager
    def at_work(self, calls: MicrobatchCalls | None = None) -> Iterator[None]:
        """The modules call their operation through this for as long as the block lasts: in F, and then in I too.

        A checkpoint's second forward must be like its first, which for the first microbatch is as ever.
        """
        self.calls = calls
        for call in self._calls:
            call.module.__dict__["forward"] = call
        try:
            yield
        finally:
            self.calls = None
            for call in self._calls:
                del call.module.__dict__["forward"]

    def look_at(self, calls: MicrobatchCalls, outputs: Sequence[Tensor]) -> None:
        """Find out from the graph of a forward which modules are the only users of their parameters.

        The first tells which can wait at all. Later ones are looked at where they took another path than others of this
        step: by how many operations autograd noted, and which modules were called. Two that are alike in both count as
        one.
        """
        if self.alone is None:
            self._look_at_first(Graph(outputs), calls.given)
        elif calls.watched:
            path = sequence_number() - calls.began, *calls.waiting
            if path not in self._as_ever:
                self._as_ever[path] = self._not_alone(Graph(outputs), calls)
            calls.as_ever = self._as_ever[path]
            for call in calls.as_ever:
                self.cannot_wait(call.module)

    def _look_at_first(self, graph: Graph, given: Sequence[Tensor]) -> None:
        counts: Counter[int] = Counter()
        hidden: set[int] = set()
        for call in self._calls:
            own = [id(p) for p in trained_by(call.module)]
            counts.update(dict.fromkeys(own, call.count))
            hidden.update(own if call.is_hidden else ())
        uses = graph.uses()
        owners = Counter(id(p) for call in self._calls for p in owned_by(call.module))
        self._shares = any(count > 1 for count in owners.values())
        known = {number for number, count in counts.items() if 0 < count == uses[number]} - hidden
        self.alone = {call.module for call in self._calls if known.issuperset(map(id, trained_by(call.module)))}
        for call in self._calls:
            if call.module not in self.alone:
                self.cannot_wait(call.module)
        self._is_closed = self._ends_here(graph, given)

    def _not_alone(self, graph: Graph, calls: MicrobatchCalls) -> Collection[ModuleCall]:
        if not self._ends_here(graph, calls.given):
            return set(calls.waiting)
        uses, own = graph.uses(), Counter(id(p) for call in calls.waiting for p in trained_by(call.module))
        return {call for call in calls.waiting if any(uses[id(p)] != own[id(p)] for p in trained_by(call.module))}

    def _ends_here(self, graph: Graph, given: Sequence[Tensor]) -> bool:
        """Whether all gradients of the stage can be asked for, by its parameters and what it was given."""
        known = {id(x) for x in (*self._stage.parameters(), *given)}
        return not graph.has_reentrant_checkpoints and all(id(x) in known for x in graph.leaves())

    def cannot_wait(self, module: nn.Module) -> None:
        """Note that the module's weight gradients come with I."""
        self._came_with_input.update({id(p): p for p in trained_by(module)})

    def _to_hold_back(self, in_halves: bool) -> Sequence[nn.Parameter]:
        if self._held_back:
            return self._held_back
        coming = self._came_with_input.values() if in_halves else (p for c in self._calls for p in trained_by(c.module))
        return [p for p in coming if id(p) in self.waited]

    def cast(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The tensor in the dtype of an autocast region, cast once until it changes or the step ends."""
        if dtype is None or tensor.dtype == dtype:
            return tensor
        version, found = self._cast.get((id(tensor), dtype), (-1, tensor))
        if version != version_of(tensor):
            with torch.no_grad():
                found = tensor.to(dtype)
            self._cast[id(tensor), dtype] = version_of(tensor), found
        return found

    def forget(self) -> None:
        """At the end of a step."""
        self._cast.clear()
        self._as_ever.clear()
        self._asked = None

    def input_gradient(self, calls: MicrobatchCalls, roots: Sequence[Any], seeds: Sequence[Tensor | None]) -> Later:
        """Go back from the roots, and give what is left to do: little, if the forward was not in halves."""
        later = self.later = Later({operands.call for _, operands in calls.watched}.difference(calls.as_ever))
        held_back = self._to_hold_back(calls.in_halves)
        before = [parameter.grad for parameter in held_back]
        for parameter in held_back:
            parameter.grad = None
        try:
            with self.at_work() if calls.in_halves else contextlib.nullcontext():
                if later.deferred:
                    wanted = (*self._all_but(later.deferred), *calls.given, self.mark)
                    run_backward((*roots, self.mark), (*seeds, self.mark.detach()), wanted)
                    self._check_all_came(calls, later, roots)
                else:
                    run_backward(roots, seeds)
        finally:
            self.later = None
            for parameter, gradient in zip(held_back, before, strict=True):
                if parameter.grad is not None:
                    later.held_back.append((parameter, parameter.grad))
                parameter.grad = gradient
        return later

    def _all_but(self, deferred: Collection[ModuleCall]) -> list[nn.Parameter]:
        """The parameters whose gradients come with I."""
        if self._asked is None or self._asked[0] != deferred:
            without = {id(p) for call in deferred for p in owned_by(call.module)}
            asked = [p for p in self._stage.parameters() if p.requires_grad and id(p) not in without]
            self._asked = deferred, asked
        return self._asked[1]

    def _check_all_came(self, calls: MicrobatchCalls, later: Later, roots: Sequence[Any]) -> None:
        """Autograd goes only where something is asked for: raise if a deferred call was off its ways."""
        missed = {node: o.call.module for node, o in calls.watched if not o.came and o.call in later.deferred}
        calls.watched.clear()  # with which all of the graph would be kept
        if not missed:
            return
        graph = Graph(roots)
        lost = {module for node, module in missed.items() if node in graph}
        for name in (name for name, module in self._stage.named_modules() if module in lost):
            raise PipeworkError(
                f"the gradient of {name!r} was not made",
                why="what it is called on comes only of a tensor that the forward itself asks for a gradient of, which "
                "it did not do on the first microbatch; so a backward in halves does not ask for it",
                remedy="call requires_grad_() in all microbatches, or choose a schedule with backwards in one piece",
            )

    def weight_gradient(self, later: Later) -> None:
        """Do what an input gradient left to do."""
        sums = {id(parameter): (parameter, gradient) for parameter, gradient in later.held_back}
        calls, later.calls = deque(later.calls), []
        last: dict[int, int] = {}  # what is used more than once is added up before it is added to `.grad`
        if sums or self._shares or len({operands.call for operands in calls}) < len(calls):
            last = {id(p): number for number, operands in enumerate(calls) for p in owned_by(operands.call.module)}
        with torch.no_grad():
            for number in range(len(calls)):
                for parameter, gradient in calls.popleft().weight_gradients():
                    if not last:
                        _accumulate(parameter, gradient)
                        continue
                    key = id(parameter)
                    total = sums.pop(key)[1] + gradient if key in sums else gradient
                    if last[key] == number:  # at once, so that the next one gets its memory
                        _accumulate(parameter, total)
                    else:
                        sums[key] = parameter, total
            for parameter, gradient in sums.values():
                _accumulate(parameter, gradient)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to `.grad` as autograd does."""
    if gradient.dtype is not parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    before = parameter.grad
    if before is not None:
        before.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        torch.autograd.backward([parameter], [gradient])
