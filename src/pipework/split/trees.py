"""Values inside values: how pipework walks what a model takes and returns.

A node is a tuple, list, dict, slice, dataclass instance, whatever is registered as a pytree (ModelOutput, ...), or an
object with tensors in its attributes (a key-value cache, ...). One function, `children`, says how a node is taken apart
and put together; the rest is built on it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from pipework.split.torch_private import PYTREE_NODES

Rebuild = Callable[[Sequence[Any]], Any]
Parts = tuple[list[str], list[Any], Rebuild]


class Ref:
    """Stands for a tensor, by its number. No dataclass, since those are taken apart as containers."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class ModuleRef:
    """Stands for a module of the model, by its FQN."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_WHOLE = (torch.Tensor, Ref, nn.Module, ModuleRef, type, FunctionType, MethodType, ModuleType)


def children(node: Any) -> Parts | None:
    """The accessors (`[0]`, `['key']`, `.field`), the children and the way back; None for a leaf."""
    if type(node) is torch.Tensor:  # as nearly all are
        return None
    return _container(node) or (_object(node) if is_object(node) else None)


def is_object(node: Any) -> bool:
    """Whether a node is an object with tensors in its attributes, and no container; one that holds itself is a leaf."""
    plain = _has_attributes(node) and _container(node) is None
    return plain and next(held(node), None) is not None and not _holds_itself(node)


def is_empty_object(node: Any) -> bool:
    """Whether a leaf is an object that could come to hold tensors."""
    return _has_attributes(node) and next(held(node), None) is None


def _container(node: Any) -> Parts | None:
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


def _tuple_kind(node: Any) -> Parts | None:
    kind = type(node)
    accessors = [f"[{i}]" for i in range(len(node))]
    if hasattr(kind, "_make"):
        return accessors, list(node), kind._make
    if hasattr(kind, "n_sequence_fields"):  # torch.return_types.max and its like
        return accessors, list(node), kind
    return None  # torch.Size is a fact, not a container


def _registered(node: Any) -> Parts:
    definition = PYTREE_NODES[type(node)]
    found, recipe = definition.flatten_fn(node)
    if isinstance(node, dict) and len(node) == len(found):
        accessors = [f"[{key!r}]" for key in node]
    else:
        accessors = [f"<{i}>" for i in range(len(found))]

    def rebuild(new: Sequence[Any]) -> Any:
        twin = definition.unflatten_fn(list(new), recipe)
        if isinstance(node, OrderedDict) and list(twin) != list(node):
            for key in node:  # a ModelOutput makes itself with its fields as they are declared, not as they were set
                twin.move_to_end(key)
        return twin

    return accessors, list(found), rebuild


def _dict_kind(node: Any) -> Parts:
    keys = list(node)

    def rebuild(new: Sequence[Any]) -> Any:
        twin = copy.copy(node)
        for key, value in zip(keys, new, strict=True):
            twin[key] = value
        return twin

    return [f"[{key!r}]" for key in keys], [node[key] for key in keys], rebuild


def _dataclass(node: Any) -> Parts:
    names = [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]

    def rebuild(new: Sequence[Any]) -> Any:
        twin = copy.copy(node)
        for name, value in zip(names, new, strict=True):
            object.__setattr__(twin, name, value)  # frozen dataclasses too
        return twin

    return [f".{name}" for name in names], [getattr(node, name) for name in names], rebuild


def _has_attributes(node: Any) -> bool:
    return not isinstance(node, _WHOLE) and hasattr(node, "__dict__")


def _object(node: Any) -> Parts:
    names = list(vars(node))

    def rebuild(new: Sequence[Any]) -> Any:
        twin = copy.copy(node)
        vars(twin).update(zip(names, new, strict=True))
        return twin

    return [f".{name}" for name in names], list(vars(node).values()), rebuild


def _inside(node: Any) -> list[Any]:
    """What a container or any object holds."""
    parts = _container(node) or (_object(node) if _has_attributes(node) else None)
    return [] if parts is None else parts[1]


def _holds_itself(node: Any, around: tuple[int, ...] = ()) -> bool:
    return id(node) in around or any(_holds_itself(inner, (*around, id(node))) for inner in _inside(node))


def held(tree: Any, found: dict[int, Any] | None = None) -> Iterator[Any]:
    """All tensors in containers and in attributes of objects, whatever these are.

    >>> class Cache:
    ...     def __init__(self): self.keys = [torch.ones(2)]
    >>> list(held({"cache": Cache()}))
    [tensor([1., 1.])]
    """
    found = {} if found is None else found
    if isinstance(tree, torch.Tensor | Ref):
        yield tree
    elif id(tree) not in found and (inner := _inside(tree)):
        found[id(tree)] = tree  # kept alive, so that its id stays its own
        for value in inner:
            yield from held(value, found)


def remade(tree: Any, swap: Callable[[Any], Any], known: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """The same tree with other leaves, in which all is new that could be written into: containers and objects.

    >>> kept = [{"a": 1}]
    >>> twin = remade(kept, lambda leaf: leaf)
    >>> twin == kept, twin[0] is kept[0]
    (True, False)
    """
    known = {} if known is None else known
    if id(tree) in known:
        return known[id(tree)][1]
    parts = _container(tree)
    if parts is not None:
        twin = parts[2]([remade(child, swap, known) for child in parts[1]])
    elif _has_attributes(tree):
        twin = copy.copy(tree)
        known[id(tree)] = tree, twin
        vars(twin).update({name: remade(value, swap, known) for name, value in vars(tree).items()})
    else:
        twin = swap(tree)
    known[id(tree)] = tree, twin
    return twin


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with every leaf replaced; a container in which nothing changes is kept as it is.

    >>> map_leaves(lambda leaf: leaf * 2, {"a": (1, [2]), "b": 3})
    {'a': (2, [4]), 'b': 6}
    """
    parts = _container(tree)
    if parts is None:
        return remade(tree, function) if is_object(tree) else function(tree)
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


def counts(tree: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Each list, tuple and dict with the expression that reaches it, and how many it holds.

    >>> list(counts({"a": (1, [2])}, "inputs"))
    [('inputs', 1), ("inputs['a']", 2), ("inputs['a'][1]", 1)]
    """
    parts = children(tree)
    if parts is None:
        return
    if isinstance(tree, (list, tuple, dict)):
        yield name, len(tree)
    accessors, found, _ = parts
    for accessor, child in zip(accessors, found, strict=True):
        yield from counts(child, name + accessor)


def fill(tree: Any, new: Sequence[Any]) -> Any:
    """The same tree with its leaves replaced from left to right.

    >>> fill({"a": (1, [2])}, ["x", "y"])
    {'a': ('x', ['y'])}
    """
    return _filled(tree, iter(new))


def _filled(tree: Any, new: Iterator[Any]) -> Any:
    parts = children(tree)
    return next(new) if parts is None else parts[2]([_filled(child, new) for child in parts[1]])
