"""Small pipes and runners for the tests of this folder, the same in every process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import pipework
from pipework import Pipe, Runner
from tests.end_to_end.case import Case, squared
from tests.end_to_end.cases import CASES
from tests.models import WIDTH, numbers
from tests.split.equality import before


def sequence(layers: int = 4) -> nn.Sequential:
    """Linear layers named 0 to `layers` - 1, with the same weights every time."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=20 + number) * 0.4)
    return model


def piped(model: nn.Module, *names: str) -> Pipe:
    """Cut before each of the names."""
    return pipework.pipeline(model, (numbers(2, WIDTH),), split_spec=before(*names))


def runner_of(
    pipe: Pipe,
    ranks: int = 2,
    microbatches: int = 4,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    **options: Any,
) -> Runner:
    """1F1B where it is defined, interleaved where there are several stages per rank."""
    layout = pipe.layout(ranks)
    family = "one_f_one_b" if layout.stages == ranks else "interleaved_one_f_one_b"
    schedule = pipework.schedules.FAMILIES[family].build(layout, microbatches)
    return Runner(pipe, schedule, group=group, **{"loss": squared, **options})


def case_runner(
    name: str, stages: int, rows: int, group: dist.ProcessGroup | None = None, **options: Any
) -> tuple[Case, Runner]:
    case = CASES[name](stages, rows)
    whole = CASES[name](stages, 1)
    pipe = pipework.pipeline(case.model, whole.args, whole.kwargs)
    return case, runner_of(pipe, stages, microbatches=rows, group=group, **{"loss": case.loss, **options})


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def unsplit(model: nn.Module, x: Tensor, target: Tensor, microbatches: int, scale: bool = True) -> Tensor:
    """The reference, plainly: forward and backward of one microbatch after the other; gives the loss."""
    losses = []
    for part, aim in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        loss = squared(model(part), aim)
        (loss / microbatches if scale else loss).backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
    return total / microbatches if scale else total


def equal(one: Any, other: Any) -> bool:
    """Of two dictionaries of tensors or Nones: the same to the last bit."""
    return one.keys() == other.keys() and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in ((one[key], other[key]) for key in one)
    )
