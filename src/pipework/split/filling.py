"""Arguments that a module changes: a cache that it fills, a dict or list into which it puts what it made.

A stage is given tensors only. So such an argument is made anew before each call, as it was at that moment of the
capture, with the tensors that it held; after the call the new tensors are taken out, and are values like any others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipework.split.trees import Ref, children, held, is_object, remade


@dataclasses.dataclass(frozen=True, slots=True)
class Filling:
    """What a call left in an argument: so many tensors, and the new ones by their place among them."""

    count: int
    new: Mapping[int, Ref]


class Holders:
    """The arguments of one call that may be changed, as they are before it."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: Callable[[torch.Tensor], int]) -> None:
        self._args, self._kwargs = args, kwargs
        self._given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        self._before: dict[int | str, Any] = {}
        self._held = {key: list(held(value)) for key, value in self._given.items()}
        for key, value in self._given.items():
            if not isinstance(value, torch.Tensor):
                with contextlib.suppress(TypeError):  # what cannot be copied stays itself
                    self._before[key] = remade(value, lambda x: Ref(number(x)) if isinstance(x, torch.Tensor) else x)

    def _is_filled(self, key: int | str) -> bool:
        now = list(held(self._given[key]))
        return key in self._before and list(map(id, now)) != list(map(id, self._held[key]))

    def reference(self, refs: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors as `Ref`, those that hold others now as they were before the call."""
        found = {
            key: self._before[key] if key in self._before and (self._is_filled(key) or _carries(value)) else refs(value)
            for key, value in self._given.items()
        }
        return tuple(found[i] for i in range(len(self._args))), {name: found[name] for name in self._kwargs}

    def filled(self, made: Callable[[torch.Tensor], int | None]) -> dict[int | str, Filling]:
        """What the call put into each; `made` gives the number of a tensor that is new, and None for one known."""
        found: dict[int | str, Filling] = {}
        for key, value in self._given.items():
            if self._is_filled(key):
                now = list(held(value))
                numbers = {place: made(tensor) for place, tensor in enumerate(now)}
                found[key] = Filling(len(now), {place: Ref(n) for place, n in numbers.items() if n is not None})
        return found


def _carries(tree: Any) -> bool:
    """Whether an object in the tree holds tensors."""
    parts = children(tree)
    return parts is not None and (is_object(tree) or any(map(_carries, parts[1])))
