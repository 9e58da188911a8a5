"""What a pipe is to train exactly as it trains unsplit: a model, a batch, a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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


def plain(model: nn.Module, rows: int, **kwargs: Any) -> Case:
    return Case(model, (numbers(rows, WIDTH),), kwargs, numbers(rows, WIDTH, seed=5), squared)
