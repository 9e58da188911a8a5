"""A model's arguments by name, however they were passed, and what of them a capture depends on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipework.errors import InputError
from pipework.split.trees import fill, held, leaves, named_leaves


@dataclasses.dataclass(frozen=True, slots=True)
class Arguments:
    """One call of a model: its arguments in the order of the signature, and how many were passed by position."""

    values: Mapping[str, Any]
    positional: int
    signature: inspect.Signature

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, which are the pipe's inputs, in order."""
        return [leaf for leaf in leaves(dict(self.values)) if isinstance(leaf, torch.Tensor)]

    def with_values(self, values: Mapping[str, Any]) -> Arguments:
        """The same call with other values."""
        return dataclasses.replace(self, values=values)

    def filled(self, leaves: Sequence[Any]) -> Arguments:
        """The same call with other leaves."""
        return self.with_values(fill(dict(self.values), leaves))

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the model with: what came by position goes by position."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, value in self.values.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args += value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs |= value
            elif kind is inspect.Parameter.POSITIONAL_ONLY or len(args) < self.positional:
                args.append(value)
            else:
                kwargs[name] = value
        return tuple(args), kwargs

    def call(self, module: nn.Module) -> Any:
        """Call the module as the user did."""
        args, kwargs = self.split()
        return module(*args, **kwargs)

    def key(self) -> tuple[Any, ...]:
        """What a capture depends on: names, layouts of tensors, all other values."""
        first: dict[int, int] = {}  # the same tensor passed twice is one value
        pairs = named(self.values)
        return tuple(
            (name, first.setdefault(id(leaf), i), *_fact(leaf))
            if isinstance(leaf, torch.Tensor)
            else (name, *_fact(leaf))
            for i, (name, leaf) in enumerate(pairs)
        )


def named(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each leaf of the arguments with the expression a user would write for it.

    >>> [name for name, _ in named({"x": 1, "masks": {"causal": 2}})]
    ['x', "masks['causal']"]
    """
    return [pair for name, value in values.items() for pair in named_leaves(value, name)]


def _fact(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride() if leaf.layout is torch.strided else None, leaf.dtype, leaf.requires_grad
    if next(held(leaf), None) is not None:
        raise InputError(
            f"an argument is an object of type {type(leaf).__name__} that carries tensors",
            why="the pipe's inputs are tensors, in containers that can be taken apart; these would be constants",
            remedy="pass its tensors (a dict, a dataclass), or register the type as a pytree",
        )
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), id(leaf)
    return type(leaf), leaf


def bind(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    partial: bool = False,
    signature: inspect.Signature | None = None,
) -> Arguments:
    """The arguments by the names of the module's forward; raises `InputError` where the call does not fit it.

    With `partial`, required arguments may be left out. A `signature` known from an earlier call saves finding it again.
    """
    signature = signature or inspect.signature(module.forward)
    try:
        bound = (signature.bind_partial if partial else signature.bind)(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the arguments do not fit {type(module).__name__}.forward{signature}",
            why=str(error),
            remedy="pass what you would pass to the model itself",
        ) from None
    values = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in values:
            values[name] = dict(sorted(values[name].items()))
    return Arguments(values, len(args), signature)
