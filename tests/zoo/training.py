"""Training a cut model on ranks as threads, against the unsplit model run microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import pipework
from pipework import Runner
from pipework.plan import Kind, Schedule
from pipework.split.draws import DrawKey, drawing_for, streams
from pipework.split.microbatch import chunk, merge
from pipework.split.trees import map_leaves
from tests.split.equality import same, tensors
from tests.zoo import inputs

MICROBATCHES = 4
STEPS = 3


def loss_of(output: Any, target: Any = None) -> torch.Tensor:
    """A loss that reads every differentiable tensor of the output, each element with its own weight.

    Equal ones are read once: what is one tensor in the uncut model may be two when it has come from another stage.
    """
    found: list[torch.Tensor] = []
    for tensor in tensors(output):
        if tensor.requires_grad and not any(torch.equal(tensor, other) for other in found):
            found.append(tensor)
    generator = torch.Generator().manual_seed(7)
    parts = [(t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() / max(1, t.numel()) for t in found]
    return torch.stack([p.float() for p in parts]).sum()


def trained_alike(found: Any, cuts: Sequence[Mapping[str, Any]]) -> None:
    """Three steps under each schedule and a fourth with other shapes: all that `_compare` compares is the same."""
    for how in cuts:
        for split in [False] + [True] * (how is cuts[-1]):
            model, reference = found.make(), found.make()
            pipe = pipework.pipeline(model, (), found.inputs(2, inputs.LENGTH, 0), **how)
            family, per_rank = ("interleaved_one_f_one_b", 2) if pipe.num_stages == 4 else ("one_f_one_b", 1)
            family, per_rank = ("zero_bubble_h1", 1) if split else (family, per_rank)
            _compare(found, pipe, reference, family, pipe.num_stages // per_rank)


def _compare(found: Any, pipe: pipework.split.Pipe, reference: nn.Module, family: str, ranks: int) -> None:
    """Losses, merged outputs, gradients, parameters and buffers."""
    model = pipe.model
    plan = getattr(pipework.schedules, family)(pipe.layout(ranks), MICROBATCHES)
    example = found.inputs(MICROBATCHES * 2, inputs.LENGTH, 0)
    by_dimension = {name: 0 for name, value in example.items() if isinstance(value, torch.Tensor)}  # whatever its size
    runner = Runner(pipe, plan, loss=loss_of, chunk_spec=by_dimension)
    runner.keep_outputs = True
    optimizer = torch.optim.AdamW(runner.parameters(), lr=1e-3)
    twin = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    for step in range(STEPS + 1):
        longer = step == STEPS
        batch = found.inputs(MICROBATCHES * (3 if longer else 2), inputs.LONGER if longer else inputs.LENGTH, step)
        optimizer.zero_grad()
        twin.zero_grad()
        parts = chunk(batch, MICROBATCHES, by_dimension)
        wanted, outputs = _reference(reference, parts, pipe, plan, DrawKey(runner.seed, step, 0))
        loss = runner.step(**batch)
        where = f"{family} step {step}: "
        same(loss, wanted, where + "loss")
        same(runner.outputs, outputs, where + "output", strides=False)
        pairs = dict(reference.named_parameters())
        for name, parameter in runner.named_parameters():
            same(parameter.grad, pairs[name].grad, f"{where}gradient of {name}", strides=False)
        optimizer.step()
        twin.step()
        for name, parameter in model.named_parameters():
            same(parameter.detach(), pairs[name].detach(), f"{where}{name}")
        buffers = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            same(buffer, buffers[name], where + name)


def _reference(
    model: nn.Module, parts: Sequence[dict[str, Any]], pipe: pipework.split.Pipe, plan: Schedule, draw: DrawKey
) -> tuple[torch.Tensor, Any]:
    """One step of the unsplit model: loss and merged output.

    Leaves its gradients in `.grad`, added in the order in which the stages make them.
    """
    outputs: list[Any] = []
    losses: list[torch.Tensor] = []
    gradients: list[dict[str, torch.Tensor | None]] = []
    for microbatch, part in enumerate(parts):
        key = DrawKey(draw.seed, draw.step, microbatch)
        with streams(dict(model.named_modules()), pipe.variant(pipe.bind((), part)).drawing), drawing_for(key):
            output = model(**part)
            loss = loss_of(output)
            (loss / len(parts)).backward()
        losses.append(loss.detach())
        outputs.append(map_leaves(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, output))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    own = dict(model.named_parameters())
    for name, order in _orders(pipe, plan).items():
        for microbatch in order:
            gradient = gradients[microbatch][name]
            if gradient is not None:
                held = own[name].grad
                own[name].grad = gradient.clone() if held is None else held + gradient
    return torch.stack(losses).sum() / len(parts), merge(outputs)


def _orders(pipe: pipework.split.Pipe, plan: Schedule) -> dict[str, list[int]]:
    """For each parameter the order in which its stage makes its gradients; for a tied one, its first stage is last."""
    names = {id(p): name for name, p in pipe.model.named_parameters()}
    orders: dict[str, list[int]] = {}
    for stage in reversed(range(pipe.num_stages)):
        actions = plan.orders[plan.layout.rank_of[stage]]
        made = [a.microbatch for a in actions if a.stage == stage and a.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)]
        orders.update({names[id(p)]: made for p in pipe.get_stage_module(stage).parameters()})
    return orders
