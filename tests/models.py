"""Models for tests: `trunk` makes one of a single function, as short as the case it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WIDTH = 8


def trunk(**attributes: Any) -> Callable[[Callable[..., Any]], nn.Module]:
    """A module with these attributes (submodules, parameters, tensors, ...) and the decorated function as its forward.

    Buffers are given as `nn.Buffer`. The weights are the same on every call.
    """

    def make(forward: Callable[..., Any]) -> nn.Module:
        kind = type(forward.__name__.strip("_").title() or "Model", (nn.Module,), {"forward": forward})
        made = kind()
        for name, value in attributes.items():
            setattr(made, name, value)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.is_floating_point() and not parameter.is_meta:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        return made

    return make


def linear(width: int = WIDTH, out: int | None = None) -> nn.Linear:
    return nn.Linear(width, out or width)


def linears(count: int, width: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def numbers(*shape: int, grad: bool = False, seed: int = 3) -> torch.Tensor:
    """Random numbers, by default (4, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (4, WIDTH)), generator=generator).requires_grad_(grad)
