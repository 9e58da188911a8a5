"""The GPT in two stages as its author would write them for torch.distributed.pipelining."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.gpt import GPT


class First(nn.Module):
    """The embeddings and the blocks before `stop`."""

    def __init__(self, model: GPT, stop: int) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = model.tokens, model.positions, model.dropout
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in range(stop)})

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks.values():
            x = block(x)
        return x


class Last(nn.Module):
    """The blocks from `start` on, and the head."""

    def __init__(self, model: GPT, start: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in range(start, len(model.blocks))})
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x))


def stage(model: GPT, index: int) -> nn.Module:
    """Stage 0 or 1; its parameters have the names they have in the model."""
    middle = len(model.blocks) // 2
    return First(model, middle) if index == 0 else Last(model, middle)
