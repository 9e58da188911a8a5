"""What stands in for a public call of torch does what that does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pipework.split.torch_private import memory_of, run_backward


class Own(Tensor):
    """A tensor of its author's own kind."""


def gradients(back: Any, plain: bool) -> list[Tensor | None]:
    """Of two leaves, gone back to from a tensor, an edge of the graph, a leaf, and a loss without a seed."""
    torch.manual_seed(0)
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    product, total = x * y, (x.exp() * y).sum()
    root = product.sin() if plain else product.sin().as_subclass(Own)
    back([root, get_gradient_edge(product), x, total], [torch.ones(3), torch.full((3,), 2.0), torch.arange(3.0), None])
    return [x.grad, y.grad]


@pytest.mark.parametrize("plain", [True, False])
def test_it_goes_back_as_autograd_does(plain: bool) -> None:
    found, wanted = gradients(run_backward, plain), gradients(torch.autograd.backward, plain)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_seed_of_another_shape_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="shape"):
        run_backward([get_gradient_edge(x * 2)], [torch.ones(4)])


def test_a_view_keeps_all_that_it_is_a_view_of() -> None:
    whole = torch.ones(4, 8)
    assert memory_of(whole[:, 2:3]) == memory_of(whole) == whole.nbytes
    assert memory_of(torch.ones(2, 3).to_sparse()) == 6 * 4
