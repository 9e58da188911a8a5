"""Random numbers of a step that is replayed: those that it would draw if it were run.

A CUDA graph draws from the generators that were registered with it, each from the seed that it has when the replay
begins. So every stream of a step (see `pipework.split.draws`) gets a generator of its own:

    a step     streams begin: 0/drop, 1/drop, ...     noted
    capture    where one begins, its generator takes the place of the device's own
    replay     all generators get the seeds of that step, then the graph runs
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import final

import torch

from pipework.split.draws import DrawKey, begun_by
from pipework.split.tape import Draw

_Stream = tuple[int, Draw, torch.device]  # microbatch, what draws, where


@final
class GraphDraws:
    """The streams on GPUs of one kind of step."""

    def __init__(self) -> None:
        self._noted: list[_Stream] = []
        self._generators: list[torch.Generator] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the block a step runs as ever."""
        self._noted.clear()

        def note(microbatch: int, draw: Draw, device: torch.device) -> bool:
            self._noted.append((microbatch, draw, device))
            return False

        with begun_by(note):
            yield

    @contextlib.contextmanager
    def drawn_in(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
        """Inside the block the step is captured, on a device.

        Raises `RuntimeError` for a stream that did not begin in the step that was noted.
        """
        own = torch.cuda.default_generators[device.index or 0]
        self._generators = [torch.Generator(device) for _ in self._noted]
        waiting: dict[_Stream, deque[torch.Generator]] = {}  # a checkpoint begins a stream a second time
        for stream, generator in zip(self._noted, self._generators, strict=True):
            graph.register_generator_state(generator)
            waiting.setdefault(stream, deque()).append(generator)

        def draw_from(microbatch: int, draw: Draw, device: torch.device) -> bool:
            generators = waiting.get((microbatch, draw, device))
            if not generators:
                raise RuntimeError(f"{draw.module or 'the model'} draws random numbers that it did not draw before")
            own.graphsafe_set_state(generators.popleft())
            return True

        before = own.graphsafe_get_state()
        own.graphsafe_set_state(own.clone_state())  # a capture that fails leaves what it has unusable
        try:
            with begun_by(draw_from):
                yield
        finally:
            own.graphsafe_set_state(before)

    def begin(self, key: DrawKey) -> None:
        """Before a replay: all streams begin as in the step of the key."""
        for (microbatch, draw, _), generator in zip(self._noted, self._generators, strict=True):
            generator.manual_seed(dataclasses.replace(key, microbatch=microbatch).seed_of(draw))
