"""What of modules a captured step is bound to."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
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
        self.times, self.window, self.activation = 1, (1, 2), torch.relu
        self.inner, self.scale = nn.ReLU(), torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor * self.times + self.shift


def nothing(*_: Any) -> None: ...


def replaced(block: Block) -> None:
    block.linear.weight.data = torch.ones(WIDTH, WIDTH)


CHANGES: dict[str, tuple[Callable[[Block], Any], str]] = {
    "a plain value": (lambda block: setattr(block, "times", 2), "times"),
    "the mode": (lambda block: block.eval(), "training"),
    "a plain tensor": (lambda block: setattr(block, "factor", torch.ones(WIDTH)), "factor"),
    "another kind of number": (lambda block: setattr(block, "times", Fraction(1, 2)), "times"),
    "a tuple": (lambda block: setattr(block, "window", (1, 3)), "window"),
    "a function": (lambda block: setattr(block, "activation", torch.tanh), "activation"),
    "a child": (lambda block: setattr(block, "inner", nn.GELU()), "training"),
    "a number on the CPU": (lambda block: block.scale.fill_(2.0), "scale"),
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
    before = state_of([block])
    assert difference(before, state_of([block])) is None
    change(block)
    found = difference(before, state_of([block]))
    assert found is not None
    assert found[1] == told


def test_a_training_step_changes_nothing() -> None:
    block = Block()
    optimizer = torch.optim.AdamW(block.parameters())
    before = state_of([block])
    block(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    block.load_state_dict(block.state_dict())
    assert difference(before, state_of([block])) is None


def test_what_has_no_memory_of_its_own_is_told_apart() -> None:
    block = Block()
    block.shift = torch.eye(3).to_sparse()
    before = state_of([block])
    assert difference(before, state_of([block])) is None
    block.shift = torch.eye(3).to_sparse()
    assert difference(before, state_of([block])) == (block, "shift")


def test_a_hook_that_is_removed_is_told_too() -> None:
    block = Block()
    hook = block.register_forward_hook(nothing)
    before = state_of([block])
    hook.remove()
    assert difference(before, state_of([block])) == (block, "_forward_hooks")
