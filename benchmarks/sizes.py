"""The models that are measured, from layers that cost nothing to layers that fill a core, and those that fill a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
    vocabulary: int = 256
    dtype: torch.dtype = torch.float32

    def model(self, device: torch.device | str = "cpu") -> GPT:
        torch.manual_seed(0)
        config = Config(self.vocabulary, self.blocks, self.width, self.heads, self.context, dropout=0.0)
        with torch.device(device):
            return GPT(config).to(self.dtype)

    def batch(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Input and target of one step, each of shape (microbatches * sequences, context)."""
        torch.manual_seed(1)
        tokens = torch.randint(self.vocabulary, (self.microbatches * self.sequences, self.context + 1)).to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def parts(self, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """The same, by microbatch."""
        return list(zip(*(tensor.chunk(self.microbatches) for tensor in self.batch(device)), strict=True))

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
_GPU = partial(Size, sequences=1, blocks=16, vocabulary=32000, dtype=torch.bfloat16)
GPU_SIZES = (
    _GPU("d768", width=768, context=512, heads=12, microbatches=16),
    _GPU("d2048", width=2048, context=2048, heads=16),
    _GPU("d4096", width=4096, context=4096, heads=32),
)
BY_NAME = {size.name: size for size in (*SIZES, *GPU_SIZES)}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
