"""What a captured step is bound to beside its inputs: what a replay asks no module for any more.

A graph reads the addresses that its kernels were given, and does what Python decided as it was captured. So both are
noted: where the tensors of the modules lie, what plain values and hooks they have. When any of it is another, the graph
is of the past.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from pipework.split.preserve import simple_attributes
from pipework.split.torch_private import buffers_of, hooks_of, parameters_of

State = Mapping[nn.Module, Mapping[str, Any]]


def state_of(modules: Iterable[nn.Module]) -> State:
    """By module and attribute: a plain value, where a tensor lies, which hooks there are."""
    return {module: simple_attributes(module) | hooks_of(module) | _places(module) for module in modules}


def _places(module: nn.Module) -> dict[str, tuple[str, int]]:
    tables = vars(module), parameters_of(module), buffers_of(module)
    members = chain.from_iterable(table.items() for table in tables)
    return {name: ("at", member.data_ptr()) for name, member in members if isinstance(member, torch.Tensor)}


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
        then = before[module]
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                return module, name
    return None
