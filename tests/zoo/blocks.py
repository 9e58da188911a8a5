"""Where to cut a model that nobody described: at the items of its lists of repeated blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pipework import SplitPoint


def layer_lists(model: nn.Module, inputs: dict[str, Any]) -> list[list[str]]:
    """The blocks of each layer list, the longest list first, each in the order of the calls.

    A layer list holds at least two blocks of one class, each called once; lists inside of another's blocks are left.
    """
    calls = _calls(model, inputs)
    lists: list[list[str]] = []
    for name, module in model.named_modules():
        if any(name.startswith(block + ".") for found in lists for block in found):
            continue
        children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        for kind in dict.fromkeys(type(child) for _, child in children):
            found = [n for n, c in children if type(c) is kind and len(calls.get(n, ())) == 1 and any(c.children())]
            if len(found) >= 2 and isinstance(module, nn.ModuleList | nn.Sequential):
                lists.append(found)
    for found in lists:
        found.sort(key=lambda n: calls[n])
    return sorted(lists, key=lambda found: (-len(found), calls[found[0]]))


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One way to cut a model, into few and into more stages; `name` says where the cuts lie."""

    name: str
    cuts: tuple[Mapping[str, Any], ...]  # keyword arguments of `pipeline`


def ways(model: nn.Module, inputs: dict[str, Any]) -> list[Way]:
    """At all layer lists, at the longest one, or wherever it balances: into 2 stages, and into 4 or as many as go."""
    lists = layer_lists(model, inputs)
    calls = _calls(model, inputs)
    found: list[Way] = []
    if len(lists) > 1:
        every = sorted((name for one in lists for name in one), key=lambda n: calls[n])
        found.append(Way("all layer lists", _at(every)))
    if lists:
        found.append(Way("the longest layer list" if len(lists) > 1 else "the layer list", _at(lists[0])))
    return [*found, Way("balanced", ({"stages": 2},))]


def _at(blocks: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    """Cuts that spread the blocks evenly."""
    specs = [
        {blocks[len(blocks) * i // stages]: SplitPoint.BEGINNING for i in range(1, stages)}
        for stages in sorted({min(stages, len(blocks)) for stages in (2, 4)})
    ]
    return tuple({"split_spec": spec} for spec in specs)


def _calls(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[int]]:
    """When each module is called."""
    calls: dict[str, list[int]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    clock = iter(range(10**9))

    def note(module: nn.Module, _: Any) -> None:
        calls.setdefault(names[id(module)], []).append(next(clock))

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls
