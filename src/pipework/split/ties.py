"""Parameters that several stages use, by one name or by several: their gradients add up as in the uncut model.

Such a parameter travels like a value that is already everywhere: nothing goes forward, but in each microbatch its
gradient comes back from user to user, the last first, and each adds its own to what came. The first user ends up with
the whole gradient of the microbatch, added in autograd's order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from torch import nn

from pipework.split.cut import Edge, Wire

NO_VALUE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Tie:
    """A parameter by its first name in the model, and the name by which each stage that uses it holds it."""

    name: str
    held_as: Mapping[int, str]

    @property
    def stages(self) -> list[int]:
        """The stages that use it, the first first."""
        return sorted(self.held_as)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """For each name of a parameter the first that it has: a tied one has several, and a stage may hold it by any."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def ties(stages: Sequence[nn.Module], names: Mapping[str, str]) -> tuple[Tie, ...]:
    """The trained parameters that more than one stage uses."""
    found: dict[str, dict[int, str]] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            if parameter.requires_grad:
                found.setdefault(names[name], {})[index] = name
    return tuple(Tie(name, held) for name, held in sorted(found.items()) if len(held) > 1)


def with_ties(edges: Sequence[Edge], tied: Sequence[Tie], stages: Sequence[nn.Module]) -> tuple[Edge, ...]:
    """The edges with a wire for each gradient of a tied parameter."""
    wires = {(edge.source, edge.target): edge.wires for edge in edges}
    for tie in tied:
        users = tie.stages
        for first, second in itertools.pairwise(users):
            parameter = stages[first].get_parameter(tie.held_as[first])
            shape, stride = tuple(parameter.shape), parameter.stride()
            wire = Wire(NO_VALUE, shape, stride, parameter.dtype, gradient=True, parameter=tie.name)
            wires[first, second] = (*wires.get((first, second), ()), wire)
    return tuple(Edge(source, target, found) for (source, target), found in sorted(wires.items()))
