"""What of modules a captured step is bound to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipework.run.graph_state import difference, state_of
from tests.models import WIDTH


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.factor = torch.ones(WIDTH)
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.times = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor * self.times + self.shift


def nothing(*_: Any) -> None: ...


def replaced(block: Block) -> None:
    block.linear.weight.data = torch.ones(WIDTH, WIDTH)


CHANGES: dict[str, tuple[Callable[[Block], Any], str]] = {
    "a plain value": (lambda block: setattr(block, "times", 2), "times"),
    "the mode": (lambda block: block.eval(), "training"),
    "a plain tensor": (lambda block: setattr(block, "factor", torch.ones(WIDTH)), "factor"),
    "a buffer": (lambda block: setattr(block, "shift", torch.ones(WIDTH)), "shift"),
    "where a weight lies": (replaced, "weight"),
    "a weight": (lambda block: setattr(block.linear, "weight", nn.Parameter(torch.ones(1, 1))), "weight"),
    "before its calls": (lambda block: block.register_forward_pre_hook(nothing), "_forward_pre_hooks"),
    "after its calls": (lambda block: block.linear.register_forward_hook(nothing), "_forward_hooks"),
    "at its backward": (lambda block: block.register_full_backward_pre_hook(nothing), "_backward_pre_hooks"),
    "at a gradient": (lambda block: block.linear.bias.register_hook(nothing), "bias._backward_hooks"),
    "after a gradient": (
        lambda block: block.linear.bias.register_post_accumulate_grad_hook(nothing),
        "bias._post_accumulate_grad_hooks",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_told(what: str) -> None:
    change, told = CHANGES[what]
    block = Block()
    before = state_of(block.modules())
    assert difference(before, state_of(block.modules())) is None
    change(block)
    found = difference(before, state_of(block.modules()))
    assert found is not None
    assert found[1] == told


def test_a_training_step_changes_nothing() -> None:
    block = Block()
    optimizer = torch.optim.AdamW(block.parameters())
    before = state_of(block.modules())
    block(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    block.load_state_dict(block.state_dict())
    assert difference(before, state_of(block.modules())) is None


def test_a_hook_that_is_removed_is_told_too() -> None:
    block = Block()
    hook = block.register_forward_hook(nothing)
    before = state_of(block.modules())
    hook.remove()
    assert difference(before, state_of(block.modules())) == (block, "_forward_hooks")
