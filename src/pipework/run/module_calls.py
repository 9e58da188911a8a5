"""What a module does instead of its forward where a backward is split, so that its weight gradient can wait."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from pipework.run.operations import Operation
from pipework.split.torch_private import (
    base_of,
    functorch_active,
    goes_on_to,
    has_gradient_hooks,
    no_view,
    parameters_of,
    saved_elsewhere,
)

if TYPE_CHECKING:
    from pipework.run.backward import MicrobatchCalls, SplitBackward


@final
class Operands:
    """Of the weight gradient of one call of a module: the input and, once it has come, the gradient of the output."""

    __slots__ = ("call", "came", "dtype", "gradient", "input")
    gradient: Tensor

    def __init__(self, call: ModuleCall, x: Tensor, dtype: torch.dtype | None) -> None:
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
class ModuleCall:
    """Stands in for the `forward` of one module."""

    def __init__(self, split: SplitBackward, module: nn.Module, operation: Operation) -> None:
        self.split, self.module, self.operation = split, module, operation
        self.count = 0  # calls in the first forward
        self.is_hidden = False  # was called without gradients, as in a reentrant checkpoint: its graph is yet to come
        self.is_saved_elsewhere = False  # what one call of it saves
        self.has_waited = False
        self.own = parameters_of(module)
        self._native = partial(type(module).forward, module)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a module that a forward makes of itself does as ever."""
        return partial, (type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives."""
        alone = self.split.alone
        if alone is None:
            self.count += torch.is_grad_enabled()
            self.is_hidden |= not torch.is_grad_enabled()
            self.is_saved_elsewhere |= saved_elsewhere()
        elif self.module in alone:
            if len(args) == 1 and not kwargs and self._can_wait(args[0]):
                return self._waiting(args[0])
            self.split.cannot_wait(self.module)
        return self._native(*args, **kwargs)

    def _waiting(self, x: Tensor) -> Tensor:
        if not self.has_waited:
            self.split.waited.update(map(id, owned_by(self.module)))
            self.has_waited = True
        calls = self.split.calls
        if calls is None:
            return self._in_halves(x)
        calls.waiting.append(self)
        if calls.can_watch and x.requires_grad and not self.is_saved_elsewhere and not saved_elsewhere():
            return self._watched(x, calls)
        return self._in_halves(x)

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
            and not (x.is_complex() or self.weight.is_complex())
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
        """The module's."""
        weight = self.own["weight"]
        assert weight is not None, "only modules with a weight are called through this"
        return weight


class _TwoHalves(torch.autograd.Function):
    """The operation of a module; its backward leaves out the weight when an input gradient is being made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mark: Tensor,
        call: ModuleCall,
        dtype: torch.dtype | None,
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


def owned_by(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters."""
    return [p for p in parameters_of(module).values() if p is not None]


def trained_by(module: nn.Module) -> list[nn.Parameter]:
    """Those of its own that get gradients."""
    return [p for p in owned_by(module) if p.requires_grad]


def can_wait(module: nn.Module, operation: Operation, tied: Collection[Tensor]) -> bool:
    """Whether the module does nothing but the operation, on parameters of its own."""
    return (
        type(module).forward in [known.forward for known in operation.classes]
        and isinstance(module, operation.classes)
        and "forward" not in module.__dict__
        and parameters_of(module).get("weight") is not None
        and not any(p is other for p in owned_by(module) for other in tied)
    )


def _all_plain(parameters: Mapping[str, nn.Parameter | None]) -> bool:
    """Whether the weight is trained, and the gradients are for `.grad` alone: nothing asks to see them on their way."""
    for parameter in parameters.values():
        if parameter is not None and (type(parameter) is not nn.Parameter or has_gradient_hooks(parameter)):
            return False
    weight = parameters["weight"]
    return weight is not None and weight.requires_grad
