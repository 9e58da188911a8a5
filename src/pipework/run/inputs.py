"""What a step is called with: arguments and target, split into microbatches, on ranks that may each have only a part.

Where every rank passes all inputs, each can work out the same plan by itself, and nothing is exchanged. Where some rank
leaves inputs out, ranks tell one another before each step what they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from pipework.errors import InputError, MismatchError
from pipework.plan import Schedule
from pipework.run.losses import Share
from pipework.run.transport import Transport, refusing, together
from pipework.split.arguments import Arguments, named
from pipework.split.microbatch import rows
from pipework.split.pipe import Pipe, Variant
from pipework.split.trees import fill, leaves, map_leaves


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A batch in microbatches: for each the variant of the cut, the input tensors by position, the target."""

    variants: list[Variant]
    given: list[list[torch.Tensor | None]]  # views of the caller's tensors
    inputs: list[list[torch.Tensor | None]]  # what the stages work on
    targets: list[Any]
    shares: Sequence[Share] | None  # of the step's loss; empty where there is no target here; None if all count alike

    def return_gradients(self) -> None:
        """Hand on the gradients of what the stages worked on to the caller's tensors, in the order of microbatches."""
        for given, inputs in zip(self.given, self.inputs, strict=True):
            for theirs, ours in zip(given, inputs, strict=True):
                if theirs is not None and ours is not None and ours is not theirs and ours.grad is not None:
                    theirs.backward(ours.grad)


class Absent:
    """Stands for a tensor that another rank has: its layout."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.layout = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)

    def __repr__(self) -> str:
        return f"a tensor of {self.layout[0]}, {self.layout[2]}"

    def tensor(self) -> torch.Tensor:
        """A tensor of this layout, without values."""
        shape, stride, dtype, requires_grad = self.layout
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta").requires_grad_(requires_grad)


def _refuse_unfinished(arguments: Arguments) -> None:
    """An input that was itself computed with gradients would be gone back through once for each microbatch."""
    for name, leaf in named(arguments.values):
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None and torch.is_grad_enabled():
            raise InputError(
                f"the input {name} is the result of a computation with gradients",
                why="the step goes back once for each microbatch, and that computation can be gone through once only",
                remedy="pass x = x.detach().requires_grad_(), and go back from x.grad yourself after the step",
            )


def _own(given: torch.Tensor | None) -> torch.Tensor | None:
    """An input as a microbatch works on it: a leaf of its own where a gradient is wanted.

    Added to the caller's tensor as they come, the gradients of one that every microbatch gets whole would depend on the
    schedule and on the moment. The leaf is a view, as what `StageRun` receives.
    """
    if given is None or not given.requires_grad:
        return given
    return given.detach().view_as(given).requires_grad_()


@final
class Inputs:
    """Makes batches for one runner."""

    def __init__(
        self,
        pipe: Pipe,
        schedule: Schedule,
        chunk_spec: Mapping[str, Any],
        weigh: Callable[[Sequence[Any]], list[float]] | None = None,
    ) -> None:
        self._pipe, self._microbatches, self._layout = pipe, schedule.microbatches, schedule.layout
        self._chunk_spec, self.weigh = chunk_spec, weigh
        self._tensor_arguments = {
            name
            for name, value in pipe.example.values.items()
            if any(isinstance(x, torch.Tensor) for x in leaves(value))
        }
        self.everyone_has_all: bool | None = None

    def batch(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Any,
        ends: Sequence[Transport],
        first: bool,
        trains: bool,
    ) -> Batch:
        """The batch of one call; raises `InputError` for what does not fit, before anything is sent.

        `first` says that no call was made before, so that all ranks will still agree on a plan.
        """
        in_threads = ends[0].in_one_process
        arguments = self._pipe.bind(args, kwargs) if in_threads else self._gathered(args, kwargs, ends[0])
        with refusing(ends[0], not in_threads and (first or not self.everyone_has_all)):
            _refuse_unfinished(arguments)
            parts = rows(arguments.values, self._microbatches, self._spec(arguments.values))
            variants = self._variants(arguments, parts)
            given = [
                [None if leaf.is_meta else leaf for leaf in part if isinstance(leaf, torch.Tensor)] for part in parts
            ]
            inputs = [[_own(t) for t in row] for row in given] if trains else given
            targets = {"target": target}
            aims = [fill(target, row) for row in rows(targets, self._microbatches, self._spec(targets))]
            shares = self._shares(aims, ends, trains)
        if not in_threads and not self.everyone_has_all:
            self._refuse_missing(variants, inputs[0], arguments, ends[0])
        return Batch(variants, given, inputs, aims, shares)

    def _shares(self, targets: Sequence[Any], ends: Sequence[Transport], trains: bool) -> list[float] | None:
        """What the loss of each microbatch counts for, where the last stage is and the loss is computed."""
        if self.weigh is None:
            return None
        is_here = any(end.rank == self._layout.rank_of[-1] for end in ends)
        needed = trains or any(target is not None for target in targets)
        return self.weigh(targets) if is_here and needed else []

    def _variants(self, arguments: Arguments, parts: Sequence[Sequence[Any]]) -> list[Variant]:
        """Each microbatch's variant: one for all, unless values of the inputs, or a count of calls, decide the path."""
        first = self._pipe.variant(arguments.filled(parts[0]))
        if first.guards is None and not first.changed_attributes:
            return [first] * len(parts)
        found: list[Variant] = []
        for part in parts:
            found.append(self._pipe.variant(arguments.filled(part)))
            self._pipe.ran(found[-1])
        return found

    def _spec(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the chunk spec says about these values; inputs that a rank was not given may be in it too."""
        known = {*self._pipe.example.signature.parameters, "target"}
        for name in self._chunk_spec:
            if name not in known:
                raise InputError(
                    f"the chunk spec names {name!r}, which is no argument",
                    remedy=f"the arguments are {', '.join(sorted(known))}",
                )
        return {name: rule for name, rule in self._chunk_spec.items() if values.get(name) is not None}

    def _gathered(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], end: Transport) -> Arguments:
        """This rank's arguments, with a stand-in for each that only other ranks have."""
        is_whole = bool(self.everyone_has_all)
        with refusing(end, not is_whole):
            mine = self._pipe.bind(args, kwargs, partial=not is_whole)
        given = {name: value for name, value in mine.values.items() if value is not None}
        missing = sorted(self._tensor_arguments - given.keys())
        if self.everyone_has_all is None:
            self.everyone_has_all = not any(together(end, missing))
        if self.everyone_has_all:
            if missing:
                raise InputError(
                    f"{missing[0]} was passed in the first step, and not in this one",
                    where=f"rank {end.rank}",
                    why="ranks that all have all inputs tell one another nothing, so the others would wait",
                    remedy="pass the same arguments in every step, or make another runner for the other kind of call",
                )
            return mine if is_whole else self._pipe.bind(args, kwargs)
        told = together(end, map_leaves(lambda x: Absent(x) if isinstance(x, torch.Tensor) else x, dict(mine.values)))
        values: dict[str, Any] = {}
        for name in mine.signature.parameters:
            holders = [(rank, has[name]) for rank, has in enumerate(told) if has.get(name) is not None]
            for rank, value in holders:
                if value != holders[0][1]:
                    raise MismatchError(
                        f"ranks {holders[0][0]} and {rank} pass another {name}",
                        where=f"{holders[0][1]!r} and {value!r}",
                        remedy="every rank that passes an argument passes the same one",
                    )
            if name in given:
                values[name] = given[name]
            elif holders:
                values[name] = map_leaves(lambda x: x.tensor() if isinstance(x, Absent) else x, holders[0][1])
            elif any(name in has for has in told):
                values[name] = None
        return mine.with_values(values)

    def _refuse_missing(
        self, variants: Sequence[Variant], inputs: list[torch.Tensor | None], arguments: Arguments, end: Transport
    ) -> None:
        names = [name for name, leaf in named(arguments.values) if isinstance(leaf, torch.Tensor)]
        problem = next(
            (
                (names[position], stage)
                for stage in self._layout.held_by(end.rank)
                for variant in variants
                for _, position in variant.cut.parts[stage].inputs
                if inputs[position] is None
            ),
            None,
        )
        for rank, found in enumerate(together(end, problem)):
            if found is not None:
                raise InputError(
                    f"rank {rank} was not given {found[0]}",
                    where=f"stage {found[1]}",
                    why="the stage reads this input, and a rank gets inputs from its own caller only",
                    remedy=f"pass {found[0]} on rank {rank} too",
                )
