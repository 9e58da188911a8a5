"""Fake twins of a model's tensors: shapes, dtypes and devices, but no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipework.split.tape import Origin, Value
from pipework.split.torch_private import FakeTensor, FakeTensorMode, buffers_of, parameters_of
from pipework.split.trees import leaves, map_leaves


class Fakes:
    """Fake twins of the model's tensors, on the device where the real ones are, or the CPU for those on meta."""

    def __init__(self) -> None:
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
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            twin = FakeTensor(self.mode, shape, device)
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
            for table in (parameters_of(m), buffers_of(m)):
                for key, tensor in table.items():
                    table[key] = self.of(tensor)
            for key, value in list(m.__dict__.items()):
                if isinstance(value, torch.Tensor) or (
                    type(value) in (list, tuple) and any(isinstance(v, torch.Tensor) for v in value)
                ):
                    m.__dict__[key] = map_leaves(self.of, value)


def needs_fakes(module: nn.Module, inputs: Any) -> bool:
    """Whether some tensor has no values, so that only a run on fake tensors is possible.

    A model whose tensors are all there runs on them: its forward then takes the very branches it takes in training,
    also where it reads a value back, or asks whether it is being traced.
    """
    tensors = [*module.parameters(), *module.buffers(), *(t for t in leaves(inputs) if isinstance(t, torch.Tensor))]
    return any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def undress(values: Sequence[Value], fakes: Fakes) -> None:
    """Constants are kept with the stage, so they must be real; those born inside the fake run cannot be."""
    for value in values:
        original = fakes.originals.get(id(value.tensor))
        if value.origin is Origin.CONSTANT and original is not None and not original.is_meta:
            value.tensor = original
