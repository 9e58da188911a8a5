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
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pipework.errors import PipeworkError
from pipework.run.autograd_graph import Graph
from pipework.run.operations import OPERATIONS, Operation
from pipework.split.torch_private import (
    base_of,
    functorch_active,
    goes_on_to,
    has_gradient_hooks,
    no_view,
    parameters_of,
    run_backward,
    saved_elsewhere,
    version_of,
)


@final
class Operands:
    """Of the weight gradient of one call of a module: the input and, once it has come, the gradient of the output."""

    __slots__ = ("call", "came", "dtype", "gradient", "input")
    gradient: Tensor

    def __init__(self, call: _Call, x: Tensor, dtype: torch.dtype | None) -> None:
        self.call, self.input, self.dtype, self.came = call, x, dtype, False

    def complete(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Put them aside; a hook of the graph."""
        (gradient,), call = gradients, self.call
        later = call.split.later
        if later is not None and call in later.deferred and goes_on_to(call.split.marked):
            self.came = True
            if gradient is not None:
                self.gradient = gradient
                later.calls.append(self)

    def weight_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The gradients of the weight, and of the bias if it has one."""
        call, gradient, dtype = self.call, self.gradient, self.dtype
        weight, bias = call.weight, call.own.get("bias")
        cast = weight if dtype is None else call.split.cast(weight, dtype)
        has_bias = bias is not None and bias.requires_grad
        to_parameters = call.operation.to_parameters
        of_weight, of_bias = to_parameters(call.module, gradient, self.input, cast, weight.requires_grad, has_bias)
        made = [] if of_weight is None else [(weight, of_weight)]
        if bias is not None and of_bias is not None:
            made.append((bias, of_bias))
        # On GPUs autocast sums up in float32, and autograd then rounds the sum as is done here.
        return made if dtype is None else [(parameter, found.to(gradient.dtype)) for parameter, found in made]


@final
class MicrobatchCalls:
    """How one microbatch's forward called the modules whose weight gradient can wait."""

    def __init__(self, in_halves: bool, can_watch: bool, given: Sequence[Tensor]) -> None:
        self.in_halves = in_halves  # the forward of the first microbatch is not
        self.can_watch = can_watch
        self.given = [x for x in given if x.requires_grad]
        self.watched: list[tuple[Any, Operands]] = []  # with the node of the graph at which each is
        self.as_ever = set[_Call]()  # with their parameters' gradients to come from autograd


@final
class Later:
    """What the weight gradient of one microbatch has left to do; the watched calls have their `deferred` ones here."""

    def __init__(self, deferred: Collection[_Call]) -> None:
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
            if _can_wait(module, operation, tied)
        ]
        self.in_compiled = [name for name, *_ in could if name in compiled]
        self._calls = [_Call(self, module, operation) for name, module, operation in could if name not in compiled]
        self._shares = False  # several of the modules have a parameter in common
        self.alone: set[nn.Module] | None = None  # modules whose parameters nobody else uses; None until seen
        self._is_closed = False  # all gradients but those of deferred calls can be asked for, by their leaves
        self._asked: tuple[Collection[_Call], list[nn.Parameter]] | None = None  # for, but for those of these calls
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

    def look_at(self, outputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Find out from the graph of the first forward which modules are the only users of their parameters."""
        if self.alone is not None:
            return
        graph = Graph(outputs)
        calls: Counter[int] = Counter()
        hidden: set[int] = set()
        for call in self._calls:
            own = [id(p) for p in _trained(call.module)]
            calls.update(dict.fromkeys(own, call.count))
            hidden.update(own if call.is_hidden else ())
        uses = graph.uses()
        owners = Counter(id(p) for call in self._calls for p in _own(call.module))
        self._shares = any(count > 1 for count in owners.values())
        known = {number for number, count in calls.items() if 0 < count == uses[number]} - hidden
        self.alone = {call.module for call in self._calls if known.issuperset(map(id, _trained(call.module)))}
        for call in self._calls:
            if call.module not in self.alone:
                self.cannot_wait(call.module)
        known = {id(x) for x in (*self._stage.parameters(), *given)}
        self._is_closed = not graph.has_reentrant_checkpoints and all(id(x) in known for x in graph.leaves())

    def cannot_wait(self, module: nn.Module) -> None:
        """Note that the module's weight gradients come with I."""
        self._came_with_input.update({id(p): p for p in _trained(module)})

    def _to_hold_back(self, in_halves: bool) -> Sequence[nn.Parameter]:
        if self._held_back:
            return self._held_back
        coming = self._came_with_input.values() if in_halves else (p for c in self._calls for p in _trained(c.module))
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
        self._asked = None

    def input_gradient(self, calls: MicrobatchCalls, roots: Sequence[Any], seeds: Sequence[Tensor | None]) -> Later:
        """Go back from the roots, and give what is left to do: little, if the forward was not in halves."""
        later = self.later = Later({operands.call for _, operands in calls.watched} - calls.as_ever)
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

    def _all_but(self, deferred: Collection[_Call]) -> list[nn.Parameter]:
        """The parameters whose gradients come with I."""
        if self._asked is None or self._asked[0] != deferred:
            without = {id(p) for call in deferred for p in _own(call.module)}
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
            last = {id(p): number for number, operands in enumerate(calls) for p in _own(operands.call.module)}
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


@final
class _Call:
    """Stands in for the `forward` of one module."""

    def __init__(self, split: SplitBackward, module: nn.Module, operation: Operation) -> None:
        self.split, self.module, self.operation = split, module, operation
        self.count = 0  # calls in the first forward
        self.is_hidden = False  # was called without gradients, as in a reentrant checkpoint: its graph is yet to come
        self.has_waited = False
        self.own = parameters_of(module)
        self._native = partial(type(module).forward, module)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a module that a forward makes of itself does as ever."""
        return partial, (type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = self.split.alone
        if alone is None:
            self.count += torch.is_grad_enabled()
            self.is_hidden |= not torch.is_grad_enabled()
        elif self.module in alone:
            calls = self.split.calls
            if len(args) == 1 and not kwargs and self._can_wait(args[0]):
                if not self.has_waited:
                    self.split.waited.update(map(id, _own(self.module)))
                    self.has_waited = True
                if calls is not None and calls.can_watch and args[0].requires_grad and not saved_elsewhere():
                    return self._watched(args[0], calls)
                return self._in_halves(args[0])
            self.split.cannot_wait(self.module)
            if calls is not None:
                calls.as_ever.add(self)
        return self._native(*args, **kwargs)

    def _watched(self, x: Tensor, calls: MicrobatchCalls) -> Tensor:
        dtype = self._dtype(x)
        if dtype is None:
            out = self.operation.forward(self.module, x, self.weight, self.own.get("bias"))
        else:
            x = x.to(dtype)
            out = self._native(x)
        # At the operation itself, before which others' hooks may change the gradient, and writes in place add to it.
        node = base_of(out).grad_fn
        assert node is not None, "what is made of a tensor that requires a gradient requires one"
        operands = Operands(self, x.detach(), dtype)
        node.register_prehook(operands.complete)
        calls.watched.append((node, operands))
        return out

    def _in_halves(self, x: Tensor) -> Tensor:
        dtype, own = self._dtype(x), self.own
        if dtype is None:
            return _TwoHalves.apply(x, own["weight"], own.get("bias"), self.split.mark, self, None)
        with torch.autocast(x.device.type, enabled=False):
            return _TwoHalves.apply(x.to(dtype), own["weight"], own.get("bias"), self.split.mark, self, dtype)

    def _can_wait(self, x: Any) -> bool:
        return (
            type(x) is Tensor
            and torch.is_grad_enabled()
            and _all_plain(self.own)
            and self.operation.fits(self.module, x, self.weight)
            and not torch.compiler.is_compiling()
            and not functorch_active()
        )

    def _dtype(self, x: Tensor) -> torch.dtype | None:
        """What autocast casts the operands to; None where it does not."""
        kind = x.device.type
        if not self.operation.is_cast or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
            return None
        return torch.get_autocast_dtype(kind)

    @property
    def weight(self) -> nn.Parameter:
        weight = self.own["weight"]
        assert weight is not None, "only modules with a weight are called through this"
        return weight


class _TwoHalves(torch.autograd.Function):
    """The operation of a module; its backward leaves out the weight when an input gradient is being made."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mark: Tensor, call: _Call, dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call, ctx.dtype = call, dtype
        cast = call.split.cast
        out = call.operation.forward(call.module, x, cast(weight, dtype), None if bias is None else cast(bias, dtype))
        return no_view(out)  # of which slices may be written in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        call, dtype = ctx.call, ctx.dtype
        later, wanted = call.split.later, ctx.needs_input_grad[1:3]
        is_going_on = torch.is_grad_enabled()
        # Somebody's own backward inside this one, which does not come to the mark, wants some gradients only.
        if later is not None and not is_going_on and goes_on_to(call.split.marked):
            operands = Operands(call, x.detach(), dtype)  # with x's graph all before would be kept
            operands.gradient = gradient
            later.calls.append(operands)
            wanted = False, False
        if not is_going_on:
            weight = call.weight  # of which a checkpoint gives back an alias, whose id is another's soon after
        cast = weight.to(dtype) if is_going_on and dtype is not None else call.split.cast(weight, dtype)
        to_input, to_parameters = call.operation.to_input, call.operation.to_parameters
        of_input = to_input(call.module, gradient, x, cast) if ctx.needs_input_grad[0] else None
        of_parameters = to_parameters(call.module, gradient, x, cast, *wanted) if any(wanted) else (None, None)
        return of_input, *of_parameters, None, None, None


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in parameters_of(module).values() if p is not None]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in _own(module) if p.requires_grad]


def _can_wait(module: nn.Module, operation: Operation, tied: Collection[Tensor]) -> bool:
    """Whether the module does nothing but the operation, on parameters of its own."""
    return (
        type(module).forward in [known.forward for known in operation.classes]
        and isinstance(module, operation.classes)
        and "forward" not in module.__dict__
        and parameters_of(module).get("weight") is not None
        and not any(p is other for p in _own(module) for other in tied)
    )


def _all_plain(parameters: Mapping[str, nn.Parameter | None]) -> bool:
    """Whether the weight is trained, and the gradients are for `.grad` alone: nothing asks to see them on their way."""
    for parameter in parameters.values():
        if parameter is not None and (type(parameter) is not nn.Parameter or has_gradient_hooks(parameter)):
            return False
    weight = parameters["weight"]
    return weight is not None and weight.requires_grad


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
