"""What one call into torch costs, counted rather than timed: the same on every rank, and for tensors without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from pipework.split.trees import leaves

OPERATIONS_PER_ELEMENT = 10.0
"""What moving one element is taken to cost beside arithmetic, so that norms and activations count for something."""


def operations(function: Any, args: Any, kwargs: Any, out: Any) -> float:
    """The cost of one call into torch: multiplications and additions of matrix products, and elements written."""
    written = sum(t.numel() for t in leaves(out) if isinstance(t, torch.Tensor))
    formula: Callable[..., int] | None = flop_registry.get(function.overloadpacket)
    arithmetic = formula(*args, **(kwargs or {}), out_val=out) if formula is not None else 0
    return arithmetic + OPERATIONS_PER_ELEMENT * written
