"""Stages that use a parameter of an earlier stage: each works on a twin of its own, which shares the memory.

The gradients of several stages must not run together in one `.grad` while a step is under way: ranks may be threads.
So a later user's stage is copied as far as it holds the parameter, with a twin in its place, and the model stays as
it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import nn

from pipework.plan import Layout
from pipework.run.layouts import Layouts
from pipework.run.transport import Transport
from pipework.split.cut import Wire
from pipework.split.stage import Stage
from pipework.split.ties import NO_VALUE, Tie
from pipework.split.torch_private import (
    children_of,
    compile_like,
    parameters_of,
    shallow_copy,
    shared_attributes,
)


@final
class TiedStage:
    """A stage with a leaf of its own for each tied parameter: the parameter itself for the first user, else a twin."""

    def __init__(self, index: int, stage: Stage, ties: Sequence[Tie]) -> None:
        self._original = stage
        self._tied = {tie.name: tie.held_as[index] for tie in ties if index in tie.held_as}
        self._twinned = [tie.name for tie in ties if index in tie.stages[1:]]
        self.leaves = {name: stage.get_parameter(own) for name, own in self._tied.items()}
        twins: dict[int, nn.Parameter] = {}
        for name in self._twinned:
            parameter = self.leaves[name]
            twins[id(parameter)] = self.leaves[name] = nn.Parameter(parameter.detach())
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        self.stage = self._copied(stage, twins)

    def _copied(self, module: nn.Module, twins: Mapping[int, nn.Parameter]) -> nn.Module:
        """The module with the twins in it; whatever holds none of them is the original itself."""
        if not any(id(parameter) in twins for parameter in module.parameters()):
            return module
        parameters = {name: twins.get(id(p), p) for name, p in parameters_of(module).items()}
        # A compiled module may have a length of its own, by which `and` would go, and refuse to say it.
        children = {n: None if c is None else self._copied(c, twins) for n, c in children_of(module).items()}
        copy = compile_like(module, shallow_copy(module, parameters, children, lambda p: twins.get(id(p), p)))
        self._copies.append((copy, module))
        return copy

    def refresh(self) -> None:
        """Follow what has happened to the original since: its modes, its values, where they are."""
        for copy, original in self._copies:
            copy.__dict__.update(shared_attributes(original))
        for name in self._twinned:
            original = self._original.get_parameter(self._tied[name])
            self.leaves[name].data = original.data
            self.leaves[name].grad = None  # what a step left that did not come to its end

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients stay with this stage: all but the twins."""
        twins = [self.leaves[name] for name in self._twinned]
        return [p for p in self.stage.parameters() if all(p is not twin for twin in twins)]

    def take_gradient(self, name: str) -> torch.Tensor | None:
        """What the last backward added for a twin, which has none afterwards."""
        leaf = self.leaves[name]
        gradient, leaf.grad = leaf.grad, None
        return gradient


@final
class Spread:
    """After a step gives every process that holds a tied parameter its whole gradient, which the first user has."""

    def __init__(
        self, ties: Sequence[Tie], layout: Layout, stages: Mapping[int, Stage], end: Transport, channel: int
    ) -> None:
        self._end = end
        self._parameters: list[tuple[nn.Parameter, int, dict[int, Layouts], int]] = []
        for number, tie in enumerate(ties):
            first, *others = dict.fromkeys(layout.rank_of[stage] for stage in tie.stages)
            mine = next((stage for stage in tie.stages if stage in stages), None)
            if mine is None:
                continue
            parameter = stages[mine].get_parameter(tie.held_as[mine])
            wire = Wire(NO_VALUE, tuple(parameter.shape), parameter.stride(), parameter.dtype, True, tie.name)
            peers = others if end.rank == first else [first]
            layouts = {rank: Layouts([wire], parameter.device) for rank in peers}
            self._parameters.append((parameter, first, layouts, channel + number))

    def __call__(self) -> None:
        """After a step, on all ranks."""
        for parameter, first, layouts, channel in self._parameters:
            for rank, layout in layouts.items():
                if self._end.rank == first:
                    layout.send([parameter.grad], partial(self._end.send, to=rank, channel=channel))()
                else:
                    receive = partial(self._end.receive, source=rank, channel=channel, device=parameter.device)
                    (parameter.grad,) = layout.receive(receive)()
