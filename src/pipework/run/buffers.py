"""Buffers that a forward writes, while other microbatches are between their forward and their backward.

Unsplit, a microbatch goes backward before the next one writes. In a pipeline several are in flight, and what autograd
keeps of a buffer for one of them must not change under the next: each works on a copy of its own.

    mean     0 ──▶ written by 0 ──▶ written by 1 ──▶ ...      copied before each forward; the last copy is the outcome
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch

from pipework.split.stage import Stage
from pipework.split.torch_private import NormWithStatistics, buffers_of


@final
class WrittenBuffers:
    """The buffers of one stage that its forward writes in place."""

    def __init__(self, stage: Stage, names: Iterable[str]) -> None:
        held = dict(stage.named_buffers(remove_duplicate=False))
        self._places: list[tuple[dict[str, torch.Tensor | None], str]] = []
        for name in sorted(held.keys() & set(names)):
            around, _, last = name.rpartition(".")
            owner = stage.get_submodule(around)
            if not isinstance(owner, NormWithStatistics):  # their backward does not read what their forward writes
                self._places.append((buffers_of(owner), last))
        self._originals: list[torch.Tensor | None] = []

    def begin(self) -> None:
        """At the start of a step."""
        self._originals = [table[name] for table, name in self._places]

    def renew(self) -> None:
        """Before the forward of a microbatch."""
        for table, name in self._places:
            value = table[name]
            table[name] = None if value is None else value.clone()

    def settle(self) -> None:
        """At the end of a step: the tensors that were there have the values that the last forward left."""
        for (table, name), original in zip(self._places, self._originals, strict=True):
            value = table[name]
            if original is not None and value is not None and value is not original:
                original.copy_(value)
                table[name] = original
