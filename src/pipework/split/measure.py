"""What the parts of a model cost: counted, or measured on real tensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipework.errors import InputError
from pipework.split.arguments import bind
from pipework.split.cost import Cost
from pipework.split.parts import ModuleCosts
from pipework.split.pipe import Pipe, pipeline
from pipework.split.points import CutPoints
from pipework.split.preserve import unchanged
from pipework.split.search import searched


def module_costs(
    module: nn.Module,
    mb_args: tuple[Any, ...] = (),
    mb_kwargs: Mapping[str, Any] | None = None,
    stages: int = 2,
    repeats: int = 0,
) -> ModuleCosts:
    """What each part of a model costs for one microbatch, in parts fine enough for so many stages.

    The arguments are those of `pipeline`. Costs are operations, counted, and the same on every rank. With `repeats`
    they are seconds instead, the median of so many runs of each part, forward and backward, after one that does not
    count; no two measurements are quite equal, so of several ranks let one measure, and the others load its
    `cut_points`. Neither the model nor the random state is changed.

    Raises `CutError` where the model has fewer parts than stages, and `InputError` where something is to be measured
    that has no values (on the meta device), or whose backward has a reentrant checkpoint.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 64))
    >>> costs = pipework.module_costs(model, (torch.ones(4, 8),), stages=2)
    >>> print(costs)
    part   forward  input gradient  weight gradient  activation  boundary
    0          832               0         1.23e+03       128 B       0 B
    1          832             832         1.23e+03       128 B     128 B
    2     6.66e+03        4.42e+03         9.86e+03       128 B     128 B
    >>> pipework.pipeline(model, (torch.ones(4, 8),), split_spec=costs.cut_points(stages=2)).num_stages
    2
    """
    args, kwargs = tuple(mb_args), dict(mb_kwargs or {})
    example = bind(module, args, kwargs)
    costs = searched(module, example, stages)
    if not repeats:
        return costs
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers(), *example.tensors())):
        raise InputError("tensors on the meta device take no time", remedy="count (repeats=0), or use a real device")
    every = CutPoints(tuple(part.begins for part in costs.parts[1:]))
    pipe = pipeline(module, args, kwargs, split_spec=every)
    runs: list[list[tuple[float, float, float]]] = []
    for _ in range(repeats + 1):
        with unchanged(module):
            runs.append(_timed(pipe))
    parts = []
    for part, timings in zip(costs.parts, zip(*runs[1:], strict=True), strict=True):
        forward, input_gradient, weight_gradient = (median(times) for times in zip(*timings, strict=True))
        cost = Cost(forward, input_gradient, weight_gradient, part.cost.activation)
        parts.append(dataclasses.replace(part, cost=cost))
    return ModuleCosts(tuple(parts), unit="s")


def _timed(pipe: Pipe) -> list[tuple[float, float, float]]:
    """Per stage the seconds of its forward, input gradient and weight gradient."""
    variant = pipe.variant(pipe.example)
    inputs = pipe.example.tensors()
    values: dict[int, Tensor] = {}
    found: list[tuple[float, float, float]] = []
    for part, code in zip(variant.cut.parts, variant.codes, strict=True):
        stage = pipe.get_stage_module(part.index)
        given = [*(inputs[position] for _, position in part.inputs), *(values[i] for i in part.received)]
        given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
        views = [tensor.view_as(tensor) for tensor in given]  # leaves could not be written in place
        forward, out = _clocked(lambda code=code, stage=stage, views=views: code(stage, *views))
        values |= {
            i: tensor.detach().requires_grad_(tensor.requires_grad) for i, tensor in zip(part.outputs, out, strict=True)
        }
        wanted = [tensor for tensor in given if tensor.requires_grad]
        weights = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        ends = [tensor for tensor in out if tensor.requires_grad]
        # Autograd goes through the stage for the weight gradients alone, too: they are what both take beyond one.
        one, both = (_backward(ends, sources) for sources in (wanted, wanted + weights))
        found.append((forward, one, max(0.0, both - one)))
    return found


def _backward(ends: list[Tensor], sources: list[Tensor]) -> float:
    if not ends or not sources:
        return 0.0
    seeds = [torch.ones_like(tensor) for tensor in ends]
    try:
        return _clocked(lambda: torch.autograd.grad(ends, sources, seeds, retain_graph=True, allow_unused=True))[0]
    except RuntimeError as error:
        raise InputError(
            "the model's backward cannot be measured by parts",
            why=f"torch says: {error}",
            remedy="count (repeats=0), or pass use_reentrant=False where the model calls torch.utils.checkpoint",
        ) from error


def _clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call takes, to the end of what it starts on an accelerator; and what it returns."""
    _synchronize()
    start = time.perf_counter()
    result = call()
    _synchronize()
    return time.perf_counter() - start, result


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
