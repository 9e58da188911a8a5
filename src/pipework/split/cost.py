"""What calls into torch cost, counted rather than timed: the same on every rank, and for tensors without values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from pipework.split.torch_private import WithoutFunctionModes, memory_of, storage_of
from pipework.split.trees import leaves, map_leaves

OPERATIONS_PER_ELEMENT = 10.0
"""What moving one element is taken to cost beside arithmetic, so that norms and activations count for something."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a model costs for one microbatch.

    `forward`, `input_gradient` and `weight_gradient` are operations where they were counted, seconds where they were
    measured. `activation` is what the forward keeps until the backward, in bytes, parameters not included.

    >>> cost = Cost(forward=1.0, input_gradient=1.0, weight_gradient=2.0, activation=64)
    >>> (cost + cost).work
    8.0
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    activation: int = 0

    @property
    def work(self) -> float:
        """All that keeps a rank busy."""
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
            self.activation + other.activation,
        )


@final
class Meter:
    """Counts what the calls into torch cost while they are made.

    An operation costs the multiplications and additions of its matrix products, and something for each element that it
    writes. A gradient costs the same again for each operand that asks for one; it is a weight gradient where the
    operand is a parameter or is made of parameters alone. What a checkpoint does again counts as input gradient, too.
    """

    def __init__(self, activations: bool = True) -> None:
        self._activations = activations
        self._weights: set[int] = set()  # storages of parameters, and of what is made of them alone
        self._kept: set[int] = set()
        self._checkpoints = 0  # around what runs now
        self._total = Cost()

    def read(self) -> Cost:
        """The cost since the last reading."""
        total, self._total = self._total, Cost()
        return total

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Inside the block the module runs once, from the beginning."""
        self._weights = {storage_of(parameter) for parameter in module.parameters()}
        self._kept = self._weights | {storage_of(buffer) for buffer in module.buffers()}
        self.read()
        with contextlib.ExitStack() as stack:
            if self._activations:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept))
            yield

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """What runs inside the block will run again in the backward, at the expense of the input gradient."""
        self._checkpoints += 1
        try:
            yield
        finally:
            self._checkpoints -= 1

    def as_in_backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a reentrant checkpoint, which runs it without gradients, as it will run in the backward."""

        def run(*args: Any) -> Any:
            own = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
            nothing = torch.autograd.graph.saved_tensors_hooks(lambda kept: None, lambda kept: kept)
            with torch.enable_grad(), self.checkpointed(), nothing if self._activations else contextlib.nullcontext():
                out = function(*(a.view_as(a) if isinstance(a, Tensor) else a for a in own))
            return map_leaves(lambda x: x.detach() if isinstance(x, Tensor) else x, out)

        return run

    def operation(self, function: Any, args: Any, kwargs: Mapping[str, Any], out: Any, born: set[int]) -> None:
        """Count one operation; `born` are the storages it made."""
        given = [t for t in leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
        same = {id(t) for t in given}
        written = sum(t.numel() for t in leaves(out) if isinstance(t, Tensor) and _is_written(t, born, same))
        formula: Callable[..., int] | None = flop_registry.get(function.overloadpacket)
        arithmetic = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        forward, input_gradient, weight_gradient = arithmetic + OPERATIONS_PER_ELEMENT * written, 0.0, 0.0
        if forward and torch.is_grad_enabled():
            for operand in {id(t): t for t in given if t.requires_grad}.values():
                matrix = arithmetic if operand.dim() > 1 else 0  # the gradient of a bias is a sum
                gradient = matrix + OPERATIONS_PER_ELEMENT * operand.numel()
                if storage_of(operand) in self._weights:
                    weight_gradient += gradient
                else:
                    input_gradient += gradient
            if input_gradient or weight_gradient:
                input_gradient += self._checkpoints * forward
        self._total += Cost(forward, input_gradient, weight_gradient)
        if given and all(storage_of(t) in self._weights for t in given):
            self._weights |= born
        else:
            self._weights -= born  # a storage's number may be that of an earlier one

    def _keep(self, tensor: Tensor) -> Tensor:
        """Count what autograd keeps for the backward, each piece of memory once; gives it what to keep."""
        storage = storage_of(tensor)
        if storage not in self._kept:
            self._kept.add(storage)
            self._total += Cost(activation=memory_of(tensor))
        with WithoutFunctionModes():
            return tensor.detach()  # itself would hold on to the node that it is kept for, and never be freed


def _is_written(tensor: Tensor, born: set[int], given: set[int]) -> bool:
    """Whether the result is more than a view: in new memory, or an operand that was written in place."""
    return storage_of(tensor) in born or id(tensor) in given
