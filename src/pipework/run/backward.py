"""A backward in two halves: the input gradient, for which other stages wait, and the gradients of weights, later.

While a stage does a microbatch whose backward is split, its `Linear`, `Conv` and `Embedding` modules call their
operation through one autograd function. In the input gradient (I) that function computes the gradient of its input
alone and puts its two operands aside; the weight gradient (W) is the rest, one product per call:

    F      y  = x wᵀ + b          as ever
    I      dx = dy w              and (dy, x) is put aside
    W      dw = dyᵀ x, db = Σ dy  added to w.grad and b.grad

Every other parameter gets its gradient with I, and so does a weight in compiled code, and one that anything else uses
too (a loss, a function): its gradients must be added up in autograd's own order. The first microbatch's forward runs as
ever, and its graph tells who uses what. Where I's would be added to `.grad` in another order of microbatches than W's,
they wait for W too.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from pipework.run.operations import OPERATIONS, Operation
from pipework.split.torch_private import (
    functorch_active,
    goes_on_to,
    has_gradient_hooks,
    no_view,
    parameters_of,
    version_of,
)


class PutAside(NamedTuple):
    """One call of a module whose weight gradient is still to be made."""

    call: _Call
    gradient: Tensor
    input: Tensor
    dtype: torch.dtype | None


@final
class Later:
    """What the weight gradient of one microbatch has left to do."""

    def __init__(self) -> None:
        self.calls: list[PutAside] = []
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
        self._held_back = held_back
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
        self.alone: set[nn.Module] | None = None  # modules whose parameters nobody else uses; None until seen
        self.later: Later | None = None  # while an input gradient is being made

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The modules call their operation through this for as long as the block lasts: in F, and then in I too.

        A checkpoint's second forward must be like its first, which for the first microbatch is as ever.
        """
        for call in self._calls:
            call.module.__dict__["forward"] = call
        try:
            yield
        finally:
            for call in self._calls:
                del call.module.__dict__["forward"]

    def look_at(self, outputs: Sequence[Tensor]) -> None:
        """Find out from the graph of the first forward which modules are the only users of their parameters."""
        if self.alone is not None:
            return
        calls: Counter[int] = Counter()
        hidden: set[int] = set()
        for call in self._calls:
            own = [id(p) for p in _trained(call.module)]
            calls.update(dict.fromkeys(own, call.count))
            hidden.update(own if call.is_hidden else ())
        uses = _uses(outputs)
        known = {number for number, count in calls.items() if 0 < count == uses[number]} - hidden
        self.alone = {call.module for call in self._calls if known.issuperset(map(id, _trained(call.module)))}
        for call in self._calls:
            if call.module not in self.alone:
                self.cannot_wait(call.module)

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

    def input_gradient(self, back: Callable[[], None], in_halves: bool = True) -> Later:
        """Go back by calling `back`, and give what it leaves to do: little, if the forward was not `in_halves`."""
        later = self.later = Later()
        held_back = self._to_hold_back(in_halves)
        before = [parameter.grad for parameter in held_back]
        for parameter in held_back:
            parameter.grad = None
        try:
            back()
        finally:
            self.later = None
            for parameter, gradient in zip(held_back, before, strict=True):
                if parameter.grad is not None:
                    later.held_back.append((parameter, parameter.grad))
                parameter.grad = gradient
        return later

    def weight_gradient(self, later: Later) -> None:
        """Do what an input gradient left to do."""
        sums = {id(parameter): (parameter, gradient) for parameter, gradient in later.held_back}
        last = {id(p): number for number, aside in enumerate(later.calls) for p in _own(aside.call.module)}
        calls, later.calls = deque(later.calls), []
        with torch.no_grad():
            for number in range(len(calls)):
                aside = calls.popleft()
                for parameter, gradient in aside.call.weight_gradients(aside):
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
        self._native = partial(type(module).forward, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = self.split.alone
        if alone is None:
            self.count += torch.is_grad_enabled()
            self.is_hidden |= not torch.is_grad_enabled()
        elif self.module in alone:
            if len(args) == 1 and not kwargs and self._can_wait(args[0]):
                return self._in_halves(args[0])
            self.split.cannot_wait(self.module)
        return self._native(*args, **kwargs)

    def _in_halves(self, x: Tensor) -> Tensor:
        if not self.has_waited:
            self.split.waited.update(map(id, _own(self.module)))
            self.has_waited = True
        dtype, own = self._dtype(x), parameters_of(self.module)
        if dtype is None:
            return _TwoHalves.apply(x, own["weight"], own.get("bias"), self, None)
        with torch.autocast(x.device.type, enabled=False):
            return _TwoHalves.apply(x.to(dtype), own["weight"], own.get("bias"), self, dtype)

    def _can_wait(self, x: Any) -> bool:
        return (
            type(x) is Tensor
            and torch.is_grad_enabled()
            and _all_plain(parameters_of(self.module))
            and self.operation.fits(self.module, x)
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
        weight = parameters_of(self.module)["weight"]
        assert weight is not None, "only modules with a weight are called through this"
        return weight

    def weight_gradients(self, aside: PutAside) -> list[tuple[nn.Parameter, Tensor]]:
        """In the dtype of the operands."""
        weight, bias = self.weight, parameters_of(self.module).get("bias")
        mask = False, weight.requires_grad, bias is not None and bias.requires_grad
        cast = self.split.cast(weight, aside.dtype)
        _, *made = self.operation.back(self.module, aside.gradient, aside.input, cast, mask)
        return [
            # On GPUs autocast sums up in float32, and autograd then rounds the sum as is done here.
            (parameter, _in(found, aside.gradient.dtype))
            for parameter, found in zip((weight, bias), made, strict=True)
            if parameter is not None and found is not None
        ]


class _TwoHalves(torch.autograd.Function):
    """The operation of a module; its backward leaves out the weight when an input gradient is being made."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, dtype: torch.dtype | None
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
        call, dtype, mask = ctx.call, ctx.dtype, ctx.needs_input_grad[:3]
        later = call.split.later
        # Somebody's own torch.autograd.grad wants no weight's gradient, or wants one to go on from.
        is_going_on = torch.is_grad_enabled()
        if later is not None and not is_going_on and goes_on_to(ctx.next_functions[_WEIGHT][0]):
            later.calls.append(PutAside(call, gradient, x.detach(), dtype))  # with x's graph all before would be kept
            mask = mask[0], False, False
        if not is_going_on:
            weight = call.weight  # of which a checkpoint gives back an alias, whose id is another's soon after
        cast = weight.to(dtype) if is_going_on and dtype is not None else call.split.cast(weight, dtype)
        return *call.operation.back(call.module, gradient, x, cast, mask), None, None


_WEIGHT = 1  # its place among the function's tensors


def _uses(outputs: Sequence[Tensor]) -> Counter[int]:
    """How often each parameter, by its id, is used in the graph behind the outputs.

    Where it is transposed or, by autocast, cast, it is the users of what comes of that who count. One that is cast and
    used in other ways too, or in a second autocast region, has its gradients added up in two dtypes: it counts as none.
    """
    users: dict[Any, list[Any]] = {x.grad_fn: [None] for x in outputs if x.grad_fn is not None}
    nodes = list(users)
    while nodes:
        node = nodes.pop()
        for after, _ in node.next_functions:
            if after is None:
                continue
            if after not in users:
                users[after] = []
                nodes.append(after)
            users[after].append(node)

    return Counter({id(node.variable): _count(node, users) for node in users if hasattr(node, "variable")})


def _count(node: Any, users: Mapping[Any, Sequence[Any]]) -> int:
    names = ["" if user is None else user.name() for user in users[node]]
    if _CAST in names and len(names) > 1:
        return 0
    return sum(
        _count(u, users) if name in (_CAST, _TRANSPOSED) else 1 for u, name in zip(users[node], names, strict=True)
    )


_CAST, _TRANSPOSED = "ToCopyBackward0", "TBackward0"


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


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # asking costs a fifth of `to`


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to `.grad` as autograd does."""
    gradient = _in(gradient, parameter.dtype)
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        torch.autograd.backward([parameter], [gradient])
