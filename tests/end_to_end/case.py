"""What a pipe is to train exactly as it trains unsplit: a model, a batch, a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import WIDTH, numbers

Loss = Callable[[Any, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and one batch for it; with `loss` None the model computes its own."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any
    loss: Loss | None


def squared(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def crossed(output: Tensor, target: Tensor) -> Tensor:
    """The loss of a language model."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def token_batch(rows: int, length: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens, and others as their target."""
    tokens = torch.randint(vocabulary, (2, rows, length), generator=torch.Generator().manual_seed(seed))
    return tokens[0], tokens[1]


def plain(model: nn.Module, rows: int, **kwargs: Any) -> Case:
    return Case(model, (numbers(rows, WIDTH),), kwargs, numbers(rows, WIDTH, seed=5), squared)
