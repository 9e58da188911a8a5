"""What a captured step is bound to beside its inputs: what a replay asks no module for any more.

A graph reads the addresses that its kernels were given, and does what Python decided as it was captured. So both are
noted: which modules there are, where their tensors lie, what values and hooks they have. When any of it is another, the
graph is of the past.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from numbers import Number
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from pipework.split.torch_private import buffers_of, hooks_of, parameters_of, version_of

State = Mapping[nn.Module, Mapping[str, Any]]
_USUAL = frozenset({bool, int, float, str, type(None)})
_PLAIN = (type(None), Number, str, bytes, Enum, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """Stands for an object that is like no other; held, so that no later one can take its place in memory."""

    what: object

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.what is self.what

    @override
    def __hash__(self) -> int:
        return id(self.what)


def is_plain(value: object) -> bool:
    """Whether a value is told from others by what it is equal to: a number, a text, a tuple of such."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


def state_of(roots: Iterable[nn.Module]) -> State:
    """By module and attribute: a value, where a tensor lies, which hooks there are. What tables hold is not noted."""
    modules = dict.fromkeys(chain.from_iterable(root.modules() for root in roots))
    return {module: dict(_noted(module)) | hooks_of(module) for module in modules}


def _noted(module: nn.Module) -> Iterable[tuple[str, Any]]:
    for name, value in chain(vars(module).items(), parameters_of(module).items(), buffers_of(module).items()):
        kind = type(value)
        if kind in _USUAL:
            yield name, value
        elif issubclass(kind, torch.Tensor):
            yield name, _place(value)
        elif not issubclass(kind, (dict, list, set)):
            yield name, value if is_plain(value) else _Same(value)


def _place(tensor: torch.Tensor) -> Any:
    if not tensor.dim() and tensor.device.type == "cpu":
        return _Same(tensor), version_of(tensor)  # kernels are given its value, not its address
    try:
        return _Same(type(tensor)), tensor.data_ptr()
    except RuntimeError:  # it has no memory of its own: sparse, or a wrapper
        return _Same(tensor)


def difference(before: State, after: State) -> tuple[nn.Module, str] | None:
    """The first module of which something is another, and what; None where all is as it was.

    >>> dropout = nn.Dropout(0.1)
    >>> before = state_of([dropout])
    >>> difference(before, state_of([dropout]))
    >>> dropout.p = 0.2
    >>> difference(before, state_of([dropout]))
    (Dropout(p=0.2, inplace=False), 'p')
    """
    for module, now in after.items():
        then = before.get(module, {})
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                return module, name
    return None
