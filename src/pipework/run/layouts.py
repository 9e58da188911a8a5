"""How gradients are laid out on their way between processes.

Kernels choose by layout, so a gradient must arrive as it left, strides and all, and one that was never made must not
arrive as zeros. Neither is known before the first step. So at first a description travels ahead of each transfer:

    step 0   [description] [gradients]         step 1, 2, ...   [gradients]

Once all gradients of a transfer were there, both ends keep their layouts, and what comes later is laid out likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import final

import torch

from pipework.run.transport import Arrival, Tensors, Wait
from pipework.split.cut import Wire


@final
class Layouts:
    """What one end knows of the gradients of one transfer; the other end knows the same."""

    def __init__(self, wires: Sequence[Wire], device: torch.device) -> None:
        self._wires, self._device = tuple(wires), device
        self._description = Wire(-1, (sum(1 + len(wire.shape) for wire in wires),), (1,), torch.int64, False)
        self.settled = not wires

    def send(self, gradients: Tensors, send: Callable[[Tensors, Sequence[Wire]], Wait]) -> Wait:
        """Send them with `send`, described unless both ends know the layouts; zeros in place of one that is missing."""
        if self.settled:
            found = [self._zeros(w) if g is None else g for g, w in zip(gradients, self._wires, strict=True)]
            return send(found, self._wires)
        numbers: list[int] = []
        for gradient, wire in zip(gradients, self._wires, strict=True):
            numbers += [0] * (1 + len(wire.shape)) if gradient is None else [1, *gradient.stride()]
        told = send([torch.tensor(numbers, device=self._device)], [self._description])
        there = [gradient for gradient in gradients if gradient is not None]
        sent = send(there, [wire for wire in self._heard(numbers) if wire is not None])

        def wait() -> None:
            told()
            sent()

        return wait

    def receive(self, receive: Callable[[Sequence[Wire]], Arrival]) -> Arrival:
        """Be ready for them with `receive`; waits for the description, where there is one."""
        if self.settled:
            return receive(self._wires)
        (description,) = receive([self._description])()
        wires = self._heard(description.tolist())
        arrival = receive([wire for wire in wires if wire is not None])

        def wait() -> Tensors:
            came = iter(arrival())
            return [None if wire is None else next(came) for wire in wires]

        return wait

    def _heard(self, numbers: Sequence[int]) -> list[Wire | None]:
        """The wires of a description, None for a gradient that is missing; kept, if they may hold for good."""
        following = iter(numbers)
        found: list[Wire | None] = []
        for wire in self._wires:
            is_there, *stride = [next(following) for _ in range(1 + len(wire.shape))]
            found.append(dataclasses.replace(wire, stride=tuple(stride)) if is_there else None)
        there = tuple(wire for wire in found if wire is not None and not _overlaps(wire))
        if len(there) == len(found):
            self._wires, self.settled = there, True
        return found

    def _zeros(self, wire: Wire) -> torch.Tensor:
        return torch.empty_strided(wire.shape, wire.stride, dtype=wire.dtype, device=self._device).zero_()


def _overlaps(wire: Wire) -> bool:
    """Whether elements share memory (`expand`), which those of a later gradient may not."""
    steps = sorted((step, size) for step, size in zip(wire.stride, wire.shape, strict=True) if size > 1)
    reach = [0]
    for step, size in steps:
        reach.append(reach[-1] + (size - 1) * step)
    return any(step <= before for (step, _), before in zip(steps, reach, strict=False))
