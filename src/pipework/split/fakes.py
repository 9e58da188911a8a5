"""Twins of tensors that have no values here: shapes, dtypes and devices, but no memory.

Only what is computed from them has no values either. All else is real while the model runs, so that the forward reads
values back, and takes its branches, as it will in training. A twin is no `FakeTensor`, nor is a mode of tracing on:
the model's own code does not see that it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from pipework.split.tape import Origin, Value
from pipework.split.torch_private import (
    FakeTensor,
    FakeTensorMode,
    aliased,
    buffers_of,
    parameters_of,
    plain_torch_function,
    share_memory,
    storage_of,
    wrapping,
    written_by,
)
from pipework.split.trees import leaves, map_leaves


class Valueless(torch.Tensor):
    """A tensor without values, on the device where the model believes it to be."""

    fake: FakeTensor
    fakes: Fakes

    __torch_function__ = plain_torch_function  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, fake: FakeTensor, fakes: Fakes) -> Valueless:
        """The tensor with the layout of a fake one."""
        made = wrapping(cls, fake)
        made.fake, made.fakes = fake, fakes
        return made

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"<no values, {tuple(self.shape)}, {self.dtype}>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation on the layouts alone."""
        kwargs = kwargs or {}
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fakes = next(leaf.fakes for leaf in given if isinstance(leaf, Valueless))
        return fakes.run(func, args, kwargs, given)


class Fakes:
    """Twins of the tensors that are not on one device, as if they were, where the model was when it was written."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.twins: dict[int, torch.Tensor] = {}
        self.originals: dict[int, torch.Tensor] = {}
        self._lost: dict[int, torch.Tensor] = {}  # real memory into which something without values was written

    def of(self, tensor: Any) -> Any:
        """The twin of a tensor without values here; anything else as it is."""
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, Valueless) or tensor.device == self.device:
            return tensor
        twin = self.twins.get(id(tensor))
        if twin is None:
            twin = self._twin(tensor)
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                twin.requires_grad_()
            self.twins[id(tensor)] = twin
            self.originals[id(twin)] = tensor
        return twin

    def dress(self, module: nn.Module) -> None:
        """Swap tensors of every module for their twins, in attributes too (an RNN lists its weights in one)."""
        for m in module.modules():
            swap(m, self.of)

    def without_lost_values(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of an operation with twins of the real tensors whose values were lost."""
        if not self._lost:
            return args, kwargs
        return map_leaves(self._forgetting, (args, kwargs))

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any], given: Sequence[torch.Tensor]) -> Any:
        """An operation on the layouts of tensors, some of them without values."""
        known = {id(t.fake): t for t in given if isinstance(t, Valueless)}
        inner_args, inner_kwargs = map_leaves(self._fake, (args, kwargs))
        with self.mode:
            out = func(*inner_args, **inner_kwargs)
        self._lost |= {storage_of(t): t for t in written_by(func, args, kwargs) if not isinstance(t, Valueless)}
        return aliased(func, args, kwargs, map_leaves(lambda x: self._outer(x, known), out))

    def _fake(self, leaf: Any) -> Any:
        if isinstance(leaf, Valueless):
            return leaf.fake
        return self._laid_out(leaf) if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided else leaf

    def _outer(self, found: Any, known: Mapping[int, Valueless]) -> Any:
        if not isinstance(found, FakeTensor):
            return found
        return known[id(found)] if id(found) in known else Valueless(found, self)

    def _forgetting(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, Valueless) or storage_of(leaf) not in self._lost:
            return leaf
        return share_memory(self._twin(leaf), leaf)

    def _twin(self, tensor: torch.Tensor) -> Valueless:
        return Valueless(self._laid_out(tensor), self)

    def _laid_out(self, tensor: torch.Tensor) -> FakeTensor:
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, shape, self.device)


def swap(module: nn.Module, other: Callable[[Any], Any]) -> None:
    """Put other tensors in place of a module's own, in its tables and its attributes."""
    for table in (parameters_of(module), buffers_of(module)):
        for key, tensor in table.items():
            table[key] = other(tensor)
    for key, value in list(module.__dict__.items()):
        if isinstance(value, torch.Tensor) or (
            type(value) in (list, tuple) and any(isinstance(v, torch.Tensor) for v in value)
        ):
            module.__dict__[key] = map_leaves(other, value)


def fakes_for(module: nn.Module, inputs: Any) -> Fakes | None:
    """Fakes where some tensor has no values, or where the model's parts are on several devices; None where neither."""
    tensors = [*module.parameters(), *module.buffers(), *(t for t in leaves(inputs) if isinstance(t, torch.Tensor))]
    devices = dict.fromkeys(t.device for t in tensors)
    real = [device for device in devices if device.type != "meta"]
    if len(devices) < 2 and len(real) == len(devices):
        return None
    return Fakes(real[0] if real else torch.device("cpu"))


def undress(values: Sequence[Value], fakes: Fakes) -> None:
    """Constants are kept with the stage, so they must be real; those born without values cannot be."""
    for value in values:
        original = fakes.originals.get(id(value.tensor))
        if value.origin is Origin.CONSTANT and original is not None and not original.is_meta:
            value.tensor = original
