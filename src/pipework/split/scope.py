"""What the generated code of a stage calls beside torch, and how it becomes a function."""

from __future__ import annotations

import itertools
import linecache
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipework.errors import MismatchError
from pipework.split.draws import streams_on
from pipework.split.trees import Ref, fill, held, leaves, remade

_files = itertools.count()


def equal(found: Any, value: Any) -> bool:
    """Whether two values read back are the same; arrays are by their elements, and NaN is as good as NaN."""
    if isinstance(found, float) and isinstance(value, float) and math.isnan(found):
        return math.isnan(value)
    same: Any = found == value
    return bool(same.all() if hasattr(same, "all") else same)


def expect(found: Any, value: Any, what: str, source: str, by_chance: bool = False) -> None:
    """A Python value on which the captured forward depends must be what it was."""
    if equal(found, value):
        return
    if by_chance:
        why = "the value was drawn at random, and the stages hold for one way through the model only"
        remedy = "put the choice in a module that stays whole (a layer may skip itself at random), or turn it off"
    else:
        why = "the forward reads this value back into Python, so the stages hold for this value only"
        remedy = "capture on an example that takes this path, or put the branching code in a module that stays whole"
    what = f"the model took another path: {what} is {found!r}, and was {value!r} on the example"
    raise MismatchError(what, where=source, why=why, remedy=remedy)


def taken_from(holder: Any, count: int, what: str, source: str) -> list[torch.Tensor]:
    """The tensors in an argument that a call filled; they must be as many as they were."""
    found = list(held(holder))
    expect(len(found), count, f"the number of tensors that {what} leaves in its argument", source)
    return found


class Template:
    """Makes a container like the captured one around other tensors."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __call__(self, *new: Any) -> Any:
        """One around these leaves."""
        return fill(self.tree, new)


class Original:
    """Makes containers and objects like the captured ones, all of them new, around other tensors."""

    def __init__(self, tree: Any) -> None:
        self.tree, self.places = tree, {id(ref): place for place, ref in enumerate(held(tree))}

    def __call__(self, *new: torch.Tensor) -> Any:
        """Some around these tensors."""
        return remade(self.tree, lambda leaf: new[self.places[id(leaf)]] if isinstance(leaf, Ref) else leaf)


SCOPE = {"torch": torch, "F": functional, "checkpoint": checkpoint, "streams_on": streams_on}
SCOPE |= {"leaves": leaves, "expect": expect, "taken_from": taken_from}
"""What any stage's code may name."""


def compiled(source: str, names: Mapping[str, Any], stage: int) -> Callable[..., tuple[Any, ...]]:
    """The function `forward` that the source defines; its lines show in tracebacks."""
    file = f"<pipework stage {stage}, capture {next(_files)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {**SCOPE, **names}
    exec(compile(source, file, "exec"), scope)
    return scope["forward"]
