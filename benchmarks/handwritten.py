"""The GPT in stages as its author would write them for torch.distributed.pipelining."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.gpt import GPT


class Stage(nn.Module):
    """Some of the blocks, the embeddings before the first and the head after the last; all named as in the model."""

    def __init__(self, model: GPT, begin: int, end: int) -> None:
        super().__init__()
        self.first, self.last = begin == 0, end == len(model.blocks)
        if self.first:
            self.tokens, self.positions, self.dropout = model.tokens, model.positions, model.dropout
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in range(begin, end)})
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            positions = torch.arange(x.shape[1], device=x.device)
            x = self.dropout(self.tokens(x) + self.positions(positions))
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if self.last else x


def begins(blocks: int, stages: int) -> list[int]:
    """The first block of each stage, and the number of blocks."""
    return [blocks * index // stages for index in range(stages + 1)]


def stage(model: GPT, index: int, stages: int) -> Stage:
    """One stage of so many, with as many blocks as any other."""
    bounds = begins(len(model.blocks), stages)
    return Stage(model, bounds[index], bounds[index + 1])
