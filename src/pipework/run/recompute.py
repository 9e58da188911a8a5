"""A stage that drops its activations after a forward, and makes them again when its backward first asks for one.

    F   autograd keeps what the stage was given, and the graph without its activations
    B   the forward runs again, up to the last activation that is wanted; then the backward goes through the first graph

This is `torch.utils.checkpoint`, not reentrant, around all that the stage does. What it leaves to its caller is done
here: the second forward finds buffers and counters as the first one found them, and leaves them as they are now; and it
draws from the streams of its microbatch (see `pipework.split.draws`), in whichever thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar, final

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from pipework.errors import MismatchError
from pipework.plan import Action
from pipework.split.draws import drawing_again
from pipework.split.preserve import simple_attributes
from pipework.split.torch_private import buffers_of

Result = TypeVar("Result")
State = list[tuple[dict[str, Any], dict[str, Any]]]
"""Tables of buffers and of attributes, each with what stands in it at some moment."""


@final
class Recomputed:
    """The forwards of one stage, of which these buffers are written in place; `draws` if random numbers go into them.

    `tables` are those of buffers that stand elsewhere, and which the stage assigns too.
    """

    def __init__(
        self, stage: nn.Module, written: Collection[str], tables: Sequence[dict[str, Any]], draws: bool
    ) -> None:
        self._tables = [*filter(None, map(buffers_of, stage.modules())), *tables]
        in_place = {id(buffer) for name, buffer in stage.named_buffers(remove_duplicate=False) if name in written}
        self._written = {(id(table), key) for table in self._tables for key, b in table.items() if id(b) in in_place}
        self._counting = list(stage.modules())  # those whose plain attributes a forward may change, as far as is known
        self._has_run, self._draws = False, draws

    def forward(self, function: Callable[..., Result], given: Sequence[torch.Tensor]) -> Result:
        """What the function makes of the tensors given; until it runs again, autograd keeps these alone."""
        before = self._fresh([(table, dict(table)) for table in self._tables])
        before += [(module.__dict__, simple_attributes(module)) for module in self._counting]
        surrounded = drawing_again() if self._draws else contextlib.nullcontext
        is_first = True

        def run(*given: torch.Tensor) -> Result:
            nonlocal is_first
            if is_first:
                is_first = False
                return function(*given)
            now = _put_in(self._fresh(before))
            try:
                with surrounded():
                    return function(*given)
            finally:
                _put_in(now)

        # While a CUDA graph is captured, a GPU's generator cannot be set; each stream has one of its own there.
        is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        result = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=self._draws and not is_captured)
        if not self._has_run:
            attributes = [values for _, values in before[len(self._tables) :]]
            changed = zip(self._counting, attributes, strict=True)
            self._counting = [module for module, values in changed if simple_attributes(module) != values]
            self._has_run = True
        return result

    def _fresh(self, state: State) -> State:
        """The same state, in which what is written in place is a copy."""
        return [
            (table, {key: value.clone() if (id(table), key) in self._written else value for key, value in row.items()})
            for table, row in state
        ]


def _put_in(state: State) -> State:
    """Put the values of a state in place, and give those that were there."""
    there = [(table, {key: table[key] for key in values if key in table}) for table, values in state]
    for table, values in state:
        table.update(values)
    return there


@contextlib.contextmanager
def explained(action: Action) -> Iterator[None]:
    """Raises `MismatchError` where torch finds that the forward of a recomputed stage was another the second time."""
    try:
        yield
    except CheckpointError as error:
        raise MismatchError(
            f"the forward of stage {action.stage} was another when it was done again",
            where=f"stage {action.stage}, microbatch {action.microbatch}, in {action}",
            why=f"it depends on more than its inputs, weights, buffers and torch's random numbers; torch says: {error}",
            remedy="let the schedule recompute other stages, or move what changes between two calls out of the forward",
        ) from error
