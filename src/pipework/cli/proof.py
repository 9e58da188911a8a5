"""What `pipework verify` runs, here or in processes of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from pipework.cli.launch import launch
from pipework.cli.load import blamed, function, split_spec, subject
from pipework.cli.plans import load
from pipework.errors import InputError
from pipework.split.trees import leaves
from pipework.verify import Report, verify


@final
@dataclass(frozen=True, slots=True)
class Proof:
    """A call of `pipework.verify` in words, so that every process can make it."""

    factory: str
    example: str | None
    stages: int | None
    at: tuple[str, ...]
    cut: Path | None
    schedule: str
    ranks: int
    microbatches: int
    loss: str | None

    def on_threads(self) -> Report:
        """The report of ranks that are threads of this process."""
        return self._made(None)

    def on_processes(self) -> Report:
        """The report of ranks that are processes over Gloo."""
        return launch(self.ranks, Proof._in_process, self)[0]

    def _in_process(self) -> Report:
        return self._made(dist.group.WORLD)

    def _made(self, group: dist.ProcessGroup | None) -> Report:
        given = subject(self.factory, self.example)
        own = function(self.loss) if self.loss else mean_square
        with blamed("the step"):
            return verify(
                given.model,
                given.args,
                given.kwargs,
                loss=lambda output, _: own(output),
                split_spec=split_spec(self.at, self.cut),
                stages=self.stages,
                schedule=load(self.schedule) or self.schedule,
                ranks=self.ranks,
                microbatches=self.microbatches,
                group=group,
            )


def mean_square(output: Any) -> torch.Tensor:
    """A loss for a model of which nothing is known: the mean square of its floating-point outputs, summed.

    >>> mean_square({"logits": torch.tensor([1.0, 3.0]), "tokens": torch.tensor([7])})
    tensor(5.)
    """
    found = [leaf for leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not found:
        raise InputError("the model's output has no floating-point tensor", remedy="give --loss MODULE:FUNCTION")
    return torch.stack([tensor.float().square().mean() for tensor in found]).sum()
