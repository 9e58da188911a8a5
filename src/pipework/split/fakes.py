"""Fake twins of a model's tensors: shapes, dtypes and devices, but no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipework.split.tape import Origin, Value
from pipework.split.torch_private import FakeTensor, FakeTensorMode, buffers_of, parameters_of
from pipework.split.trees import leaves, map_leaves


class Fakes:
    """Fake twins of tensors, all on one device, as the model was when it was written."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.twins: dict[int, torch.Tensor] = {}
        self.originals: dict[int, torch.Tensor] = {}

    def of(self, tensor: Any) -> Any:
        """The twin of a tensor; anything else as it is."""
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
            return tensor
        twin = self.twins.get(id(tensor))
        if twin is None:
            shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            twin = FakeTensor(self.mode, shape, self.device)
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                twin.requires_grad_()
            self.twins[id(tensor)] = twin
            self.originals[id(twin)] = tensor
        return twin

    def dress(self, module: nn.Module) -> None:
        """Swap every tensor of every module for its twin, in attributes too (an RNN lists its weights in one)."""
        for m in module.modules():
            swap(m, self.of)


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
    """Fakes where some tensor has no values, or where the model's parts are on several devices; None where neither.

    A model whose tensors are all there, in one place, runs on them: its forward then takes the very branches it takes
    in training, also where it reads a value back, or asks whether it is being traced.
    """
    tensors = [*module.parameters(), *module.buffers(), *(t for t in leaves(inputs) if isinstance(t, torch.Tensor))]
    devices = dict.fromkeys(t.device for t in tensors)
    real = [device for device in devices if device.type != "meta"]
    if len(devices) < 2 and len(real) == len(devices) and not any(isinstance(t, FakeTensor) for t in tensors):
        return None
    return Fakes(real[0] if real else torch.device("cpu"))


def undress(values: Sequence[Value], fakes: Fakes) -> None:
    """Constants are kept with the stage, so they must be real; those born inside the fake run cannot be."""
    for value in values:
        original = fakes.originals.get(id(value.tensor))
        if value.origin is Origin.CONSTANT and original is not None and not original.is_meta:
            value.tensor = original
