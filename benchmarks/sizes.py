"""The models that are measured, from layers that cost nothing to layers that fill a core."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.gpt import GPT, Config


@dataclass(frozen=True)
class Size:
    """A GPT without dropout (so that every contender computes the same numbers), and one step's batch."""

    name: str
    width: int
    context: int
    sequences: int  # per microbatch
    heads: int = 4
    blocks: int = 8
    microbatches: int = 8

    def model(self) -> GPT:
        torch.manual_seed(0)
        return GPT(Config(blocks=self.blocks, width=self.width, heads=self.heads, context=self.context, dropout=0.0))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Input and target of one step, each of shape (microbatches * sequences, context)."""
        torch.manual_seed(1)
        tokens = torch.randint(256, (self.microbatches * self.sequences, self.context + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __str__(self) -> str:
        return f"{self.name}: {self.blocks} x width {self.width}, {self.sequences} x {self.context} tokens"


SIZES = (
    Size("minimal", width=8, context=4, sequences=1, heads=2),
    Size("tiny", width=32, context=16, sequences=1),
    Size("small", width=64, context=32, sequences=2),
    Size("demo", width=128, context=64, sequences=4),
    Size("large", width=256, context=64, sequences=4),
    Size("larger", width=384, context=64, sequences=4),
)
BY_NAME = {size.name: size for size in SIZES}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
