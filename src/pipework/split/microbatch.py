"""A batch into microbatches and back, leaf by leaf.

A spec says along which dimension a tensor is split: an integer, or None for one that every microbatch gets whole. It
may be given for a whole subtree, or as a tree of its own. Without one, tensors are split along dimension 0, while
tensors without dimensions and other values go whole to every microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipework.errors import InputError
from pipework.split.trees import children, fill, leaves, named_leaves

UNSAID: Any = object()
"""The spec of a leaf about which nothing was said."""


def chunk(values: Mapping[str, Any], microbatches: int, spec: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The arguments of each microbatch; tensors are views of the batch.

    Raises `InputError`, naming the leaf, where a tensor cannot be split evenly.

    >>> x = torch.arange(4)
    >>> chunk({"x": x, "scale": 0.5}, 2)
    [{'x': tensor([0, 1]), 'scale': 0.5}, {'x': tensor([2, 3]), 'scale': 0.5}]
    """
    return [fill(dict(values), row) for row in rows(values, microbatches, spec)]


def rows(values: Mapping[str, Any], microbatches: int, spec: Mapping[str, Any] | None = None) -> list[list[Any]]:
    """The leaves of each microbatch's arguments from left to right, as `chunk` puts them into the arguments."""
    spec = spec or {}
    unknown = [name for name in spec if name not in values]
    if unknown:
        raise InputError(
            f"the chunk spec names {unknown[0]!r}, which was not passed",
            remedy=f"the arguments are {', '.join(values)}",
        )
    columns: list[Sequence[Any]] = []
    plain: dict[str, int] = {}  # leaves split without a spec, by their size
    for argument, value in values.items():
        found = list(named_leaves(value, argument))
        rules = _spread(spec[argument], value, argument) if argument in spec else [UNSAID] * len(found)
        columns += [
            _parts(name, leaf, rule, microbatches, plain) for (name, leaf), rule in zip(found, rules, strict=True)
        ]
    return [[column[number] for column in columns] for number in range(microbatches)]


def _spread(spec: Any, value: Any, name: str) -> list[Any]:
    """The spec of each leaf of a value; what is said of a node holds for all below."""
    parts = children(value)
    if spec is UNSAID or spec is None or isinstance(spec, int):
        return [spec] * len(leaves(value))
    if parts is None:
        raise InputError(f"the chunk spec of {name} is {spec!r}", remedy="give the dimension to split, or None")
    told = children(spec)
    accessors, found, _ = parts
    if told is None or told[0] != accessors:
        raise InputError(
            f"the chunk spec of {name} has another structure than what was passed",
            why=f"it has {', '.join(told[0]) if told else spec!r} where the argument has {', '.join(accessors)}",
            remedy="give one integer (or None) for all of it, or a tree of the same structure",
        )
    return [
        rule
        for accessor, child, said in zip(accessors, found, told[1], strict=True)
        for rule in _spread(said, child, name + accessor)
    ]


def _parts(name: str, leaf: Any, rule: Any, microbatches: int, plain: dict[str, int]) -> Sequence[Any]:
    if not isinstance(leaf, torch.Tensor) or rule is None or (rule is UNSAID and leaf.dim() == 0):
        return [leaf] * microbatches
    dimension = 0 if rule is UNSAID else rule
    if not -leaf.dim() <= dimension < leaf.dim():
        raise InputError(
            f"{name} of shape {tuple(leaf.shape)} has no dimension {dimension} to split",
            remedy="correct the chunk spec",
        )
    size = leaf.shape[dimension]
    how = f"pass chunk_spec={{{name!r}: None}}" if name.isidentifier() else f"in the chunk spec, say None for {name}"
    whole = f"{how} if every microbatch needs all of it"
    if rule is UNSAID:
        plain[name] = size
        other = next((n for n, s in plain.items() if s != size), None)
        if other is not None:
            raise InputError(
                f"{name} has size {size} along dimension 0, and {other} has {plain[other]}",
                why="both are split into microbatches along dimension 0, so one of them is no batch",
                remedy=f"{whole}, or give the dimension of its batch",
            )
    if size % microbatches:
        raise InputError(
            f"{name} of size {size} along dimension {dimension} does not divide into {microbatches} microbatches",
            remedy=f"use a batch that is a multiple of {microbatches}, or another number of microbatches; {whole}",
        )
    return leaf.split(size // microbatches, dimension) if size else [leaf] * microbatches


def merge(outputs: Sequence[Any], spec: Any = UNSAID) -> Any:
    """One output from those of the microbatches.

    Tensors are joined along their dimension of the spec (0 without one; None takes the first microbatch's). Of
    tensors without dimensions, floating ones are averaged and others stacked. Other values are kept where all agree,
    else listed.

    >>> merge([{"y": torch.ones(1), "loss": torch.tensor(1.0)}, {"y": torch.zeros(1), "loss": torch.tensor(3.0)}])
    {'y': tensor([1., 0.]), 'loss': tensor(2.)}
    """
    first = outputs[0]
    columns = zip(*(leaves(output) for output in outputs), strict=True)
    return fill(
        first, [_joined(column, rule) for column, rule in zip(columns, _spread(spec, first, "output"), strict=True)]
    )


def _joined(column: tuple[Any, ...], rule: Any) -> Any:
    first = column[0]
    if rule is None:
        return first
    if not isinstance(first, torch.Tensor):
        same = all(type(value) is type(first) and value == first for value in column)
        return first if same else list(column)
    if first.dim():
        return torch.cat(column, 0 if rule is UNSAID else rule)
    return torch.stack(column).mean() if first.is_floating_point() else torch.stack(column)
