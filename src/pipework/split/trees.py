"""Values inside values: how pipework walks what a model takes and returns.

A node is a tuple, list, dict, slice, dataclass instance, or whatever is registered as a pytree (ModelOutput, ...). One
function, `children`, says how a node is taken apart and put together; the rest is built on it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipework.split.torch_private import PYTREE_NODES

Rebuild = Callable[[Sequence[Any]], Any]


def children(node: Any) -> tuple[list[str], list[Any], Rebuild] | None:
    """The accessors (`[0]`, `['key']`, `.field`), the children and the way back; None for a leaf."""
    kind = type(node)
    if kind in (tuple, list):
        return [f"[{i}]" for i in range(len(node))], list(node), kind
    if kind is dict:
        keys = list(node)
        return [f"[{k!r}]" for k in keys], list(node.values()), lambda new: dict(zip(keys, new, strict=True))
    if kind is slice:
        return [".start", ".stop", ".step"], [node.start, node.stop, node.step], lambda new: slice(*new)
    if isinstance(node, tuple):
        return _tuple_kind(node)
    if kind in PYTREE_NODES:
        return _registered(node)
    if isinstance(node, dict):
        return _dict_kind(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return _dataclass(node)
    return None


def _tuple_kind(node: Any) -> tuple[list[str], list[Any], Rebuild] | None:
    kind = type(node)
    accessors = [f"[{i}]" for i in range(len(node))]
    if hasattr(kind, "_make"):
        return accessors, list(node), kind._make
    if hasattr(kind, "n_sequence_fields"):  # torch.return_types.max and its like
        return accessors, list(node), kind
    return None  # torch.Size is a fact, not a container


def _registered(node: Any) -> tuple[list[str], list[Any], Rebuild]:
    definition = PYTREE_NODES[type(node)]
    found, recipe = definition.flatten_fn(node)
    if isinstance(node, dict) and len(node) == len(found):
        accessors = [f"[{key!r}]" for key in node]
    else:
        accessors = [f"<{i}>" for i in range(len(found))]
    return accessors, list(found), lambda new: definition.unflatten_fn(list(new), recipe)


def _dict_kind(node: Any) -> tuple[list[str], list[Any], Rebuild]:
    keys = list(node)

    def rebuild(new: Sequence[Any]) -> Any:
        twin = copy.copy(node)
        for key, value in zip(keys, new, strict=True):
            twin[key] = value
        return twin

    return [f"[{key!r}]" for key in keys], [node[key] for key in keys], rebuild


def _dataclass(node: Any) -> tuple[list[str], list[Any], Rebuild]:
    names = [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]

    def rebuild(new: Sequence[Any]) -> Any:
        twin = copy.copy(node)
        for name, value in zip(names, new, strict=True):
            object.__setattr__(twin, name, value)  # frozen dataclasses too
        return twin

    return [f".{name}" for name in names], [getattr(node, name) for name in names], rebuild


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with every leaf replaced; a subtree in which nothing changes is kept as it is.

    >>> map_leaves(lambda leaf: leaf * 2, {"a": (1, [2]), "b": 3})
    {'a': (2, [4]), 'b': 6}
    """
    parts = children(tree)
    if parts is None:
        return function(tree)
    _, old, rebuild = parts
    new = [map_leaves(function, child) for child in old]
    return tree if all(a is b for a, b in zip(old, new, strict=True)) else rebuild(new)


def leaves(tree: Any) -> list[Any]:
    """The leaves from left to right.

    >>> leaves({"a": (1, [2]), "b": 3})
    [1, 2, 3]
    """
    return [leaf for _, leaf in named_leaves(tree)]


def named_leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with the expression that reaches it.

    >>> list(named_leaves({"a": (1, [2])}, "inputs"))
    [("inputs['a'][0]", 1), ("inputs['a'][1][0]", 2)]
    """
    parts = children(tree)
    if parts is None:
        yield name, tree
        return
    accessors, found, _ = parts
    for accessor, child in zip(accessors, found, strict=True):
        yield from named_leaves(child, name + accessor)


def hidden(leaf: Any, found: set[int] | None = None) -> Iterator[Any]:
    """What the attributes of a leaf reach: an object that is no container can carry tensors all the same.

    >>> class Cache:
    ...     def __init__(self): self.keys = [torch.ones(2)]
    >>> list(hidden(Cache()))
    [tensor([1., 1.])]
    """
    found = set() if found is None else found
    if id(leaf) in found or isinstance(leaf, (type, nn.Module, torch.Tensor)) or not hasattr(leaf, "__dict__"):
        return
    found.add(id(leaf))
    inner = [leaf.data] if isinstance(leaf, UserDict) else list(vars(leaf).values())
    for value in leaves(inner):
        if isinstance(value, torch.Tensor):
            yield value
        else:
            yield from hidden(value, found)


def fill(tree: Any, new: Sequence[Any]) -> Any:
    """The same tree with its leaves replaced from left to right.

    >>> fill({"a": (1, [2])}, ["x", "y"])
    {'a': ('x', ['y'])}
    """
    following = iter(new)
    return map_leaves(lambda _: next(following), tree)
