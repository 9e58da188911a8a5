"""Parameters whose stages are on other ranks: what a step here does with them is lost, so that it must do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import final

from torch import nn

from pipework.errors import InputError


@final
class Elsewhere:
    """The parameters of a model that no stage of this process holds, though the process has them in memory."""

    def __init__(self, model: nn.Module, held: Iterable[nn.Parameter]) -> None:
        own = {id(parameter) for parameter in held}
        self._parameters = {name: p for name, p in model.named_parameters() if id(p) not in own}

    @contextlib.contextmanager
    def left_alone(self, rank: int) -> Iterator[None]:
        """Raises `InputError` where what the block does gives one of them a gradient, which its rank never hears of."""
        before = [parameter.grad for parameter in self._parameters.values()]
        yield
        for (name, parameter), old in zip(self._parameters.items(), before, strict=True):
            if parameter.grad is not old:
                raise InputError(
                    f"{name!r} was used on a rank that does not have its stage",
                    where=f"rank {rank}",
                    why="the loss, or a block that has it in a list or a closure, uses this process's copy of it, "
                    "which nobody trains, and whose gradient reaches nobody",
                    remedy="use it in the model's own forward, outside of blocks: a penalty can be one of its outputs",
                )
